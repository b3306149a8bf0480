// SPDX-License-Identifier: Apache-2.0
// The row of a GPU thread, in shared memory: its lists are indexed at run time, which in registers
// would be local memory.
#pragma once

#include "cuda/resolution.h"

namespace fastdiff::cuda {

// Waits until the kernels ahead in the stream have ended and what they wrote is seen. A launch may
// begin before that (`resolves_early`): until here it has read nothing but its row, and written
// nothing. Every thread of such a launch comes here, so that the kernel behind it, which waits for
// this one, waits for those ahead as well.
FASTDIFF_HD void await_predecessors() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The row of sample b, not yet checked. Wraps where a stage index is nonsense.
FASTDIFF_HD int64_t row_of(const Launch& l, int64_t b) {
    uint64_t index = static_cast<uint64_t>(l.row);
    if (l.row_index != nullptr) index += static_cast<uint64_t>(*l.row_index);
    if (l.args.stage_index != nullptr) index += static_cast<uint64_t>(l.args.stage_index[b]);
    return static_cast<int64_t>(index);
}

// A row in shared memory. One warp resolves it, one thread then reports a fault after
// `await_predecessors`, with a barrier before the row is read.
template <class R>
struct Resolved {
    R row;
    Status status;

    FASTDIFF_HD void resolve(const Warp& warp, const Launch& l, int64_t index) {
        if (index < 0 || index >= l.args.rows) {
            status = kBadRow;
        } else {
            Resolution<R> resolution{warp, l.args, l.args.table + index * l.args.width(), row};
            status = resolution.run(false);
            if (status == kOk) status = scaled(l, resolution.limits);
        }
    }
    FASTDIFF_HD void report(const Launch& l, int64_t index) const {
        if (status == kOk) return;
        l.fault[1] = index;
        l.fault[0] = status;
    }
};

// Doubles of a row of the widest layout.
constexpr int kMaxWidth = head::kColumns + term::kColumns * kMaxTerms +
                          branch::kColumns * kMaxBranches + extra::kColumns * kMaxExtras +
                          product::kColumns * kMaxProducts + measure::kColumns * kMaxMeasures;

// A row for its measures, with the columns that say what they are. All threads `fetch`, with a
// barrier before a warp resolves.
template <class T>
struct Measured : Resolved<GrownRow<T>> {
    double columns[kMaxWidth];

    FASTDIFF_HD void fetch(const Launch& l, int64_t index, int thread, int threads) {
        if (index < 0 || index >= l.args.rows) return;
        const int64_t width = l.args.width();
        const double* from = l.args.table + index * width;
        for (int c = thread; c < static_cast<int>(width); c += threads) columns[c] = from[c];
    }
    FASTDIFF_HD void resolve(const Warp& warp, const Launch& l, int64_t index) {
        const StageArgs& a = l.args;
        bool draws = false;
        this->status = index < 0 || index >= a.rows ? kBadRow : measures(warp, a, draws);
        if (this->status != kOk) return;
        Resolution<GrownRow<T>> resolution{warp, a, columns, this->row};
        this->status = resolution.run(draws);
    }

private:
    // As `check_measures`: a lane has a measure.
    FASTDIFF_HD Status measures(const Warp& warp, const StageArgs& a, bool& draws) const {
        const Whole flags = whole(columns[head::flags], 0, kAllFlags + 1);
        const Whole count = whole(columns[head::n_measures], 0, a.measures + 1);
        if (!flags.legal) return kBadFlags;
        if (!count.legal) return kBadCount;
        struct One {
            int32_t status;
            bool draws;
        };
        const double* m = columns + a.measure_offset();
        const auto each = warp.each([&](int lane) {
            One one = {kOk, false};
            if (lane < static_cast<int>(count.above)) {
                one.status = check_measure(a, columns, m + measure::kColumns * lane, one.draws);
            }
            return one;
        });
        draws = warp.ballot([&](int lane) { return each.at(lane).draws; }) != 0;
        const uint32_t faults = warp.ballot([&](int lane) { return each.at(lane).status != kOk; });
        if (faults == 0) return kOk;
        const auto statuses = warp.each([&](int lane) { return each.at(lane).status; });
        return static_cast<Status>(warp.of(statuses, lowest_bit(faults)));
    }
};

}  // namespace fastdiff::cuda
