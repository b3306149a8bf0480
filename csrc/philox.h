// SPDX-License-Identifier: Apache-2.0
// Counter-based normals: the definition that every backend reproduces bit for bit.
//
// Element i of a sample takes normal i % 4 of counter i / 4:
//   key     = (low 32, high 32 bits of the sample's seed)
//   counter = (low 32 bits of i / 4, stream, high 32 bits of i / 4, 0)
// so the third word is 0 up to 2^34 elements a sample. Logarithm, sine and cosine are polynomials
// with explicit fma: no libm gives the same bits on two machines, and these vectorise.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define FASTDIFF_HD __host__ __device__ __forceinline__
#else
#define FASTDIFF_HD inline __attribute__((always_inline))
#endif
// Before a loop of a GPU thread that is kept a loop: unrolled, its loads would take registers that
// other threads need.
#if defined(__CUDA_ARCH__)
#define FASTDIFF_ROLLED _Pragma("unroll 1")
#define FASTDIFF_UNROLLED _Pragma("unroll")
#else
#define FASTDIFF_ROLLED
#define FASTDIFF_UNROLLED
#endif

namespace fastdiff {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct Words {
    uint32_t w[4];
};

FASTDIFF_HD uint32_t high_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    return __umulhi(a, b);  // shifted from 64 bits, it costs an addition of 0
#else
    return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

// Philox4x32-10.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
FASTDIFF_HD Words philox(Words counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
        counter = {{high_product(kPhiloxM1, counter.w[2]) ^ counter.w[1] ^ key0,
                    kPhiloxM1 * counter.w[2],
                    high_product(kPhiloxM0, counter.w[0]) ^ counter.w[3] ^ key1,
                    kPhiloxM0 * counter.w[0]}};
        key0 += kPhiloxW0;
        key1 += kPhiloxW1;
    }
    return counter;
}

FASTDIFF_HD Words noise_words(uint64_t seed, uint32_t stream, uint64_t quad) {
    const uint32_t low = static_cast<uint32_t>(quad), high = static_cast<uint32_t>(quad >> 32);
    const Words counter = {{low, stream, high, 0}};
    return philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

FASTDIFF_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}

FASTDIFF_HD double fused(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
    return __fma_rn(a, b, c);
#else
    return __builtin_fma(a, b, c);
#endif
}

// What `normal_pair` needs of a lane type; the CPU's vectors supply their own.
struct ScalarLanes {
    using F = float;
    using I = int32_t;
    using U = uint32_t;
    static FASTDIFF_HD F all(float v) { return v; }
    static FASTDIFF_HD F to_float(I v) { return static_cast<float>(v); }
    static FASTDIFF_HD F fma(F a, F b, F c) { return fused(a, b, c); }
    static FASTDIFF_HD U bits(F v) {
#if defined(__CUDA_ARCH__)
        return __float_as_uint(v);
#else
        U u;
        __builtin_memcpy(&u, &v, sizeof u);
        return u;
#endif
    }
    static FASTDIFF_HD F from_bits(U v) {
#if defined(__CUDA_ARCH__)
        return __uint_as_float(v);
#else
        F f;
        __builtin_memcpy(&f, &v, sizeof f);
        return f;
#endif
    }
    static FASTDIFF_HD F sqrt(F v) {
#if defined(__CUDA_ARCH__)
        // `__fsqrt_rn` from 2^-101 up, without its test of what lies outside
        float root;
        asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(v));
        const float near = __fmul_rn(v, root);
        return __fmaf_rn(__fmaf_rn(-near, near, v), __fmul_rn(root, 0.5f), near);
#else
        return __builtin_sqrtf(v);
#endif
    }
};

// Box-Muller: two words make two normals r cos(2 pi u_b), r sin(2 pi u_b), r = sqrt(-2 log u_a),
// u = ((word >> 9) + 0.5) 2^-23, which lies in (0, 1) and is exact in float32.
template <class O>
FASTDIFF_HD void normal_pair(typename O::U word_a, typename O::U word_b, typename O::F& first,
                             typename O::F& second) {
    using F = typename O::F;
    using I = typename O::I;
    using U = typename O::U;

    // u_a = m 2^k with m in [2/3, 4/3); log u = k log 2 + log1p(m - 1); all times -2.
    const F u = O::from_bits((word_a >> 9) | 0x3F800000u) - 0x1.fffffep-1f;  // both exact
    const U bits = O::bits(u), k = (bits - 0x3F2AAAABu) & 0xFF800000u;         // times 2^23
    const F f = O::from_bits(bits - k) - 1.0f;
    F p = O::all(0.2577131390571594f);
    p = O::fma(p, f, O::all(-0.2797379493713379f));
    p = O::fma(p, f, O::all(0.24371427297592163f));
    p = O::fma(p, f, O::all(-0.2801061272621155f));
    p = O::fma(p, f, O::all(0.3336075246334076f));
    p = O::fma(p, f, O::all(-0.4002089202404022f));
    p = O::fma(p, f, O::all(0.49999600648880005f));
    p = O::fma(p, f, O::all(-0.6666643023490906f));
    const F ff = f * f;
    const F mantissa = O::fma(f, O::all(-2.0f), O::fma(ff * f, p, ff));  // -2 f + f^2 + f^3 p
    const F log_2 = O::all(-1.3862943649291992f * 0x1p-23f);
    const F r = O::sqrt(O::fma(O::to_float((I)k), log_2, mantissa));

    // Angle in turns, and 1/8: its two highest bits are the quadrant q, whose middle is at 0, and
    // the rest is t in [-1/8, 1/8], exact.
    const U turn = word_b + 0x20000000u;
    const F t = O::from_bits(((turn >> 7) & 0x7FFFFCu) | 0x3E800000u) - (0.375f - 0x1p-24f);
    const F z = t * t;
    F s = O::all(-75.46574401855469f);
    s = O::fma(s, z, O::all(81.59423065185547f));
    s = O::fma(s, z, O::all(-41.3416748046875f));
    s = t * O::fma(s, z, O::all(6.2831854820251465f));
    F c = O::all(58.5575065612793f);
    c = O::fma(c, z, O::all(-85.4230728149414f));
    c = O::fma(c, z, O::all(64.93914031982422f));
    c = O::fma(c, z, O::all(-19.739208221435547f));
    c = O::fma(c, z, O::all(1.0f));
    const U sin_bits = O::bits(s), cos_bits = O::bits(c);
    const U odd = (U)((I)(turn << 1) >> 31);  // all ones where the quadrant swaps sine and cosine
    const U cos_sign = (turn + 0x40000000u) & 0x80000000u, sin_sign = turn & 0x80000000u;
    first = r * O::from_bits(((cos_bits & ~odd) | (sin_bits & odd)) ^ cos_sign);
    second = r * O::from_bits(((sin_bits & ~odd) | (cos_bits & odd)) ^ sin_sign);
}

// The four normals of one counter.
FASTDIFF_HD void normal_quad(uint64_t seed, uint32_t stream, uint64_t quad, float z[4]) {
    const Words words = noise_words(seed, stream, quad);
    normal_pair<ScalarLanes>(words.w[0], words.w[1], z[0], z[1]);
    normal_pair<ScalarLanes>(words.w[2], words.w[3], z[2], z[3]);
}

}  // namespace fastdiff
