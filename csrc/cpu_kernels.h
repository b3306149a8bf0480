// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of one instruction set: `stage.h` and `philox.h` over packs of vectors.
//
// Included once by each cpu*.cpp, which sets FASTDIFF_LANES (float32 lanes of a vector) and
// FASTDIFF_ISA (a namespace) and switches the compiler's target before any include. Everything here
// lies in that namespace or is inlined by force: a function shared between those files would be
// kept once, perhaps with instructions that the machine does not have.
#pragma once

#include "cpu.h"

#if FASTDIFF_LANES > 4
#include <immintrin.h>
#endif
#include <string.h>

#define FASTDIFF_INLINE inline __attribute__((always_inline))

namespace fastdiff::cpu::FASTDIFF_ISA {

constexpr int kLanes = FASTDIFF_LANES;
constexpr int64_t kBlock = 1024;  // elements between two draws of noise: stays in the first cache

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

// -- the stage -----------------------------------------------------------------------------------

// U vectors of T that one `update` works on; U > 1 spreads the row's branches over more elements.
template <class T, class S, int U>
struct Pack {
    struct V {
        Vector<T> v[U];
    };
    static constexpr bool kNoiseFirst = false;
    static constexpr bool kThresholds = U == 1;  // a test that other rows need not make
    const Span<T, S>& at;
    int64_t i;

    template <class From>
    FASTDIFF_INLINE V read(const From* p) const {
        V r;
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) r.v[u] = load_as<T>(p + i + u * kWidth<T>);
        return r;
    }
    template <class M>
    FASTDIFF_INLINE void write(M* p, const V& v) const {
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) store_as(p + i + u * kWidth<T>, v.v[u]);
    }
    FASTDIFF_INLINE V zero() const {
        V r;
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) r.v[u] = Vector<T>{};
        return r;
    }
    FASTDIFF_INLINE V fma(T c, const V& v, const V& sum) const {
        const Vector<T> k = splat(c);
        V r;
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) r.v[u] = vector_fma(k, v.v[u], sum.v[u]);
        return r;
    }
    FASTDIFF_INLINE V mul(T c, const V& v) const {
        V r;
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) r.v[u] = v.v[u] * splat(c);
        return r;
    }
    FASTDIFF_INLINE V clip(const V& v, T lo, T hi) const {
        V r;
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
            const Vector<T> raised = v.v[u] < splat(lo) ? splat(lo) : v.v[u];
            r.v[u] = v.v[u] > splat(hi) ? splat(hi) : raised;
        }
        return r;
    }
    FASTDIFF_INLINE V divide(const V& v, T by) const {
        V r;
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) r.v[u] = v.v[u] / splat(by);
        return r;
    }
    FASTDIFF_INLINE T scale() const { return at.scale; }
    FASTDIFF_INLINE V x() const { return read(at.x); }
    FASTDIFF_INLINE V e() const { return read(at.e); }
    FASTDIFF_INLINE V out(int g) const { return read(at.out[g]); }
    FASTDIFF_INLINE V term(int j) const { return read(at.term[j]); }
    FASTDIFF_INLINE V extra(int k) const { return read(at.extra[k]); }
    FASTDIFF_INLINE V xi() const { return read(at.xi); }
    FASTDIFF_INLINE V draw(int d) const { return read(at.draw[d]); }
    FASTDIFF_INLINE void put_x(const V& v) const { write(at.x, v); }
    FASTDIFF_INLINE void put_e(const V& v) const { write(at.e, v); }
    FASTDIFF_INLINE void put_push(const V& v) const { write(at.push, v); }
    FASTDIFF_INLINE void put_push_x(const V& v) const { write(at.push_x, v); }
    FASTDIFF_INLINE void put_m(const V& v) const {
        for (int64_t k = 0; k < at.copies; ++k) {
            const int64_t offset = k * at.copy_stride;
            switch (at.network) {
                case kFloat32: write(static_cast<float*>(at.m) + offset, v); break;
                case kFloat64: write(static_cast<double*>(at.m) + offset, v); break;
                case kBfloat16: write(static_cast<Bfloat16*>(at.m) + offset, v); break;
                default: write(static_cast<Float16*>(at.m) + offset, v); break;
            }
        }
    }
};

