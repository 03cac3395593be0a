// The losses of a pair of decoders, values and gradients with respect to the logits in one pass
// over the pixels. CPU, float32 or bfloat16 logits, planar or channels-last. Work is cut into
// fixed blocks and summed in their order: the result does not depend on the number of threads.
#include "ops.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

namespace cpcr {

constexpr int64_t B = 256;  // pixels in a block

// exp and log after Cephes: about one unit in the last place, and free of branches and calls,
// so that the loops around them vectorise.
CPCR_INLINE float exp_(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  float t = x * 1.44269504088896341f + 12582912.0f;
  float n = t - 12582912.0f;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return y * bits_to_float(uint32_t(int32_t(n) + 127) << 23);
}

CPCR_INLINE float log_(float x) {
  x = x < 1.17549435e-38f ? 1.17549435e-38f : x;
  uint32_t u = float_to_bits(x);
  float e = float(int32_t(u >> 23) - 126);
  float m = bits_to_float((u & 0x007fffffu) | 0x3f000000u);
  bool low = m < 0.707106781186547524f;
  e = low ? e - 1.0f : e;
  m = low ? m + m - 1.0f : m - 1.0f;
  float z = m * m;
  float y = 7.0376836292e-2f;
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * z;
  y = y - e * 2.12194440e-4f - 0.5f * z;
  return m + y + e * 0.693359375f;
}

struct Terms {
  // Weights of sums over pixels, or of Dice's derivatives; zero leaves the term out.
  double focal, gamma, kd, temperature, entropy;
  double log_classes;
};

// p = softmax(l * inv) over the C rows of B; lse = its log normaliser.
CPCR_INLINE void softmax(const float* __restrict l, int64_t C, float inv, float* __restrict p,
                         float* __restrict lse) {
  float top[B], sum[B];
  for (int64_t i = 0; i < B; ++i) top[i] = l[i];
  for (int64_t c = 1; c < C; ++c)
    for (int64_t i = 0; i < B; ++i) top[i] = top[i] > l[c * B + i] ? top[i] : l[c * B + i];
  for (int64_t i = 0; i < B; ++i) sum[i] = 0;
  for (int64_t c = 0; c < C; ++c)
    for (int64_t i = 0; i < B; ++i) {
      float e = exp_((l[c * B + i] - top[i]) * inv);
      p[c * B + i] = e;
      sum[i] += e;
    }
  for (int64_t i = 0; i < B; ++i) {
    lse[i] = top[i] * inv + log_(sum[i]);
    sum[i] = 1.0f / sum[i];
  }
  for (int64_t c = 0; c < C; ++c)
    for (int64_t i = 0; i < B; ++i) p[c * B + i] *= sum[i];
}

CPCR_INLINE double sum_first(const float* v, int64_t n) {
  float s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < n; ++i) s += v[i];
  return s;
}

