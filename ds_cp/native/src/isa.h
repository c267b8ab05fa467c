// Variants by instruction set. A file *_kernels.cpp is compiled once per variant with DS_CP_ISA set
// to its name. Such a file includes only C headers and intrinsics and keeps everything but its
// DS_CP_NAME(...) functions in an anonymous namespace: an inline function of the C++ library,
// compiled here for AVX-512 and merged by the linker, would also be run on processors without it.
#pragma once

#include <stdint.h>

#define DS_CP_JOIN2(a, b) a##_##b
#define DS_CP_JOIN(a, b) DS_CP_JOIN2(a, b)
#define DS_CP_EXPORT extern "C" __attribute__((visibility("default")))

#ifdef DS_CP_ISA
// The name of a function of this variant: DS_CP_NAME(attend) is attend_avx2 and so on.
#define DS_CP_NAME(name) DS_CP_JOIN(name, DS_CP_ISA)
#endif

namespace ds_cp {

// Numbers of the variants, the best first; Python passes names' numbers through ds_cp_isa_number.
enum Isa { kAvx512Bf16 = 0, kAvx512 = 1, kAvx2 = 2, kBaseline = 3, kIsas = 4 };

// Whether the variant is in the library and this processor (and system) can run it.
bool isa_runs(int isa);

}  // namespace ds_cp
