// RMS norms: tasks for threads; see norm_kernels.cpp.
#include <stdint.h>

#include <algorithm>

#include "isa.h"
#include "parallel.h"

namespace ds_cp {

#define DS_CP_NORM(isa) \
  void rms_norm_##isa(const void*, int64_t, int64_t, const float*, int64_t, float, bool, bool, void*)
DS_CP_NORM(avx512bf16);
DS_CP_NORM(avx512);
DS_CP_NORM(avx2);
DS_CP_NORM(baseline);

namespace {

constexpr int64_t kElements = 32768;  // of a task

auto norm_of(int64_t isa) {
  switch (isa) {
#ifdef DS_CP_HAS_AVX512BF16
    case kAvx512Bf16:
      return rms_norm_avx512bf16;
#endif
#ifdef DS_CP_HAS_AVX512
    case kAvx512:
      return rms_norm_avx512;
#endif
#ifdef DS_CP_HAS_AVX2
    case kAvx2:
      return rms_norm_avx2;
#endif
    default:
      return rms_norm_baseline;
  }
}

}  // namespace
}  // namespace ds_cp

using namespace ds_cp;

// y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * w over rows of n, computed in fp32. `round_first`: the
// quotient is rounded to the dtype before the product is.
DS_CP_EXPORT void ds_cp_rms_norm(const void* x, int64_t rows, int64_t ldx, const float* w, int64_t n,
                                 float eps, int64_t bf16, int64_t round_first, int64_t isa, void* y,
                                 int64_t threads) {
  const int64_t some = std::max<int64_t>(1, kElements / n), size = bf16 ? 2 : 4;
  const auto norm = norm_of(isa);
  parallel_for((rows + some - 1) / some, static_cast<int>(threads), [=](int64_t task, int) {
    const int64_t r = task * some;
    norm(static_cast<const char*>(x) + r * ldx * size, std::min(some, rows - r), ldx, w, n, eps,
         bf16, round_first, static_cast<char*>(y) + r * n * size);
  });
}
