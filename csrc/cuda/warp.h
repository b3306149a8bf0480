// SPDX-License-Identifier: Apache-2.0
// Thirty-two lanes that do the same. On a GPU each lane runs these lines and has its own value; on a
// host one call runs all lanes, one after another. Between two calls every lane has finished.
#pragma once

#include <stdint.h>
#include <string.h>

#include "philox.h"

namespace fastdiff::cuda {

constexpr int kLanes = 32;

// A value a lane: `at(lane)` gives a lane its own.
template <class U>
struct Lanes {
#if defined(__CUDA_ARCH__)
    U own;
    FASTDIFF_HD const U& at(int) const { return own; }
#else
    U all[kLanes];
    const U& at(int lane) const { return all[lane]; }
#endif
};

struct Warp {
    int lane;  // on a GPU, of the caller

    // f(lane) of every lane.
    template <class F>
    FASTDIFF_HD auto each(const F& f) const -> Lanes<decltype(f(0))> {
#if defined(__CUDA_ARCH__)
        return {f(lane)};
#else
        Lanes<decltype(f(0))> values;
        for (int k = 0; k < kLanes; ++k) values.all[k] = f(k);
        return values;
#endif
    }
    // f(lane) in every lane.
    template <class F>
    FASTDIFF_HD void run(const F& f) const {
#if defined(__CUDA_ARCH__)
        f(lane);
#else
        for (int k = 0; k < kLanes; ++k) f(k);
#endif
    }
    // f() once.
    template <class F>
    FASTDIFF_HD void once(const F& f) const {
#if defined(__CUDA_ARCH__)
        if (lane == 0) f();
#else
        f();
#endif
    }
    // Bit k: whether f(k). Every lane learns all of them.
    template <class F>
    FASTDIFF_HD uint32_t ballot(const F& f) const {
#if defined(__CUDA_ARCH__)
        return __ballot_sync(0xFFFFFFFFu, f(lane));
#else
        uint32_t bits = 0;
        for (int k = 0; k < kLanes; ++k) bits |= static_cast<uint32_t>(f(k) ? 1 : 0) << k;
        return bits;
#endif
    }
    // What one lane has, for every lane.
    template <class U>
    FASTDIFF_HD U of(const Lanes<U>& values, int from) const {
#if defined(__CUDA_ARCH__)
        return __shfl_sync(0xFFFFFFFFu, values.own, from);
#else
        return values.all[from];
#endif
    }
};

FASTDIFF_HD int count_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __popc(bits);
#else
    return __builtin_popcount(bits);
#endif
}
// The place of the lowest bit set; `bits` is not 0.
FASTDIFF_HD int lowest_bit(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __ffs(static_cast<int>(bits)) - 1;
#else
    return __builtin_ctz(bits);
#endif
}
// How many of the bits stand below a lane's: its place in the list of those set.
FASTDIFF_HD int place_among(uint32_t bits, int lane) {
    return count_bits(bits & ((1u << lane) - 1));
}

// A column read as an integer in [least, least + count).
struct Whole {
    bool legal;
    uint32_t above;  // the integer less `least`
};

// `least` is 0 or -1. One addition makes the low bits of the sum the integer, which takes less time
// than casts to and fro; another undoes it where the value is one.
FASTDIFF_HD Whole whole(double value, int least, int64_t count) {
    const double shift = 6755399441055744.0 - least;  // 1.5 2^52: a unit in the last place is 1
    const double sum = value + shift;
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    const uint32_t above = static_cast<uint32_t>(bits);
    const bool legal = sum - shift == value && bits >> 32 == 0x43380000u && above < count;
    return {legal, above};
}

}  // namespace fastdiff::cuda
