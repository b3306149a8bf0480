// SPDX-License-Identifier: Apache-2.0
// The CUDA backend's entry points. Nothing here or below allocates device memory or waits for it.
#pragma once

#include <functional>

#include "measure.h"

namespace fastdiff::cuda {

// One stage on one stream. The row that runs is row + *row_index + stage_index[b], each of the last
// two where given: both are read by the kernel, so a captured graph follows them.
struct Launch {
    StageArgs args;            // every pointer is the device's, `table` too
    int64_t row;
    const int64_t* row_index;  // [1] or null
    int64_t* fault;            // [2]: Status and row of a row that the kernel refused
    void* scale;               // [batch] of x's type, for the s of each sample that is thresholded;
                               // null: no row of the table thresholds
    bool grown;                // whether a row of the table may be a GrownRow
    bool own_table;            // copies from the host alone write to args.table
    bool aligned;              // set by `run`: accesses of four elements are legal
};

// Of a legal row: whether its scale is found, where it `limits` by one.
FASTDIFF_HD Status scaled(const Launch& l, bool limits) {
    return limits && l.scale == nullptr ? kNoThreshold : kOk;
}

// A row from its columns.
template <class R>
FASTDIFF_HD Status resolve(const Launch& l, const double* columns, R& row) {
    const Status status = fastdiff::resolve(l.args, columns, row);
    return status == kOk ? scaled(l, row.flags & kThreshold) : status;
}

// The most elements of a sample that is thresholded: they are counted in 32 bits.
constexpr int64_t kMostToThreshold = 0xFFFFFFFF;

// What went wrong: kOk, or kDeviceError with the CUDA runtime's words.
struct Outcome {
    Status status;
    const char* reason;
};

// Runs a stage on device number `device` and a cudaStream_t: one kernel, after another that fills
// `scale` where that is given. Where nothing ahead in the stream can change its row, a kernel begins
// before the one ahead has ended, and awaits that one when the row is resolved. The kernels check the row once more: one that would leave the
// registers writes nothing, and its status goes to `fault`.
Outcome run_stage(Launch launch, int device, void* stream);

// Makes the measures of that row and leaves them in args.scalars: one kernel, likewise.
Outcome run_measures(Launch launch, int device, void* stream);

// Normals [batch, size], sample b from seeds[b]; element i takes the noise of i + 4 first_quad.
struct Normals {
    void* z;
    const uint64_t* seeds;
    int64_t batch, size, first_quad;
    uint32_t stream;
};

// Standard normals as float32 or float64.
Outcome normal(const Normals& normals, Dtype dtype, int device, void* cuda_stream);

// Whether there is a driver and a device.
Outcome probe();
// Whether the kernels run on device number `device`.
Outcome probe(int device);

// What a kernel takes of a device.
struct Usage {
    const char* family;
    bool grown, wide;  // for a GrownRow; for a float64 state
    int out;           // Dtype of the output
    int registers;     // of a thread
    int64_t local, shared;  // bytes, of a thread and of a block
    int threads, blocks;    // of a block; at once on a multiprocessor
};
using UsageOf = std::function<void(const Usage&)>;

// Calls `each` with every kernel's, as device number `device` has it.
Outcome usages(int device, const UsageOf& each);

}  // namespace fastdiff::cuda