template <bool kHasE, class T, class S>
FASTDIFF_INLINE void update_range(const Row<T>& row, const Span<T, S>& at, int64_t lo, int64_t hi) {
    constexpr int kUnroll = kLanes > 4 ? 4 : 1;
    constexpr int64_t kWide = kUnroll * kWidth<T>;
    const int64_t packed = row.flags & kThreshold ? lo : hi;
    int64_t i = lo;
    for (; i + kWide <= packed; i += kWide) update<kHasE>(row, Pack<T, S, kUnroll>{at, i});
    for (; i + kWidth<T> <= hi; i += kWidth<T>) update<kHasE>(row, Pack<T, S, 1>{at, i});
    for (; i < hi; ++i) update<kHasE>(row, Element<T, S>{at, i});
}

static void normals(const uint64_t* seeds, int64_t size, uint32_t stream, int64_t lo, int64_t hi,
                    float* z);

// A row of which everything but the coefficients is known here, so that `update` compiles to a
// straight line: x' from x, h and kTerms outputs of the history, with or without fresh noise.
template <int kTerms, bool kPoint, bool kPush, bool kNoise, class T>
FASTDIFF_INLINE Row<T> plain_row(const Row<T>& row) {
    Row<T> r;
    r.flags = kEvaluate | kWritesX;
    r.x_reads = kReadsX | kReadsH | (kNoise ? kReadsXi : 0);
    r.e_reads = 0;
    r.loads_x = true;
    r.loads_e = r.writes_m = false;
    r.loads_xi = kNoise;
    r.branches = r.draws = 1;
    r.terms = kTerms;
    r.extras = 0;
    r.push = kPush ? 0 : -1;
    r.push_x = -1;
    r.p = kPoint ? row.p : T(0);
    r.k[0] = row.k[0];
    r.a_x = row.a_x;
    r.b_0 = row.b_0;
    r.c = row.c;
    r.xi[0] = row.xi[0];
#pragma GCC unroll 4
    for (int j = 0; j < kTerms; ++j) r.term[j].b = row.term[j].b;
    return r;
}

template <int kTerms, bool kPoint, bool kPush, bool kNoise, class T, class S>
static int64_t plain_range(const Row<T>& row, const Span<T, S>& from, int64_t lo, int64_t hi) {
    const Row<T> plain = plain_row<kTerms, kPoint, kPush, kNoise>(row);
    Span<T, S> at;
    at.x = from.x;
    at.push = from.push;
    at.out[0] = from.out[0];
    at.draw[0] = from.draw[0];
#pragma GCC unroll 4
    for (int j = 0; j < kTerms; ++j) at.term[j] = from.term[j];
    constexpr int kUnroll = kLanes > 4 ? 4 : 1;
    constexpr int64_t kWide = kUnroll * kWidth<T>;
    int64_t i = lo;
    for (; i + kWide <= hi; i += kWide) update<false>(plain, Pack<T, S, kUnroll>{at, i});
    return i;
}

template <int kTerms, class T, class S>
FASTDIFF_INLINE int64_t plain_terms(const Row<T>& row, const Span<T, S>& at, int64_t lo, int64_t hi) {
    const bool point = row.p != T(0), push = row.push >= 0;
    if (row.draws == 1) {
        if (push) {
            return point ? plain_range<kTerms, true, true, true>(row, at, lo, hi)
                         : plain_range<kTerms, false, true, true>(row, at, lo, hi);
        }
        return point ? plain_range<kTerms, true, false, true>(row, at, lo, hi)
                     : plain_range<kTerms, false, false, true>(row, at, lo, hi);
    }
    if (push) {
        return point ? plain_range<kTerms, true, true, false>(row, at, lo, hi)
                     : plain_range<kTerms, false, true, false>(row, at, lo, hi);
    }
    return point ? plain_range<kTerms, true, false, false>(row, at, lo, hi)
                 : plain_range<kTerms, false, false, false>(row, at, lo, hi);
}

// As much of [lo, hi) as a plain row covers; returns where it stopped.
template <class T, class S>
FASTDIFF_INLINE int64_t plain(const Row<T>& row, const Span<T, S>& at, int64_t lo, int64_t hi) {
    // where it pays: vectors, a float32 state, and outputs as networks return them
    if constexpr (kLanes == 4 || sizeof(T) == 8 || __is_same(S, double) || __is_same(S, Float16)) {
        return lo;
    }
    const int32_t reads = kReadsX | kReadsH | (row.draws == 1 ? kReadsXi : 0);
    if (row.flags != (kEvaluate | kWritesX) || row.x_reads != reads || row.branches != 1 ||
        row.draws > 1 || row.extras != 0 || row.writes_m || row.push_x >= 0) {
        return lo;
    }
    switch (row.terms) {
        case 0: return plain_terms<0>(row, at, lo, hi);
        case 1: return plain_terms<1>(row, at, lo, hi);
        case 2: return plain_terms<2>(row, at, lo, hi);
        case 3: return plain_terms<3>(row, at, lo, hi);
        default: return lo;
    }
}

