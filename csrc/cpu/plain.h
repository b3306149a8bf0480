// SPDX-License-Identifier: Apache-2.0
// Rows of the commonest shape, with all but their coefficients known at compile time.
#pragma once

#include "cpu/pack.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

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
    // `writes_m` says whether there is an m to write, which the flag does not
    if ((row.flags & ~kWritesM) != (kEvaluate | kWritesX) || row.x_reads != reads || row.branches != 1 ||
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

}  // namespace fastdiff::cpu::FASTDIFF_ISA
