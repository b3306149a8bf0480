// SPDX-License-Identifier: Apache-2.0
// A row from its columns by a warp: a lane has a column of the head, and one member of each list.
//
// What `resolve` in row.h says of a row holds here line by line, with the same status for a row that
// is refused.
#pragma once

#include <stddef.h>

#include "cuda/cuda.h"
#include "cuda/warp.h"

namespace fastdiff::cuda {

static_assert(head::n_measures < kLanes && head::c_in_next == kLanes - 1 &&
                  head::scalar_b == kLanes && head::scalar_ce == kLanes + 3,
              "a lane has a column of the head, the first four one more");
static_assert(kMaxBranches <= kLanes && kMaxExtras <= kLanes && kMaxProducts <= kLanes &&
                  kMaxMeasures <= kLanes,
              "a lane has a member of each list, of the terms two");

// Where the number of column c stands, c from p on and none of the threshold's.
template <class T>
FASTDIFF_HD T* number_of(Row<T>& row, int c) {
    static_assert(head::p + 4 == head::hi && head::hi + 4 == head::a_x &&
                  head::a_x + 13 == head::c_in_next);
    static_assert(offsetof(Row<T>, a_x) == offsetof(Row<T>, p) + 5 * sizeof(T) &&
                  offsetof(Row<T>, c_in) == offsetof(Row<T>, a_x) + 13 * sizeof(T));
    const int at = c < head::a_x ? c - head::p : c - head::a_x + 5;
    return reinterpret_cast<T*>(reinterpret_cast<char*>(&row) + offsetof(Row<T>, p)) + at;
}

// The columns of a row as the lanes have them. All are read before any is looked at.
struct Columns {
    struct Scaled {
        double k, scalar;
    };
    struct Weighed {
        double from, first, second;
    };
    Lanes<double> head, scalar;  // of the head's last four columns
    Lanes<Scaled> branch;
    Lanes<Weighed> extra;

    FASTDIFF_HD Columns(const Warp& warp, const StageArgs& a, const double* v) {
        head = warp.each([&](int lane) { return v[lane]; });
        scalar = warp.each([&](int lane) { return lane < 4 ? v[head::scalar_b + lane] : -1; });
        const double* branches = v + a.branch_offset();
        branch = warp.each([&](int lane) -> Scaled {
            if (lane >= a.branches) return {0, -1};
            const double* c = branches + branch::kColumns * lane;
            return {c[branch::k], c[branch::scalar_k]};
        });
        extra = weighed(warp, v + a.extra_offset(), a.extras);
    }

    // Three columns of each of the first `count` members of a list.
    static FASTDIFF_HD Lanes<Weighed> weighed(const Warp& warp, const double* v, int count) {
        static_assert(term::kColumns == 3 && extra::kColumns == 3);
        return warp.each([&](int lane) -> Weighed {
            if (lane >= count) return {0, 0, 0};
            const double* c = v + 3 * lane;
            return {c[0], c[1], c[2]};
        });
    }
};

// A row while a warp resolves it.
template <class R>
struct Resolution {
    using T = typename R::Number;
    const Warp& warp;
    const StageArgs& a;
    const double* v;
    R& row;
    Status status = kOk;  // the first fault
    uint32_t set = 0;     // columns of the head that are not neutral
    int32_t flags = 0, reads = 0;
    bool evaluates = false, writes_x = false, writes_e = false, limits = false;  // by a threshold

    FASTDIFF_HD void fail(bool when, Status as) {
        if (status == kOk && when) status = as;
    }
    FASTDIFF_HD bool has(int column) const { return set >> column & 1; }

    // The integers of the head: their lanes know what they must be.
    FASTDIFF_HD Lanes<Whole> integers(const Columns& columns) const {
        return warp.each([&](int lane) {
            int64_t count = 0;
            if (lane == head::flags) count = kAllFlags + 1;
            if (lane == head::push || lane == head::push_x) count = a.slots + 1;
            if (lane == head::draws) count = kMaxDraws + 1;
            if (lane == head::stream_1 || lane == head::stream_2) count = int64_t{1} << 32;
            if (lane == head::n_terms) count = a.terms + 1;
            if (lane == head::n_extras) count = a.extras + 1;
            if (lane == head::n_products) count = a.products + 1;
            const int least = lane == head::push || lane == head::push_x ? -1 : 0;
            return whole(columns.head.at(lane), least, count);
        });
    }

