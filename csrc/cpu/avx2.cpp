// SPDX-License-Identifier: Apache-2.0
// The kernels for x86-64-v3: AVX2, FMA, F16C.
#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target( \
    "avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTDIFF_ISA avx2
#define FASTDIFF_LANES 8
#include "cpu/kernels.h"

namespace fastdiff::cpu {
extern const Kernels kAvx2 = avx2::kKernels;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
