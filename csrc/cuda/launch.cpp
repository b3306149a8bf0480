// SPDX-License-Identifier: Apache-2.0
// The launchers: devices, grids, streams and the CUDA runtime's errors.
#include "cuda/launch.h"

#include <cuda_runtime.h>

#include "cuda/thread.h"

namespace fastdiff::cuda {
namespace {

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

// Whether a device and its driver let a kernel begin before the one ahead in its stream has ended,
// in a capture too: compute capability 9.0, CUDA 12.3. Kernels made from the PTX of an older
// architecture run there and do not wait for the one ahead (`await_predecessors`), so that they may
// not begin early.
bool overlaps_launches(const Kernel& kernel, int device) {
    static std::atomic<int> known[kMaxDevices];  // 0: not asked yet, 1: no, 2: yes
    int answer = device < kMaxDevices ? known[device].load() : 0;
    if (answer == 0) {
        int major = 0, driver = 0;
        cudaFuncAttributes compiled{};
        const bool asked = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor,
                                                  device) == cudaSuccess &&
                           cudaDriverGetVersion(&driver) == cudaSuccess &&
                           cudaFuncGetAttributes(&compiled, kernel.function) == cudaSuccess;
        answer = asked && major >= 9 && driver >= 12030 && compiled.ptxVersion >= 90 ? 2 : 1;
        if (device < kMaxDevices) known[device].store(answer);
    }
    return answer == 2;
}

// `early`: the launch may begin before the kernel ahead of it in its stream has ended.
Outcome launch(Kernel& kernel, int64_t wanted, bool early, int device, void* stream,
               void** arguments) {
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return outcome(guard.status());
    unsigned blocks = 0;
    const cudaError_t error = blocks_for(kernel, device, wanted, &blocks);
    if (error != cudaSuccess) return outcome(error);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(static_cast<unsigned>(kernel.threads));
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = early && overlaps_launches(kernel, device) ? 1 : 0;
    return outcome(cudaLaunchKernelExC(&config, kernel.function, arguments));
}

// What a kernel reads before `await_predecessors` is its row. The kernel just ahead may have
// written an index, or a table that others can reach; a table of the stage's own is written by
// copies from the host alone, and a kernel behind a copy begins when the copy has ended. That holds
// for whatever stands farther ahead too: a table's copy has ended before the kernel behind it began.
bool resolves_early(const Launch& l) {
    return l.own_table && l.row_index == nullptr && l.args.stage_index == nullptr;
}

bool is_wide(const StageArgs& a) { return a.state == kFloat64; }

}  // namespace

Outcome run_stage(Launch l, int device, void* stream) {
    const StageArgs& a = l.args;
    const Status status = check_alignment(l);
    if (status != kOk) return {status, nullptr};
    const int64_t quads = quads_of(a.size);
    if (a.batch == 0 || quads == 0) return {kOk, nullptr};
    const bool per_sample = a.stage_index != nullptr, early = resolves_early(l);
    const int64_t warps = a.batch * ((quads + kChunk - 1) / kChunk);
    const int64_t wanted = per_sample ? (warps + kWarps - 1) / kWarps
                                      : (a.batch * quads + kThreads - 1) / kThreads;
    void* arguments[] = {&l};
    if (l.scale != nullptr) {
        const Outcome first = launch(kThresholds[l.grown][is_wide(a)][a.out_dtype], a.batch, early,
                                     device, stream, arguments);
        if (first.status != kOk) return first;
    }
    return launch(kStages[l.grown][per_sample][is_wide(a)][a.out_dtype], wanted, early, device,
                  stream, arguments);
}

Outcome run_measures(Launch l, int device, void* stream) {
    const StageArgs& a = l.args;
    const Status status = check_alignment(l);
    if (status != kOk) return {status, nullptr};
    if (a.batch == 0 || a.size == 0) return {kOk, nullptr};
    void* arguments[] = {&l};
    return launch(kMeasures[is_wide(a)][a.out_dtype], a.batch, resolves_early(l), device, stream,
                  arguments);
}

Outcome normal(const Normals& normals, Dtype dtype, int device, void* cuda_stream) {
    if (dtype != kFloat32 && dtype != kFloat64) return {kBadDtype, nullptr};
    const int64_t quads = quads_of(normals.size);
    if (normals.batch == 0 || quads == 0) return {kOk, nullptr};
    Normals n = normals;
    bool wide = n.size % 4 == 0 && reinterpret_cast<uintptr_t>(n.z) % 16 == 0;
    void* arguments[] = {&n, &wide};
    return launch(kNormals[dtype == kFloat64], (n.batch * quads + kThreads - 1) / kThreads, false,
                  device, cuda_stream, arguments);
}

Outcome probe() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return outcome(error == cudaSuccess && count == 0 ? cudaErrorNoDevice : error);
}

Outcome probe(int device) {
    static std::atomic<bool> runs[kMaxDevices];
    if (device < kMaxDevices && runs[device].load()) return {kOk, nullptr};
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    const cudaError_t error = guard.status() != cudaSuccess
                                  ? guard.status()
                                  : cudaFuncGetAttributes(&attributes, kNormals[0].function);
    if (error == cudaSuccess && device < kMaxDevices) runs[device].store(true);
    return outcome(error);
}

Outcome usages(int device, const UsageOf& each) {
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return outcome(guard.status());
    cudaError_t error = cudaSuccess;
    const auto ask = [&](const Kernel& kernel, const char* family, bool grown, bool wide, int out) {
        cudaFuncAttributes found;
        Usage usage{family, grown, wide, out, 0, 0, 0, kernel.threads, 0};
        if (error == cudaSuccess) error = cudaFuncGetAttributes(&found, kernel.function);
        if (error == cudaSuccess) {
            error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&usage.blocks, kernel.function,
                                                                  kernel.threads, 0);
        }
        if (error != cudaSuccess) return;
        usage.registers = found.numRegs;
        usage.local = static_cast<int64_t>(found.localSizeBytes);
        usage.shared = static_cast<int64_t>(found.sharedSizeBytes);
        each(usage);
    };
    for (int wide = 0; wide < 2; ++wide) {
        for (int out = 0; out < kDtypes; ++out) {
            for (int grown = 0; grown < 2; ++grown) {
                ask(kStages[grown][0][wide][out], "stage_shared", grown, wide, out);
                ask(kStages[grown][1][wide][out], "stage_samples", grown, wide, out);
                ask(kThresholds[grown][wide][out], "thresholds", grown, wide, out);
            }
            ask(kMeasures[wide][out], "measures", true, wide, out);
        }
        ask(kNormals[wide], "normals", false, wide, wide);
    }
    return outcome(error);
}

}  // namespace fastdiff::cuda
