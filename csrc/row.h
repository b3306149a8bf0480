// SPDX-License-Identifier: Apache-2.0
// A table row checked and turned into coefficients of the arithmetic type, without the terms whose
// coefficient is exactly 0: their registers are never read and may hold anything.
//
// `Row` serves the rows that only combine, limit and push. `GrownRow` adds what a row may do
// besides: blend its h with the point, weigh h before its limit, read the new x in e', multiply by
// the bank and scale by S. Each has kernels of its own, so that plain rows pay nothing.
#pragma once

#include "table.h"

namespace fastdiff {

enum Reads : int32_t { kReadsX = 1, kReadsE = 2, kReadsH = 4, kReadsXi = 8 };

template <class T>
struct Term {
    T b, g;
    int32_t source;  // history slot or entry of the bank
};

template <class T>
struct Product {
    T weight;
    int32_t of, at, entry;
};

// A table row in the arithmetic type. Lists hold only what is read.
template <class T>
struct Row {
    using Number = T;
    static constexpr bool kGrown = false;

    int32_t flags, push, push_x;
    int32_t x_reads, e_reads;  // Reads of each sum
    bool loads_x, loads_e, loads_xi, writes_m;
    int32_t branches, terms, extras, draws;
    uint32_t stream[kMaxDraws];
    double quantile, floor, ceiling;  // of the threshold: what the float64 columns say
    // The numbers of the head in the order of their columns, so that a warp converts them at once;
    // u, v, b_raw, d_new and g_raw are a GrownRow's.
    T p, u, v, lo, hi;
    T a_x, a_e, b_0, b_raw, c, d_x, d_e, d_new, g_0, g_raw, c_e;
    T xi[kMaxDraws];
    T c_in;
    T k[kMaxBranches];
    int32_t branch[kMaxBranches];
    Term<T> term[kMaxTerms];
    Term<T> extra[kMaxExtras];

    FASTDIFF_HD bool reads_bank() const { return extras > 0; }
    // Whether e is read or written.
    FASTDIFF_HD bool has_e() const { return loads_e || (flags & kWritesE); }
    // Whether something beside the noise tells the samples of one row apart.
    FASTDIFF_HD bool scaled() const { return false; }
};

template <class T>
struct GrownRow : Row<T> {
    static constexpr bool kGrown = true;

    bool blends;  // (u, v) is not (0, 1)
    int32_t scalar_b, scalar_g, scalar_c, scalar_ce;  // columns of S; -1: none
    int32_t scalar_k[kMaxBranches];                   // of the branches that are read
    int32_t into_y, into_x, products;  // [0, into_y) go into y, [into_y, into_x) into x, the rest
    Product<T> product[kMaxProducts];  // into e

