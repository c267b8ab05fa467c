// Vectors of fp32 of the width of the variant, by the compiler's vector extension.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef float vf_any __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));

constexpr float kInf = __builtin_inff();
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

#define DS_CP_INLINE static inline __attribute__((always_inline))

DS_CP_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
DS_CP_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
DS_CP_INLINE vu load_bits(const void* p) { return *reinterpret_cast<const vu_any*>(p); }
DS_CP_INLINE vf all(float x) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(x);
#else
  return vf{x, x, x, x};
#endif
}
// The second where one of them is NaN.
DS_CP_INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Sums and maxima over the lanes, by halves.
DS_CP_INLINE float sum_of(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float part[kLanes];
  store(part, x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
#endif
}
DS_CP_INLINE float max_of(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float part[kLanes];
  store(part, x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
  return part[0];
#endif
}

// 2 to the power of t <= 127. t is cut into a whole number n, by adding and taking away 1.5 * 2^23, and
// f in [-0.5, 0.5]; 2^f is a polynomial (minimax), of which the exponent is then raised by n.
// Below -126, also for -inf, exactly 0; NaN for NaN.
DS_CP_INLINE vf exp2_of(vf t) {
  const vf magic = all(12582912.0f);
  const vf u = max(all(-126.5f), t);  // NaN, if it is there, is the second
  const vf z = u + magic;
  const vf f = u - (z - magic);
  vf p = all(1.53457696017e-4f);  // relative error 2e-9
  p = p * f + 1.33999220074e-3f;
  p = p * f + 9.61848901906e-3f;
  p = p * f + 5.55032880038e-2f;
  p = p * f + 2.4022646891e-1f;
  p = p * f + 6.93147205726e-1f;
  p = p * f + 1.0f;
  const vf scaled = (vf)((vu)p + ((vu)z << 23));
  return t > -126.0f ? scaled : max(vf{}, t);  // 0, or NaN
}

#if defined(__AVX512F__) && defined(__AVX512DQ__)
// The same with a relative error of 8e-5, for weights that are then rounded to 8 bits. What it gives
// below -126 is so small that the rounding makes it 0.
DS_CP_INLINE vf exp2_short(vf t) {
  const vf f = (vf)_mm512_reduce_ps((__m512)t, 1);  // t - floor(t)
  vf p = all(0.0780238756369f);
  p = p * f + 0.226066931008f;
  p = p * f + 0.695834241561f;
  p = p * f + 0.999925078772f;
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)t);  // p * 2^floor(t)
}
#endif

}  // namespace
