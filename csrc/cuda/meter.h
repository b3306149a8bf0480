// SPDX-License-Identifier: Apache-2.0
// Measures of a sample by one block of kThreads threads.
//
// A thread has four of the 1024 lanes, those of its quads: element i belongs to lane i % 1024, so
// that the quads q, q + kThreads, ... of a sample feed the same four. Then the lanes are folded.
#pragma once

#include "cuda/selection.h"

namespace fastdiff::cuda {

static_assert(4 * kThreads == kLaneCount, "a thread has the lanes of its quads");
static_assert(Selection<float>::kBins <= kThreads, "a thread has a bin");

// Shared memory of a block. `total` is a reduction's sum, `value` the reduction.
template <class T>
struct Meter {
    union {
        double lanes[kLaneCount];
        Selection<T> selection;
    };
    double mean, value[2];

    // The lanes of this thread. `kind`: as `added` takes it.
    template <bool kWide, class S>
    FASTDIFF_HD void add_up(const Launch& l, const GrownRow<T>& row, int64_t b, const Reduction& r,
                            int32_t kind, int thread) {
        const StageArgs& a = l.args;
        const uint64_t seed = row.draws > 0 ? a.seeds[b] : 0;
        const bool same = r.a.of == r.b.of && r.a.at == r.b.at;
        double sums[4] = {0, 0, 0, 0};
        for (int64_t q = thread; q < quads_of(a.size); q += kThreads) {
            reread();
            const auto quad = quad_of<kWide, S>(l, row, b, q, seed);
            auto first = quad.zero(), second = first;
            FASTDIFF_ROLLED  // one copy of what an operand takes, for the registers it keeps
            for (int operand = 0; operand < (same ? 1 : 2); ++operand) {
                second = operand_of(row, quad, operand == 0 ? r.a : r.b);
                if (operand == 0) first = second;
            }
            for (int k = 0; k < 4; ++k) {
                if (k < quad.count) sums[k] = added(kind, first.v[k], second.v[k], mean, sums[k]);
            }
        }
        for (int k = 0; k < 4; ++k) lanes[4 * thread + k] = sums[k];
    }

    // Lane l and lane l + half, for halves of 512, 256, ..., 1 with a barrier after each.
    FASTDIFF_HD void fold(int half, int thread) {
        for (int l = thread; l < half; l += kThreads) lanes[l] += lanes[l + half];
    }

    // `Selection::count` of an operand.
    template <bool kWide, class S>
    FASTDIFF_HD void count(const Launch& l, const GrownRow<T>& row, int64_t b, Operand operand,
                           int pass, int thread) {
        const uint64_t seed = row.draws > 0 ? l.args.seeds[b] : 0;
        typename Selection<T>::Tally tally(selection, pass, thread);
        for (int64_t q = thread; q < quads_of(l.args.size); q += kThreads) {
            reread();
            const auto quad = quad_of<kWide, S>(l, row, b, q, seed);
            tally.add_all(operand_of(row, quad, operand).v, quad.count);
        }
        tally.end(pass);
    }

private:
    // A measure is taken without the scalars.
    template <bool kWide, class S>
    static FASTDIFF_HD Quad<kWide, false, GrownRow<T>, S> quad_of(const Launch& l,
                                                                  const GrownRow<T>& row, int64_t b,
                                                                  int64_t q, uint64_t seed) {
        const int64_t size = l.args.size;
        const int count = size - 4 * q < 4 ? static_cast<int>(size - 4 * q) : 4;
        auto quad = quad_at<kWide, false, GrownRow<T>, S>(l, row, b, q, seed, count);
        quad.scalars = nullptr;
        return quad;
    }
};

template <class T, class S>
FASTDIFF_HD void add_up(const Launch& l, const GrownRow<T>& row, int64_t b, const Reduction& r,
                        int32_t kind, int thread, Meter<T>& meter) {
    if (wide_samples(l)) {
        meter.template add_up<true, S>(l, row, b, r, kind, thread);
    } else {
        meter.template add_up<false, S>(l, row, b, r, kind, thread);
    }
}

template <class T, class S>
FASTDIFF_HD void count_operand(const Launch& l, const GrownRow<T>& row, int64_t b, Operand operand,
                               int pass, int thread, Meter<T>& meter) {
    if (wide_samples(l)) {
        meter.template count<true, S>(l, row, b, operand, pass, thread);
    } else {
        meter.template count<false, S>(l, row, b, operand, pass, thread);
    }
}

// All measures of sample b, by the threads of a block. `each(work)` calls work(thread) for every
// thread of the block and ends with a barrier; on a GPU it calls it for the caller's own thread.
template <class T, class S, class Each>
FASTDIFF_HD void measure_sample(const Launch& l, const double* columns, const GrownRow<T>& row,
                                int64_t b, Meter<T>& meter, const Each& each) {
    const StageArgs& a = l.args;
    const auto total = [&](const Reduction& r, int32_t kind) {
        each([&](int thread) { add_up<T, S>(l, row, b, r, kind, thread, meter); });
        FASTDIFF_ROLLED
        for (int half = kLaneCount / 2; half > 0; half /= 2) {
            each([&](int thread) { meter.fold(half, thread); });
        }
    };
    const int count = static_cast<int>(columns[head::n_measures]);
    FASTDIFF_ROLLED
    for (int i = 0; i < count; ++i) {
        const Measure m = measure_of(a, columns, i);
        FASTDIFF_ROLLED
        for (int part = 0; part < (m.divides ? 2 : 1); ++part) {
            const Reduction r = part == 0 ? m.num : m.den;
            if (r.kind == kQuantile) {
                each([&](int thread) { meter.selection.start(r.rank, a.size, thread); });
                FASTDIFF_ROLLED
                for (int pass = 0; pass < Selection<T>::kPasses; ++pass) {
                    each([&](int thread) { meter.selection.clear(thread, kThreads); });
                    each([&](int thread) {
                        count_operand<T, S>(l, row, b, r.a, pass, thread, meter);
                    });
                    each([&](int thread) {
                        if (thread < Selection<T>::kBins) meter.selection.sum(thread);
                    });
                    each([&](int thread) {
                        if (thread < Selection<T>::kBins) meter.selection.choose(pass, thread);
                    });
                }
                each([&](int thread) {
                    if (thread == 0) {
                        meter.value[part] = meter.selection.quantile(r.rank, a.size);
                    }
                });
                continue;
            }
            // a deviation takes the sum for the mean first
            FASTDIFF_ROLLED
            for (int pass = r.kind == kStd ? 0 : 1; pass < 2; ++pass) {
                total(r, pass == 0 ? kSum : r.kind);
                each([&](int thread) {
                    if (thread != 0) return;
                    if (pass == 0) {
                        meter.mean = meter.lanes[0] / static_cast<double>(a.size);
                    } else {
                        meter.value[part] = reduced(r.kind, meter.lanes[0], a.size);
                    }
                });
            }
        }
        each([&](int thread) {
            if (thread != 0) return;
            T* to = static_cast<T*>(a.scalars) + b * a.scalar_columns;
            to[m.into] = static_cast<T>(measured(m, meter.value[0], meter.value[1]));
        });
    }
}

}  // namespace fastdiff::cuda
