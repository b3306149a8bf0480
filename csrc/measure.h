// SPDX-License-Identifier: Apache-2.0
// Measures: numbers of each sample that a row takes before it updates, and leaves in S.
//
//     S[b, into] = offset + weight (num / den)^power
//
// in float64, rounded once to the state's type. Sums have one order on every backend: lane l of
// 1024 adds the elements l, l + 1024, l + 2048, ... in order; then lane l adds lane l + 512 (for
// l < 512), l + 256, ..., l + 1.
#pragma once

#include <math.h>

#include "quantile.h"
#include "stage.h"

namespace fastdiff {

constexpr int kLaneCount = 1024;

struct Operand {
    int32_t of, at;
};

struct Reduction {
    int32_t kind;
    Operand a, b;  // b as a where the row names none
    double rank;
};

struct Measure {
    int32_t into;
    double power, weight, offset;
    Reduction num, den;
    bool divides;
};

// From the columns of one reduction.
FASTDIFF_HD Reduction reduction_of(const double* v) {
    const auto integer = [&](int column) {
        return static_cast<int32_t>(v[column - measure::num_kind]);
    };
    const Operand a = {integer(measure::num_a), integer(measure::num_a_at)};
    const Operand b = {integer(measure::num_b), integer(measure::num_b_at)};
    return {integer(measure::num_kind), a, b.of < 0 ? a : b,
            v[measure::num_rank - measure::num_kind]};
}

// The i-th of a row that `check_measures` has passed.
FASTDIFF_HD Measure measure_of(const StageArgs& a, const double* v, int i) {
    const double* m = v + a.measure_offset() + measure::kColumns * i;
    const bool divides = m[measure::den_kind] >= 0;
    const Reduction num = reduction_of(m + measure::num_kind);
    return {static_cast<int32_t>(m[measure::measure_into]),
            m[measure::power],
            m[measure::measure_weight],
            m[measure::offset],
            num,
            divides ? reduction_of(m + measure::den_kind) : num,
            divides};
}

// One operand of a reduction; sets `draws` where it is the noise.
FASTDIFF_HD Status check_operand(const StageArgs& a, const double* v, double of, double at,
                                 bool& draws) {
    if (!is_index(of, kOfCodes)) return kBadMeasure;
    const bool evaluates = static_cast<int32_t>(v[head::flags]) & kEvaluate;
    switch (static_cast<int32_t>(of)) {
        case kOfX: return kOk;
        case kOfE: return a.e == nullptr ? kNoE : kOk;
        case kOfXi: draws = true; return kOk;
        case kOfSlot: return is_index(at, a.slots) ? kOk : kBadSlot;
        case kOfBank: return is_index(at, a.entries) ? kOk : kBadEntry;
        case kOfOut:
            if (!is_index(at, a.branches)) return kBadMeasure;
            return a.out == nullptr ? kNoOut : kOk;
        case kOfY: return evaluates ? kOk : kNoH;
        default: return kBadMeasure;
    }
}

FASTDIFF_HD Status check_reduction(const StageArgs& a, const double* v, const double* r,
                                   bool& draws) {
    const auto column = [&](int c) { return r[c - measure::num_kind]; };
    if (!is_index(column(measure::num_kind), kReduceCodes)) return kBadMeasure;
    const int kind = static_cast<int>(column(measure::num_kind));
    const double rank = column(measure::num_rank);
    if (kind == kQuantile && !(rank >= 0 && rank <= 1)) return kBadMeasure;
    const bool second = column(measure::num_b) != -1;
    if (second && kind != kDot) return kBadMeasure;
    const Status status =
        check_operand(a, v, column(measure::num_a), column(measure::num_a_at), draws);
    if (status != kOk || !second) return status;
    return check_operand(a, v, column(measure::num_b), column(measure::num_b_at), draws);
}

// Whether one measure, from its columns, can be made in the row `v`; sets `draws` where it reads the
// noise.
FASTDIFF_HD Status check_measure(const StageArgs& a, const double* v, const double* m,
                                 bool& draws) {
    if (!is_index(m[measure::measure_into], a.scalar_columns)) return kBadScalar;
    const Status status = check_reduction(a, v, m + measure::num_kind, draws);
    if (status != kOk || m[measure::den_kind] == -1) return status;
    return check_reduction(a, v, m + measure::den_kind, draws);
}

// Whether the measures of a row can be made; sets `draws` where one reads the noise. The flags are
// checked before.
FASTDIFF_HD Status check_measures(const StageArgs& a, const double* v, bool& draws) {
    draws = false;
    if (!is_index(v[head::n_measures], 0, a.measures)) return kBadCount;
    const double* m = v + a.measure_offset();
    for (int i = 0; i < static_cast<int>(v[head::n_measures]); ++i, m += measure::kColumns) {
        const Status status = check_measure(a, v, m, draws);
        if (status != kOk) return status;
    }
    return kOk;
}

// The row for its measures: as it updates, with the noise drawn where a measure reads it.
template <class T>
FASTDIFF_HD Status resolve_measures(const StageArgs& a, const double* v, GrownRow<T>& row) {
    bool draws = false;
    if (!is_index(v[head::flags], 0, kAllFlags)) return kBadFlags;
    const Status status = check_measures(a, v, draws);
    return status != kOk ? status : resolve(a, v, row, draws);
}

// What `io` stands at of an operand. y is combined without the scalars that io has.
template <class T, class IO>
FASTDIFF_HD typename IO::V operand_of(const GrownRow<T>& row, const IO& io, Operand operand) {
    switch (operand.of) {
        case kOfX: return io.x();
        case kOfE: return io.e();
        case kOfXi: return noise_of(row, io);
        case kOfSlot: return io.slot(operand.at);
        case kOfBank: return io.entry(operand.at);
        case kOfOut: return io.output(operand.at);
        default: return form(row, io);
    }
}

// `total` with one element added: of a sum, of squares or products, or of squared deviations.
FASTDIFF_HD double added(int32_t kind, double a, double b, double mean, double total) {
    if (kind == kSum) return total + a;
    if (kind != kStd) return fused(a, b, total);
    const double deviation = a - mean;
    return fused(deviation, deviation, total);
}

// A reduction from its sum over n elements.
FASTDIFF_HD double reduced(int32_t kind, double total, int64_t n) {
    if (kind == kNorm) return sqrt(total);
    if (kind == kStd) return sqrt(total / static_cast<double>(n - 1));
    return total;
}

// ratio^power. The powers that plans use are spelt out: a library's pow differs between machines.
FASTDIFF_HD double raised(double ratio, double power) {
    if (power == 1) return ratio;
    if (power == 0.5) return sqrt(ratio);
    if (power == 2) return ratio * ratio;
    if (power == -1) return 1 / ratio;
    if (power == -0.5) return 1 / sqrt(ratio);
    return pow(ratio, power);
}

// What goes into S. A denominator of 0 makes the ratio 0.
FASTDIFF_HD double measured(const Measure& m, double num, double den) {
    const double ratio = !m.divides ? num : den == 0 ? 0 : num / den;
    return fused(m.weight, raised(ratio, m.power), m.offset);
}

}  // namespace fastdiff
