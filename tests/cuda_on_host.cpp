// SPDX-License-Identifier: Apache-2.0
// The CUDA module with the host in the device's place: csrc/cuda_kernels.h run thread after thread,
// in the grids of csrc/cuda.cu, on host memory. What it cannot show is what only a GPU has:
// barriers, memory spaces, the compiled machine code.
#include "cuda_kernels.h"

#include <memory>

namespace fastdiff::cuda {
namespace {

// Few, so that every test makes threads stride.
constexpr int64_t kResident = 3;

int64_t blocks_for(int64_t wanted) { return wanted < kResident ? wanted : kResident; }

template <class T, class S>
void shared(const Launch& l) {
    const int64_t quads = l.args.batch * quads_of(l.args.size);
    const int64_t threads = blocks_for((quads + kThreads - 1) / kThreads) * kThreads;
    Resolved<T> at;
    for (int64_t thread = 0; thread < threads; ++thread) {
        const int64_t index = row_of(l, 0);
        if (thread % kThreads == 0) {
            for (int lane = kThreads; lane-- > 0;) at.fetch(l, index, lane, kThreads);
            at.resolve(l, index);
        }
        if (at.status == kOk) shared_thread<T, S>(l, at.row, thread, threads);
    }
}

template <class T, class S>
void samples(const Launch& l) {
    const int64_t chunks = (quads_of(l.args.size) + kChunk - 1) / kChunk;
    Resolved<T> at;
    for (int64_t unit = l.args.batch * chunks; unit-- > 0;) {
        const int64_t b = divide(unit, chunks), index = row_of(l, b);
        for (int lane = 0; lane < kWarp; ++lane) at.fetch(l, index, lane, kWarp);
        at.resolve(l, index);
        for (int lane = 0; lane < kWarp && at.status == kOk; ++lane) {
            sample_lane<T, S>(l, at.row, b, unit - b * chunks, lane, kWarp);
        }
    }
}

// Each thread of a block does `work` before any of them goes on: what a barrier ends.
template <class Work>
void phase(int threads, const Work& work) {
    for (int k = 0; k < threads; ++k) work((k * 37 + 11) % threads);
}

template <class T, class S>
void thresholds(const Launch& l) {
    constexpr int kBlock = kSelectors<T>, kBins = Selection<T>::kBins;
    Resolved<T> at;
    const auto memory = std::make_unique<Selection<T>>();
    Selection<T>& selection = *memory;
    for (int64_t b = 0; b < l.args.batch; ++b) {
        const int64_t index = row_of(l, b);
        phase(kBlock, [&](int thread) { at.fetch(l, index, thread, kBlock); });
        at.resolve(l, index);
        if (at.status != kOk || !(at.row.flags & kThreshold)) continue;
        memset(static_cast<void*>(&selection), 0xA5, sizeof selection);
        phase(kBlock, [&](int thread) { selection.start(at.row, l.args.size, thread); });
        for (int pass = 0; pass < Selection<T>::kPasses; ++pass) {
            phase(kBlock, [&](int thread) { selection.clear(thread, kBlock); });
            phase(kBlock, [&](int thread) {
                count_magnitudes<T, S>(l, at.row, b, pass, thread, kBlock, selection);
            });
            phase(kBins, [&](int bin) { selection.sum(bin); });
            phase(kBins, [&](int bin) { selection.choose(pass, bin); });
        }
        static_cast<T*>(l.scale)[b] = selection.scale(at.row, l.args.size);
    }
}

template <class T, class S>
void either(const Launch& l) {
    if (l.scale != nullptr) thresholds<T, S>(l);
    if (l.args.stage_index == nullptr) {
        shared<T, S>(l);
    } else {
        samples<T, S>(l);
    }
}

template <class T>
void by_output(const Launch& l) {
    switch (l.args.out_dtype) {
        case kFloat32: return either<T, float>(l);
        case kFloat64: return either<T, double>(l);
        case kBfloat16: return either<T, Bfloat16>(l);
        default: return either<T, Float16>(l);
    }
}

template <class Z>
void fill(Z* z, const uint64_t* seeds, int64_t batch, int64_t size, uint32_t stream) {
    const bool wide = size % 4 == 0 && reinterpret_cast<uintptr_t>(z) % 16 == 0;
    const int64_t threads = kResident * kThreads;
    for (int64_t thread = 0; thread < threads; ++thread) {
        normal_thread(z, seeds, batch, size, stream, wide, thread, threads);
    }
}

}  // namespace

Outcome run(Launch l, int, void*) {
    const Status status = check_alignment(l);
    if (status != kOk) return {status, nullptr};
    if (l.args.batch * l.args.size == 0) return {kOk, nullptr};
    if (l.args.state == kFloat64) {
        by_output<double>(l);
    } else {
        by_output<float>(l);
    }
    return {kOk, nullptr};
}

Outcome normal(void* z, Dtype dtype, const uint64_t* seeds, int64_t batch, int64_t size,
               uint32_t stream, int, void*) {
    if (batch * size == 0) return {kOk, nullptr};
    if (dtype == kFloat64) {
        fill(static_cast<double*>(z), seeds, batch, size, stream);
    } else {
        fill(static_cast<float*>(z), seeds, batch, size, stream);
    }
    return {kOk, nullptr};
}

Outcome probe() { return {kOk, nullptr}; }

}  // namespace fastdiff::cuda
