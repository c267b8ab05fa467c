// The inner loops of linear layers; see linear.h. Compiled once per instruction set.
#include "isa.h"
#include "linear.h"

#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using ds_cp::kFew;
using ds_cp::kPanel;
using ds_cp::kPanels;
using ds_cp::kRows;
using ds_cp::kUnit;
using ds_cp::Linear;
using ds_cp::LinearCall;

// Elements of K in one chain from zero, part of the result! fp32 has shorter ones: in bf16 the
// rounding of the result hides that of its sums.
constexpr int64_t kBlockBf16 = 1024;
constexpr int64_t kBlockFp32 = 128;

#define UNROLL _Pragma("GCC unroll 16")

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline uint32_t pair_at(const uint16_t* x) {
  uint32_t both;
  memcpy(&both, x, 4);
  return both;
}

// F: kLanes fp32 numbers. W: as many pairs of bf16 numbers. kMostRows and kMostUnits: of a tile,
// so that its sums and factors stay in registers.
#if defined(__AVX512F__)
using F = __m512;
using W = __m512i;
constexpr int64_t kLanes = 16, kMostRows = 6, kMostUnits = 4;
inline F zero() { return _mm512_setzero_ps(); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void put(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F plus(F a, F b) { return _mm512_add_ps(a, b); }
inline F all(float x) { return _mm512_set1_ps(x); }
inline F times_plus(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline W load_pairs(const uint16_t* p) { return _mm512_loadu_si512(p); }
inline W all_pairs(uint32_t pair) { return _mm512_set1_epi32(static_cast<int>(pair)); }
#if defined(__AVX512BF16__)
inline F pairs_plus(W a, W b, F c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(a));
}
#else
inline F low(W w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
inline F high(W w) {
  return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
inline F pairs_plus(W a, W b, F c) {
  return times_plus(high(a), high(b), times_plus(low(a), low(b), c));
}
#endif
#elif defined(__AVX2__)
using F = __m256;
using W = __m256i;
constexpr int64_t kLanes = 8, kMostRows = 2, kMostUnits = 2;
inline F zero() { return _mm256_setzero_ps(); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void put(float* p, F v) { _mm256_storeu_ps(p, v); }
inline F plus(F a, F b) { return _mm256_add_ps(a, b); }
inline F all(float x) { return _mm256_set1_ps(x); }
inline F times_plus(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline W load_pairs(const uint16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline W all_pairs(uint32_t pair) { return _mm256_set1_epi32(static_cast<int>(pair)); }
inline F low(W w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)); }
inline F high(W w) {
  return _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
inline F pairs_plus(W a, W b, F c) {
  return times_plus(high(a), high(b), times_plus(low(a), low(b), c));
}
#else
typedef float F __attribute__((vector_size(16)));
typedef uint32_t W __attribute__((vector_size(16)));
constexpr int64_t kLanes = 4, kMostRows = 2, kMostUnits = 1;
inline F zero() { return F{0, 0, 0, 0}; }
inline F load(const float* p) {
  F v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void put(float* p, F v) { memcpy(p, &v, sizeof v); }
inline F plus(F a, F b) { return a + b; }
inline F all(float x) { return F{x, x, x, x}; }
inline F times_plus(F a, F b, F c) { return a * b + c; }
inline W load_pairs(const uint16_t* p) {
  W v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline W all_pairs(uint32_t pair) { return W{pair, pair, pair, pair}; }
inline F low(W w) { return reinterpret_cast<F>(w << 16); }
inline F high(W w) { return reinterpret_cast<F>(w & 0xffff0000u); }
inline F pairs_plus(W a, W b, F c) {
  return times_plus(high(a), high(b), times_plus(low(a), low(b), c));
}
#endif

// MR rows of x times NU units of one panel over part of K. `c` gets the sums (first) or has them
// added. Strides `ldx`, `ldc` in elements; `ldb`: columns of the panel.
struct Tile {
  const void* x;
  int64_t ldx;
  const void* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int64_t k;
  bool first;
};
using Kernel = void (*)(const Tile&);

template <int MR, int NR>
inline void add_sums(const Tile& t, const F (&sums)[MR][NR]) {
  UNROLL for (int r = 0; r < MR; r++) {
    UNROLL for (int n = 0; n < NR; n++) {
      float* c = t.c + r * t.ldc + kLanes * n;
      put(c, t.first ? sums[r][n] : plus(load(c), sums[r][n]));
    }
  }
}

template <int MR, int NU>
void bf16_tile(const Tile& t) {
  constexpr int NR = NU * kUnit / kLanes;
  const uint16_t* x = static_cast<const uint16_t*>(t.x);
  const uint16_t* b = static_cast<const uint16_t*>(t.b);
  const int64_t ldx = t.ldx, step = t.ldb * 2, pairs = t.k / 2;
  F sums[MR][NR];
  UNROLL for (int r = 0; r < MR; r++) {
    UNROLL for (int n = 0; n < NR; n++) sums[r][n] = zero();
  }
  for (int64_t k = 0; k < pairs; k++, b += step) {
    W w[NR];
    UNROLL for (int n = 0; n < NR; n++) w[n] = load_pairs(b + 2 * kLanes * n);
    UNROLL for (int r = 0; r < MR; r++) {
      const W a = all_pairs(pair_at(x + r * ldx + 2 * k));
      UNROLL for (int n = 0; n < NR; n++) sums[r][n] = pairs_plus(a, w[n], sums[r][n]);
    }
  }
  if (t.k % 2) {
    UNROLL for (int r = 0; r < MR; r++) {
      const W a = all_pairs(x[r * ldx + t.k - 1]);
      UNROLL for (int n = 0; n < NR; n++)
        sums[r][n] = pairs_plus(a, load_pairs(b + 2 * kLanes * n), sums[r][n]);
    }
  }
  add_sums<MR, NR>(t, sums);
}

template <int MR, int NU>
void fp32_tile(const Tile& t) {
  constexpr int NR = NU * kUnit / kLanes;
  const float* x = static_cast<const float*>(t.x);
  const float* b = static_cast<const float*>(t.b);
  const int64_t ldx = t.ldx, step = t.ldb;
  F sums[MR][NR];
  UNROLL for (int r = 0; r < MR; r++) {
    UNROLL for (int n = 0; n < NR; n++) sums[r][n] = zero();
  }
  for (int64_t k = 0; k < t.k; k++, b += step) {
    F w[NR];
    UNROLL for (int n = 0; n < NR; n++) w[n] = load(b + kLanes * n);
    UNROLL for (int r = 0; r < MR; r++) {
      const F a = all(x[r * ldx + k]);
      UNROLL for (int n = 0; n < NR; n++) sums[r][n] = times_plus(a, w[n], sums[r][n]);
    }
  }
  add_sums<MR, NR>(t, sums);
}

#if defined(__AVX512F__)
#define ROW(f, m) {f<m, 1>, f<m, 2>, f<m, 3>, f<m, 4>}
#define TABLE(f) {ROW(f, 1), ROW(f, 2), ROW(f, 3), ROW(f, 4), ROW(f, 5), ROW(f, 6)}
#elif defined(__AVX2__)
#define TABLE(f) {{f<1, 1>, f<1, 2>}, {f<2, 1>, f<2, 2>}}
#else
#define TABLE(f) {{f<1, 1>}, {f<2, 1>}}
#endif
const Kernel kBf16[kMostRows][kMostUnits] = TABLE(bf16_tile);  // [rows - 1][units - 1]
const Kernel kFp32[kMostRows][kMostUnits] = TABLE(fp32_tile);

inline uint16_t rounded(float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void store(float* c, const float* bias, bool bf16, void* y, int64_t columns) {
  if (bias) {
    for (int64_t n = 0; n < ds_cp::round_up(columns, kUnit); n += kLanes)
      put(c + n, plus(load(c + n), load(bias + n)));
  }
  if (!bf16) {
    memcpy(y, c, columns * sizeof(float));
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(y);
  for (int64_t n = 0; n < columns; n++) out[n] = rounded(c[n]);
}

}  // namespace

namespace ds_cp {

void DS_CP_NAME(linear_tile)(const LinearCall& call, int64_t m0, int64_t rows, int64_t u0,
                             int64_t units, float* c) {
  const Linear& l = *call.linear;
  const int64_t size = l.bf16 ? 2 : 4, p = l.bf16 ? 2 : 1, k_packed = round_up(l.k, p);
  const int64_t ldc = units * kUnit, columns_packed = round_up(l.n, kUnit);
  const char* x0 = call.x + m0 * call.ldx * size;
  const int64_t block = l.bf16 ? kBlockBf16 : kBlockFp32;
  // Many rows: a stretch of a panel stays in the second-level cache while they pass.
  const int64_t stretch = rows <= kFew ? l.k : kBlockBf16;
  for (int64_t k0 = 0; k0 < l.k; k0 += stretch) {
    for (int64_t u = u0; u < u0 + units;) {
      const int64_t panel = u * kUnit / kPanel, within = u * kUnit % kPanel;
      const int64_t width = least(kPanel, columns_packed - panel * kPanel);
      const int64_t now = least(least((width - within) / kUnit, u0 + units - u), kMostUnits);
      const char* b =
          static_cast<const char*>(l.packed) + (panel * kPanel * k_packed + within * p) * size;
      for (int64_t k = k0; k < least(k0 + stretch, l.k); k += block) {
        const int64_t depth = least(block, l.k - k);
        for (int64_t r = 0; r < rows;) {
          const int64_t some = least(kMostRows, rows - r);
          const Tile tile = {x0 + (r * call.ldx + k) * size, call.ldx, b + k * width * size, width,
                             c + r * ldc + (u - u0) * kUnit, ldc,      depth,                k == 0};
          (l.bf16 ? kBf16 : kFp32)[some - 1][now - 1](tile);
          r += some;
        }
      }
      u += now;
    }
  }
  const int64_t columns = least(units * kUnit, l.n - u0 * kUnit);
  for (int64_t r = 0; r < rows; r++) {
    char* y = call.y + ((m0 + r) * call.ldy + u0 * kUnit) * size;
    store(c + r * ldc, l.bias ? l.bias + u0 * kUnit : nullptr, l.bf16, y, columns);
  }
}

}  // namespace ds_cp