template <class T, class S>
static void span(const void* row_, void* span_, const uint64_t* seeds, int64_t size, int64_t lo,
          int64_t hi) {
    const Row<T>& row = *static_cast<const Row<T>*>(row_);
    Span<T, S>& at = *static_cast<Span<T, S>*>(span_);
    alignas(64) float z[kMaxDraws][kBlock];
    while (lo < hi) {
        const int64_t end = row.draws == 0 || hi - lo <= kBlock ? hi : lo + kBlock;
        for (int d = 0; d < row.draws; ++d) {
            normals(seeds, size, row.stream[d], lo, end, z[d]);
            at.draw[d] = z[d] - lo;
        }
        if (row.flags & kWritesE) {
            update_range<true>(row, at, lo, end);
        } else {
            update_range<false>(row, at, plain(row, at, lo, end), end);
        }
        lo = end;
    }
}

template <class T, class S>
static void form_range(const void* row_, const void* span_, int64_t lo, int64_t hi, void* h_) {
    const Row<T>& row = *static_cast<const Row<T>*>(row_);
    const Span<T, S>& at = *static_cast<const Span<T, S>*>(span_);
    T* h = static_cast<T*>(h_) - lo;
    constexpr int kUnroll = kLanes > 4 ? 4 : 1;
    constexpr int64_t kWide = kUnroll * kWidth<T>;
    int64_t i = lo;
    for (; i + kWide <= hi; i += kWide) {
        const Pack<T, S, kUnroll> pack{at, i};
        pack.write(h, form(row, pack));
    }
    for (; i < hi; ++i) h[i] = form(row, Element<T, S>{at, i});
}

// -- noise ---------------------------------------------------------------------------------------

struct VectorLanes {
    using F = cpu::FASTDIFF_ISA::F;
    using I = cpu::FASTDIFF_ISA::I;
    using U = cpu::FASTDIFF_ISA::U;
    static FASTDIFF_INLINE F all(float v) { return splat(v); }
    static FASTDIFF_INLINE F to_float(I v) { return __builtin_convertvector(v, F); }
    static FASTDIFF_INLINE F fma(F a, F b, F c) { return vector_fma(a, b, c); }
    static FASTDIFF_INLINE U bits(F v) { return (U)v; }
    static FASTDIFF_INLINE F from_bits(U v) { return (F)v; }
    static FASTDIFF_INLINE F sqrt(F v) {
#if FASTDIFF_LANES == 16
        return (F)_mm512_sqrt_ps((__m512)v);
#elif FASTDIFF_LANES == 8
        return (F)_mm256_sqrt_ps((__m256)v);
#else
        for (int l = 0; l < kLanes; ++l) v[l] = __builtin_sqrtf(v[l]);
        return v;
#endif
    }
};

// Which counter stands at a lane: such that a transpose within 128-bit lanes orders the output.
constexpr int counter_of_lane(int lane) { return (kLanes / 4) * (lane % 4) + lane / 4; }

FASTDIFF_INLINE L low_product(L a, uint32_t m) {
#if FASTDIFF_LANES == 16
    return (L)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif FASTDIFF_LANES == 8
    return (L)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
    return (a & 0xFFFFFFFFull) * m;
#endif
}

// Ten rounds on 64-bit lanes of which only the low 32 bits count: a product's high half is a shift
// away and nothing is ever masked, since every multiplication ignores what stands above.
// w[0], w[2] hold the counter's words 0 and 2; `Key` is L or uint64_t (the same for all lanes).
template <class Key>
FASTDIFF_INLINE void rounds(L w[4], uint32_t stream, Key key0, Key key1) {
    L w0 = w[0], w1 = L{} + stream, w2 = w[2], w3 = L{};
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const L p0 = low_product(w0, kPhiloxM0), p1 = low_product(w2, kPhiloxM1);
        w0 = (p1 >> 32) ^ w1 ^ key0;
        w1 = p1;
        w2 = (p0 >> 32) ^ w3 ^ key1;
        w3 = p0;
        key0 += kPhiloxW0;
        key1 += kPhiloxW1;
    }
    w[0] = w0;
    w[1] = w1;
    w[2] = w2;
    w[3] = w3;
}

