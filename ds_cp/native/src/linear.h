// Linear layers with weights packed once: y[M, N] = x[M, K] W^T + b, bf16 or fp32.
//
// Each element of y is one chain of sums over K in a fixed order: blocks of K of a constant length,
// ascending, each from zero on, then the bias, then one rounding. How many rows there are, how they
// are tiled and how many threads work changes which registers hold a chain, never the chain. So a
// row of y has the same bits alone (a decode step) and among thousands (a prefill). Another
// instruction set has other chains.
//
// Packed weights: panels of 64 columns of y (the last one of 16, 32, 48 or 64), each
// [K / p][columns][p] with p = 2 for bf16 and 1 for fp32, padded with zeros.
#pragma once

#include <stdint.h>

namespace ds_cp {

constexpr int64_t kUnit = 16;     // columns: the least that is computed
constexpr int64_t kPanel = 64;    // columns of a panel
constexpr int64_t kRows = 96;     // of x, that stay in the second-level cache
constexpr int64_t kPanels = 4;    // for which such rows are used again
constexpr int64_t kFew = 12;      // rows for which panels are read once, in the order of memory

struct Linear {  // ds_cp/model/packed_linear.py has the same
  const void* packed;
  const float* bias;  // null, or N padded to a multiple of kUnit
  int64_t n;
  int64_t k;
  int64_t bf16;  // 1: bf16, 0: fp32
  int64_t isa;   // of isa.h
};

struct LinearCall {
  const Linear* linear;
  const char* x;
  char* y;
  int64_t m, ldx, ldy;  // strides of rows, in elements
};

// Rows [m0, m0 + rows) and units [u0, u0 + units) of y, at most kRows and kPanels panels of them.
// `sums`: room for kRows * kPanels * kPanel numbers, at a multiple of 64.
using LinearTile = void (*)(const LinearCall& call, int64_t m0, int64_t rows, int64_t u0,
                            int64_t units, float* sums);

// Static: see isa.h.
static inline __attribute__((always_inline)) int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

}  // namespace ds_cp
