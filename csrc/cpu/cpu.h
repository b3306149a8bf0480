// SPDX-License-Identifier: Apache-2.0
// The CPU backend's entry points, and the kernels that each instruction set supplies to them.
#pragma once

#include "measure.h"

namespace fastdiff::cpu {

// Elements from which a call uses several threads: below, starting them costs more than it saves.
constexpr int64_t kParallelFrom = 65536;

// Elements between two draws of noise: they stay in the first cache.
constexpr int64_t kBlock = 1024;
static_assert(kBlock == kLaneCount, "a block has one element for each lane of a reduction");

// What normals are drawn for: samples of `size` elements, sample b from seeds[b].
struct Draws {
    const uint64_t* seeds;
    int64_t size;
    int64_t first_quad;  // element i of a sample takes the noise of i + 4 first_quad
    uint32_t stream;
};

// Elements [lo, hi) of a batch seen as one row of `batch * size` elements. Row is Row<T> or
// GrownRow<T>, span is Span<T, S>, of the T and S that the table below is indexed by.
using SpanKernel = void (*)(const void* row, void* span, int64_t lo, int64_t hi);

// h [0 .. hi - lo), in the state's type, of elements [lo, hi), not yet limited.
using FormKernel = void (*)(const void* row, const void* span, int64_t lo, int64_t hi, void* h);

// The same of an operand of a measure, at most kBlock elements; row is GrownRow<T>.
using OperandKernel = void (*)(const void* row, void* span, Operand operand, int64_t lo, int64_t hi,
                               void* to);

// lanes[l] with element l of `a` and `b`, of the state's type, added as `added` says, l < count.
using LanesKernel = void (*)(int32_t kind, const void* a, const void* b, double mean, int64_t count,
                             double* lanes);

struct Kernels {
    const char* name;
    SpanKernel span[2][2][kDtypes];  // [grown][state][Dtype of out]
    FormKernel form[2][2][kDtypes];
    OperandKernel operand[2][kDtypes];  // [state][Dtype of out]
    LanesKernel lanes[2];               // [state]
    // z[0 .. hi - lo) = the normals of elements [lo, hi) of the samples in a row.
    void (*normals)(const Draws& draws, int64_t lo, int64_t hi, float* z);
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
Status run_stage(const StageArgs& args, int64_t row, int threads, int64_t* bad_row);

// Makes the measures of that row and leaves them in args.scalars; likewise.
Status run_measures(const StageArgs& args, int64_t row, int threads, int64_t* bad_row);

// Standard normals [batch, draws.size] as float32 or float64.
Status normal(void* z, Dtype dtype, int64_t batch, const Draws& draws, int threads);

}  // namespace fastdiff::cpu