    // Whether a column asks for a GrownRow where R is none: as `grows`.
    FASTDIFF_HD bool grows(const Columns& columns, bool legal_flags) const {
        const uint32_t scaled = warp.ballot([&](int lane) { return columns.scalar.at(lane) != -1; });
        const uint32_t branches = warp.ballot([&](int lane) {
            return columns.branch.at(lane).k != 0 && columns.branch.at(lane).scalar != -1;
        });
        return (set & (1u << head::b_raw | 1u << head::g_raw | 1u << head::d_new |
                       1u << head::n_products)) != 0 ||
               (scaled & coefficients()) != 0 || branches != 0 ||
               ((has(head::u) || has(head::v)) && legal_flags && evaluates);
    }
    // Bits 0 to 3: whether b_0, g_0, c and c_e weigh.
    FASTDIFF_HD uint32_t coefficients() const {
        return (set >> head::b_0 & 1) | (set >> head::g_0 & 1) << 1 | (set >> head::c & 1) << 2 |
               (set >> head::c_e & 1) << 3;
    }
    FASTDIFF_HD int32_t reads_of(int x_or_d, int e_or_d, int h, int noise) const {
        return static_cast<int32_t>((set >> x_or_d & 1) * kReadsX | (set >> e_or_d & 1) * kReadsE |
                                    (set >> h & 1) * kReadsH | (set >> noise & 1) * kReadsXi);
    }

    // Each lane converts its column of the head. Gives the columns whose number is not 0.
    FASTDIFF_HD uint32_t numbers(const Columns& columns) const {
        uint32_t left_out = 0;
        if (!evaluates) left_out |= 1u << head::p | 1u << head::u | 1u << head::v;
        if (!writes_x) left_out |= 1u << head::b_raw;
        if (!writes_e) left_out |= 1u << head::g_raw | 1u << head::d_new;
        const auto number = warp.each([&](int lane) {
            const T neutral = lane == head::v ? T(1) : T(0);
            return left_out >> lane & 1 ? neutral : static_cast<T>(columns.head.at(lane));
        });
        warp.run([&](int lane) {
            if (lane >= head::quantile && lane <= head::ceiling) {
                const int at = lane - head::quantile;
                *(at == 0 ? &row.quantile : at == 1 ? &row.floor : &row.ceiling) =
                    columns.head.at(lane);
            } else if (lane >= head::p) {
                *number_of<T>(row, lane) = number.at(lane);
            }
        });
        return warp.ballot([&](int lane) { return number.at(lane) != T(0); });
    }

    // What GrownRow adds, but for the branches' scalars; gives whether h reads the point besides.
    FASTDIFF_HD bool growth(const Columns& columns, uint32_t numbers, int n_products) {
        const auto has_number = [&](int column) { return (numbers >> column & 1) != 0; };
        row.blends = evaluates && (has(head::u) || has(head::v));
        fail(!evaluates && (has_number(head::b_raw) || has_number(head::g_raw)), kNoH);
        const auto column = warp.each([&](int lane) {
            return whole(columns.scalar.at(lane), -1, lane < 4 ? a.scalar_columns + 1 : 0);
        });
        const uint32_t scaled = coefficients();
        fail((scaled & ~warp.ballot([&](int lane) { return column.at(lane).legal; })) != 0,
             kBadScalar);
        warp.run([&](int lane) {
            const int32_t value = static_cast<int32_t>(column.at(lane).above) - 1;
            const int32_t used = scaled >> lane & 1 ? value : -1;
            if (lane == 0) row.scalar_b = used;
            if (lane == 1) row.scalar_g = used;
            if (lane == 2) row.scalar_c = used;
            if (lane == 3) row.scalar_ce = used;
        });
        const int into_y = products(n_products);
        if (has_number(head::d_new) && !writes_x) reads |= kReadsX;
        return has_number(head::u) || into_y > 0;
    }

