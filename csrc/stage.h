// SPDX-License-Identifier: Apache-2.0
// One element's stage update, the one instruction every sampler compiles to.
//
// `update` is the arithmetic: fused multiply-adds in table order, each sum starting from 0. It is
// written over an accessor, so one definition serves a scalar, a pack of CPU vectors and a GPU
// thread, and all of them give the same bits.
//
// An accessor IO supplies the value type V; zero(), fma(T, V, V), fuse(V, V, V), mul(T, V),
// clip(V, T, T); loads x(), e(), out(g), term(j), extra(i), draw(d) (places in the row's lists),
// xi(), slot(s), entry(k), output(g) (numbers of the history, the bank and the branches) and
// scalar(i) of the sample's S; stores put_x, put_e, put_push, put_push_x, put_m; and says
//   kNoiseFirst   whether the noise is made before anything is loaded (where making it takes
//                 registers) or when it is added (where it is read);
//   kOutputs,     how many outputs and terms are loaded before any arithmetic, so that their
//   kTerms        latencies overlap; those beyond are loaded where they are added;
//   kKeepsX       whether the x that a row pushes is kept from the start, or read again: to keep it
//                 may cost registers;
//   kThresholds   whether it has scale(), the sample's s, and divide(V, T). Rows that threshold run
//                 on such alone.
#pragma once

#include "row.h"
#include "storage.h"

namespace fastdiff {

// A coefficient times the column of S that scales it: one rounded product.
template <class T, class IO>
FASTDIFF_HD T scaled(const IO& io, T coefficient, int32_t column) {
    return column < 0 ? coefficient : coefficient * io.scalar(column);
}

#define FASTDIFF_SCALED(name, column)                                              \
    template <class R, class IO>                                                   \
    FASTDIFF_HD typename R::Number name##_of(const R& row, const IO& io) {         \
        if constexpr (R::kGrown) return scaled(io, row.name, row.column);          \
        (void)io;                                                                  \
        return row.name;                                                           \
    }
FASTDIFF_SCALED(b_0, scalar_b)
FASTDIFF_SCALED(g_0, scalar_g)
FASTDIFF_SCALED(c, scalar_c)
FASTDIFF_SCALED(c_e, scalar_ce)
#undef FASTDIFF_SCALED

template <class T, class IO>
FASTDIFF_HD typename IO::V noise_of(const Row<T>& row, const IO& io) {
    if (row.draws == 0) return io.xi();
    typename IO::V xi = io.zero();
    FASTDIFF_ROLLED
    for (int d = 0; d < row.draws; ++d) xi = io.fma(row.xi[d], io.draw(d), xi);
    return xi;
}

// The first outputs and terms of a row, as far as it has them.
template <class IO>
struct Ahead {
    typename IO::V out[IO::kOutputs + 1], term[IO::kTerms + 1];
};

template <class R, class IO>
FASTDIFF_HD void load_outputs(const R& row, const IO& io, Ahead<IO>& ahead) {
    FASTDIFF_UNROLLED
    for (int g = 0; g < IO::kOutputs; ++g) {
        ahead.out[g] = io.zero();
        if (g < row.branches) ahead.out[g] = io.out(g);
    }
}
template <class R, class IO>
FASTDIFF_HD void load_terms(const R& row, const IO& io, Ahead<IO>& ahead) {
    FASTDIFF_UNROLLED
    for (int j = 0; j < IO::kTerms; ++j) {
        ahead.term[j] = io.zero();
        if (j < row.terms) ahead.term[j] = io.term(j);
    }
}

template <class R, class IO>
FASTDIFF_HD typename R::Number weight_of(const R& row, const IO& io, int g) {
    if constexpr (R::kGrown) return scaled(io, row.k[g], row.scalar_k[g]);
    (void)io;
    return row.k[g];
}

// What the outputs add to h.
template <class R, class IO>
FASTDIFF_HD typename IO::V outputs_of(const R& row, const IO& io, const Ahead<IO>& ahead) {
    typename IO::V h = io.zero();
    FASTDIFF_UNROLLED
    for (int g = 0; g < IO::kOutputs; ++g) {
        if (g < row.branches) h = io.fma(weight_of(row, io, g), ahead.out[g], h);
    }
    FASTDIFF_ROLLED
    for (int g = IO::kOutputs; g < row.branches; ++g) {
        h = io.fma(weight_of(row, io, g), io.out(g), h);
    }
    return h;
}

