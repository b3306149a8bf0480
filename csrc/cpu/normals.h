// SPDX-License-Identifier: Apache-2.0
// Philox and Box-Muller on vectors: the normals of `philox.h`, lane by lane.
#pragma once

#include "cpu/vectors.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

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

// Elements [lo, hi) of one sample, whose element 0 takes the noise of 4 first_quad.
static void sample_normals(uint64_t seed, const Draws& draws, int64_t lo, int64_t hi, float* z) {
    const uint32_t stream = draws.stream;
    const LaneCounters lanes;
    const uint64_t key0 = seed & 0xFFFFFFFFull, key1 = seed >> 32;
    for (int64_t quad = lo / 4; 4 * quad < hi; quad += kLanes) {
        const L base = L{} + static_cast<uint64_t>(quad + draws.first_quad);
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
static void small_normals(const Draws& draws, int64_t lo, int64_t hi, float* z) {
    const uint64_t* seeds = draws.seeds;
    const int64_t size = draws.size, quads = (size + 3) / 4;
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
            counter[lane & 1][lane / 2] = static_cast<uint64_t>(q + draws.first_quad);
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
        group_normals(v[0], v[1], draws.stream, v[2], v[4], v[3], v[5],
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

static void normals(const Draws& draws, int64_t lo, int64_t hi, float* z) {
    const int64_t size = draws.size;
    if (size < 16 * kLanes) {
        if (lo < hi) small_normals(draws, lo, hi, z);
        return;
    }
    while (lo < hi) {
        const int64_t b = lo / size, begin = b * size;
        const int64_t end = hi < begin + size ? hi : begin + size;
        sample_normals(draws.seeds[b], draws, lo - begin, end - begin, z);
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

}  // namespace fastdiff::cpu::FASTDIFF_ISA