// The words of kLanes counters, by lane. `even` holds the 64-bit counters of lanes 0, 2, 4, ...,
// `odd` of the others; keys likewise.
template <class Key>
FASTDIFF_INLINE void group_words(L even, L odd, uint32_t stream, Key even0, Key even1, Key odd0,
                                 Key odd1, U words[4]) {
    L a[4] = {even, L{}, even >> 32, L{}}, b[4] = {odd, L{}, odd >> 32, L{}};
    rounds(a, stream, even0, even1);
    rounds(b, stream, odd0, odd1);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) words[k] = (U)((a[k] & 0xFFFFFFFFull) | (b[k] << 32));
}

// Four values of each lane's counter, stored in the counters' order.
FASTDIFF_INLINE void store_group(float* z, const F v[4]) {
#if FASTDIFF_LANES == 16
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    const __m512d ab0 = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
    const __m512d ab1 = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    const __m512d cd0 = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
    const __m512d cd1 = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    _mm512_storeu_ps(z, _mm512_castpd_ps(_mm512_unpacklo_pd(ab0, cd0)));
    _mm512_storeu_ps(z + 16, _mm512_castpd_ps(_mm512_unpackhi_pd(ab0, cd0)));
    _mm512_storeu_ps(z + 32, _mm512_castpd_ps(_mm512_unpacklo_pd(ab1, cd1)));
    _mm512_storeu_ps(z + 48, _mm512_castpd_ps(_mm512_unpackhi_pd(ab1, cd1)));
#elif FASTDIFF_LANES == 8
    const __m256 a = (__m256)v[0], b = (__m256)v[1], c = (__m256)v[2], d = (__m256)v[3];
    const __m256d ab0 = _mm256_castps_pd(_mm256_unpacklo_ps(a, b));
    const __m256d ab1 = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
    const __m256d cd0 = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
    const __m256d cd1 = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    _mm256_storeu_ps(z, _mm256_castpd_ps(_mm256_unpacklo_pd(ab0, cd0)));
    _mm256_storeu_ps(z + 8, _mm256_castpd_ps(_mm256_unpackhi_pd(ab0, cd0)));
    _mm256_storeu_ps(z + 16, _mm256_castpd_ps(_mm256_unpacklo_pd(ab1, cd1)));
    _mm256_storeu_ps(z + 24, _mm256_castpd_ps(_mm256_unpackhi_pd(ab1, cd1)));
#else
    for (int l = 0; l < kLanes; ++l) {
        for (int k = 0; k < 4; ++k) z[4 * counter_of_lane(l) + k] = v[k][l];
    }
#endif
}

template <class Key>
FASTDIFF_INLINE void group_normals(L even, L odd, uint32_t stream, Key even0, Key even1, Key odd0,
                                   Key odd1, float* z) {
    U words[4];
    F v[4];
    group_words(even, odd, stream, even0, even1, odd0, odd1, words);
    normal_pair<VectorLanes>(words[0], words[1], v[0], v[1]);
    normal_pair<VectorLanes>(words[2], words[3], v[2], v[3]);
    store_group(z, v);
}

struct LaneCounters {
    L even, odd;
    FASTDIFF_INLINE LaneCounters() {
        for (int l = 0; l < kLanes / 2; ++l) {
            even[l] = static_cast<uint64_t>(counter_of_lane(2 * l));
            odd[l] = static_cast<uint64_t>(counter_of_lane(2 * l + 1));
        }
    }
};

// Elements [lo, hi) of one sample.
static void sample_normals(uint64_t seed, uint32_t stream, int64_t lo, int64_t hi, float* z) {
    const LaneCounters lanes;
    const uint64_t key0 = seed & 0xFFFFFFFFull, key1 = seed >> 32;
    for (int64_t quad = lo / 4; 4 * quad < hi; quad += kLanes) {
        const L base = L{} + static_cast<uint64_t>(quad);
        const L even = base + lanes.even, odd = base + lanes.odd;
        const int64_t first = 4 * quad, last = first + 4 * kLanes;
        if (first >= lo && last <= hi) {
            group_normals(even, odd, stream, key0, key1, key0, key1, z + (first - lo));
        } else {
            float group[4 * kLanes];
            group_normals(even, odd, stream, key0, key1, key0, key1, group);
            const int64_t from = first < lo ? lo : first, to = last < hi ? last : hi;
            memcpy(z + (from - lo), group + (from - first), static_cast<size_t>(to - from) * 4);
        }
    }
}