// weight R[entry] of the row's product j.
template <class T, class IO>
FASTDIFF_HD typename IO::V factor(const GrownRow<T>& row, const IO& io, int j) {
    return io.mul(row.product[j].weight, io.entry(row.product[j].entry));
}

// What the products into y add to the combination h.
template <class R, class IO>
FASTDIFF_HD typename IO::V multiplied(const R& row, const IO& io, typename IO::V point,
                                      typename IO::V h) {
    if constexpr (R::kGrown) {
        FASTDIFF_ROLLED
        for (int j = 0; j < row.into_y; ++j) h = io.fuse(factor(row, io, j), point, h);
    }
    return h;
}

// The y of what `io` stands at, not yet limited. x and e by value: with a reference to either a GPU
// would keep both in memory. kHasE as in `update`.
template <bool kHasE, class R, class IO>
FASTDIFF_HD typename IO::V form(const R& row, const IO& io, const Ahead<IO>& ahead,
                                typename IO::V x, typename IO::V e) {
    using T = typename R::Number;
    using V = typename IO::V;
    V h = outputs_of(row, io, ahead);
    if (row.p != T(0)) {
        if (kHasE && (row.flags & kAtE)) {
            h = io.fma(row.p, e, h);
        } else {
            h = io.fma(row.p, x, h);
        }
    }
    if constexpr (R::kGrown) {
        if (row.into_y > 0) {
            V point = x;
            if (kHasE && (row.flags & kAtE)) point = e;
            h = multiplied(row, io, point, h);
        }
    }
    return h;
}

// The same, with what it takes of x or e loaded.
template <class R, class IO>
FASTDIFF_HD typename IO::V form(const R& row, const IO& io) {
    using T = typename R::Number;
    bool reads = row.p != T(0);
    if constexpr (R::kGrown) reads = reads || row.into_y > 0;
    typename IO::V point = io.zero();
    Ahead<IO> ahead;
    if (reads) point = (row.flags & kAtE) ? io.e() : io.x();
    load_outputs(row, io, ahead);
    typename IO::V h = outputs_of(row, io, ahead);
    if (row.p != T(0)) h = io.fma(row.p, point, h);
    return multiplied(row, io, point, h);
}

// A term or an entry of the bank added to both sums.
template <bool kHasE, class T, class IO, class V>
FASTDIFF_HD void add(const IO& io, const Term<T>& term, const V v, V& x_next, V& e_next) {
    if (!kHasE || term.b != T(0)) x_next = io.fma(term.b, v, x_next);
    if (kHasE && term.g != T(0)) e_next = io.fma(term.g, v, e_next);
}

// The operands of one update, as far as the row reads them.
template <class V>
struct Operands {
    V x, e, h, xi;
};

// sum with the products [from, to) of the row added. kIntoX: the new x is the sum so far, and
// `fresh` otherwise. Operands by value, as in `form`.
template <bool kIntoX, class T, class IO, class V>
FASTDIFF_HD V products_of(const GrownRow<T>& row, const IO& io, int from, int to,
                          const Operands<V> of, V sum, V fresh) {
    FASTDIFF_ROLLED
    for (int j = from; j < to; ++j) {
        V operand = io.zero();
        switch (row.product[j].of) {
            case kOfX: operand = of.x; break;
            case kOfE: operand = of.e; break;
            case kOfH: operand = of.h; break;
            case kOfXi: operand = of.xi; break;
            case kOfSlot: operand = io.slot(row.product[j].at); break;
            case kOfBank: operand = io.entry(row.product[j].at); break;
            default: operand = kIntoX ? sum : fresh; break;
        }
        sum = io.fuse(factor(row, io, j), operand, sum);
    }
    return sum;
}