    FASTDIFF_HD bool reads_bank() const { return this->extras > 0 || products > 0; }
    FASTDIFF_HD bool scaled() const {
        bool any = scalar_b >= 0 || scalar_g >= 0 || scalar_c >= 0 || scalar_ce >= 0;
        for (int g = 0; g < this->branches; ++g) any = any || scalar_k[g] >= 0;
        return any;
    }
};

// Whether `value` is an integer in [lo, hi]; false for NaN.
FASTDIFF_HD bool is_index(double value, double lo, double hi) {
    return value >= lo && value <= hi && value == static_cast<double>(static_cast<int64_t>(value));
}
FASTDIFF_HD bool is_index(double value, int64_t count) {
    return is_index(value, 0, static_cast<double>(count) - 1);
}

FASTDIFF_HD bool evaluates_row(const double* v) {
    return is_index(v[head::flags], 0, kAllFlags) && (static_cast<int32_t>(v[head::flags]) & kEvaluate);
}

// Whether the row asks for a GrownRow. What nothing weighs does not: a row of zeros does nothing.
// Asked at every launch of the CPU core, so without a branch a column.
FASTDIFF_HD bool grows(const StageArgs& a, const double* v) {
    bool any = (v[head::b_raw] != 0) | (v[head::g_raw] != 0) | (v[head::d_new] != 0) |
               (v[head::n_products] != 0);
    any |= (v[head::scalar_b] != -1) & (v[head::b_0] != 0);
    any |= (v[head::scalar_g] != -1) & (v[head::g_0] != 0);
    any |= (v[head::scalar_c] != -1) & (v[head::c] != 0);
    any |= (v[head::scalar_ce] != -1) & (v[head::c_e] != 0);
    if ((v[head::u] != 0) | (v[head::v] != 1)) any |= evaluates_row(v);
    const double* columns = v + a.branch_offset();
    for (int g = 0; g < a.branches; ++g, columns += branch::kColumns) {
        any |= (columns[branch::scalar_k] != -1) & (columns[branch::k] != 0);
    }
    return any;
}

// The draws of a row whose noise is read.
template <class T>
FASTDIFF_HD Status resolve_draws(const StageArgs& a, const double* v, Row<T>& row) {
    row.draws = static_cast<int32_t>(v[head::draws]);
    if (row.draws == 0) return kNoXi;
    if (a.seeds == nullptr) return kNoSeeds;
    for (int d = 0; d < row.draws; ++d) {
        if (!is_index(v[head::stream_1 + d], 0, 4294967295.0)) return kBadStream;
        row.stream[d] = static_cast<uint32_t>(v[head::stream_1 + d]);
        row.xi[d] = static_cast<T>(v[head::xi_1 + d]);
    }
    return kOk;
}

// Which sum a product's columns go into, or -1 where they name none.
FASTDIFF_HD int32_t sum_of(const double* columns) {
    return is_index(columns[product::into], kIntoCodes)
               ? static_cast<int32_t>(columns[product::into])
               : -1;
}

// A product from its columns, in a row with these flags. Sets `used` where it weighs; `reads` gains
// what it reads.
template <class T>
FASTDIFF_HD Status resolve_product(const StageArgs& a, const double* columns, int32_t flags,
                                   Product<T>& to, bool& used, int32_t& reads) {
    const int32_t into = sum_of(columns);
    const bool evaluates = flags & kEvaluate, written = into == kIntoY ||
               (flags & (into == kIntoX ? kWritesX : kWritesE));
    used = false;
    if (into < 0 || !is_index(columns[product::of], kOfPoint + 1)) return kBadProduct;
    int32_t of = static_cast<int32_t>(columns[product::of]);
    if (into == kIntoY && of != kOfPoint) return kBadProduct;
    if (into == kIntoY && !evaluates) return kNoH;
    if (!written || columns[product::weight] == 0) return kOk;
    if (!is_index(columns[product::bank], a.entries)) return kBadEntry;
    const double at = columns[product::at];
    if (of == kOfSlot && !is_index(at, a.slots)) return kBadSlot;
    if (of == kOfBank && !is_index(at, a.entries)) return kBadEntry;
    if (of == kOfH && !evaluates) return kNoH;
    if (of == kOfPoint && into != kIntoY) of = (flags & kAtE) ? kOfE : kOfX;
    if (of == kOfX || (of == kOfNew && !(flags & kWritesX))) reads |= kReadsX;
    if (of == kOfE) reads |= kReadsE;
    if (of == kOfXi) reads |= kReadsXi;
    used = true;
    to = {static_cast<T>(columns[product::weight]), of,
          of == kOfSlot || of == kOfBank ? static_cast<int32_t>(at) : 0,
          static_cast<int32_t>(columns[product::bank])};
    return kOk;
}

template <class T>
FASTDIFF_HD Status resolve_products(const StageArgs& a, const double* v, GrownRow<T>& row,
                                    int32_t& reads) {
    const int count = static_cast<int>(v[head::n_products]);
    row.products = 0;
    for (int into = kIntoY; into < kIntoCodes; ++into) {
        const double* columns = v + a.product_offset();
        for (int i = 0; i < count; ++i, columns += product::kColumns) {
            const int32_t sum = sum_of(columns);
            if (sum < 0) return kBadProduct;
            if (sum != into) continue;
            Product<T> product;
            bool used = false;
            const Status status = resolve_product(a, columns, row.flags, product, used, reads);
            if (status != kOk) return status;
            if (used) row.product[row.products++] = product;
        }
        if (into == kIntoY) row.into_y = row.products;
        if (into == kIntoX) row.into_x = row.products;
    }
    return kOk;
}

// What GrownRow adds, but for the branches' scalars. `reads` gains what the sums read besides,
// `at_point` whether h reads the point besides.
template <class T>
FASTDIFF_HD Status resolve_growth(const StageArgs& a, const double* v, GrownRow<T>& row,
                                  int32_t& reads, bool& at_point) {
    const bool evaluates = row.flags & kEvaluate, writes_x = row.flags & kWritesX,
               writes_e = row.flags & kWritesE;
    row.u = evaluates ? static_cast<T>(v[head::u]) : T(0);
    row.v = evaluates ? static_cast<T>(v[head::v]) : T(1);
    row.blends = evaluates && (v[head::u] != 0 || v[head::v] != 1);
    row.b_raw = writes_x ? static_cast<T>(v[head::b_raw]) : T(0);
    row.g_raw = writes_e ? static_cast<T>(v[head::g_raw]) : T(0);
    row.d_new = writes_e ? static_cast<T>(v[head::d_new]) : T(0);
    if (!evaluates && (row.b_raw != T(0) || row.g_raw != T(0))) return kNoH;
    bool legal = true;
    const auto scalar = [&](int coefficient, int column) {
        if (v[coefficient] == 0) return -1;
        legal = legal && is_index(v[column], -1, static_cast<double>(a.scalar_columns) - 1);
        return static_cast<int32_t>(v[column]);
    };
    row.scalar_b = scalar(head::b_0, head::scalar_b);
    row.scalar_g = scalar(head::g_0, head::scalar_g);
    row.scalar_c = scalar(head::c, head::scalar_c);
    row.scalar_ce = scalar(head::c_e, head::scalar_ce);
    if (!legal) return kBadScalar;
    const Status status = resolve_products(a, v, row, reads);
    if (status != kOk) return status;
    if (row.d_new != T(0) && !writes_x) reads |= kReadsX;
    at_point = row.u != T(0) || row.into_y > 0;
    return kOk;
}

// Whether a threshold's numbers are legal.
template <class T>
FASTDIFF_HD bool is_threshold(double quantile, double floor, double ceiling) {
    const T least = static_cast<T>(floor);
    return quantile > 0 && quantile <= 1 && least > 0 &&
           least - least == 0 &&  // finite in the arithmetic type
           ceiling >= floor;
}

// From the columns `v` of a row, wherever they lie. Writes nothing but `row`. `draws`: whether the
// noise is read whatever the row weighs.
template <class R>
FASTDIFF_HD Status resolve(const StageArgs& a, const double* v, R& row, bool draws = false) {
    using T = typename R::Number;
    const double* terms = v + head::kColumns;
    const double* weights = v + a.branch_offset();
    const double* extras = v + a.extra_offset();
    if (!is_index(v[head::flags], 0, kAllFlags)) return kBadFlags;
    if (!is_index(v[head::push], -1, static_cast<double>(a.slots) - 1)) return kBadSlot;
    if (!is_index(v[head::push_x], -1, static_cast<double>(a.slots) - 1)) return kBadSlot;
    if (!is_index(v[head::draws], 0, kMaxDraws)) return kBadCount;
    if (!is_index(v[head::n_terms], 0, a.terms)) return kBadCount;
    if (!is_index(v[head::n_extras], 0, a.extras)) return kBadCount;
    if (R::kGrown && !is_index(v[head::n_products], 0, a.products)) return kBadCount;
    const int32_t flags = static_cast<int32_t>(v[head::flags]);
    const bool evaluates = flags & kEvaluate;
    row.flags = evaluates ? flags : flags & ~kThreshold;  // without h there is nothing to limit
    const bool writes_e = flags & kWritesE, writes_x = flags & kWritesX;
    row.push = static_cast<int32_t>(v[head::push]);
    row.push_x = static_cast<int32_t>(v[head::push_x]);
    if (row.push_x >= 0 && row.push_x == row.push) return kBadSlot;

    const auto reads = [&](int x_or_d, int e_or_d, int h, int noise) {
        return (v[x_or_d] != 0 ? kReadsX : 0) | (v[e_or_d] != 0 ? kReadsE : 0) |
               (v[h] != 0 ? kReadsH : 0) | (v[noise] != 0 ? kReadsXi : 0);
    };
    row.x_reads = writes_x ? reads(head::a_x, head::a_e, head::b_0, head::c) : 0;
    row.e_reads = writes_e ? reads(head::d_x, head::d_e, head::g_0, head::c_e) : 0;
    int32_t either = row.x_reads | row.e_reads;
    if (!evaluates && ((either & kReadsH) || row.push >= 0)) return kNoH;
    bool reads_point = evaluates && v[head::p] != 0;
    row.p = reads_point ? static_cast<T>(v[head::p]) : T(0);
    if constexpr (R::kGrown) {
        bool at_point = false;
        const Status status = resolve_growth(a, v, row, either, at_point);
        if (status != kOk) return status;
        reads_point = reads_point || at_point;
    }
    row.writes_m = a.m != nullptr && (flags & kWritesM);
    row.loads_x = (either & kReadsX) || (reads_point && !(flags & kAtE)) ||
                  (row.writes_m && v[head::c_in_next] != 0 && !writes_x && !writes_e);
    row.loads_e = (either & kReadsE) || (reads_point && (flags & kAtE));
    if ((row.loads_e || writes_e) && a.e == nullptr) return kNoE;

    row.lo = static_cast<T>(v[head::lo]);
    row.hi = static_cast<T>(v[head::hi]);
    row.quantile = v[head::quantile];
    row.floor = v[head::floor];
    row.ceiling = v[head::ceiling];
    if ((flags & kThreshold) &&
        ((flags & kClip) || !is_threshold<T>(row.quantile, row.floor, row.ceiling))) {
        return kBadThreshold;
    }
    row.a_x = static_cast<T>(v[head::a_x]);
    row.a_e = static_cast<T>(v[head::a_e]);
    row.b_0 = static_cast<T>(v[head::b_0]);
    row.c = static_cast<T>(v[head::c]);
    row.d_x = static_cast<T>(v[head::d_x]);
    row.d_e = static_cast<T>(v[head::d_e]);
    row.g_0 = static_cast<T>(v[head::g_0]);
    row.c_e = static_cast<T>(v[head::c_e]);
    row.c_in = static_cast<T>(v[head::c_in_next]);

    row.branches = 0;
    for (int g = 0; evaluates && g < a.branches; ++g, weights += branch::kColumns) {
        if (weights[branch::k] == 0) continue;
        if (a.out == nullptr) return kNoOut;
        if constexpr (R::kGrown) {
            const double column = weights[branch::scalar_k];
            if (!is_index(column, -1, static_cast<double>(a.scalar_columns) - 1)) return kBadScalar;
            row.scalar_k[row.branches] = static_cast<int32_t>(column);
        }
        row.k[row.branches] = static_cast<T>(weights[branch::k]);
        row.branch[row.branches++] = g;
    }
    row.terms = 0;
    const int n_terms = static_cast<int>(v[head::n_terms]);
    for (int j = 0; j < n_terms; ++j, terms += term::kColumns) {
        const double b = writes_x ? terms[term::past_b] : 0;
        const double g = writes_e ? terms[term::past_g] : 0;
        if (b == 0 && g == 0) continue;
        if (!is_index(terms[term::slot], a.slots)) return kBadSlot;
        row.term[row.terms++] = {static_cast<T>(b), static_cast<T>(g),
                                 static_cast<int32_t>(terms[term::slot])};
    }
    row.extras = 0;
    const int n_extras = static_cast<int>(v[head::n_extras]);
    for (int i = 0; i < n_extras; ++i, extras += extra::kColumns) {
        const double r = writes_x ? extras[extra::r] : 0, s = writes_e ? extras[extra::s] : 0;
        if (r == 0 && s == 0) continue;
        if (!is_index(extras[extra::entry], a.entries)) return kBadEntry;
        row.extra[row.extras++] = {static_cast<T>(r), static_cast<T>(s),
                                   static_cast<int32_t>(extras[extra::entry])};
    }

    row.draws = 0;
    row.loads_xi = draws || (either & kReadsXi) != 0;
    return row.loads_xi && a.xi == nullptr ? resolve_draws(a, v, row) : kOk;
}

template <class R>
FASTDIFF_HD Status resolve(const StageArgs& a, int64_t index, R& row) {
    if (index < 0 || index >= a.rows) return kBadRow;
    return resolve(a, a.table + index * a.width(), row);
}

}  // namespace fastdiff
