// The 3 x 3 convolutions at the network's edges, where channels are few: the first one (few in),
// the heads (few out), and those of 16 to 64 channels between large maps. oneDNN runs these at a
// half of what the processor can do and less; docs/benchmarks.md has the figures. Everything else
// (other sizes, types, layouts or processors, and gradients of wide weights) stays oneDNN's.
//
// CPU, float32, channels-last, stride 1, padding 1. A vector holds 16 channels of one pixel; sums
// run over taps and input channels in a fixed order, so results do not depend on threads.
#include "ops.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

namespace cpcr {

// Sixteen channels; loads and stores of it need no alignment.
typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t kLanes = 16;
// Pixels that a block keeps in registers: with the weights' one, half of the 32 there are.
constexpr int kPixels = 14;
// Three taps of so many outputs fit into one vector.
constexpr int64_t kFewMax = 5;

#define CPCR_V4 __attribute__((target("arch=x86-64-v4")))
#define CPCR_V4_INLINE static inline __attribute__((always_inline)) CPCR_V4

CPCR_V4_INLINE v16 read16(const float* p) { return *reinterpret_cast<const v16*>(p); }
CPCR_V4_INLINE void write16(float* p, v16 v) { *reinterpret_cast<v16*>(p) = v; }

// The three input rows around output row y; outside the image a row of zeros.
struct Rows {
  const float* at[3];
  Rows(const float* image, int64_t y, int64_t H, int64_t row, const float* zeros) {
    for (int64_t k = 0; k < 3; ++k) {
      int64_t r = y + k - 1;
      at[k] = r < 0 || r >= H ? zeros : image + r * row;
    }
  }
};

// ---- Many outputs: 16 output channels of P pixels from x0 on, taps lo to hi of each row ---------

// Starts from `bias`, or without one from what `out` holds.
template <int IC, int P>
CPCR_V4_INLINE void wide_block(const Rows& rows, int64_t x0, int lo, int hi, const float* w,
                               const float* bias, float* out, int64_t out_pixel) {
  v16 acc[P];
  for (int j = 0; j < P; ++j) acc[j] = read16(bias ? bias : out + j * out_pixel);
  for (int ky = 0; ky < 3; ++ky)
    for (int kx = lo; kx < hi; ++kx) {
      const float* in = rows.at[ky] + (x0 + kx - 1) * IC;
      const float* tap = w + (ky * 3 + kx) * IC * kLanes;
      for (int c = 0; c < IC; ++c) {
        v16 weights = read16(tap + c * kLanes);
#pragma GCC unroll 14
        for (int j = 0; j < P; ++j) acc[j] += in[j * IC + c] * weights;
      }
    }
  for (int j = 0; j < P; ++j) write16(out + j * out_pixel, acc[j]);
}

// One output row [W, OC]. `w` is [OC / 16, 3, 3, IC, 16]. Without a bias it adds to `out`.
template <int IC>
CPCR_V4 void wide_row(const Rows& rows, int64_t W, const float* w, const float* bias, float* out,
                      int64_t OC) {
  for (int64_t o = 0; o < OC; o += kLanes, w += 9 * IC * kLanes) {
    const float* b = bias ? bias + o : nullptr;
    wide_block<IC, 1>(rows, 0, 1, 3, w, b, out + o, OC);
    int64_t x = 1;
    for (; x + kPixels <= W - 1; x += kPixels)
      wide_block<IC, kPixels>(rows, x, 0, 3, w, b, out + x * OC + o, OC);
    for (; x + 4 <= W - 1; x += 4) wide_block<IC, 4>(rows, x, 0, 3, w, b, out + x * OC + o, OC);
    for (; x < W - 1; ++x) wide_block<IC, 1>(rows, x, 0, 3, w, b, out + x * OC + o, OC);
    wide_block<IC, 1>(rows, W - 1, 0, 2, w, b, out + (W - 1) * OC + o, OC);
  }
}

using WideRow = void (*)(const Rows&, int64_t, const float*, const float*, float*, int64_t);

static WideRow wide_row_for(int64_t IC) {
  switch (IC) {
    case 1: return wide_row<1>;
    case 2: return wide_row<2>;
    case 3: return wide_row<3>;
    case 4: return wide_row<4>;
    case 5: return wide_row<5>;
    case 16: return wide_row<16>;
    case 32: return wide_row<32>;
    case 64: return wide_row<64>;
    default: return nullptr;
  }
}

// ---- Few outputs: lanes are (tap kx, output), and each input pixel is read once a row -----------

CPCR_V4 static void few_row(const Rows& rows, int64_t W, int64_t IC, const float* w,
                            const float* bias, float* out, int64_t OC, float* scratch) {
  // scratch[q, kx * OC + o]: what input column q gives to output column q + 1 - kx.
  for (int64_t x = 0; x < W; x += kPixels) {
    int64_t at = std::min(x, W - kPixels);
    v16 acc[kPixels] = {};
    for (int ky = 0; ky < 3; ++ky) {
      const float* in = rows.at[ky] + at * IC;
      for (int64_t c = 0; c < IC; ++c) {
        v16 weights = read16(w + (ky * IC + c) * kLanes);
#pragma GCC unroll 14
        for (int j = 0; j < kPixels; ++j) acc[j] += in[j * IC + c] * weights;
      }
    }
    for (int j = 0; j < kPixels; ++j) write16(scratch + (at + j) * kLanes, acc[j]);
  }
  for (int64_t x = 0; x < W; ++x) {
    const float* s = scratch + x * kLanes;
    for (int64_t o = 0; o < OC; ++o) {
      float v = bias[o] + s[OC + o];
      if (x > 0) v += s[o - kLanes];
      if (x + 1 < W) v += s[2 * OC + o + kLanes];
      out[x * OC + o] = v;
    }
  }
}

// ---- Gradients of weights where one side has few channels ---------------------------------------

// Adds one row's part to sums [3 taps, F, V]: over columns x, wide[x + kx - 1] few[x] with
// `wide_shifted`, else wide[x] few[x + kx - 1]. V is a multiple of 16.
template <int F>
CPCR_V4 void weight_row(const float* wide, int64_t V, const float* few, int64_t W,
                        bool wide_shifted, float* sums) {
  for (int64_t v = 0; v < V; v += kLanes) {
    v16 acc[3][F] = {};
    for (int64_t x = 0; x < W; ++x)
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx) {
        int64_t shifted = x + kx - 1;
        if (shifted < 0 || shifted >= W) continue;
        v16 wide_pixel = read16(wide + (wide_shifted ? shifted : x) * V + v);
        const float* few_pixel = few + (wide_shifted ? x : shifted) * F;
        for (int f = 0; f < F; ++f) acc[kx][f] += few_pixel[f] * wide_pixel;
      }
    for (int kx = 0; kx < 3; ++kx)
      for (int f = 0; f < F; ++f) {
        float* s = sums + (kx * F + f) * V + v;
        write16(s, read16(s) + acc[kx][f]);
      }
  }
}

