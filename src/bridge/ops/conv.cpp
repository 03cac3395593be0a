// The 3 x 3 convolutions of the network on the CPU: float32, channels-last, stride 1, padding 1.
//
// - Few channels on one side (the first convolution, the heads): direct, a vector holding 16
//   channels of one pixel. oneDNN runs these at a tenth to a half of what the processor can do.
// - 16 channels and more on both sides, forwards and for the input's gradient: Winograd's F(2, 3)
//   along rows, which multiplies four times for two outputs instead of six. Its constants are 1 and
//   1/2, so that it rounds no worse than the direct sum (F(4, 3) would save more and rounds ten times
//   worse).
//
// Everything else (other sizes, types, layouts or processors, and gradients of wide weights) stays
// oneDNN's. Sums run in a fixed order, so results do not depend on threads. docs/benchmarks.md has
// the figures.
#include "ops.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

namespace cpcr {

// Sixteen channels; loads and stores of it need no alignment.
typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t kLanes = 16;
// Pixels of a direct block: with the weights' one, half of the 32 registers there are.
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

// ---- Few inputs, many outputs: 16 output channels of P pixels from x0 on, taps lo to hi of a row --

template <int IC, int P>
CPCR_V4_INLINE void direct_block(const Rows& rows, int64_t x0, int lo, int hi, const float* w,
                                 v16 bias, float* out, int64_t out_pixel) {
  v16 acc[P];
  for (int j = 0; j < P; ++j) acc[j] = bias;
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

// One output row [W, OC]. `w` is [OC / 16, 3, 3, IC, 16].
template <int IC>
CPCR_V4 void direct_row(const Rows& rows, int64_t W, const float* w, const float* bias, float* out,
                        int64_t OC) {
  for (int64_t o = 0; o < OC; o += kLanes, w += 9 * IC * kLanes) {
    v16 b = read16(bias + o);
    direct_block<IC, 1>(rows, 0, 1, 3, w, b, out + o, OC);
    for (int64_t x = 1; x < W - 1; x += kPixels) {
      // The last block overlaps the one before it rather than being a shorter one.
      int64_t at = std::min(x, W - 1 - kPixels);
      direct_block<IC, kPixels>(rows, at, 0, 3, w, b, out + at * OC + o, OC);
    }
    direct_block<IC, 1>(rows, W - 1, 0, 2, w, b, out + (W - 1) * OC + o, OC);
  }
}

using DirectRow = void (*)(const Rows&, int64_t, const float*, const float*, float*, int64_t);

static DirectRow direct_row_for(int64_t IC) {
  constexpr DirectRow rows[] = {direct_row<1>, direct_row<2>, direct_row<3>, direct_row<4>,
                                direct_row<5>};
  return IC >= 1 && IC <= kFewMax ? rows[IC - 1] : nullptr;
}

// ---- Many inputs and outputs: Winograd's F(2, 3) along the row --------------------------------

// A pair of output columns comes from four input columns d and three taps g as A [(G g) * (B d)]:
//   B d = (d0 - d2, d1 + d2, d2 - d1, d1 - d3)
//   G g = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)
//   A m = (m0 + m1 + m2, m1 - m2 - m3)
// The products are summed over input channels and the three rows before A is taken.
constexpr int64_t kTerms = 4;

// B of one input row [W, IC]: [4, W / 2, IC].
CPCR_V4 static void winograd_input(const float* x, int64_t W, int64_t IC, float* v) {
  const int64_t pairs = W / 2, term = pairs * IC;
  for (int64_t i = 0; i < pairs; ++i)
    for (int64_t c = 0; c < IC; c += kLanes) {
      const float* d = x + 2 * i * IC + c;
      v16 d0 = i > 0 ? read16(d - IC) : v16{}, d1 = read16(d), d2 = read16(d + IC);
      v16 d3 = i + 1 < pairs ? read16(d + 2 * IC) : v16{};
      float* to = v + i * IC + c;
      write16(to, d0 - d2);
      write16(to + term, d1 + d2);
      write16(to + 2 * term, d2 - d1);
      write16(to + 3 * term, d1 - d3);
    }
}

// G of all weights [OC, IC, 3, 3]: [OC / 16, 4, 3, IC, 16].
static std::vector<float> winograd_weights(const float* w, int64_t OC, int64_t IC) {
  std::vector<float> u(size_t(kTerms * 3 * OC * IC));
  for (int64_t o = 0; o < OC; ++o)
    for (int64_t c = 0; c < IC; ++c)
      for (int64_t ky = 0; ky < 3; ++ky, w += 3) {
        const float g[kTerms] = {w[0], (w[0] + w[1] + w[2]) / 2, (w[0] - w[1] + w[2]) / 2, w[2]};
        for (int64_t t = 0; t < kTerms; ++t)
          u[size_t((((o / kLanes * kTerms + t) * 3 + ky) * IC + c) * kLanes + o % kLanes)] = g[t];
      }
  return u;
}

// Products of one term for P pairs of columns, summed over rows and input channels.
template <int IC, int P>
CPCR_V4_INLINE void winograd_block(const float* const* rows, int64_t at, const float* u, float* m) {
  v16 acc[P] = {};
  for (int ky = 0; ky < 3; ++ky) {
    const float* in = rows[ky] + at;
    for (int c = 0; c < IC; ++c) {
      v16 weights = read16(u + (ky * IC + c) * kLanes);
#pragma GCC unroll 16
      for (int j = 0; j < P; ++j) acc[j] += in[j * IC + c] * weights;
    }
  }
  for (int j = 0; j < P; ++j) write16(m + j * kLanes, acc[j]);
}

// One output row [W, OC] from three rows of `winograd_input`; without a bias it adds to `out`.
template <int IC>
CPCR_V4 void winograd_row(const float* const* rows, int64_t W, const float* u, const float* bias,
                          float* out, int64_t OC, float* m) {
  const int64_t pairs = W / 2, term = pairs * kLanes;
  for (int64_t o = 0; o < OC; o += kLanes) {
    for (int64_t t = 0; t < kTerms; ++t, u += 3 * IC * kLanes) {
      int64_t i = 0;
      auto at = [&] { return (t * pairs + i) * IC; };
      for (; i + 16 <= pairs; i += 16)
        winograd_block<IC, 16>(rows, at(), u, m + t * term + i * kLanes);
      for (; i + 4 <= pairs; i += 4)
        winograd_block<IC, 4>(rows, at(), u, m + t * term + i * kLanes);
    }
    for (int64_t i = 0; i < pairs; ++i) {
      const float* q = m + i * kLanes;
      v16 m0 = read16(q), m1 = read16(q + term), m2 = read16(q + 2 * term), m3 = read16(q + 3 * term);
      float* y = out + 2 * i * OC + o;
      v16 left = read16(bias ? bias + o : y), right = read16(bias ? bias + o : y + OC);
      write16(y, left + (m0 + m1 + m2));
      write16(y + OC, right + (m1 - m2 - m3));
    }
  }
}

using WinogradRow = void (*)(const float* const*, int64_t, const float*, const float*, float*, int64_t,
                             float*);

static WinogradRow winograd_row_for(int64_t IC) {
  switch (IC) {
    case 16: return winograd_row<16>;
    case 32: return winograd_row<32>;
    case 64: return winograd_row<64>;
    case 128: return winograd_row<128>;
    case 256: return winograd_row<256>;
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

// Which way a convolution from IC to OC channels and W columns goes.
enum class Way { kNone, kFewIn, kFewOut, kWinograd };

static Way way(int64_t IC, int64_t OC, int64_t W) {
  if (is_wide(OC) && direct_row_for(IC) && W >= kPixels + 2) return Way::kFewIn;
  if (is_wide(IC) && OC <= kFewMax && W >= kPixels) return Way::kFewOut;
  if (is_wide(OC) && winograd_row_for(IC) && W % 8 == 0) return Way::kWinograd;
  return Way::kNone;
}

static bool fits(const at::Tensor& x, const at::Tensor& w) {
  static const bool able = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  // One channel is contiguous either way: the strides say which one is meant.
  return able && x.device().is_cpu() && w.device().is_cpu() && x.scalar_type() == at::kFloat && x.dim() == 4 &&
         w.scalar_type() == at::kFloat && w.dim() == 4 && w.size(2) == 3 && w.size(3) == 3 &&
         w.size(1) == x.size(1) && x.size(0) > 0 && x.size(2) > 0 &&
         x.is_contiguous(at::MemoryFormat::ChannelsLast) &&
         x.suggest_memory_format() == at::MemoryFormat::ChannelsLast &&
         way(x.size(1), w.size(0), x.size(3)) != Way::kNone;
}

// One of the direct ways; `w` contiguous.
static void direct(at::Tensor& y, const at::Tensor& x, const at::Tensor& w, const float* bias,
                   bool few_out) {
  const int64_t N = x.size(0), IC = x.size(1), H = x.size(2), W = x.size(3), OC = w.size(0);
  // Many outputs: [OC / 16, 3, 3, IC, 16]; few: [3 (ky), IC, 16 lanes of (kx, o)].
  std::vector<float> packed(size_t(few_out ? 3 * IC * kLanes : 9 * IC * OC), 0.0f);
  const float* from = data(w);
  for (int64_t o = 0; o < OC; ++o)
    for (int64_t c = 0; c < IC; ++c)
      for (int64_t k = 0; k < 9; ++k) {
        int64_t to = few_out ? (k / 3 * IC + c) * kLanes + k % 3 * OC + o
                             : ((o / kLanes * 9 + k) * IC + c) * kLanes + o % kLanes;
        packed[size_t(to)] = *from++;
      }
  const std::vector<float> zeros(size_t(W * IC), 0.0f);
  const float* in = data(x);
  float* out = y.mutable_data_ptr<float>();
  DirectRow row = direct_row_for(IC);
  at::parallel_for(0, N * H, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(few_out ? size_t(W * kLanes) : 0);
    for (int64_t r = begin; r < end; ++r) {
      Rows rows(in + r / H * H * W * IC, r % H, H, W * IC, zeros.data());
      float* to = out + r * W * OC;
      if (few_out)
        few_row(rows, W, IC, packed.data(), bias, to, OC, scratch.data());
      else
        row(rows, W, packed.data(), bias, to, OC);
    }
  });
}

static void winograd(at::Tensor& y, const at::Tensor& x, const at::Tensor& w, const float* bias) {
  const int64_t N = x.size(0), IC = x.size(1), H = x.size(2), W = x.size(3), OC = w.size(0);
  const std::vector<float> u = winograd_weights(data(w), OC, IC);
  const int64_t row_size = kTerms * W / 2 * IC;
  const std::vector<float> zeros(size_t(row_size), 0.0f);
  const float* in = data(x);
  float* out = y.mutable_data_ptr<float>();
  WinogradRow row = winograd_row_for(IC);
  at::parallel_for(0, N * H, 16, [&](int64_t begin, int64_t end) {
    // The transformed rows around the current one: each is made once and serves three outputs.
    std::vector<float> window(size_t(3 * row_size)), products(size_t(kTerms * W / 2 * kLanes));
    int64_t held[3] = {-1, -1, -1};
    for (int64_t r = begin; r < end; ++r) {
      const float* rows[3];
      for (int64_t k = 0; k < 3; ++k) {
        const int64_t wanted = r + k - 1, y_in = r % H + k - 1;
        if (y_in < 0 || y_in >= H) {
          rows[k] = zeros.data();
          continue;
        }
        const int64_t place = wanted % 3;
        float* to = window.data() + place * row_size;
        if (held[place] != wanted) winograd_input(in + wanted * W * IC, W, IC, to);
        held[place] = wanted;
        rows[k] = to;
      }
      row(rows, W, u.data(), bias, out + r * W * OC, OC, products.data());
    }
  });
}

// y = x * w + b by a way of ours, or y += x * w without a bias (Winograd only); w contiguous.
static void convolve_into(at::Tensor& y, const at::Tensor& x, const at::Tensor& w,
                          const float* bias) {
  switch (way(x.size(1), w.size(0), x.size(3))) {
    case Way::kFewIn: return direct(y, x, w, bias, false);
    case Way::kFewOut: return direct(y, x, w, bias, true);
    case Way::kWinograd: return winograd(y, x, w, bias);
    case Way::kNone: TORCH_CHECK(false, "this convolution is not ours");
  }
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
    const int64_t IC = x.size(1), OC = w.size(0), W = x.size(3);
    const bool few = way(IC, OC, W) != Way::kWinograd;
    const bool wanted = ctx->needs_input_grad(0), fast = way(OC, IC, W) != Way::kNone;
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
    *out = new at::Tensor(fits(*x, *w) && b->scalar_type() == at::kFloat && b->is_cpu() && b->is_cpu()
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
    const int64_t A = x1->size(1), B = x2->size(1), OC = w->size(0), W = x1->size(3);
    auto ours = [&](const at::Tensor& x, int64_t C, int64_t first) {
      return fits(x, w->detach().narrow(1, first, C)) && way(C, OC, W) == Way::kWinograd &&
             way(OC, C, W) == Way::kWinograd;
    };
    const bool fast = x2->size(0) == x1->size(0) && x2->size(2) == x1->size(2) &&
                      x2->size(3) == W && b->scalar_type() == at::kFloat && b->is_cpu() && ours(*x1, A, 0) &&
                      ours(*x2, B, A);
    *out = new at::Tensor(fast ? Conv3x3Pair::apply(*x1, *x2, *w, *b)
                               : at::conv2d(at::cat({*x1, *x2}, 1), *w, *b, {1, 1}, {1, 1}));
  });
}

}  // extern "C"