// One block of one pair. l: logits [2][C][B]; g: gradients out; w: scratch [4][C][B].
// label: null where there is none. dice: [2][2][C], d loss / d (intersection, square sum).
// values += [focal, KD, entropy], plain sums over the block's n pixels.
CPCR_CLONES void pair_block(const float* __restrict l, float* __restrict g, float* __restrict w,
                            int64_t C, int64_t n, const uint8_t* label, const float* dice,
                            const Terms& t, double* values) {
  const int64_t S = C * B;
  float* p = w;
  float* u = w + 2 * S;
  float lse[2][B], a[B], b[B];
  const bool sup = label && (dice || t.focal != 0), soft = sup || t.entropy != 0;
  for (int64_t i = 0; i < 2 * S; ++i) g[i] = 0;
  if (t.kd != 0) {
    // KD both ways: the two values add up to T^2 sum (p2 - p1) (log p2 - log p1), the gradient
    // of each logit is T (p1 - p2), the teacher being detached.
    const float inv = float(1 / t.temperature), k = float(t.kd * t.temperature);
    softmax(l, C, inv, u, lse[0]);
    softmax(l + S, C, inv, u + S, lse[1]);
    for (int64_t i = 0; i < B; ++i) { a[i] = 0; b[i] = lse[1][i] - lse[0][i]; }
    for (int64_t c = 0; c < C; ++c)
      for (int64_t i = 0; i < B; ++i) {
        int64_t j = c * B + i;
        float d = u[S + j] - u[j];
        a[i] += d * ((l[S + j] - l[j]) * inv - b[i]);
        g[j] = -k * d;
        g[S + j] = k * d;
      }
    values[1] += t.temperature * t.temperature * sum_first(a, n);
  }
  if (!soft) return;
  softmax(l, C, 1.0f, p, lse[0]);
  softmax(l + S, C, 1.0f, p + S, lse[1]);
  float* up = u;  // d loss / d p, [2][C][B]
  for (int64_t i = 0; i < 2 * S; ++i) up[i] = 0;
  if (t.entropy != 0) {
    const float k = float(-0.5 * t.entropy / t.log_classes);
    for (int64_t i = 0; i < B; ++i) a[i] = 0;
    for (int64_t c = 0; c < C; ++c)
      for (int64_t i = 0; i < B; ++i) {
        int64_t j = c * B + i;
        float q = 0.5f * (p[j] + p[S + j]), h = log_(q + 1e-6f);
        a[i] -= q * h;
        up[j] = up[S + j] = k * (h + q / (q + 1e-6f));
      }
    values[2] += sum_first(a, n) / t.log_classes;
  }
  if (sup && dice) {
    for (int d = 0; d < 2; ++d)
      for (int64_t c = 0; c < C; ++c) {
        const float ki = dice[(d * 2) * C + c], kp = 2 * dice[(d * 2 + 1) * C + c];
        for (int64_t i = 0; i < B; ++i) {
          int64_t j = d * S + c * B + i;
          up[j] += kp * p[j] + (label[i] == c ? ki : 0.0f);
        }
      }
  }
  for (int d = 0; d < 2; ++d) {
    for (int64_t i = 0; i < B; ++i) a[i] = 0;
    for (int64_t c = 0; c < C; ++c)
      for (int64_t i = 0; i < B; ++i) a[i] += p[d * S + c * B + i] * up[d * S + c * B + i];
    for (int64_t c = 0; c < C; ++c)
      for (int64_t i = 0; i < B; ++i) {
        int64_t j = d * S + c * B + i;
        g[j] += p[j] * (up[j] - a[i]);
      }
  }
  if (sup && t.focal != 0) {
    const float k = float(t.focal), gamma = float(t.gamma);
    for (int d = 0; d < 2; ++d) {
      for (int64_t i = 0; i < B; ++i) a[i] = 0;
      for (int64_t c = 0; c < C; ++c)
        for (int64_t i = 0; i < B; ++i) a[i] = label[i] == c ? l[d * S + c * B + i] : a[i];
      for (int64_t i = 0; i < B; ++i) {
        float log_p = a[i] - lse[d][i];
        float rest = 1.0f - exp_(log_p);
        b[i] = exp_(gamma * log_(rest > 0 ? rest : 0.0f));
        a[i] = -b[i] * log_p;
      }
      values[0] += sum_first(a, n);
      for (int64_t c = 0; c < C; ++c)
        for (int64_t i = 0; i < B; ++i) {
          int64_t j = d * S + c * B + i;
          g[j] += k * b[i] * (p[j] - (label[i] == c ? 1.0f : 0.0f));
        }
    }
  }
}

// sums += [2][3][C]: intersection, squared probabilities, label counts.
CPCR_CLONES void dice_block(const float* __restrict l, float* __restrict w, int64_t C, int64_t n,
                            const uint8_t* label, double* sums) {
  float lse[B];
  for (int d = 0; d < 2; ++d) {
    softmax(l + d * C * B, C, 1.0f, w, lse);
    for (int64_t c = 0; c < C; ++c) {
      float in = 0, sq = 0, count = 0;
#pragma omp simd reduction(+ : in, sq, count)
      for (int64_t i = 0; i < n; ++i) {
        float p = w[c * B + i];
        bool is = label[i] == c;
        in += is ? p : 0.0f;
        sq += p * p;
        count += is ? 1.0f : 0.0f;
      }
      sums[(d * 3) * C + c] += in;
      sums[(d * 3 + 1) * C + c] += sq;
      sums[(d * 3 + 2) * C + c] += count;
    }
  }
}