using WeightRow = void (*)(const float*, int64_t, const float*, int64_t, bool, float*);

static WeightRow weight_row_for(int64_t F) {
  constexpr WeightRow rows[] = {weight_row<1>, weight_row<2>, weight_row<3>, weight_row<4>,
                                weight_row<5>};
  return F >= 1 && F <= kFewMax ? rows[F - 1] : nullptr;
}

// ---- Whole tensors ------------------------------------------------------------------------------

static const float* data(const at::Tensor& t) { return t.const_data_ptr<float>(); }

static bool is_wide(int64_t channels) { return channels % kLanes == 0; }

static bool fast_forward(int64_t IC, int64_t OC) {
  return (is_wide(OC) && wide_row_for(IC)) || (is_wide(IC) && OC <= kFewMax);
}

static bool fits(const at::Tensor& x, const at::Tensor& w) {
  static const bool able = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return able && x.device().is_cpu() && x.scalar_type() == at::kFloat && x.dim() == 4 &&
         w.scalar_type() == at::kFloat && w.dim() == 4 && w.size(2) == 3 && w.size(3) == 3 &&
         w.size(1) == x.size(1) && x.size(0) > 0 && x.size(2) > 0 && x.size(3) >= kPixels + 2 &&
         x.is_contiguous(at::MemoryFormat::ChannelsLast) && fast_forward(x.size(1), w.size(0));
}

