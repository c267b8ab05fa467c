// ATen's product of bf16 matrices (oneDNN's brgemm), found in torch's library by its C++ name: no header
// of torch is needed, and it uses AMX where the processor has it.
#include <dlfcn.h>

#include "attention.h"
#include "parallel.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace ds_cp {
namespace {

Brgemm find() {
  Brgemm found;
  void* handle = torch_library();
  if (!handle) return found;
  found.multiply = reinterpret_cast<decltype(found.multiply)>(
      dlsym(handle, "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"));
  found.release = reinterpret_cast<decltype(found.release)>(
      dlsym(handle, "_ZN2at6native7cpublas14brgemm_releaseEb"));
  return found;
}

bool has_amx() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
#else
  return false;
#endif
}

}  // namespace

const Brgemm& brgemm() {
  static const Brgemm found = find();
  return found;
}

}  // namespace ds_cp

// 0: there is no brgemm for this processor; 1: there is; 2: and it uses AMX. Call it when torch has been
// imported. It stands on the bf16 instructions of AVX-512, without which ATen's brgemm refuses.
DS_CP_EXPORT int64_t ds_cp_brgemm() {
  using namespace ds_cp;
  if (!isa_runs(kAvx512Bf16) || !brgemm().multiply || !brgemm().release) return 0;
  return has_amx() ? 2 : 1;
}
