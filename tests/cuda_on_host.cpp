// SPDX-License-Identifier: Apache-2.0
// The CUDA module with the host in the device's place: csrc/cuda/*.h run thread after thread, in the
// grids of csrc/cuda/kernels.cu, on host memory. What it cannot show is what only a GPU has:
// barriers, memory spaces, the compiled machine code.
#include "cuda/meter.h"

#include <memory>

namespace fastdiff::cuda {
namespace {

// Few, so that every test makes threads stride.
constexpr int64_t kResident = 3;

int64_t blocks_for(int64_t wanted) { return wanted < kResident ? wanted : kResident; }

// Each thread of a block does `work` before any of them goes on: what a barrier ends.
template <class Work>
void phase(int threads, const Work& work) {
    for (int k = 0; k < threads; ++k) work((k * 37 + 11) % threads);
}

// The row of a block or a warp of this many threads.
template <class At>
void resolve_by(int threads, const Launch& l, int64_t index, At& at) {
    bool grown = false;
    phase(threads, [&](int lane) { grown = at.fetch(l, index, lane, threads) || grown; });
    at.resolve(l, index, grown);
}

template <class R, class S>
void shared(const Launch& l) {
    const int64_t quads = l.args.batch * quads_of(l.args.size);
    const int64_t threads = blocks_for((quads + kThreads - 1) / kThreads) * kThreads;
    Resolved<R> at;
    for (int64_t thread = 0; thread < threads; ++thread) {
        if (thread % kThreads == 0) resolve_by(kThreads, l, row_of(l, 0), at);
        if (at.status == kOk) shared_thread<S>(l, at.row, thread, threads);
    }
}

template <class R, class S>
void samples(const Launch& l) {
    const int64_t chunks = (quads_of(l.args.size) + kChunk - 1) / kChunk;
    Resolved<R> at;
    for (int64_t unit = l.args.batch * chunks; unit-- > 0;) {
        const int64_t b = divide(unit, chunks);
        resolve_by(kWarp, l, row_of(l, b), at);
        for (int lane = 0; lane < kWarp && at.status == kOk; ++lane) {
            sample_lane<S>(l, at.row, b, unit - b * chunks, lane, kWarp);
        }
    }
}

template <class R, class S>
void thresholds(const Launch& l) {
    using T = typename R::Number;
    constexpr int kBlock = kSelectors<T>, kBins = Selection<T>::kBins;
    Resolved<R> at;
    const auto memory = std::make_unique<Selection<T>>();
    Selection<T>& selection = *memory;
    for (int64_t b = 0; b < l.args.batch; ++b) {
        resolve_by(kBlock, l, row_of(l, b), at);
        if (at.status != kOk || !(at.row.flags & kThreshold)) continue;
        memset(static_cast<void*>(&selection), 0xA5, sizeof selection);
        const double wanted = at.row.quantile;
        phase(kBlock, [&](int thread) { selection.start(wanted, l.args.size, thread); });
        for (int pass = 0; pass < Selection<T>::kPasses; ++pass) {
            phase(kBlock, [&](int thread) { selection.clear(thread, kBlock); });
            phase(kBlock, [&](int thread) {
                count_magnitudes<S>(l, at.row, b, pass, thread, kBlock, selection);
            });
            phase(kBins, [&](int bin) { selection.sum(bin); });
            phase(kBins, [&](int bin) { selection.choose(pass, bin); });
        }
        static_cast<T*>(l.scale)[b] = scale_of(at.row, selection.quantile(wanted, l.args.size));
    }
}

template <class T, class S>
void measures(const Launch& l) {
    Resolved<GrownRow<T>, true> at;
    const auto memory = std::make_unique<Meter<T>>();
    Meter<T>& meter = *memory;
    for (int64_t b = 0; b < l.args.batch; ++b) {
        resolve_by(kThreads, l, row_of(l, b), at);
        if (at.status != kOk) continue;
        memset(static_cast<void*>(&meter), 0xA5, sizeof meter);
        measure_sample<T, S>(l, at.columns, at.row, b, meter,
                             [](const auto& work) { phase(kThreads, work); });
    }
}

template <class R, class S>
void either(const Launch& l) {
    if (l.scale != nullptr) thresholds<R, S>(l);
    if (l.args.stage_index == nullptr) {
        shared<R, S>(l);
    } else {
        samples<R, S>(l);
    }
}

struct RunStage {
    template <class T, class S>
    static void run(const Launch& l) {
        if (l.grown) {
            either<GrownRow<T>, S>(l);
        } else {
            either<Row<T>, S>(l);
        }
    }
};

struct RunMeasures {
    template <class T, class S>
    static void run(const Launch& l) {
        measures<T, S>(l);
    }
};

template <class What, class T>
void by_output(const Launch& l) {
    switch (l.args.out_dtype) {
        case kFloat32: return What::template run<T, float>(l);
        case kFloat64: return What::template run<T, double>(l);
        case kBfloat16: return What::template run<T, Bfloat16>(l);
        default: return What::template run<T, Float16>(l);
    }
}

template <class What>
Outcome dispatch(Launch l) {
    const Status status = check_alignment(l);
    if (status != kOk) return {status, nullptr};
    if (l.args.batch * l.args.size == 0) return {kOk, nullptr};
    if (l.args.state == kFloat64) {
        by_output<What, double>(l);
    } else {
        by_output<What, float>(l);
    }
    return {kOk, nullptr};
}

}  // namespace

Outcome run_stage(Launch l, int, void*) { return dispatch<RunStage>(l); }

Outcome run_measures(Launch l, int, void*) { return dispatch<RunMeasures>(l); }

Outcome normal(const Normals& n, Dtype dtype, int, void*) {
    const bool wide = n.size % 4 == 0 && reinterpret_cast<uintptr_t>(n.z) % 16 == 0;
    const int64_t threads = kResident * kThreads;
    for (int64_t thread = 0; thread < threads && n.batch * n.size > 0; ++thread) {
        if (dtype == kFloat64) {
            normal_thread<double>(n, wide, thread, threads);
        } else {
            normal_thread<float>(n, wide, thread, threads);
        }
    }
    return {kOk, nullptr};
}

Outcome probe() { return {kOk, nullptr}; }

}  // namespace fastdiff::cuda
