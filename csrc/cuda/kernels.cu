// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels and their launchers. `thread.h`, `selection.h` and `meter.h` say what a thread
// does; here stand the barriers, the grids and the runtime's errors.
#include "cuda/meter.h"

#include <cuda_runtime.h>

#include <atomic>

namespace fastdiff::cuda {
namespace {

// Registers for four blocks a processor in float32 (three where rows grow), two in float64, and no
// local memory.
template <class R>
constexpr int kBlocks = sizeof(typename R::Number) == 8 ? 2 : R::kGrown ? 3 : 4;

// -- kernels -------------------------------------------------------------------------------------

// All samples run one row: each block resolves it and strides over the batch.
template <class R, class S>
__global__ void __launch_bounds__(kThreads, kBlocks<R>)
    stage_shared(const __grid_constant__ Launch l) {
    __shared__ Resolved<R> at;
    const int64_t index = row_of(l, 0);
    const bool grown = __syncthreads_or(at.fetch(l, index, threadIdx.x, kThreads));
    if (threadIdx.x == 0) at.resolve(l, index, grown);
    __syncthreads();
    if (at.status != kOk) return;
    shared_thread<S>(l, at.row, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
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
            const bool grown = __any_sync(0xFFFFFFFFu, at.fetch(l, index, lane, kWarp));
            if (lane == 0) at.resolve(l, index, grown);
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
        const bool grown = __syncthreads_or(at.fetch(l, index, thread, kBlock));
        if (thread == 0) at.resolve(l, index, grown);
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
__global__ void __launch_bounds__(kThreads, 1) measures(const __grid_constant__ Launch l) {
    __shared__ Resolved<GrownRow<T>, true> at;
    __shared__ Meter<T> meter;
    const int thread = threadIdx.x;
    for (int64_t b = blockIdx.x; b < l.args.batch; b += gridDim.x) {
        const int64_t index = row_of(l, b);
        __syncthreads();
        at.fetch(l, index, thread, kThreads);
        __syncthreads();
        if (thread == 0) at.resolve(l, index, false);
        __syncthreads();
        if (at.status != kOk) continue;
        measure_sample<T, S>(l, at.columns, at.row, b, meter, [&](const auto& work) {
            work(thread);
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

// -- launchers -----------------------------------------------------------------------------------

// The current device for a scope; touches nothing where it is the right one already.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        status_ = cudaGetDevice(&before_);
        if (status_ == cudaSuccess && before_ != device) {
            status_ = cudaSetDevice(device);
            switched_ = status_ == cudaSuccess;
        }
    }
    ~DeviceGuard() {
        if (switched_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    cudaError_t status() const { return status_; }

private:
    cudaError_t status_;
    int before_ = 0;
    bool switched_ = false;
};

Outcome outcome(cudaError_t error) {
    if (error == cudaSuccess) return {kOk, nullptr};
    cudaGetLastError();  // said here, and not again by the next call
    return {kDeviceError, cudaGetErrorString(error)};
}

constexpr int kMaxDevices = 64;

struct Kernel {
    const void* function;
    int threads;  // of a block
    std::atomic<int> resident[kMaxDevices];  // blocks that a device holds at once; 0: not asked yet
};

// As many blocks as run at once: each resolves its row once and strides over the rest.
cudaError_t blocks_for(Kernel& kernel, int device, int64_t wanted, unsigned* blocks) {
    int most = device < kMaxDevices ? kernel.resident[device].load() : 0;
    if (most == 0) {
        int processors = 0, each = 0;
        cudaError_t error =
            cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
        if (error == cudaSuccess) {
            error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel.function,
                                                                  kernel.threads, 0);
        }
        if (error != cudaSuccess) return error;
        most = processors * (each > 0 ? each : 1);
        if (device < kMaxDevices) kernel.resident[device].store(most);
    }
    *blocks = static_cast<unsigned>(wanted < most ? wanted : most);
    return cudaSuccess;
}

Outcome launch(Kernel& kernel, int64_t wanted, int device, void* stream, void** arguments) {
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return outcome(guard.status());
    unsigned blocks = 0;
    const cudaError_t error = blocks_for(kernel, device, wanted, &blocks);
    if (error != cudaSuccess) return outcome(error);
    return outcome(cudaLaunchKernel(kernel.function, dim3(blocks),
                                    dim3(static_cast<unsigned>(kernel.threads)), arguments, 0,
                                    static_cast<cudaStream_t>(stream)));
}

#define FASTDIFF_OUT_DTYPES(kernel, T, threads)                                \
    {                                                                          \
        {reinterpret_cast<const void*>(kernel<T, float>), threads, {}},        \
            {reinterpret_cast<const void*>(kernel<T, double>), threads, {}},   \
            {reinterpret_cast<const void*>(kernel<T, Bfloat16>), threads, {}}, \
            {reinterpret_cast<const void*>(kernel<T, Float16>), threads, {}},  \
    }

Kernel kStages[2][2][2][kDtypes] = {  // [grown][per sample][float64][Dtype of out]
    {{FASTDIFF_OUT_DTYPES(stage_shared, Row<float>, kThreads),
      FASTDIFF_OUT_DTYPES(stage_shared, Row<double>, kThreads)},
     {FASTDIFF_OUT_DTYPES(stage_samples, Row<float>, kThreads),
      FASTDIFF_OUT_DTYPES(stage_samples, Row<double>, kThreads)}},
    {{FASTDIFF_OUT_DTYPES(stage_shared, GrownRow<float>, kThreads),
      FASTDIFF_OUT_DTYPES(stage_shared, GrownRow<double>, kThreads)},
     {FASTDIFF_OUT_DTYPES(stage_samples, GrownRow<float>, kThreads),
      FASTDIFF_OUT_DTYPES(stage_samples, GrownRow<double>, kThreads)}},
};
Kernel kThresholds[2][2][kDtypes] = {  // [grown][float64][Dtype of out]
    {FASTDIFF_OUT_DTYPES(thresholds, Row<float>, kSelectors<float>),
     FASTDIFF_OUT_DTYPES(thresholds, Row<double>, kSelectors<double>)},
    {FASTDIFF_OUT_DTYPES(thresholds, GrownRow<float>, kSelectors<float>),
     FASTDIFF_OUT_DTYPES(thresholds, GrownRow<double>, kSelectors<double>)},
};
Kernel kMeasures[2][kDtypes] = {FASTDIFF_OUT_DTYPES(measures, float, kThreads),
                                FASTDIFF_OUT_DTYPES(measures, double, kThreads)};
Kernel kNormals[2] = {{reinterpret_cast<const void*>(normals<float>), kThreads, {}},
                      {reinterpret_cast<const void*>(normals<double>), kThreads, {}}};

}  // namespace

Outcome run_stage(Launch l, int device, void* stream) {
    const StageArgs& a = l.args;
    const Status status = check_alignment(l);
    if (status != kOk) return {status, nullptr};
    const int64_t quads = quads_of(a.size);
    if (a.batch == 0 || quads == 0) return {kOk, nullptr};
    const bool per_sample = a.stage_index != nullptr;
    const int64_t warps = a.batch * ((quads + kChunk - 1) / kChunk);
    const int64_t wanted = per_sample ? (warps + kWarps - 1) / kWarps
                                      : (a.batch * quads + kThreads - 1) / kThreads;
    void* arguments[] = {&l};
    const bool wide = a.state == kFloat64;
    if (l.scale != nullptr) {
        const Outcome first =
            launch(kThresholds[l.grown][wide][a.out_dtype], a.batch, device, stream, arguments);
        if (first.status != kOk) return first;
    }
    return launch(kStages[l.grown][per_sample][wide][a.out_dtype], wanted, device, stream,
                  arguments);
}

Outcome run_measures(Launch l, int device, void* stream) {
    const StageArgs& a = l.args;
    const Status status = check_alignment(l);
    if (status != kOk) return {status, nullptr};
    if (a.batch == 0 || a.size == 0) return {kOk, nullptr};
    void* arguments[] = {&l};
    return launch(kMeasures[a.state == kFloat64][a.out_dtype], a.batch, device, stream, arguments);
}

Outcome normal(const Normals& normals, Dtype dtype, int device, void* cuda_stream) {
    if (dtype != kFloat32 && dtype != kFloat64) return {kBadDtype, nullptr};
    const int64_t quads = quads_of(normals.size);
    if (normals.batch == 0 || quads == 0) return {kOk, nullptr};
    Normals n = normals;
    bool wide = n.size % 4 == 0 && reinterpret_cast<uintptr_t>(n.z) % 16 == 0;
    void* arguments[] = {&n, &wide};
    return launch(kNormals[dtype == kFloat64], (n.batch * quads + kThreads - 1) / kThreads, device,
                  cuda_stream, arguments);
}

Outcome probe() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return outcome(error == cudaSuccess && count == 0 ? cudaErrorNoDevice : error);
}

}  // namespace fastdiff::cuda