// How to walk [N, C, H, W] that is planar or channels-last.
struct Layout {
  int64_t C, pixels, channel, pixel, sample;
};

Layout layout_of(const at::Tensor& t) {
  const int64_t C = t.size(1), P = t.size(2) * t.size(3);
  if (t.is_contiguous()) return {C, P, P, 1, C * P};
  TORCH_CHECK(t.is_contiguous(at::MemoryFormat::ChannelsLast), "logits must be dense");
  return {C, P, 1, C, C * P};
}

template <class T>
CPCR_INLINE void fetch_body(const T* src, const Layout& y, int64_t first, int64_t n,
                            float* __restrict out) {
  for (int64_t c = 0; c < y.C; ++c) {
    const T* s = src + c * y.channel + first * y.pixel;
    for (int64_t i = 0; i < n; ++i) out[c * B + i] = load(s + i * y.pixel);
    for (int64_t i = n; i < B; ++i) out[c * B + i] = 0;
  }
}

template <class T>
CPCR_INLINE void put_body(T* dst, const Layout& y, int64_t first, int64_t n,
                          const float* __restrict in) {
  for (int64_t c = 0; c < y.C; ++c) {
    T* s = dst + c * y.channel + first * y.pixel;
    for (int64_t i = 0; i < n; ++i) store(s + i * y.pixel, in[c * B + i]);
  }
}

void fetch(const at::Tensor& t, const Layout& y, int64_t sample, int64_t first, int64_t n,
           float* out) {
  if (t.scalar_type() == at::kFloat)
    fetch_body(static_cast<const float*>(t.data_ptr()) + sample * y.sample, y, first, n, out);
  else
    fetch_body(static_cast<const uint16_t*>(t.data_ptr()) + sample * y.sample, y, first, n, out);
}

void put(at::Tensor& t, const Layout& y, int64_t sample, int64_t first, int64_t n,
         const float* in) {
  if (t.scalar_type() == at::kFloat)
    put_body(static_cast<float*>(t.data_ptr()) + sample * y.sample, y, first, n, in);
  else
    put_body(static_cast<uint16_t*>(t.data_ptr()) + sample * y.sample, y, first, n, in);
}

void check_pair(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(a.device().is_cpu() && b.device().is_cpu(), "the fused losses are for the CPU");
  TORCH_CHECK(a.dim() == 4 && a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type(),
              "the two decoders' logits differ in shape or type");
  TORCH_CHECK(a.scalar_type() == at::kFloat || a.scalar_type() == at::kBFloat16,
              "the fused losses know float32 and bfloat16");
  TORCH_CHECK(a.size(1) >= 2 && a.size(1) <= 255, "between 2 and 255 classes");
}

void check_labels(const at::Tensor& a, const at::Tensor& labels) {
  TORCH_CHECK(labels.device().is_cpu() && labels.scalar_type() == at::kByte &&
                  labels.is_contiguous() && labels.dim() == 3 && labels.size(0) <= a.size(0) &&
                  labels.size(1) == a.size(2) && labels.size(2) == a.size(3),
              "labels must be uint8 [labelled, H, W] for these logits");
}

}  // namespace cpcr

using namespace cpcr;