// The update of what `io` stands at: one element or a pack of them. Every load precedes every
// store but that of push_x, so x', e', the pushes and m' may overwrite what the same elements were
// read from. kHasE: the row `has_e`.
template <bool kHasE, class R, class IO>
FASTDIFF_HD void update(const R& row, const IO& io) {
    using V = typename IO::V;
    using T = typename R::Number;
    V x = io.zero(), e = io.zero(), h = io.zero(), x_next = io.zero(), e_next = io.zero();
    V xi = io.zero(), y = io.zero();
    if (IO::kNoiseFirst && row.loads_xi) xi = noise_of(row, io);
    Ahead<IO> ahead;
    if (row.loads_x || (IO::kKeepsX && row.push_x >= 0)) x = io.x();
    if (kHasE && row.loads_e) e = io.e();
    load_outputs(row, io, ahead);
    load_terms(row, io, ahead);
    if (row.flags & kEvaluate) {
        h = form<kHasE>(row, io, ahead, x, e);
        if constexpr (R::kGrown) y = h;
        if constexpr (IO::kThresholds) {
            if (row.flags & kThreshold) {
                h = io.divide(io.clip(h, -io.scale(), io.scale()), io.scale());
            }
        }
        if (row.flags & kClip) h = io.clip(h, row.lo, row.hi);
        if constexpr (R::kGrown) {
            if (row.blends) {
                if (row.v != T(0)) {
                    h = io.mul(row.v, h);
                } else {
                    h = io.zero();
                }
                if (row.u != T(0)) {
                    V point = x;
                    if (kHasE && (row.flags & kAtE)) point = e;
                    h = io.fma(row.u, point, h);
                }
            }
        }
    }
    if (row.x_reads & kReadsX) x_next = io.fma(row.a_x, x, x_next);
    if (kHasE && (row.x_reads & kReadsE)) x_next = io.fma(row.a_e, e, x_next);
    if (row.x_reads & kReadsH) x_next = io.fma(b_0_of(row, io), h, x_next);
    if (kHasE) {
        if (row.e_reads & kReadsX) e_next = io.fma(row.d_x, x, e_next);
        if (row.e_reads & kReadsE) e_next = io.fma(row.d_e, e, e_next);
        if (row.e_reads & kReadsH) e_next = io.fma(g_0_of(row, io), h, e_next);
    }
    if constexpr (R::kGrown) {
        if (row.b_raw != T(0)) x_next = io.fma(row.b_raw, y, x_next);
        if (kHasE && row.g_raw != T(0)) e_next = io.fma(row.g_raw, y, e_next);
    }
    FASTDIFF_UNROLLED
    for (int j = 0; j < IO::kTerms; ++j) {
        if (j < row.terms) add<kHasE>(io, row.term[j], ahead.term[j], x_next, e_next);
    }
    FASTDIFF_ROLLED
    for (int j = IO::kTerms; j < row.terms; ++j) {
        add<kHasE>(io, row.term[j], io.term(j), x_next, e_next);
    }
    if (row.loads_xi) {
        if (!IO::kNoiseFirst) xi = noise_of(row, io);
        if (row.x_reads & kReadsXi) x_next = io.fma(c_of(row, io), xi, x_next);
        if (kHasE && (row.e_reads & kReadsXi)) e_next = io.fma(c_e_of(row, io), xi, e_next);
    }
    FASTDIFF_ROLLED
    for (int i = 0; i < row.extras; ++i) {
        add<kHasE>(io, row.extra[i], io.extra(i), x_next, e_next);
    }
    if constexpr (R::kGrown) {
        const Operands<V> of = {x, e, h, xi};
        x_next = products_of<true>(row, io, row.into_y, row.into_x, of, x_next, x);
        if (kHasE) {
            V fresh = x;
            if (row.flags & kWritesX) fresh = x_next;
            if (row.d_new != T(0)) e_next = io.fma(row.d_new, fresh, e_next);
            e_next = products_of<false>(row, io, row.into_x, row.products, of, e_next, fresh);
        }
    }
    if (row.push_x >= 0) io.put_push_x(IO::kKeepsX ? x : io.x());
    if (row.flags & kWritesX) io.put_x(x_next);
    if (kHasE && (row.flags & kWritesE)) io.put_e(e_next);
    if (row.push >= 0) io.put_push(h);
    if (row.writes_m) {
        if (kHasE && (row.flags & kWritesE)) {
            x = e_next;
        } else if (row.flags & kWritesX) {
            x = x_next;
        }
        io.put_m(row.c_in != T(0) ? io.mul(row.c_in, x) : io.zero());
    }
}

