// What the library says of itself.
#include "isa.h"

#include <string>

namespace ds_cp {

bool isa_runs(int isa) {
#if defined(__x86_64__)
  switch (isa) {
#ifdef DS_CP_HAS_AVX512BF16
    case kAvx512Bf16:
      return __builtin_cpu_supports("avx512bf16") && isa_runs(kAvx512);
#endif
#ifdef DS_CP_HAS_AVX512
    case kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             isa_runs(kAvx2);
#endif
#ifdef DS_CP_HAS_AVX2
    case kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
#endif
    default:
      break;
  }
#endif
  return isa == kBaseline;
}

}  // namespace ds_cp

DS_CP_EXPORT const char* ds_cp_stamp() { return DS_CP_STAMP; }

// Names of the variants that run here, the best first, with spaces between.
DS_CP_EXPORT const char* ds_cp_isas() {
  static const std::string names = [] {
    const char* const all[ds_cp::kIsas] = {"avx512bf16", "avx512", "avx2", "baseline"};
    std::string found;
    for (int isa = 0; isa < ds_cp::kIsas; ++isa)
      if (ds_cp::isa_runs(isa)) found += (found.empty() ? "" : " ") + std::string(all[isa]);
    return found;
  }();
  return names.c_str();
}