extern "C" {

// out: float64 [2, 3, C] over the labelled samples, which are the first of the batch.
int cpcr_ops_dice_sums(const at::Tensor* l1, const at::Tensor* l2, const at::Tensor* labels,
                       at::Tensor** out) {
  return guarded([&] {
    check_pair(*l1, *l2);
    check_labels(*l1, *labels);
    const Layout y1 = layout_of(*l1), y2 = layout_of(*l2);
    const int64_t C = y1.C, per = (y1.pixels + B - 1) / B, blocks = labels->size(0) * per;
    const uint8_t* label = labels->data_ptr<uint8_t>();
    std::vector<double> partial(size_t(blocks * 6 * C), 0.0);
    std::vector<uint8_t> top(size_t(blocks), 0);
    at::parallel_for(0, blocks, 8, [&](int64_t b, int64_t e) {
      std::vector<float> buffer(size_t(3 * C * B));
      for (int64_t k = b; k < e; ++k) {
        int64_t s = k / per, first = (k % per) * B, n = std::min(B, y1.pixels - first);
        fetch(*l1, y1, s, first, n, buffer.data());
        fetch(*l2, y2, s, first, n, buffer.data() + C * B);
        const uint8_t* at = label + s * y1.pixels + first;
        for (int64_t i = 0; i < n; ++i) top[k] = std::max(top[k], at[i]);
        dice_block(buffer.data(), buffer.data() + 2 * C * B, C, n, at,
                   partial.data() + k * 6 * C);
      }
    });
    for (uint8_t t : top) TORCH_CHECK(t < C, "label ", int(t), " with ", C, " classes");
    auto sums = at::zeros({2, 3, C}, at::kDouble);
    double* s = sums.data_ptr<double>();
    for (int64_t k = 0; k < blocks; ++k)
      for (int64_t i = 0; i < 6 * C; ++i) s[i] += partial[k * 6 * C + i];
    *out = new at::Tensor(sums);
  });
}

// Gradients like the logits and float64 [3] = sums of [focal, KD, entropy] over this rank's pixels.
int cpcr_ops_pair_loss(const at::Tensor* l1, const at::Tensor* l2, const at::Tensor* labels,
                       const at::Tensor* dice, double focal, double gamma, double kd,
                       double temperature, double entropy, at::Tensor** g1, at::Tensor** g2,
                       at::Tensor** values) {
  return guarded([&] {
    check_pair(*l1, *l2);
    const int64_t labelled = labels ? labels->size(0) : 0;
    if (labels) check_labels(*l1, *labels);
    const Layout y1 = layout_of(*l1), y2 = layout_of(*l2);
    const int64_t C = y1.C, per = (y1.pixels + B - 1) / B;
    const Terms t{focal, gamma, kd, temperature, entropy, std::log(double(C))};
    std::vector<float> coef;
    if (dice) {
      auto d = dice->to(at::kFloat).contiguous();
      TORCH_CHECK(d.numel() == 4 * C, "Dice coefficients must be [2, 2, C]");
      coef.assign(d.data_ptr<float>(), d.data_ptr<float>() + 4 * C);
    }
    // Without a term on the whole batch the unlabelled samples have no gradient.
    const int64_t samples = kd != 0 || entropy != 0 ? l1->size(0) : labelled;
    const bool partly = samples < l1->size(0);
    auto o1 = partly ? at::zeros_like(*l1) : at::empty_like(*l1);
    auto o2 = partly ? at::zeros_like(*l2) : at::empty_like(*l2);
    const int64_t blocks = samples * per;
    std::vector<double> partial(size_t(blocks * 3), 0.0);
    at::parallel_for(0, blocks, 8, [&](int64_t b, int64_t e) {
      std::vector<float> buffer(size_t(8 * C * B));
      std::vector<uint8_t> padded(B);
      float *l = buffer.data(), *g = l + 2 * C * B, *w = l + 4 * C * B;
      for (int64_t k = b; k < e; ++k) {
        int64_t s = k / per, first = (k % per) * B, n = std::min(B, y1.pixels - first);
        fetch(*l1, y1, s, first, n, l);
        fetch(*l2, y2, s, first, n, l + C * B);
        const uint8_t* at = nullptr;
        if (s < labelled) {
          std::memcpy(padded.data(), labels->data_ptr<uint8_t>() + s * y1.pixels + first, n);
          at = padded.data();
        }
        pair_block(l, g, w, C, n, at, dice ? coef.data() : nullptr, t, partial.data() + k * 3);
        put(o1, y1, s, first, n, g);
        put(o2, y2, s, first, n, g + C * B);
      }
    });
    auto sums = at::zeros({3}, at::kDouble);
    for (int64_t k = 0; k < blocks; ++k)
      for (int i = 0; i < 3; ++i) sums.data_ptr<double>()[i] += partial[k * 3 + i];
    *g1 = new at::Tensor(o1);
    *g2 = new at::Tensor(o2);
    *values = new at::Tensor(sums);
  });
}

}  // extern "C"