// -- one element ---------------------------------------------------------------------------------

// Where the elements of one sample (or of a whole batch whose samples share a row) stand. T is the
// state's type, S the network output's; `draw` holds float32 normals.
template <class T, class S>
struct Span {
    T* x;
    T* e;
    T* push;
    T* push_x;
    void* m;
    int64_t copies, copy_stride;
    int32_t network;  // Dtype of m
    T scale;          // s of the sample, where the row thresholds
    const T* xi;
    const float* draw[kMaxDraws];
    const S* out[kMaxBranches];
    const T* term[kMaxTerms];
    const T* extra[kMaxExtras];
    // What a GrownRow and a measure read by number, from the sample on.
    const T* history;
    const T* bank;
    const S* outputs;
    int64_t history_stride, bank_stride, output_stride;  // elements between two of each
    const T* scalars;  // the sample's row of S; null: each counts as 1
    const uint64_t* seeds;  // of the sample and those after it
    int64_t size;           // elements of a sample
    int64_t first_quad;
};

template <class T, class S>
struct Element {
    using V = T;
    static constexpr bool kNoiseFirst = false, kKeepsX = false, kThresholds = true;
    static constexpr int kOutputs = 0, kTerms = 0;
    const Span<T, S>& at;
    int64_t i;

    FASTDIFF_HD T zero() const { return T(0); }
    FASTDIFF_HD T fma(T c, T v, T sum) const { return fused(c, v, sum); }
    FASTDIFF_HD T fuse(T a, T b, T sum) const { return fused(a, b, sum); }
    FASTDIFF_HD T mul(T c, T v) const { return c * v; }
    // NaN stays.
    FASTDIFF_HD T clip(T v, T lo, T hi) const { return v < lo ? lo : v > hi ? hi : v; }
    FASTDIFF_HD T divide(T v, T by) const { return v / by; }
    FASTDIFF_HD T scale() const { return at.scale; }
    FASTDIFF_HD T x() const { return at.x[i]; }
    FASTDIFF_HD T e() const { return at.e[i]; }
    FASTDIFF_HD T out(int g) const { return static_cast<T>(widen(at.out[g][i])); }
    FASTDIFF_HD T term(int j) const { return at.term[j][i]; }
    FASTDIFF_HD T extra(int k) const { return at.extra[k][i]; }
    FASTDIFF_HD T slot(int s) const { return at.history[s * at.history_stride + i]; }
    FASTDIFF_HD T entry(int k) const { return at.bank[k * at.bank_stride + i]; }
    FASTDIFF_HD T output(int g) const {
        return static_cast<T>(widen(at.outputs[g * at.output_stride + i]));
    }
    FASTDIFF_HD T scalar(int c) const { return at.scalars == nullptr ? T(1) : at.scalars[c]; }
    FASTDIFF_HD T xi() const { return at.xi[i]; }
    FASTDIFF_HD T draw(int d) const { return static_cast<T>(at.draw[d][i]); }
    FASTDIFF_HD void put_x(T v) const { at.x[i] = v; }
    FASTDIFF_HD void put_e(T v) const { at.e[i] = v; }
    FASTDIFF_HD void put_push(T v) const { at.push[i] = v; }
    FASTDIFF_HD void put_push_x(T v) const { at.push_x[i] = v; }
    FASTDIFF_HD void put_m(T v) const {
        switch (at.network) {
            case kFloat32: put(static_cast<float*>(at.m), v); break;
            case kFloat64: put(static_cast<double*>(at.m), v); break;
            case kBfloat16: put(static_cast<Bfloat16*>(at.m), v); break;
            default: put(static_cast<Float16*>(at.m), v); break;
        }
    }
    template <class M>
    FASTDIFF_HD void put(M* m, T v) const {
        M value;
        narrow(v, value);
        for (int64_t k = 0; k < at.copies; ++k) m[k * at.copy_stride + i] = value;
    }
};

}  // namespace fastdiff
