// SPDX-License-Identifier: Apache-2.0
// The CPU backend's entry points, and the kernels that each instruction set supplies to them.
#pragma once

#include "stage.h"

namespace fastdiff::cpu {

// Elements from which a call uses several threads: below, starting them costs more than it saves.
constexpr int64_t kParallelFrom = 65536;

// Elements [lo, hi) of a batch seen as one row of `batch * size` elements. Row is Row<T>, span is
// Span<T, S>, of the T and S that the table below is indexed by.
using SpanKernel = void (*)(const void* row, void* span, const uint64_t* seeds, int64_t size,
                            int64_t lo, int64_t hi);

// h [0 .. hi - lo), in the state's type, of elements [lo, hi), not yet limited.
using FormKernel = void (*)(const void* row, const void* span, int64_t lo, int64_t hi, void* h);

struct Kernels {
    const char* name;
    SpanKernel span[2][kDtypes];  // [state][Dtype of out]
    FormKernel form[2][kDtypes];
    // z[0 .. hi - lo) = the normals of elements [lo, hi) of samples of `size` elements.
    void (*normals)(const uint64_t* seeds, int64_t size, uint32_t stream, int64_t lo, int64_t hi,
                    float* z);
    // The Philox words behind them, four a counter, for counters [0, quads).
    void (*words)(uint64_t seed, uint32_t stream, int64_t quads, uint32_t* words);
};

extern const Kernels kBaseline;
#if defined(__x86_64__) && defined(__GNUC__)
#define FASTDIFF_X86 1
extern const Kernels kAvx2, kAvx512;
#endif

// Instruction sets that this machine runs, best first. `active` is used by all calls; `select` is
// for tests and returns false where the name is not among them.
int available(const Kernels* list[3]);
const Kernels& active();
bool select(const char* name);

// Runs row `row` (+ stage_index[b]). All rows are checked before anything is written; `bad_row` is
// the first offender. At most `threads` threads; results do not depend on their number.
Status run(const StageArgs& args, int64_t row, int threads, int64_t* bad_row);

// Standard normals [batch, size] as float32 or float64.
Status normal(void* z, Dtype dtype, const uint64_t* seeds, int64_t batch, int64_t size,
              uint32_t stream, int threads);

}  // namespace fastdiff::cpu
