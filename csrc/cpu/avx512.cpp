// SPDX-License-Identifier: Apache-2.0
// The kernels for x86-64-v4: AVX-512 F, DQ, BW and VL.
#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target( \
    "avx512f,avx512dq,avx512bw,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#endif
#define FASTDIFF_ISA avx512
#define FASTDIFF_LANES 16
#include "cpu/kernels.h"

namespace fastdiff::cpu {
extern const Kernels kAvx512 = avx512::kKernels;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
