// SPDX-License-Identifier: Apache-2.0
// The row of a GPU thread, in shared memory: its lists are indexed at run time, which in registers
// would be local memory.
#pragma once

#include "cuda/cuda.h"

namespace fastdiff::cuda {

// The row of sample b, not yet checked. Wraps where a stage index is nonsense.
FASTDIFF_HD int64_t row_of(const Launch& l, int64_t b) {
    uint64_t index = static_cast<uint64_t>(l.row);
    if (l.row_index != nullptr) index += static_cast<uint64_t>(*l.row_index);
    if (l.args.stage_index != nullptr) index += static_cast<uint64_t>(l.args.stage_index[b]);
    return static_cast<int64_t>(index);
}

// Doubles of a row of the widest layout, without what its kernel leaves out.
template <class R, bool kMeasures>
constexpr int kMaxWidth = head::kColumns + term::kColumns * kMaxTerms +
                          branch::kColumns * kMaxBranches + extra::kColumns * kMaxExtras +
                          (R::kGrown ? product::kColumns * kMaxProducts : 0) +
                          (kMeasures ? measure::kColumns * kMaxMeasures : 0);

// A row in shared memory. Its threads call `fetch`, one of them then `resolve` with whether any
// `fetch` was true, with barriers before, between and after. kMeasures: for the row's measures.
template <class R, bool kMeasures = false>
struct Resolved {
    double columns[kMaxWidth<R, kMeasures>];
    R row;
    Status status;

    // Whether a column read here asks for a GrownRow where R is none.
    FASTDIFF_HD bool fetch(const Launch& l, int64_t index, int lane, int lanes) {
        if (index < 0 || index >= l.args.rows) return false;
        const StageArgs& a = l.args;
        const int64_t used = kMeasures    ? a.width()
                             : R::kGrown ? a.measure_offset()
                                         : a.product_offset();
        const double* from = a.table + index * a.width();
        bool grown = false;
        for (int c = lane; c < static_cast<int>(used); c += lanes) {
            columns[c] = from[c];
            if (!R::kGrown) grown = grown || grows(a, c, from);
        }
        return grown;
    }
    FASTDIFF_HD void resolve(const Launch& l, int64_t index, bool grown) {
        if (index < 0 || index >= l.args.rows) {
            status = kBadRow;
        } else if (grown) {
            status = kNoGrowth;
        } else if constexpr (kMeasures) {
            status = resolve_measures(l.args, columns, row);
        } else {
            status = cuda::resolve(l, columns, row);
        }
        if (status == kOk) return;
        l.fault[1] = index;
        l.fault[0] = status;
    }
};

}  // namespace fastdiff::cuda
