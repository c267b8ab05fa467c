// Linear layers: packing, and tasks for threads; see linear.h.
#include "linear.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"

namespace ds_cp {

void linear_tile_avx512bf16(const LinearCall&, int64_t, int64_t, int64_t, int64_t, float*);
void linear_tile_avx512(const LinearCall&, int64_t, int64_t, int64_t, int64_t, float*);
void linear_tile_avx2(const LinearCall&, int64_t, int64_t, int64_t, int64_t, float*);
void linear_tile_baseline(const LinearCall&, int64_t, int64_t, int64_t, int64_t, float*);

namespace {

constexpr int64_t kTasks = 6;     // for each thread, so that all end together
constexpr int64_t kFewTasks = 4;  // the same for a few rows: memory takes the time, and a panel that two
                                  // threads share is read by both
constexpr int64_t kMost = 8;   // layers of one call; ds_cp/model/packed_linear.py has the same

LinearTile tile_of(int64_t isa) {
  switch (isa) {
#ifdef DS_CP_HAS_AVX512BF16
    case kAvx512Bf16:
      return linear_tile_avx512bf16;
#endif
#ifdef DS_CP_HAS_AVX512
    case kAvx512:
      return linear_tile_avx512;
#endif
#ifdef DS_CP_HAS_AVX2
    case kAvx2:
      return linear_tile_avx2;
#endif
    default:
      return linear_tile_baseline;
  }
}

template <class T>
void pack(const T* w, int64_t ldw, int64_t n, int64_t k, int64_t p, T* packed, int64_t panel) {
  const int64_t at = panel * kPanel, k_packed = round_up(k, p);
  const int64_t width = std::min(kPanel, round_up(n, kUnit) - at);
  for (int64_t k0 = 0; k0 < k_packed; k0 += 64) {  // 64 columns and 64 k stay in the cache
    for (int64_t j = 0; j < width; j++) {
      for (int64_t i = k0; i < std::min(k0 + 64, k_packed); i++) {
        const bool there = at + j < n && i < k;
        packed[at * k_packed + (i / p * width + j) * p + i % p] = there ? w[(at + j) * ldw + i] : T{};
      }
    }
  }
}

}  // namespace
}  // namespace ds_cp

using namespace ds_cp;

// Elements of the packed weights of an [N, K] layer.
DS_CP_EXPORT int64_t ds_cp_linear_elements(int64_t n, int64_t k, int64_t bf16) {
  return round_up(n, kUnit) * round_up(k, bf16 ? 2 : 1);
}

// Pack w[N, K], rows `ldw` elements apart, into ds_cp_linear_elements elements.
DS_CP_EXPORT void ds_cp_linear_pack(const void* w, int64_t ldw, int64_t n, int64_t k, int64_t bf16,
                                    void* packed, int64_t threads) {
  parallel_for(round_up(n, kPanel) / kPanel, static_cast<int>(threads), [=](int64_t panel, int) {
    if (bf16) {
      pack(static_cast<const uint16_t*>(w), ldw, n, k, 2, static_cast<uint16_t*>(packed), panel);
    } else {
      pack(static_cast<const uint32_t*>(w), ldw, n, k, 1, static_cast<uint32_t*>(packed), panel);
    }
  });
}

// ys[i][M, N_i] = x[M, K] W_i^T + b_i for `count` layers (at most kMost) of one input by up to
// `threads` threads. Rows of x are `ldx` elements apart and dense within; y is dense.
DS_CP_EXPORT void ds_cp_linear(const Linear* const* linears, int64_t count, const void* x,
                               int64_t m, int64_t ldx, void* const* ys, int64_t threads) {
  struct Share {
    LinearCall call;
    LinearTile tile;
    int64_t all, n_tasks, first;  // units of y, tasks of a stretch of rows, first task
  } shares[kMost];
  const int64_t m_tasks = round_up(m, kRows) / kRows;
  const int64_t wanted = (m <= kFew ? kFewTasks : kTasks) * threads;
  int64_t units = 2 * kPanels * kPanel / kUnit, tasks = 0;
  do {  // smaller tasks until there are enough
    units /= 2;
    tasks = 0;
    for (int64_t i = 0; i < count; i++) {
      const Linear* l = linears[i];
      const int64_t all = round_up(l->n, kUnit) / kUnit, n_tasks = round_up(all, units) / units;
      shares[i] = {{l, static_cast<const char*>(x), static_cast<char*>(ys[i]), m, ldx, l->n},
                   tile_of(l->isa), all, n_tasks, tasks};
      tasks += m_tasks * n_tasks;
    }
  } while (units > 1 && tasks < wanted);
  parallel_for(tasks, static_cast<int>(threads), [&](int64_t task, int) {
    int64_t i = count - 1;
    while (task < shares[i].first) i--;
    const Share& share = shares[i];
    task -= share.first;
    const int64_t m0 = task / share.n_tasks * kRows, u0 = task % share.n_tasks * units;
    // 96 KiB are too much for the stack of a thread that somebody else has made.
    alignas(64) static thread_local float sums[kRows * kPanels * kPanel];
    share.tile(share.call, m0, std::min(kRows, m - m0), u0, std::min(units, share.all - u0), sums);
  });
}
