// Batch norm, leaky ReLU and dropout in one: three passes over memory fewer forwards and five
// fewer backwards than one after another, no mask and no intermediate kept. Training mode, CPU,
// channels-last, float32 or bfloat16 (and NormActAny for what is none of these). Statistics can be summed over ranks through a callback
// (synchronised batch norm); sums are taken in fixed chunks, so the result does not depend on
// the number of threads.
#include "ops.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <memory>
#include <vector>

namespace cpcr {

constexpr int64_t kChunkRows = 512;

// A callback that sums a float64 tensor over all ranks, in place. Freed with its last holder.
struct SumHook {
  int (*call)(void* context, at::Tensor* sums);
  void (*drop)(void* context);
  void* context;
  ~SumHook() { drop(context); }
  void operator()(at::Tensor& sums) const {
    TORCH_CHECK(call(context, &sums) == 0, "summing batch-norm statistics over ranks failed");
  }
};

struct Drop {
  bool on;
  uint32_t k0, k1, threshold;
  float scale;
};

template <class T>
CPCR_INLINE void stats_body(const T* __restrict x, int64_t rows, int64_t C,
                            const float* __restrict shift, float* __restrict s1,
                            float* __restrict s2) {
  for (int64_t r = 0; r < rows; ++r, x += C)
    for (int64_t c = 0; c < C; ++c) {
      float d = load(x + c) - shift[c];
      s1[c] += d;
      s2[c] += d * d;
    }
}

template <class T>
CPCR_INLINE void apply_body(const T* __restrict x, T* __restrict y, int64_t rows, int64_t C,
                            const float* __restrict a, const float* __restrict b, float slope,
                            const Drop& drop, uint32_t index) {
  const uint32_t k0 = drop.k0, k1 = drop.k1, threshold = drop.threshold;
  const float scale = drop.scale;
  const bool on = drop.on;
  for (int64_t r = 0; r < rows; ++r, x += C, y += C, index += uint32_t(C)) {
    if (on) {
      for (int64_t c = 0; c < C; ++c) {
        float z = a[c] * load(x + c) + b[c];
        z = z > 0 ? z : slope * z;
        store(y + c, random_bits(index + uint32_t(c), k0, k1) >= threshold ? z * scale : 0.0f);
      }
    } else {
      for (int64_t c = 0; c < C; ++c) {
        float z = a[c] * load(x + c) + b[c];
        store(y + c, z > 0 ? z : slope * z);
      }
    }
  }
}

// d loss / d (normalised, scaled value): through dropout and leaky ReLU.
template <class T>
CPCR_INLINE float through(const T* dy, float x, float a, float b, float slope, bool on,
                          uint32_t bits, uint32_t threshold, float scale) {
  float g = load(dy);
  if (on) g = bits >= threshold ? g * scale : 0.0f;
  return a * x + b > 0 ? g : slope * g;
}

template <class T, bool ON>
CPCR_INLINE void reduce_body(const T* __restrict dy, int64_t dy_row, const T* __restrict x,
                             int64_t rows, int64_t C, const float* __restrict a,
                             const float* __restrict b, const float* __restrict mean,
                             const float* __restrict invstd, float slope, const Drop& drop,
                             uint32_t index, float* __restrict s1, float* __restrict s2) {
  const uint32_t k0 = drop.k0, k1 = drop.k1, threshold = drop.threshold;
  const float scale = drop.scale;
  for (int64_t r = 0; r < rows; ++r, x += C, dy += dy_row, index += uint32_t(C))
    for (int64_t c = 0; c < C; ++c) {
      float v = load(x + c);
      uint32_t bits = ON ? random_bits(index + uint32_t(c), k0, k1) : 0u;
      float g = through(dy + c, v, a[c], b[c], slope, ON, bits, threshold, scale);
      s1[c] += g;
      s2[c] += g * ((v - mean[c]) * invstd[c]);
    }
}

template <class T, bool ON>
CPCR_INLINE void dx_body(const T* __restrict dy, int64_t dy_row, const T* __restrict x,
                         T* __restrict dx, int64_t rows, int64_t C, const float* __restrict a,
                         const float* __restrict b, const float* __restrict mean,
                         const float* __restrict invstd, const float* __restrict m1,
                         const float* __restrict m2, float slope, const Drop& drop,
                         uint32_t index) {
  const uint32_t k0 = drop.k0, k1 = drop.k1, threshold = drop.threshold;
  const float scale = drop.scale;
  for (int64_t r = 0; r < rows; ++r, x += C, dx += C, dy += dy_row, index += uint32_t(C))
    for (int64_t c = 0; c < C; ++c) {
      float v = load(x + c);
      uint32_t bits = ON ? random_bits(index + uint32_t(c), k0, k1) : 0u;
      float g = through(dy + c, v, a[c], b[c], slope, ON, bits, threshold, scale);
      store(dx + c, a[c] * (g - m1[c] - (v - mean[c]) * invstd[c] * m2[c]));
    }
}

// One instance per element type: cloned functions cannot be templates.
#define CPCR_KERNELS(T)                                                                          \
  CPCR_CLONES void stats(const T* x, int64_t rows, int64_t C, const float* k, float* s1,         \
                         float* s2) {                                                            \
    stats_body(x, rows, C, k, s1, s2);                                                           \
  }                                                                                              \
  CPCR_CLONES void apply_rows(const T* x, T* y, int64_t rows, int64_t C, const float* a,              \
                         const float* b, float slope, const Drop& drop, uint32_t index) {        \
    apply_body(x, y, rows, C, a, b, slope, drop, index);                                         \
  }                                                                                              \
  CPCR_CLONES void reduce(const T* dy, int64_t dy_row, const T* x, int64_t rows, int64_t C,      \
                          const float* const* v, float slope, const Drop& drop, uint32_t index,  \
                          float* s1, float* s2) {                                                \
    if (drop.on)                                                                                 \
      reduce_body<T, true>(dy, dy_row, x, rows, C, v[0], v[1], v[2], v[3], slope, drop, index,   \
                           s1, s2);                                                              \
    else                                                                                         \
      reduce_body<T, false>(dy, dy_row, x, rows, C, v[0], v[1], v[2], v[3], slope, drop, index,  \
                            s1, s2);                                                             \
  }                                                                                              \
  CPCR_CLONES void dx_rows(const T* dy, int64_t dy_row, const T* x, T* dx, int64_t rows,         \
                           int64_t C, const float* const* v, float slope, const Drop& drop,      \
                           uint32_t index) {                                                     \
    if (drop.on)                                                                                 \
      dx_body<T, true>(dy, dy_row, x, dx, rows, C, v[0], v[1], v[2], v[3], v[4], v[5], slope,    \
                       drop, index);                                                             \
    else                                                                                         \
      dx_body<T, false>(dy, dy_row, x, dx, rows, C, v[0], v[1], v[2], v[3], v[4], v[5], slope,   \
                        drop, index);                                                            \
  }
CPCR_KERNELS(float)
CPCR_KERNELS(uint16_t)

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Runs body(first row, rows, chunk) over fixed chunks and sums what it leaves in 2 C floats.
template <class F>
std::vector<double> sum_chunks(int64_t rows, int64_t C, F&& body) {
  int64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
  std::vector<float> partial(size_t(chunks * 2 * C), 0.0f);
  at::parallel_for(0, chunks, 4, [&](int64_t b, int64_t e) {
    for (int64_t k = b; k < e; ++k) {
      float* s = partial.data() + k * 2 * C;
      body(k * kChunkRows, std::min(kChunkRows, rows - k * kChunkRows), s, s + C);
    }
  });
  std::vector<double> sums(size_t(2 * C), 0.0);
  for (int64_t k = 0; k < chunks; ++k)
    for (int64_t c = 0; c < 2 * C; ++c) sums[c] += partial[k * 2 * C + c];
  return sums;
}

template <class T>
T* data_of(const at::Tensor& t) { return static_cast<T*>(t.data_ptr()); }

// The context stores plain values only: a heap cell keeps the hook alive for the backward.
static void hold_hook(AutogradContext* ctx, const std::shared_ptr<SumHook>& hook) {
  ctx->saved_data["hook"] = int64_t(0);
  if (!hook) return;
  auto* cell = new std::shared_ptr<SumHook>(hook);
  ctx->saved_data["hook_owner"] = at::from_blob(
      cell, {1}, [](void* p) { delete static_cast<std::shared_ptr<SumHook>*>(p); }, at::kByte);
  ctx->saved_data["hook"] = int64_t(reinterpret_cast<intptr_t>(cell));
}

static const SumHook* held_hook(AutogradContext* ctx) {
  auto* cell =
      reinterpret_cast<std::shared_ptr<SumHook>*>(intptr_t(ctx->saved_data["hook"].toInt()));
  return cell ? cell->get() : nullptr;
}

struct NormAct : torch::autograd::Function<NormAct> {
  template <class T>
  static at::Tensor run(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor& bias, at::Tensor& running_mean, at::Tensor& running_var,
                        double momentum, double eps, double slope, const Drop& drop,
                        const SumHook* hook, double& count) {
    const int64_t C = x.size(1), rows = x.numel() / C;
    const T* in = data_of<T>(x);
    std::vector<float> shift(C);
    for (int64_t c = 0; c < C; ++c) shift[c] = load(in + c);
    auto sums = sum_chunks(rows, C, [&](int64_t first, int64_t n, float* s1, float* s2) {
      stats(in + first * C, n, C, shift.data(), s1, s2);
    });
    // [sum, sum of squares, count] about zero, in float64: what ranks can add.
    auto total = at::empty({2 * C + 1}, at::kDouble);
    double* s = total.data_ptr<double>();
    for (int64_t c = 0; c < C; ++c) {
      double k = shift[c], d1 = sums[c], d2 = sums[C + c];
      s[c] = d1 + k * rows;
      s[C + c] = d2 + 2 * k * d1 + k * k * rows;
    }
    s[2 * C] = double(rows);
    if (hook) (*hook)(total);
    s = total.data_ptr<double>();
    count = s[2 * C];
    // Rows: scale, offset, mean, inverse standard deviation.
    auto coef = at::empty({4, C}, at::kFloat);
    float* v = coef.data_ptr<float>();
    const float* w = weight.data_ptr<float>();
    const float* o = bias.data_ptr<float>();
    float* rm = running_mean.data_ptr<float>();
    float* rv = running_var.data_ptr<float>();
    for (int64_t c = 0; c < C; ++c) {
      double mean = s[c] / count;
      double var = std::max(s[C + c] / count - mean * mean, 0.0);
      double invstd = 1 / std::sqrt(var + eps);
      v[c] = float(w[c] * invstd);
      v[C + c] = float(o[c] - mean * w[c] * invstd);
      v[2 * C + c] = float(mean);
      v[3 * C + c] = float(invstd);
      rm[c] = float((1 - momentum) * rm[c] + momentum * mean);
      rv[c] = float((1 - momentum) * rv[c] + momentum * var * (count / (count - 1)));
    }
    auto y = at::empty_like(x, at::MemoryFormat::ChannelsLast);
    T* out = data_of<T>(y);
    at::parallel_for(0, rows, kChunkRows, [&](int64_t b, int64_t e) {
      apply_rows(in + b * C, out + b * C, e - b, C, v, v + C, float(slope), drop, uint32_t(b * C));
    });
    ctx->save_for_backward({x, coef});
    return y;
  }