    // Those into y stand first, then those into x, then those into e; and so are they checked.
    // Gives how many go into y.
    FASTDIFF_HD int products(int count) {
        struct One {
            Product<T> product;
            int32_t into, reads, status;
            bool used;
        };
        const double* columns = v + a.product_offset();
        const auto each = warp.each([&](int lane) {
            One one = {{}, kIntoCodes, 0, kOk, false};
            if (lane >= count || lane >= a.products) return one;
            const double* own = columns + product::kColumns * lane;
            one.into = sum_of(own);
            one.status = resolve_product(a, own, flags, one.product, one.used, one.reads);
            return one;
        });
        const auto any_reads = [&](int32_t what) {
            return warp.ballot([&](int lane) { return (each.at(lane).reads & what) != 0; }) != 0;
        };
        reads |= (any_reads(kReadsX) ? kReadsX : 0) | (any_reads(kReadsE) ? kReadsE : 0) |
                 (any_reads(kReadsXi) ? kReadsXi : 0);
        const auto statuses = warp.each([&](int lane) { return each.at(lane).status; });
        int total = 0, into_y = 0;
        for (int into = kIntoY; into < kIntoCodes; ++into) {
            const uint32_t faults = warp.ballot([&](int lane) {
                const One& one = each.at(lane);
                return one.status != kOk && (one.into == into || one.into < 0);
            });
            if (faults != 0) {
                fail(true, static_cast<Status>(warp.of(statuses, lowest_bit(faults))));
            }
            const uint32_t own = warp.ballot(
                [&](int lane) { return each.at(lane).used && each.at(lane).into == into; });
            warp.run([&](int lane) {
                if (own >> lane & 1) {
                    row.product[total + place_among(own, lane)] = each.at(lane).product;
                }
            });
            total += count_bits(own);
            if (into == kIntoY) row.into_y = into_y = total;
            if (into == kIntoX) row.into_x = total;
        }
        row.products = total;
        return into_y;
    }

    FASTDIFF_HD void branches(const Columns& columns) {
        const uint32_t weigh = warp.ballot([&](int lane) { return columns.branch.at(lane).k != 0; });
        const uint32_t used = evaluates ? weigh : 0;
        fail(used != 0 && a.out == nullptr, kNoOut);
        warp.run([&](int lane) {
            if (!(used >> lane & 1)) return;
            const int at = place_among(used, lane);
            row.k[at] = static_cast<T>(columns.branch.at(lane).k);
            row.branch[at] = lane;
        });
        row.branches = count_bits(used);
        if constexpr (R::kGrown) {
            const auto column = warp.each([&](int lane) {
                return whole(columns.branch.at(lane).scalar, -1, a.scalar_columns + 1);
            });
            fail((used & ~warp.ballot([&](int lane) { return column.at(lane).legal; })) != 0,
                 kBadScalar);
            warp.run([&](int lane) {
                if (!(used >> lane & 1)) return;
                row.scalar_k[place_among(used, lane)] =
                    static_cast<int32_t>(column.at(lane).above) - 1;
            });
        }
    }

    // A list's members that weigh, from number `first` on and before `count`, behind `total` others;
    // their columns name one of `sources`.
    FASTDIFF_HD int32_t list(const Lanes<Columns::Weighed>& columns, int first, int count,
                             int64_t sources, Status fault, Term<T>* to, int total) {
        const auto weighs_x = [&](int lane) { return writes_x && columns.at(lane).first != 0; };
        const auto weighs_e = [&](int lane) { return writes_e && columns.at(lane).second != 0; };
        const auto source = warp.each(
            [&](int lane) { return whole(columns.at(lane).from, 0, sources); });
        const uint32_t used = warp.ballot(
            [&](int lane) { return first + lane < count && (weighs_x(lane) || weighs_e(lane)); });
        fail((used & ~warp.ballot([&](int lane) { return source.at(lane).legal; })) != 0, fault);
        warp.run([&](int lane) {
            if (!(used >> lane & 1)) return;
            to[total + place_among(used, lane)] = {
                writes_x ? static_cast<T>(columns.at(lane).first) : T(0),
                writes_e ? static_cast<T>(columns.at(lane).second) : T(0),
                static_cast<int32_t>(source.at(lane).above)};
        });
        return total + count_bits(used);
    }

