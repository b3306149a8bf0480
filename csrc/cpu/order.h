// SPDX-License-Identifier: Apache-2.0
// Quantiles of a sample's magnitudes without storing or sorting them.
#pragma once

#include <algorithm>

#include "cpu/cpu.h"

namespace fastdiff::cpu {

// Quantiles of one sample's |h|, exact. Passes over h, formed again in each, settle 11 bits
// of the wanted one at a time until those that share them fit in a block, among which it is then
// chosen: one pass for a sample of up to a block, three for nearly all others, seven where float64
// values tie.
//
// `read(lo, hi, h)` writes h of elements [lo, hi) of the sample.
template <class T, class Read>
class Magnitudes {
public:
    Magnitudes(int64_t size, const Read& read) : size_(size), read_(read) {}

    double quantile(double quantile) const {
        const Position position(quantile, size_);
        T low, high;
        pair(position.rank, low, high);
        return between(position.weight, low, high);
    }

private:
    using Bits = typename Magnitude<T>::Bits;
    static constexpr int kBits = Magnitude<T>::kBits, kRadix = 11;

    template <class Work>
    void each(const Work& work) const {
        alignas(64) T h[kBlock];
        for (int64_t lo = 0; lo < size_; lo += kBlock) {
            const int64_t hi = std::min(lo + kBlock, size_);
            read_(lo, hi, h);
            for (int64_t i = 0; i < hi - lo; ++i) work(Magnitude<T>::of(h[i]));
        }
    }

    // Those of rank `rank` and rank + 1; NaN where there is no such.
    void pair(int64_t rank, T& low, T& high) const {
        Bits prefix = 0;  // of the wanted key: its bits from `shift` on
        int shift = kBits;
        int64_t sharing = size_;  // keys with that prefix, and `rank` counts among them
        while (sharing > kBlock && shift > 0) {
            const int width = std::min(kRadix, shift);
            int64_t count[1 << kRadix] = {};
            each([&](Bits key) {
                if (key >> shift == prefix) ++count[(key >> (shift - width)) & ((1 << width) - 1)];
            });
            int digit = 0;
            while (rank >= count[digit]) rank -= count[digit++];
            prefix = prefix << width | static_cast<Bits>(digit);
            shift -= width;
            sharing = count[digit];
        }
        Bits kept[kBlock], above = Magnitude<T>::kMost;
        int64_t filled = 0;
        each([&](Bits key) {
            if (key >> shift == prefix) {
                if (filled < kBlock) kept[filled++] = key;  // past a block all are equal
            } else if (key >> shift > prefix && key < above) {
                above = key;
            }
        });
        const int64_t place = std::min(rank, filled - 1);
        std::nth_element(kept, kept + place, kept + filled);
        low = Magnitude<T>::value(kept[place]);
        if (place + 1 < filled) {
            above = *std::min_element(kept + place + 1, kept + filled);
        } else if (rank + 1 < sharing) {
            above = kept[place];
        }
        high = Magnitude<T>::value(above);
    }

    int64_t size_;
    const Read& read_;
};

}  // namespace fastdiff::cpu