// y = x * w + b by the fast path, or y += x * w without a bias (many outputs only); w is
// [OC, IC, 3, 3] and contiguous, b [OC].
static void convolve_into(at::Tensor& y, const at::Tensor& x, const at::Tensor& w,
                          const float* bias) {
  const int64_t N = x.size(0), IC = x.size(1), H = x.size(2), W = x.size(3), OC = w.size(0);
  const bool wide = is_wide(OC);
  // wide: [OC / 16, 3, 3, IC, 16]; few: [3 (ky), IC, 16 lanes of (kx, o)].
  std::vector<float> packed(size_t(wide ? 9 * IC * OC : 3 * IC * kLanes), 0.0f);
  const float* from = data(w);
  for (int64_t o = 0; o < OC; ++o)
    for (int64_t c = 0; c < IC; ++c)
      for (int64_t k = 0; k < 9; ++k) {
        int64_t to = wide ? ((o / kLanes * 9 + k) * IC + c) * kLanes + o % kLanes
                          : (k / 3 * IC + c) * kLanes + k % 3 * OC + o;
        packed[size_t(to)] = *from++;
      }
  const std::vector<float> zeros(size_t(W * IC), 0.0f);
  const float* in = data(x);
  float* out = y.mutable_data_ptr<float>();
  WideRow row = wide ? wide_row_for(IC) : nullptr;
  at::parallel_for(0, N * H, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(wide ? 0 : size_t(W * kLanes));
    for (int64_t r = begin; r < end; ++r) {
      Rows rows(in + r / H * H * W * IC, r % H, H, W * IC, zeros.data());
      float* to = out + r * W * OC;
      if (wide)
        row(rows, W, packed.data(), bias, to, OC);
      else
        few_row(rows, W, IC, packed.data(), bias, to, OC, scratch.data());
    }
  });
}

static at::Tensor convolve(const at::Tensor& x, const at::Tensor& w, const at::Tensor& b) {
  auto y = at::empty({x.size(0), w.size(0), x.size(2), x.size(3)}, x.options(),
                     at::MemoryFormat::ChannelsLast);
  convolve_into(y, x, w, data(b));
  return y;
}

// Kernels turned by half a turn, inputs and outputs swapped: convolving the output's gradient with
// them gives the input's.
static at::Tensor turned(const at::Tensor& w) {
  return w.flip({2, 3}).transpose(0, 1).contiguous();
}

static at::Tensor input_gradient(const at::Tensor& g, const at::Tensor& w) {
  return convolve(g, turned(w), at::zeros({w.size(1)}, g.options()));
}

// oneDNN's gradients of input, weight and bias, as far as `mask` asks for them.
static std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients(const at::Tensor& g,
                                                                const at::Tensor& x,
                                                                const at::Tensor& w,
                                                                std::array<bool, 3> mask) {
  return at::convolution_backward(g, x, w, at::OptionalIntArrayRef({w.size(0)}), {1, 1}, {1, 1},
                                  {1, 1}, false, {0, 0}, 1, mask);
}

// d loss / d w where one side has few channels, [OC, IC, 3, 3]. Sums in float32 over a row and an
// image, in float64 over images.
static at::Tensor weight_gradient(const at::Tensor& x, const at::Tensor& g) {
  const int64_t N = x.size(0), IC = x.size(1), H = x.size(2), W = x.size(3), OC = g.size(1);
  const bool few_out = OC <= kFewMax;
  const int64_t F = few_out ? OC : IC, V = few_out ? IC : OC;
  const int64_t size = 9 * F * V;
  WeightRow row = weight_row_for(F);
  std::vector<float> partial(size_t(N * size), 0.0f);
  const float *in = data(x), *grad = data(g);
  at::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t y = 0; y < H; ++y)
        for (int64_t ky = 0; ky < 3; ++ky) {
          int64_t from = y + ky - 1;
          if (from < 0 || from >= H) continue;
          const float* xs = in + (n * H + from) * W * IC;
          const float* gs = grad + (n * H + y) * W * OC;
          float* sums = partial.data() + n * size + ky * 3 * F * V;
          row(few_out ? xs : gs, V, few_out ? gs : xs, W, few_out, sums);
        }
  });
  auto dw = at::empty({OC, IC, 3, 3}, x.options());
  float* to = dw.mutable_data_ptr<float>();
  for (int64_t o = 0; o < OC; ++o)
    for (int64_t c = 0; c < IC; ++c)
      for (int64_t k = 0; k < 9; ++k) {
        int64_t at = (k * F + (few_out ? o : c)) * V + (few_out ? c : o);
        double sum = 0;
        for (int64_t n = 0; n < N; ++n) sum += partial[size_t(n * size + at)];
        *to++ = float(sum);
      }
  return dw;
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Conv3x3 : torch::autograd::Function<Conv3x3> {
  static at::Tensor forward(AutogradContext* ctx, at::Tensor x, at::Tensor w, at::Tensor b) {
    ctx->save_for_backward({x, w});
    return convolve(x, w.contiguous(), b.contiguous());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    auto x = saved[0], w = saved[1];
    auto g = grads[0].contiguous(at::MemoryFormat::ChannelsLast);
    const int64_t IC = x.size(1), OC = w.size(0);
    const bool few = OC <= kFewMax ? is_wide(IC) : IC <= kFewMax;
    const bool wanted = ctx->needs_input_grad(0), fast = fast_forward(OC, IC);
    at::Tensor dx, dw, db;
    if (!few || (wanted && !fast))
      std::tie(dx, dw, db) = gradients(g, x, w, {wanted && !fast, !few, !few});
    if (wanted && fast) dx = input_gradient(g, w);
    if (few) {
      dw = weight_gradient(x, g);
      db = g.sum({0, 2, 3});
    }
    return {dx, dw, db};
  }
};

