// Small entries that tch 0.24 lacks: backward from given gradients, gradients set to none,
// SGD with state, channels-last conversion, TF32 on or off, a keyed dropout mask.
#include "ops.h"

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>

#include <vector>

namespace cpcr {

std::string& last_error() {
  static thread_local std::string message;
  return message;
}

static std::vector<at::Tensor> gather(at::Tensor* const* list, int64_t n) {
  std::vector<at::Tensor> out;
  out.reserve(n);
  for (int64_t i = 0; i < n; ++i) out.push_back(*list[i]);
  return out;
}

CPCR_CLONES void mask_span(float* out, int64_t begin, int64_t end, uint32_t k0, uint32_t k1,
                           uint32_t threshold, float scale) {
  for (int64_t i = begin; i < end; ++i)
    out[i] = random_bits(uint32_t(i), k0, k1) >= threshold ? scale : 0.0f;
}

}  // namespace cpcr

using namespace cpcr;

extern "C" {

const char* cpcr_ops_last_error() { return last_error().c_str(); }

int cpcr_ops_backward(at::Tensor* const* roots, at::Tensor* const* grads, int64_t n) {
  return guarded([&] { torch::autograd::backward(gather(roots, n), gather(grads, n)); });
}

int cpcr_ops_grads_to_none(at::Tensor* const* list, int64_t n) {
  return guarded([&] {
    for (int64_t i = 0; i < n; ++i) list[i]->mutable_grad() = at::Tensor();
  });
}

// torch.optim.SGD without dampening or Nesterov, operation for operation; `first` is the step
// in which the momentum buffers are the gradients themselves.
int cpcr_ops_sgd(at::Tensor* const* params, at::Tensor* const* buffers, int64_t n, double lr,
                 double momentum, double weight_decay, int first) {
  return guarded([&] {
    if (n == 0) return;
    at::NoGradGuard no_grad;
    auto p = gather(params, n);
    auto b = gather(buffers, n);
    std::vector<at::Tensor> g;
    g.reserve(n);
    for (auto& t : p) {
      TORCH_CHECK(t.grad().defined(), "a parameter given to SGD has no gradient");
      g.push_back(t.grad());
    }
    if (weight_decay != 0) g = at::_foreach_add(g, p, weight_decay);
    if (first) {
      at::_foreach_copy_(b, g);
    } else {
      at::_foreach_mul_(b, momentum);
      at::_foreach_add_(b, g, 1);
    }
    at::_foreach_add_(p, b, -lr);
  });
}

int cpcr_ops_channels_last(const at::Tensor* in, at::Tensor** out) {
  return guarded([&] {
    auto t = in->contiguous(at::MemoryFormat::ChannelsLast);
    // With one channel both layouts have the same elements in the same order and ATen keeps the
    // planar strides, which convolutions take for a planar input: say which one is meant.
    if (t.size(1) == 1 && t.suggest_memory_format() != at::MemoryFormat::ChannelsLast)
      t = t.as_strided(t.sizes(), {t.size(2) * t.size(3), 1, t.size(3), 1});
    *out = new at::Tensor(t);
  });
}

int cpcr_ops_is_channels_last(const at::Tensor* in, int* out) {
  return guarded([&] { *out = in->is_contiguous(at::MemoryFormat::ChannelsLast); });
}

// TF32 in matrix products and convolutions on GPUs; libtorch allows it in the latter by default.
int cpcr_ops_allow_tf32(int allow) {
  return guarded([&] {
    at::globalContext().setAllowTF32CuBLAS(allow != 0);
    at::globalContext().setAllowTF32CuDNN(allow != 0);
  });
}

// 0 or 1 / (1 - p), in the memory order of `like`.
int cpcr_ops_dropout_mask(const at::Tensor* like, double p, uint64_t key, at::Tensor** out) {
  return guarded([&] {
    TORCH_CHECK(like->device().is_cpu(), "the keyed dropout mask is for the CPU");
    TORCH_CHECK(p >= 0 && p < 1, "dropout probability ", p);
    auto mask = at::empty_like(*like, like->options().dtype(at::kFloat).requires_grad(false));
    TORCH_CHECK(mask.is_non_overlapping_and_dense(), "dense tensors only");
    float* data = mask.data_ptr<float>();
    at::parallel_for(0, mask.numel(), 1 << 15, [&](int64_t b, int64_t e) {
      mask_span(data, b, e, uint32_t(key), uint32_t(key >> 32), drop_threshold(p),
                float(1 / (1 - p)));
    });
    *out = new at::Tensor(like->scalar_type() == at::kFloat ? mask : mask.to(like->scalar_type()));
  });
}

}  // extern "C"
