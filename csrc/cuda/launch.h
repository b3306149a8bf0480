// SPDX-License-Identifier: Apache-2.0
// The kernels of kernels.cu as launch.cpp starts them: by address, so that a host can put others in
// their place.
#pragma once

#include <atomic>

#include "cuda/cuda.h"

namespace fastdiff::cuda {

constexpr int kMaxDevices = 64;

struct Kernel {
    const void* function;
    int threads;                             // of a block
    std::atomic<int> resident[kMaxDevices];  // blocks that a device holds at once; 0: not asked yet
};

// Each takes one Launch; a normal takes Normals and whether accesses of four elements are legal.
extern Kernel kStages[2][2][2][kDtypes];  // [grown][per sample][float64][Dtype of out]
extern Kernel kThresholds[2][2][kDtypes];  // [grown][float64][Dtype of out]
extern Kernel kMeasures[2][kDtypes];       // [float64][Dtype of out]
extern Kernel kNormals[2];                 // [float64]

}  // namespace fastdiff::cuda