  static at::Tensor forward(AutogradContext* ctx, at::Tensor x, at::Tensor weight, at::Tensor bias,
                            at::Tensor running_mean, at::Tensor running_var, double momentum,
                            double eps, double slope, double p, int64_t key,
                            std::shared_ptr<SumHook> hook) {
    TORCH_CHECK(x.device().is_cpu() && x.dim() == 4 &&
                    x.is_contiguous(at::MemoryFormat::ChannelsLast),
                "norm_act wants a channels-last CPU tensor");
    TORCH_CHECK(weight.scalar_type() == at::kFloat && bias.scalar_type() == at::kFloat &&
                    weight.numel() == x.size(1) && bias.numel() == x.size(1) &&
                    running_mean.numel() == x.size(1) && running_var.numel() == x.size(1),
                "norm_act wants one float32 weight, bias, mean and variance per channel");
    TORCH_CHECK(p >= 0 && p < 1, "dropout probability ", p);
    Drop drop{p > 0, uint32_t(uint64_t(key)), uint32_t(uint64_t(key) >> 32), drop_threshold(p),
              float(1 / (1 - p))};
    double count = 0;
    at::Tensor y;
    if (x.scalar_type() == at::kFloat)
      y = run<float>(ctx, x, weight, bias, running_mean, running_var, momentum, eps, slope, drop,
                     hook.get(), count);
    else if (x.scalar_type() == at::kBFloat16)
      y = run<uint16_t>(ctx, x, weight, bias, running_mean, running_var, momentum, eps, slope,
                        drop, hook.get(), count);
    else
      TORCH_CHECK(false, "norm_act knows float32 and bfloat16");
    ctx->saved_data["slope"] = slope;
    ctx->saved_data["p"] = p;
    ctx->saved_data["key"] = key;
    ctx->saved_data["count"] = count;
    hold_hook(ctx, hook);
    return y;
  }

