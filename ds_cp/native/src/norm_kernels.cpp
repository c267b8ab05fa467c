// RMS norms of rows. The order of a row's sum follows from its length alone. Compiled once per
// instruction set.
#include "isa.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int64_t kSums = 16;  // side by side, whatever the registers

inline float value_of(float x) { return x; }
inline float value_of(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline void put(float* y, float value) { *y = value; }
inline void put(uint16_t* y, float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t near = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
  *y = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? nan : near);
}

template <class T>
void row(const T* x, const float* w, int64_t n, float eps, bool round_first, T* y) {
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int64_t j = 0; j < kSums; j++) {
      const float v = value_of(x[i + j]);
      sums[j] += v * v;
    }
  }
  for (int64_t j = 0; i + j < n; j++) sums[j] += value_of(x[i + j]) * value_of(x[i + j]);
  for (int64_t half = kSums / 2; half; half /= 2) {
    for (int64_t j = 0; j < half; j++) sums[j] += sums[j + half];
  }
  const float scale = 1.0f / sqrtf(sums[0] / static_cast<float>(n) + eps);
  if (round_first) {
    for (i = 0; i < n; i++) {
      T normed;
      put(&normed, value_of(x[i]) * scale);
      put(&y[i], w[i] * value_of(normed));
    }
  } else {
    for (i = 0; i < n; i++) put(&y[i], value_of(x[i]) * scale * w[i]);
  }
}

}  // namespace

namespace ds_cp {

// Rows of x `ldx` elements apart; y is dense. `round_first`: to the dtype before the weights.
void DS_CP_NAME(rms_norm)(const void* x, int64_t rows, int64_t ldx, const float* w, int64_t n,
                          float eps, bool bf16, bool round_first, void* y) {
  for (int64_t r = 0; r < rows; r++) {
    if (bf16) {
      row(static_cast<const uint16_t*>(x) + r * ldx, w, n, eps, round_first,
          static_cast<uint16_t*>(y) + r * n);
    } else {
      row(static_cast<const float*>(x) + r * ldx, w, n, eps, round_first,
          static_cast<float*>(y) + r * n);
    }
  }
}

}  // namespace ds_cp
