// What the files of this folder share: the error channel and small helpers.
// Every exported function returns 0, or 1 with a message in a thread-local string.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <string>

namespace cpcr {

std::string& last_error();

template <class F>
int guarded(F&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    last_error() = e.what();
  } catch (...) {
    last_error() = "an exception that is not a std::exception";
  }
  return 1;
}

// Instruction sets are chosen when the program is loaded, so one binary serves every x86-64.
#define CPCR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define CPCR_INLINE static inline __attribute__((always_inline))

CPCR_INLINE float bits_to_float(uint32_t u) { return __builtin_bit_cast(float, u); }
CPCR_INLINE uint32_t float_to_bits(float f) { return __builtin_bit_cast(uint32_t, f); }

// bfloat16 travels as uint16_t: plain integer code is what the compiler vectorises.
CPCR_INLINE float load(const float* p) { return *p; }
CPCR_INLINE float load(const uint16_t* p) { return bits_to_float(uint32_t(*p) << 16); }
CPCR_INLINE void store(float* p, float v) { *p = v; }
CPCR_INLINE void store(uint16_t* p, float v) {
  // Round to nearest even. A NaN keeps its high bits; the canonical one of our kernels stays NaN.
  uint32_t u = float_to_bits(v);
  *p = uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// Counter-based random bits: a function of (key, index) alone, so a mask needs no storage and
// does not depend on the number of threads. Two rounds of the "lowbias32" integer hash.
CPCR_INLINE uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x21f0aaadu;
  x ^= x >> 15;
  x *= 0x735a2d97u;
  return x ^ (x >> 15);
}
CPCR_INLINE uint32_t random_bits(uint32_t index, uint32_t k0, uint32_t k1) {
  return mix(mix(index ^ k0) + k1);
}

// Dropout of probability p drops where random_bits < threshold.
inline uint32_t drop_threshold(double p) {
  double t = p * 4294967296.0;
  return t >= 4294967295.0 ? 4294967295u : uint32_t(t);
}

}  // namespace cpcr
