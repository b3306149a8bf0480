// SPDX-License-Identifier: Apache-2.0
// Vectors of one instruction set: arithmetic, and loads and stores that cast.
//
// Included once by each instruction set's file, which sets FASTDIFF_LANES (float32 lanes of a
// vector) and FASTDIFF_ISA (a namespace) and switches the compiler's target before any include.
// Everything here and in the headers that include it lies in that namespace or is inlined by force:
// a function shared between those files would be kept once, perhaps with instructions that the
// machine does not have.
#pragma once

#include "cpu/cpu.h"

#if FASTDIFF_LANES > 4
#include <immintrin.h>
#endif
#include <string.h>

#define FASTDIFF_INLINE inline __attribute__((always_inline))

namespace fastdiff::cpu::FASTDIFF_ISA {

constexpr int kLanes = FASTDIFF_LANES;

typedef float F __attribute__((vector_size(4 * FASTDIFF_LANES)));
typedef int32_t I __attribute__((vector_size(4 * FASTDIFF_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * FASTDIFF_LANES)));
typedef uint64_t L __attribute__((vector_size(4 * FASTDIFF_LANES)));
typedef double D __attribute__((vector_size(4 * FASTDIFF_LANES)));

// -- vectors -------------------------------------------------------------------------------------

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
    using V = F;
    using Bits = I;
};
template <>
struct VectorOf<double> {
    using V = D;
    typedef int64_t Bits __attribute__((vector_size(4 * FASTDIFF_LANES)));
};
template <class T>
using Vector = typename VectorOf<T>::V;
template <class T>
constexpr int kWidth = static_cast<int>(sizeof(F) / sizeof(T));

template <class T>
FASTDIFF_INLINE Vector<T> splat(T v) {
    return v - Vector<T>{};  // v - 0: exact, and -0 stays -0
}

FASTDIFF_INLINE F vector_fma(F a, F b, F c) {
#if FASTDIFF_LANES == 16
    return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FASTDIFF_LANES == 8
    return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    for (int l = 0; l < kLanes; ++l) c[l] = fused(a[l], b[l], c[l]);
    return c;
#endif
}
FASTDIFF_INLINE D vector_fma(D a, D b, D c) {
#if FASTDIFF_LANES == 16
    return (D)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif FASTDIFF_LANES == 8
    return (D)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    for (int l = 0; l < kLanes / 2; ++l) c[l] = fused(a[l], b[l], c[l]);
    return c;
#endif
}

// A full vector of T from storage of type S.
template <class T>
FASTDIFF_INLINE Vector<T> load(const T* p) {
    Vector<T> v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class T, class S>
FASTDIFF_INLINE Vector<T> load_as(const S* p) {
    if constexpr (sizeof(T) == sizeof(S)) {
        return load(p);
    } else {
#if FASTDIFF_LANES == 16
        if constexpr (sizeof(T) == 4 && sizeof(S) == 8) {
            const __m256 lo = _mm512_cvtpd_ps(_mm512_loadu_pd(p));
            const __m256 hi = _mm512_cvtpd_ps(_mm512_loadu_pd(p + 8));
            return (F)_mm512_insertf32x8(_mm512_castps256_ps512(lo), hi, 1);
        } else if constexpr (sizeof(T) == 8 && sizeof(S) == 4) {
            return (D)_mm512_cvtps_pd(_mm256_loadu_ps(p));
        } else if constexpr (sizeof(T) == 4) {
            const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
            if constexpr (__is_same(S, Float16)) return (F)_mm512_cvtph_ps(raw);
            return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
        } else {
            const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
            if constexpr (__is_same(S, Float16)) return (D)_mm512_cvtps_pd(_mm256_cvtph_ps(raw));
            const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
            return (D)_mm512_cvtps_pd(_mm256_castsi256_ps(wide));
        }
#elif FASTDIFF_LANES == 8
        if constexpr (sizeof(T) == 4 && sizeof(S) == 8) {
            const __m128 lo = _mm256_cvtpd_ps(_mm256_loadu_pd(p));
            const __m128 hi = _mm256_cvtpd_ps(_mm256_loadu_pd(p + 4));
            return (F)_mm256_set_m128(hi, lo);
        } else if constexpr (sizeof(T) == 8 && sizeof(S) == 4) {
            return (D)_mm256_cvtps_pd(_mm_loadu_ps(p));
        } else if constexpr (sizeof(T) == 4) {
            const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
            if constexpr (__is_same(S, Float16)) return (F)_mm256_cvtph_ps(raw);
            return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
        } else {
            const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
            if constexpr (__is_same(S, Float16)) return (D)_mm256_cvtps_pd(_mm_cvtph_ps(raw));
            const __m128i wide = _mm_slli_epi32(_mm_cvtepu16_epi32(raw), 16);
            return (D)_mm256_cvtps_pd(_mm_castsi128_ps(wide));
        }
#else
        Vector<T> v;
        for (int l = 0; l < kWidth<T>; ++l) v[l] = static_cast<T>(widen(p[l]));
        return v;
#endif
    }
}

template <class M>
FASTDIFF_INLINE void store_as(M* p, F v) {
    if constexpr (sizeof(M) == 4) {
        memcpy(p, &v, sizeof v);
    } else {
#if FASTDIFF_LANES == 16
        if constexpr (sizeof(M) == 8) {
            _mm512_storeu_pd(p, _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)));
            _mm512_storeu_pd(p + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1)));
        } else if constexpr (__is_same(M, Float16)) {
            const __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
        } else {
            const U u = (U)v;
            const U rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
            const U bits = (u & 0x7FFFFFFFu) > 0x7F800000u ? (U{} + 0x7FC0u) : rounded;
            const __m256i half = _mm512_cvtepi32_epi16((__m512i)bits);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
        }
#elif FASTDIFF_LANES == 8
        if constexpr (sizeof(M) == 8) {
            _mm256_storeu_pd(p, _mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)));
            _mm256_storeu_pd(p + 4, _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1)));
        } else if constexpr (__is_same(M, Float16)) {
            const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
        } else {
            const U u = (U)v;
            const U rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
            const U bits = (u & 0x7FFFFFFFu) > 0x7F800000u ? (U{} + 0x7FC0u) : rounded;
            const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
            const __m256i half = _mm256_permute4x64_epi64(packed, 0x08);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(half));
        }
#else
        for (int l = 0; l < kLanes; ++l) narrow(static_cast<float>(v[l]), p[l]);
#endif
    }
}
template <class M>
FASTDIFF_INLINE void store_as(M* p, D v) {
    if constexpr (sizeof(M) == 8) {
        memcpy(p, &v, sizeof v);
    } else {
        for (int l = 0; l < kWidth<double>; ++l) narrow(static_cast<double>(v[l]), p[l]);
    }
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