// The same over many small samples: lanes take counters across samples.
static void small_normals(const uint64_t* seeds, int64_t size, uint32_t stream, int64_t lo,
                          int64_t hi, float* z) {
    const int64_t quads = (size + 3) / 4;
    int64_t b = lo / size, q = (lo - b * size) / 4, from = lo;
    while (from < hi) {
        uint64_t counter[2][kLanes / 2] = {}, key0[2][kLanes / 2] = {}, key1[2][kLanes / 2] = {};
        int64_t start[kLanes];  // flat index of the counter's first element
        int32_t count[kLanes];
        int filled = 0;
        for (; filled < kLanes; ++filled) {
            const int64_t element = b * size + 4 * q;
            if (element >= hi) break;
            const int lane = 4 * (filled % (kLanes / 4)) + filled / (kLanes / 4);
            counter[lane & 1][lane / 2] = static_cast<uint64_t>(q);
            key0[lane & 1][lane / 2] = seeds[b] & 0xFFFFFFFFull;
            key1[lane & 1][lane / 2] = seeds[b] >> 32;
            start[filled] = element;
            count[filled] = static_cast<int32_t>(q + 1 < quads ? 4 : size - 4 * q);
            if (++q == quads) {
                q = 0;
                ++b;
            }
        }
        L v[6];
        memcpy(v, counter, sizeof counter);
        memcpy(v + 2, key0, sizeof key0);
        memcpy(v + 4, key1, sizeof key1);
        float group[4 * kLanes];
        const bool whole = filled == kLanes && size % 4 == 0 && start[0] >= lo &&
                           start[0] + 4 * kLanes <= hi;
        group_normals(v[0], v[1], stream, v[2], v[4], v[3], v[5],
                      whole ? z + (start[0] - lo) : group);
        for (int l = 0; !whole && l < filled; ++l) {
            for (int k = 0; k < count[l]; ++k) {
                const int64_t element = start[l] + k;
                if (element >= lo && element < hi) z[element - lo] = group[4 * l + k];
            }
        }
        from = start[filled - 1] + count[filled - 1];
    }
}

static void normals(const uint64_t* seeds, int64_t size, uint32_t stream, int64_t lo, int64_t hi,
                    float* z) {
    if (size < 16 * kLanes) {
        if (lo < hi) small_normals(seeds, size, stream, lo, hi, z);
        return;
    }
    while (lo < hi) {
        const int64_t b = lo / size, begin = b * size;
        const int64_t end = hi < begin + size ? hi : begin + size;
        sample_normals(seeds[b], stream, lo - begin, end - begin, z);
        z += end - lo;
        lo = end;
    }
}

static void words(uint64_t seed, uint32_t stream, int64_t quads, uint32_t* to) {
    const LaneCounters lanes;
    const uint64_t key0 = seed & 0xFFFFFFFFull, key1 = seed >> 32;
    for (int64_t quad = 0; quad < quads; quad += kLanes) {
        const L base = L{} + static_cast<uint64_t>(quad);
        U lane_words[4];
        F as_float[4];
        float group[4 * kLanes];
        const L even = base + lanes.even, odd = base + lanes.odd;
        group_words(even, odd, stream, key0, key1, key0, key1, lane_words);
        memcpy(as_float, lane_words, sizeof as_float);
        store_group(group, as_float);
        const int64_t count = quads - quad < kLanes ? quads - quad : kLanes;
        memcpy(to + 4 * quad, group, static_cast<size_t>(count) * 16);
    }
}

#define FASTDIFF_STRING(s) #s
#define FASTDIFF_NAME(isa) FASTDIFF_STRING(isa)

constexpr Kernels kKernels = {FASTDIFF_NAME(FASTDIFF_ISA),
                              {{span<float, float>, span<float, double>, span<float, Bfloat16>,
                                span<float, Float16>},
                               {span<double, float>, span<double, double>, span<double, Bfloat16>,
                                span<double, Float16>}},
                              {{form_range<float, float>, form_range<float, double>,
                                form_range<float, Bfloat16>, form_range<float, Float16>},
                               {form_range<double, float>, form_range<double, double>,
                                form_range<double, Bfloat16>, form_range<double, Float16>}},
                              normals,
                              words};

}  // namespace fastdiff::cpu::FASTDIFF_ISA
