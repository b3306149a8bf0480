// SPDX-License-Identifier: Apache-2.0
// The packed table and what a launch is given: columns, codes, and the registers by address.
//
// fastdiff/plans/layout.py says what each column holds. The names here are exported by the bindings
// and compared with those there when the core is loaded.
#pragma once

#include "philox.h"
#include "status.h"

namespace fastdiff {

// Raised whenever a signature of the compiled core changes; columns and codes are compared by name.
constexpr int kAbi = 7;

enum Dtype : int32_t { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2, kFloat16 = 3 };
constexpr int kDtypes = 4;
constexpr int64_t kBytes[kDtypes] = {4, 8, 2, 2};

// -- columns -------------------------------------------------------------------------------------

#define FASTDIFF_HEAD(X)                                                                          \
    X(flags) X(push) X(push_x) X(draws) X(stream_1) X(stream_2) X(n_terms) X(n_extras)            \
    X(n_products) X(n_measures) X(p) X(u) X(v) X(lo) X(hi) X(quantile) X(floor) X(ceiling)        \
    X(a_x) X(a_e) X(b_0) X(b_raw) X(c) X(d_x) X(d_e) X(d_new) X(g_0) X(g_raw) X(c_e)              \
    X(xi_1) X(xi_2) X(c_in_next) X(scalar_b) X(scalar_g) X(scalar_c) X(scalar_ce)
#define FASTDIFF_TERM(X) X(slot) X(past_b) X(past_g)
#define FASTDIFF_BRANCH(X) X(k) X(scalar_k)
#define FASTDIFF_EXTRA(X) X(entry) X(r) X(s)
#define FASTDIFF_PRODUCT(X) X(into) X(of) X(at) X(bank) X(weight)
#define FASTDIFF_MEASURE(X)                                                                       \
    X(measure_into) X(power) X(measure_weight) X(offset)                                          \
    X(num_kind) X(num_a) X(num_a_at) X(num_b) X(num_b_at) X(num_rank)                             \
    X(den_kind) X(den_a) X(den_a_at) X(den_b) X(den_b_at) X(den_rank)

#define FASTDIFF_COLUMN(name) name,
#define FASTDIFF_COLUMN_NAME(name) #name,
// Places of the columns within a group, and their names.
#define FASTDIFF_GROUP(group, COLUMNS)                                      \
    namespace group {                                                       \
    enum Column : int { COLUMNS(FASTDIFF_COLUMN) kColumns };                \
    constexpr const char* kNames[] = {COLUMNS(FASTDIFF_COLUMN_NAME)};       \
    }
FASTDIFF_GROUP(head, FASTDIFF_HEAD)
FASTDIFF_GROUP(term, FASTDIFF_TERM)
FASTDIFF_GROUP(branch, FASTDIFF_BRANCH)
FASTDIFF_GROUP(extra, FASTDIFF_EXTRA)
FASTDIFF_GROUP(product, FASTDIFF_PRODUCT)
FASTDIFF_GROUP(measure, FASTDIFF_MEASURE)
constexpr int kReducedColumns = measure::den_kind - measure::num_kind;

// -- codes ---------------------------------------------------------------------------------------

// Bits of the flags column.
enum Flag : int32_t {
    kEvaluate = 1, kAtE = 2, kWritesE = 4, kWritesX = 8, kClip = 16, kThreshold = 32, kWritesM = 64
};
constexpr int32_t kAllFlags = 127;
constexpr const char* kFlagNames[] = {"EVALUATE", "AT_E", "WRITES_E", "WRITES_X",
                                      "CLIP", "THRESHOLD", "WRITES_M"};

enum Into : int32_t { kIntoY, kIntoX, kIntoE, kIntoCodes };
constexpr const char* kIntoNames[] = {"y", "x", "e"};

// What a product multiplies or a reduction reads.
enum Of : int32_t {
    kOfX, kOfE, kOfH, kOfXi, kOfSlot, kOfBank, kOfNew, kOfPoint, kOfOut, kOfY, kOfCodes
};
constexpr const char* kOfNames[] = {"x", "e", "h", "xi", "slot", "bank", "new", "point", "out",
                                    "y"};

enum Reduce : int32_t { kSum, kDot, kNorm, kStd, kQuantile, kReduceCodes };
constexpr const char* kReduceNames[] = {"sum", "dot", "norm", "std", "quantile"};

// The most of each group that a row of the core holds; the bank itself has no such bound.
constexpr int kMaxTerms = 64, kMaxBranches = 16, kMaxExtras = 16, kMaxDraws = 2, kMaxProducts = 8,
              kMaxMeasures = 16;

// -- a launch ------------------------------------------------------------------------------------

// Everything one launch needs besides the row. Registers are contiguous [batch, size].
struct StageArgs {
    void* x;
    void* e;                      // null where absent
    void* history;                // [slots, batch, size]
    void* m;                      // [copies, batch, size] or null
    const void* bank;             // [entries, bank_batch, size] or null
    void* scalars;                // [batch, scalar_columns] or null
    const uint64_t* seeds;        // [batch] or null
    const double* table;          // [rows, width]
    const int64_t* stage_index;   // [batch] or null
    const void* out;              // branch g, sample b at (g batch + b) out_stride, or null
    const void* xi;               // noise [batch, size] instead of the row's own, or null
    int64_t batch, size;          // samples, elements of each
    int64_t rows, slots, copies, out_stride;
    int64_t entries, bank_batch, scalar_columns;
    int64_t first_quad;           // element i of a sample takes the noise of i + 4 first_quad
    int32_t terms, branches, extras, products, measures;  // layout
    int32_t state, network, out_dtype;  // Dtype of x; of m; of out

    FASTDIFF_HD int64_t branch_offset() const { return head::kColumns + term::kColumns * terms; }
    FASTDIFF_HD int64_t extra_offset() const {
        return branch_offset() + branch::kColumns * branches;
    }
    FASTDIFF_HD int64_t product_offset() const {
        return extra_offset() + extra::kColumns * extras;
    }
    FASTDIFF_HD int64_t measure_offset() const {
        return product_offset() + product::kColumns * products;
    }
    FASTDIFF_HD int64_t width() const { return measure_offset() + measure::kColumns * measures; }

    // Whether an entry of the bank holds the same for all samples.
    FASTDIFF_HD bool bank_shared() const { return bank_batch < batch; }
};

}  // namespace fastdiff