    // `draws`: whether the noise is read whatever the row weighs.
    FASTDIFF_HD Status run(bool draws) {
        const Columns columns(warp, a, v);
        const double* const of_terms = v + head::kColumns;
        Lanes<Columns::Weighed> terms = Columns::weighed(warp, of_terms, a.terms);

        const Lanes<Whole> integer = integers(columns);
        const uint32_t legal = warp.ballot([&](int lane) { return integer.at(lane).legal; });
        set = warp.ballot(
            [&](int lane) { return columns.head.at(lane) != (lane == head::v ? 1 : 0); });
        const auto above = warp.each([&](int lane) { return integer.at(lane).above; });
        const auto integer_of = [&](int column) {
            return static_cast<int32_t>(warp.of(above, column));
        };
        flags = integer_of(head::flags);
        evaluates = flags & kEvaluate;
        writes_x = flags & kWritesX;
        writes_e = flags & kWritesE;
        const int32_t push = integer_of(head::push) - 1, push_x = integer_of(head::push_x) - 1;
        const int n_draws = integer_of(head::draws), n_terms = integer_of(head::n_terms),
                  n_extras = integer_of(head::n_extras);
        if constexpr (!R::kGrown) fail(grows(columns, legal >> head::flags & 1), kNoGrowth);
        uint32_t wanted = 1u << head::flags | 1u << head::push | 1u << head::push_x |
                          1u << head::draws | 1u << head::n_terms | 1u << head::n_extras;
        if (R::kGrown) wanted |= 1u << head::n_products;
        if (const uint32_t faults = wanted & ~legal) {
            const int first = lowest_bit(faults);
            fail(true, first == head::flags ? kBadFlags : first <= head::push_x ? kBadSlot
                                                                              : kBadCount);
        }
        fail(push_x >= 0 && push_x == push, kBadSlot);
        row.push = push;
        row.push_x = push_x;
        limits = evaluates && (flags & kThreshold);  // without h there is nothing to limit
        row.flags = limits ? flags : flags & ~kThreshold;

        const int32_t x_reads =
            writes_x ? reads_of(head::a_x, head::a_e, head::b_0, head::c) : 0;
        const int32_t e_reads =
            writes_e ? reads_of(head::d_x, head::d_e, head::g_0, head::c_e) : 0;
        row.x_reads = x_reads;
        row.e_reads = e_reads;
        reads = x_reads | e_reads;
        fail(!evaluates && ((reads & kReadsH) || push >= 0), kNoH);
        const uint32_t weighing = numbers(columns);
        bool reads_point = evaluates && has(head::p);
        if constexpr (R::kGrown) {
            reads_point |= growth(columns, weighing, integer_of(head::n_products));
        }
        const bool writes_m = a.m != nullptr && (flags & kWritesM);
        const bool loads_e = (reads & kReadsE) || (reads_point && (flags & kAtE));
        row.writes_m = writes_m;
        row.loads_x = (reads & kReadsX) || (reads_point && !(flags & kAtE)) ||
                      (writes_m && has(head::c_in_next) && !writes_x && !writes_e);
        row.loads_e = loads_e;
        fail((loads_e || writes_e) && a.e == nullptr, kNoE);
        if (flags & kThreshold) {
            const auto of = [&](int column) { return warp.of(columns.head, column); };
            fail((flags & kClip) || !is_threshold<T>(of(head::quantile), of(head::floor),
                                                     of(head::ceiling)),
                 kBadThreshold);
        }

        branches(columns);
        int32_t total = 0;
        for (int first = 0;;) {
            total = list(terms, first, n_terms, a.slots, kBadSlot, row.term, total);
            first += kLanes;
            if (first >= a.terms) break;
            terms = Columns::weighed(warp, of_terms + term::kColumns * first, a.terms - first);
        }
        row.terms = total;
        row.extras = list(columns.extra, 0, n_extras, a.entries, kBadEntry, row.extra, 0);

        const bool loads_xi = draws || (reads & kReadsXi) != 0, drawn = loads_xi && a.xi == nullptr;
        row.loads_xi = loads_xi;
        row.draws = drawn ? n_draws : 0;
        warp.run([&](int lane) {
            if (lane == head::stream_1) row.stream[0] = integer.at(lane).above;
            if (lane == head::stream_2) row.stream[1] = integer.at(lane).above;
        });
        if (drawn) {
            const uint32_t streams = (1u << (n_draws & 3)) - 1;
            fail(n_draws == 0, kNoXi);
            fail(a.seeds == nullptr, kNoSeeds);
            fail((streams & ~(legal >> head::stream_1)) != 0, kBadStream);
        }
        return status;
    }
};

}  // namespace fastdiff::cuda
