// SPDX-License-Identifier: Apache-2.0
// As much of the CUDA runtime as csrc/cuda/launch.cpp calls, over devices that are made up: a kernel
// is a function of the host and runs at once. Tests set the machine and read the launches by ctypes.
#pragma once

#include <stddef.h>

#include <string>
#include <vector>

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
using cudaStream_t = struct Stream*;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    explicit dim3(unsigned n) : x(n) {}
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
struct cudaFuncAttributes {
    int numRegs;
    size_t localSizeBytes, sharedSizeBytes;
    int ptxVersion;
};

// The machine: `capability` of each device; those below `least` have no kernel. Kernels are compiled
// for an architecture of at most `most`.
struct Machine {
    std::vector<int> capability = {90};
    int current = 0, driver = 13000, least = 80, most = 100;
    cudaError_t last = cudaSuccess;
    std::vector<std::string> launches;

    cudaError_t said(cudaError_t error) { return error == cudaSuccess ? error : last = error; }
    cudaError_t runs(int device) {
        const bool image = capability.at(static_cast<size_t>(device)) >= least;
        return said(image ? cudaSuccess : cudaErrorNoKernelImageForDevice);
    }
};
inline Machine machine;

#define FASTDIFF_EXPORT extern "C" inline __attribute__((used, visibility("default")))
// Makes a machine of `count` devices, by their compute capability times 10.
FASTDIFF_EXPORT void machine_of(const int* capability, int count, int driver, int least, int most) {
    machine = Machine{};
    machine.capability.assign(capability, capability + count);
    machine.driver = driver;
    machine.least = least;
    machine.most = most;
}
FASTDIFF_EXPORT int launch_count() { return static_cast<int>(machine.launches.size()); }
FASTDIFF_EXPORT const char* launch_at(int i) {
    return machine.launches.at(static_cast<size_t>(i)).c_str();
}
FASTDIFF_EXPORT int current_device() { return machine.current; }
#undef FASTDIFF_EXPORT

inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = static_cast<int>(machine.capability.size());
    if (machine.driver < 12000) return machine.said(cudaErrorInsufficientDriver);
    return machine.said(*count == 0 ? cudaErrorNoDevice : cudaSuccess);
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = machine.current;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= static_cast<int>(machine.capability.size())) {
        return machine.said(cudaErrorInvalidDevice);
    }
    machine.current = device;
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = machine.driver;
    return cudaSuccess;
}
// Few multiprocessors, so that every test makes threads stride: three on the first device, then two,
// then one.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    const int capability = machine.capability.at(static_cast<size_t>(device));
    *value = attribute == cudaDevAttrMultiProcessorCount ? (device < 2 ? 3 - device : 1) : capability / 10;
    return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int,
                                                                 size_t) {
    *blocks = 1;
    return machine.runs(machine.current);
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    const int capability = machine.capability.at(static_cast<size_t>(machine.current));
    *attributes = {61, 0, 1248, capability < machine.most ? capability : machine.most};
    return machine.runs(machine.current);
}
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                       void** arguments) {
    const bool early = config->numAttrs == 1 &&
                       config->attrs[0].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                       config->attrs[0].val.programmaticStreamSerializationAllowed == 1;
    const cudaError_t error = machine.runs(machine.current);
    if (error != cudaSuccess) return error;
    machine.launches.push_back("device " + std::to_string(machine.current) + ", blocks " +
                               std::to_string(config->gridDim.x) + " of " +
                               std::to_string(config->blockDim.x) + (early ? ", early" : ""));
    reinterpret_cast<void (*)(void**, unsigned)>(const_cast<void*>(function))(arguments,
                                                                              config->gridDim.x);
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
    const cudaError_t error = machine.last;
    machine.last = cudaSuccess;
    return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInsufficientDriver:
            return "CUDA driver version is insufficient for CUDA runtime version";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        default: return "no kernel image is available for execution on the device";
    }
}
