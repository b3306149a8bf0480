// SPDX-License-Identifier: Apache-2.0
// Quantiles of magnitudes, exact: what a threshold and a measure take from order statistics.
#pragma once

#include <string.h>

#include <type_traits>

#include "row.h"

namespace fastdiff {

// The magnitude of a T as an integer: these order as magnitudes do, NaN last.
template <class T>
struct Magnitude {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    static constexpr int kBits = 8 * sizeof(T) - 1;
    static constexpr Bits kMost = ~Bits{0} >> 1;  // a NaN

    static FASTDIFF_HD Bits of(T v) {
        Bits bits;
        memcpy(&bits, &v, sizeof bits);
        return bits & kMost;
    }
    static FASTDIFF_HD T value(Bits bits) {
        T v;
        memcpy(&v, &bits, sizeof v);
        return v;
    }
};

// Where a quantile of n magnitudes lies: `weight` of the way from the one of rank `rank` to the
// next, the least having rank 0.
struct Position {
    int64_t rank;
    double weight;

    FASTDIFF_HD Position(double quantile, int64_t n) {
        const double position = quantile * static_cast<double>(n - 1);
        rank = static_cast<int64_t>(position);
        weight = position - static_cast<double>(rank);
    }
};

// The quantile between the two; `high` may be anything where `weight` is 0.
template <class T>
FASTDIFF_HD double between(double weight, T low, T high) {
    if (weight == 0) high = low;
    return low + weight * (static_cast<double>(high) - low);
}

// The scale s of a sample from its quantile; the floor where that is NaN.
template <class T>
FASTDIFF_HD T scale_of(const Row<T>& row, double quantile) {
    const double s = quantile > row.floor ? quantile : row.floor;
    return static_cast<T>(s < row.ceiling ? s : row.ceiling);
}

}  // namespace fastdiff
