// SPDX-License-Identifier: Apache-2.0
// Storage types, and casts between them and the arithmetic types.
#pragma once

#include "philox.h"

namespace fastdiff {

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

FASTDIFF_HD float widen(float v) { return v; }
FASTDIFF_HD double widen(double v) { return v; }
FASTDIFF_HD float widen(Bfloat16 v) {
    return ScalarLanes::from_bits(static_cast<uint32_t>(v.bits) << 16);
}
FASTDIFF_HD float widen(Float16 v) {
    const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
    const uint32_t rest = v.bits & 0x7FFFu;
#if defined(__CUDA_ARCH__)
    if (rest <= 0x7C00u) {
        float wide;
        asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
        return wide;
    }
#endif
    if (rest >= 0x7C00u) {  // infinity; NaN keeps its payload and turns quiet
        return ScalarLanes::from_bits(sign | 0x7F800000u | (rest & 0x3FFu) << 13 |
                                      (rest > 0x7C00u ? 0x400000u : 0u));
    }
    if (rest >= 0x400u) return ScalarLanes::from_bits(sign | ((rest << 13) + 0x38000000u));
    return ScalarLanes::from_bits(ScalarLanes::bits(static_cast<float>(rest) * 0x1p-24f) | sign);
}

// Rounded to nearest even. From float64, 16-bit types go through float32, as PyTorch's cast does.
FASTDIFF_HD void narrow(float v, float& to) { to = v; }
FASTDIFF_HD void narrow(float v, double& to) { to = v; }
FASTDIFF_HD void narrow(float v, Bfloat16& to) {
    const uint32_t u = ScalarLanes::bits(v);
    const bool nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
    to.bits = static_cast<uint16_t>(nan ? 0x7FC0u : (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}
FASTDIFF_HD void narrow(float v, Float16& to) {
    const uint32_t u = ScalarLanes::bits(v);
    const uint32_t sign = (u >> 16) & 0x8000u, a = u & 0x7FFFFFFFu;
#if defined(__CUDA_ARCH__)
    if (a <= 0x7F800000u) {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(v));
        return;
    }
#endif
    uint32_t half;
    if (a > 0x7F800000u) {
        half = 0x7E00u | ((a >> 13) & 0x3FFu);
    } else if (a >= 0x47800000u) {  // 2^16
        half = 0x7C00u;
    } else if (a >= 0x38800000u) {  // 2^-14, the least normal
        const uint32_t r = a - 0x38000000u;
        half = (r + 0xFFFu + ((r >> 13) & 1u)) >> 13;
    } else if (a > 0x33000000u) {  // above 2^-25: a multiple of 2^-24
        const uint32_t mantissa = (a & 0x7FFFFFu) | 0x800000u, shift = 126u - (a >> 23);
        const uint32_t rest = mantissa & ((1u << shift) - 1u), middle = 1u << (shift - 1u);
        half = mantissa >> shift;
        half += rest > middle || (rest == middle && (half & 1u));
    } else {
        half = 0;
    }
    to.bits = static_cast<uint16_t>(sign | half);
}
template <class S>
FASTDIFF_HD void narrow(double v, S& to) {
    narrow(static_cast<float>(v), to);
}
FASTDIFF_HD void narrow(double v, double& to) { to = v; }

}  // namespace fastdiff
