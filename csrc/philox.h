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
#else
#define FASTDIFF_ROLLED
#endif

namespace fastdiff {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct Words {
    uint32_t w[4];
};

// Philox4x32-10.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
FASTDIFF_HD Words philox(Words counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * counter.w[0];
        const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * counter.w[2];
        counter = {{static_cast<uint32_t>(p1 >> 32) ^ counter.w[1] ^ key0,
                    static_cast<uint32_t>(p1),
                    static_cast<uint32_t>(p0 >> 32) ^ counter.w[3] ^ key1,
                    static_cast<uint32_t>(p0)}};
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
        return __fsqrt_rn(v);
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
    const F u = (O::to_float((I)(word_a >> 9)) + 0.5f) * 0x1p-23f;
    const U bits = O::bits(u);
    const I k = (I)(bits - 0x3F2AAAABu) >> 23;
    const F f = O::from_bits(bits - ((U)k << 23)) - 1.0f;
    F p = O::all(-0.1288565695285797f);
    p = O::fma(p, f, O::all(0.13986897468566895f));
    p = O::fma(p, f, O::all(-0.12185713648796082f));
    p = O::fma(p, f, O::all(0.14005306363105774f));
    p = O::fma(p, f, O::all(-0.1668037623167038f));
    p = O::fma(p, f, O::all(0.2001044601202011f));
    p = O::fma(p, f, O::all(-0.24999800324440002f));
    p = O::fma(p, f, O::all(0.3333321511745453f));
    const F ff = f * f;
    const F tail = O::fma(ff * f, p * -2.0f, ff);  // f^2 - 2 f^3 p
    const F mantissa = O::fma(f, O::all(-2.0f), tail);
    const F r = O::sqrt(O::fma(O::to_float(k), O::all(-1.3862943649291992f), mantissa));

    // Angle in turns: quadrant q and the rest t in [-1/8, 1/8], both exact.
    const I turn = (I)(word_b >> 9);
    const I q = (turn + (1 << 20)) >> 21;
    const F t = (O::to_float(turn - (I)((U)q << 21)) + 0.5f) * 0x1p-23f;
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
    const U odd = U{} - ((U)q & 1u);  // all ones where the quadrant swaps sine and cosine
    const U cos_sign = (((U)q + 1u) & 2u) << 30;
    const U sin_sign = ((U)q & 2u) << 30;
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