  template <class T>
  static void backprop(const at::Tensor& x, at::Tensor dy, const at::Tensor& coef, double count,
                       float slope, const Drop& drop, const SumHook* hook, at::Tensor& dx,
                       at::Tensor& dw, at::Tensor& db) {
    const int64_t C = x.size(1), rows = x.numel() / C, H = x.size(2), W = x.size(3);
    // A slice of a wider channels-last tensor (the gradient of a concatenation) is read in place.
    int64_t dy_row = dy.stride(3);
    bool in_place = dy.stride(1) == 1 && dy_row >= C && dy.stride(2) == W * dy_row &&
                    dy.stride(0) == H * W * dy_row;
    if (!in_place) {
      dy = dy.contiguous(at::MemoryFormat::ChannelsLast);
      dy_row = C;
    }
    const T* in = data_of<T>(x);
    const T* g = data_of<T>(dy);
    const float* v = coef.data_ptr<float>();
    const float* rows4[6] = {v, v + C, v + 2 * C, v + 3 * C, nullptr, nullptr};
    auto sums = sum_chunks(rows, C, [&](int64_t first, int64_t n, float* s1, float* s2) {
      reduce(g + first * dy_row, dy_row, in + first * C, n, C, rows4, slope, drop,
             uint32_t(first * C), s1, s2);
    });
    auto total = at::empty({2 * C}, at::kDouble);
    std::memcpy(total.data_ptr<double>(), sums.data(), sizeof(double) * 2 * C);
    db = at::empty({C}, at::kFloat);
    dw = at::empty({C}, at::kFloat);
    for (int64_t c = 0; c < C; ++c) {
      db.data_ptr<float>()[c] = float(sums[c]);
      dw.data_ptr<float>()[c] = float(sums[C + c]);
    }
    if (hook) (*hook)(total);
    std::vector<float> m(size_t(2 * C));
    for (int64_t c = 0; c < 2 * C; ++c) m[c] = float(total.data_ptr<double>()[c] / count);
    rows4[4] = m.data();
    rows4[5] = m.data() + C;
    dx = at::empty_like(x, at::MemoryFormat::ChannelsLast);
    T* out = data_of<T>(dx);
    at::parallel_for(0, rows, kChunkRows, [&](int64_t b, int64_t e) {
      dx_rows(g + b * dy_row, dy_row, in + b * C, out + b * C, e - b, C, rows4, slope, drop,
              uint32_t(b * C));
    });
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    auto x = saved[0], coef = saved[1];
    double p = ctx->saved_data["p"].toDouble();
    uint64_t key = uint64_t(ctx->saved_data["key"].toInt());
    Drop drop{p > 0, uint32_t(key), uint32_t(key >> 32), drop_threshold(p), float(1 / (1 - p))};
    const SumHook* hook = held_hook(ctx);
    auto dy = grads[0].to(x.scalar_type());
    at::Tensor dx, dw, db;
    auto run = x.scalar_type() == at::kFloat ? &backprop<float> : &backprop<uint16_t>;
    run(x, dy, coef, ctx->saved_data["count"].toDouble(),
        float(ctx->saved_data["slope"].toDouble()), drop, hook, dx, dw, db);
    variable_list out(11);
    out[0] = dx;
    out[1] = dw;
    out[2] = db;
    return out;
  }
};

// The same without dropout for what the kernels above do not know: other devices, other layouts,
// float64. Plain tensor operations; sums are float64.
struct NormActAny : torch::autograd::Function<NormActAny> {
  // [C] as [1, C, 1, 1] in the type that x is computed in.
  static at::Tensor wide(const at::Tensor& v, at::ScalarType type) {
    return v.to(type).view({1, -1, 1, 1});
  }

