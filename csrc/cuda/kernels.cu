// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels. `thread.h`, `selection.h` and `meter.h` say what a thread does; here stand the
// barriers.
#include "cuda/launch.h"
#include "cuda/meter.h"

namespace fastdiff::cuda {

static_assert(kWarp == kLanes);

namespace {

// Registers for four blocks a processor in float32 (three where rows grow), two in float64, and no
// local memory.
template <class R>
constexpr int kBlocks = sizeof(typename R::Number) == 8 ? 2 : R::kGrown ? 3 : 4;

// The thread's number, asked again: what follows from it takes no registers between two samples.
__device__ int thread_anew() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// -- kernels -------------------------------------------------------------------------------------

// All samples run one row: each block resolves it and strides over the batch.
template <class R, class S>
__global__ void __launch_bounds__(kThreads, kBlocks<R>)
    stage_shared(const __grid_constant__ Launch l) {
    __shared__ Placed<R> at;
    const int64_t index = row_of(l, 0);
    if (threadIdx.x < kWarp) {
        const Warp warp{static_cast<int>(threadIdx.x)};
        at.resolve(warp, l, index);
        at.template find_places<S>(warp, l);
    }
    await_predecessors();
    if (threadIdx.x == 0) at.report(l, index);
    __syncthreads();
    if (at.status != kOk) return;
    shared_thread<S>(l, at, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                     static_cast<int64_t>(gridDim.x) * kThreads);
}

// Each sample runs its own row: a warp takes a chunk of one sample at a time.
template <class R, class S>
__global__ void __launch_bounds__(kThreads, kBlocks<R>)
    stage_samples(const __grid_constant__ Launch l) {
    __shared__ Resolved<R> each[kWarps];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    Resolved<R>& at = each[warp];
    // Where a warp stands is not kept in registers, of which there is none to spare.
    __shared__ int64_t resolved[kWarps], unit[kWarps];
    if (lane == 0) resolved[warp] = -1;  // never a row of the table
    if (lane == 0) unit[warp] = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
    __syncwarp();
    while (true) {
        reread();
        const int64_t u = unit[warp], chunks = (quads_of(again(l.args.size)) + kChunk - 1) / kChunk;
        if (u >= l.args.batch * chunks) break;
        const int64_t b = divide(u, chunks), index = row_of(l, b);
        if (index != resolved[warp] || index < 0) {
            __syncwarp();
            at.resolve(Warp{lane}, l, index);
            await_predecessors();
            if (lane == 0) at.report(l, index);
            if (lane == 0) resolved[warp] = index;
            __syncwarp();
        }
        if (at.status == kOk) sample_lane<S>(l, at.row, b, u - b * chunks, lane, kWarp);
        __syncwarp();
        if (lane == 0) unit[warp] += static_cast<int64_t>(gridDim.x) * kWarps;
        __syncwarp();
    }
}

// The scale of each sample whose row thresholds: a block takes one sample at a time.
template <class R, class S>
__global__ void __launch_bounds__(kSelectors<typename R::Number>, 1)
    thresholds(const __grid_constant__ Launch l) {
    using T = typename R::Number;
    __shared__ Resolved<R> at;
    __shared__ Selection<T> selection;
    constexpr int kBlock = kSelectors<T>;
    const int thread = threadIdx.x;
    for (int64_t b = blockIdx.x; b < l.args.batch; b += gridDim.x) {
        const int64_t index = row_of(l, b);
        __syncthreads();
        if (thread < kWarp) at.resolve(Warp{thread}, l, index);
        await_predecessors();
        if (thread == 0) at.report(l, index);
        __syncthreads();
        if (at.status != kOk || !(at.row.flags & kThreshold)) continue;
        selection.start(at.row.quantile, l.args.size, thread);
        FASTDIFF_ROLLED
        for (int pass = 0; pass < Selection<T>::kPasses; ++pass) {
            selection.clear(thread, kBlock);
            __syncthreads();
            count_magnitudes<S>(l, at.row, b, pass, thread, kBlock, selection);
            __syncthreads();
            if (thread < Selection<T>::kBins) selection.sum(thread);
            __syncthreads();
            if (thread < Selection<T>::kBins) selection.choose(pass, thread);
            __syncthreads();
        }
        if (thread == 0) {
            static_cast<T*>(l.scale)[b] =
                scale_of(at.row, selection.quantile(at.row.quantile, l.args.size));
        }
    }
}

// The measures of each sample: a block takes one sample at a time.
template <class T, class S>
__global__ void __launch_bounds__(kThreads, 2) measures(const __grid_constant__ Launch l) {
    __shared__ Measured<T> at;
    __shared__ Meter<T> meter;
    for (int64_t b = blockIdx.x; b < l.args.batch; b += gridDim.x) {
        const int thread = thread_anew();
        const int64_t index = row_of(l, b);
        __syncthreads();
        at.fetch(l, index, thread, kThreads);
        __syncthreads();
        if (thread < kWarp) at.resolve(Warp{thread}, l, index);
        await_predecessors();
        if (thread == 0) at.report(l, index);
        __syncthreads();
        if (at.status != kOk) continue;
        measure_sample<T, S>(l, at.columns, at.row, b, meter, [&](const auto& work) {
            work(thread_anew());
            __syncthreads();
        });
    }
}

template <class Z>
__global__ void __launch_bounds__(kThreads)
    normals(const __grid_constant__ Normals n, bool wide) {
    normal_thread<Z>(n, wide, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                     static_cast<int64_t>(gridDim.x) * kThreads);
}

// -- launchers start them by these ---------------------------------------------------------------

}  // namespace
}  // namespace fastdiff::cuda

#include "cuda/kernels.h"