// The convolution of two inputs joined on channels, without joining them: neither the joined tensor
// nor the two parts of its gradient are ever copied.
struct Conv3x3Pair : torch::autograd::Function<Conv3x3Pair> {
  static at::Tensor forward(AutogradContext* ctx, at::Tensor x1, at::Tensor x2, at::Tensor w,
                            at::Tensor b) {
    ctx->save_for_backward({x1, x2, w});
    auto parts = w.split_with_sizes({x1.size(1), x2.size(1)}, 1);
    auto y = convolve(x1, parts[0].contiguous(), b.contiguous());
    convolve_into(y, x2, parts[1].contiguous(), nullptr);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    auto x1 = saved[0], x2 = saved[1], w = saved[2];
    auto g = grads[0].contiguous(at::MemoryFormat::ChannelsLast);
    auto parts = w.split_with_sizes({x1.size(1), x2.size(1)}, 1);
    auto first = gradients(g, x1, parts[0], {false, true, true});
    auto second = gradients(g, x2, parts[1], {false, true, false});
    auto dw = at::cat({std::get<1>(first), std::get<1>(second)}, 1);
    return {input_gradient(g, parts[0]), input_gradient(g, parts[1]), dw, std::get<2>(first)};
  }
};

}  // namespace cpcr

using namespace cpcr;

extern "C" {

// 3 x 3, stride 1, padding 1; whatever the fast path does not fit is at::conv2d.
int cpcr_ops_conv3x3(const at::Tensor* x, const at::Tensor* w, const at::Tensor* b,
                     at::Tensor** out) {
  return guarded([&] {
    TORCH_CHECK(b->dim() == 1 && w->dim() == 4 && b->size(0) == w->size(0),
                "conv3x3 wants one bias per output channel");
    *out = new at::Tensor(fits(*x, *w) && b->scalar_type() == at::kFloat
                              ? Conv3x3::apply(*x, *w, *b)
                              : at::conv2d(*x, *w, *b, {1, 1}, {1, 1}));
  });
}

// The same of two inputs joined on channels.
int cpcr_ops_conv3x3_pair(const at::Tensor* x1, const at::Tensor* x2, const at::Tensor* w,
                          const at::Tensor* b, at::Tensor** out) {
  return guarded([&] {
    TORCH_CHECK(b->dim() == 1 && w->dim() == 4 && b->size(0) == w->size(0),
                "conv3x3 wants one bias per output channel");
    TORCH_CHECK(x1->dim() == 4 && x2->dim() == 4 && x1->size(1) + x2->size(1) == w->size(1),
                "conv3x3 wants weights for both inputs' channels");
    const int64_t C = x1->size(1);
    auto apart = [&] { return w->detach().split_with_sizes({C, x2->size(1)}, 1); };
    const bool fast = x2->size(0) == x1->size(0) && x2->size(2) == x1->size(2) &&
                      x2->size(3) == x1->size(3) && is_wide(w->size(0)) && is_wide(C) &&
                      is_wide(x2->size(1)) && b->scalar_type() == at::kFloat &&
                      fits(*x1, apart()[0]) && fits(*x2, apart()[1]) &&
                      fast_forward(w->size(0), C) && fast_forward(w->size(0), x2->size(1));
    *out = new at::Tensor(fast ? Conv3x3Pair::apply(*x1, *x2, *w, *b)
                               : at::conv2d(at::cat({*x1, *x2}, 1), *w, *b, {1, 1}, {1, 1}));
  });
}

}  // extern "C"