  static at::ScalarType type_of(const at::Tensor& x) {
    return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  }

  static at::Tensor sum(const at::Tensor& t) { return t.sum({0, 2, 3}, false, at::kDouble); }

  static at::Tensor forward(AutogradContext* ctx, at::Tensor x, at::Tensor weight, at::Tensor bias,
                            at::Tensor running_mean, at::Tensor running_var, double momentum,
                            double eps, double slope, std::shared_ptr<SumHook> hook) {
    TORCH_CHECK(x.dim() == 4 && weight.numel() == x.size(1) && bias.numel() == x.size(1) &&
                    running_mean.numel() == x.size(1) && running_var.numel() == x.size(1),
                "norm_act wants [N, C, H, W] and one weight, bias, mean and variance per channel");
    const int64_t C = x.size(1);
    const auto type = type_of(x);
    const auto in = x.to(type);
    const double rows = double(x.numel() / C);
    // About the first pixel, so that a mean far from zero costs no digits.
    const auto shift = in.select(0, 0).select(1, 0).select(1, 0).contiguous();
    const auto d = in - wide(shift, type);
    const auto k = shift.to(at::kDouble), d1 = sum(d), d2 = sum(d * d);
    auto total = at::cat({d1 + k * rows, d2 + 2 * k * d1 + k * k * rows, at::full({1}, rows, k.options())});
    if (hook) (*hook)(total);
    const auto count = total.slice(0, 2 * C);
    const auto mean = total.slice(0, 0, C) / count;
    const auto var = (total.slice(0, C, 2 * C) / count - mean * mean).clamp_min(0);
    const auto invstd = (var + eps).rsqrt();
    running_mean.mul_(1 - momentum).add_(mean.to(running_mean.scalar_type()), momentum);
    running_var.mul_(1 - momentum)
        .add_((var * (count / (count - 1))).to(running_var.scalar_type()), momentum);
    const auto scale = weight.to(at::kDouble) * invstd;
    const auto offset = bias.to(at::kDouble) - mean * scale;
    ctx->save_for_backward({x, scale, offset, mean, invstd, count});
    ctx->saved_data["slope"] = slope;
    hold_hook(ctx, hook);
    const auto z = in * wide(scale, type) + wide(offset, type);
    return at::leaky_relu(z, slope).to(x.scalar_type());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    const auto x = saved[0], scale = saved[1], offset = saved[2], mean = saved[3], invstd = saved[4],
               count = saved[5];
    const int64_t C = x.size(1);
    const auto type = type_of(x);
    const auto in = x.to(type);
    const auto z = in * wide(scale, type) + wide(offset, type);
    const auto g = at::where(z > 0, grads[0].to(type), grads[0].to(type) * ctx->saved_data["slope"].toDouble());
    const auto normal = (in - wide(mean, type)) * wide(invstd, type);
    auto total = at::cat({sum(g), sum(g * normal)});
    const auto own = total.clone();
    if (auto* hook = held_hook(ctx)) (*hook)(total);
    const auto m1 = total.slice(0, 0, C) / count, m2 = total.slice(0, C) / count;
    const auto dx = wide(scale, type) * (g - wide(m1, type) - normal * wide(m2, type));
    variable_list out(9);
    out[0] = dx.to(x.scalar_type());
    out[1] = own.slice(0, C).to(type);
    out[2] = own.slice(0, 0, C).to(type);
    return out;
  }
};

}  // namespace cpcr

using namespace cpcr;

extern "C" {

// `hook_call` may be null; else `context` is owned by the graph and freed with `hook_drop`,
// also when this fails.
int cpcr_ops_norm_act(const at::Tensor* x, const at::Tensor* weight, const at::Tensor* bias,
                      const at::Tensor* running_mean, const at::Tensor* running_var,
                      double momentum, double eps, double slope, double p, uint64_t key,
                      int (*hook_call)(void*, at::Tensor*), void (*hook_drop)(void*),
                      void* context, at::Tensor** out) {
  return guarded([&] {
    std::shared_ptr<SumHook> hook;
    if (hook_call) hook.reset(new SumHook{hook_call, hook_drop, context});
    const bool fused = x->device().is_cpu() && x->is_contiguous(at::MemoryFormat::ChannelsLast) &&
                       (x->scalar_type() == at::kFloat || x->scalar_type() == at::kBFloat16);
    if (fused) {
      *out = new at::Tensor(NormAct::apply(*x, *weight, *bias, *running_mean, *running_var,
                                           momentum, eps, slope, p, int64_t(key), hook));
      return;
    }
    TORCH_CHECK(p == 0, "norm_act drops out on the CPU's channels-last tensors only");
    *out = new at::Tensor(NormActAny::apply(*x, *weight, *bias, *running_mean, *running_var,
                                            momentum, eps, slope, hook));
  });
}

}  // extern "C"
