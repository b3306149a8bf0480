// SPDX-License-Identifier: Apache-2.0
// What can be wrong with a stage, and the sentence that says so.
//
// Kernels and entry points return a Status. The bindings alone turn it into an exception, by the
// table below: "stage: <the rule>; got row <row>. <what to do>".
#pragma once

#include <stdint.h>

namespace fastdiff {

enum Status : int32_t {
    kOk = 0,
    kBadRow,        // row (+ stage_index[b]) outside the table
    kBadFlags,      // flags column is no combination of the known bits
    kBadThreshold,  // a quantile outside (0, 1], a floor that is not positive, a ceiling below it,
                    // or a clip as well
    kNoThreshold,   // the row thresholds and nothing was launched to find its scale
    kNoGrowth,      // the row uses what the launched kernel leaves out
    kBadCount,      // draws, n_terms, n_extras, n_products or n_measures outside the layout
    kBadSlot,       // a history slot outside the ring
    kBadEntry,      // an entry outside the bank
    kBadScalar,     // a column outside S
    kBadProduct,    // a product of an unknown kind, or one into y of something else than the point
    kBadMeasure,    // a reduction of an unknown kind or operand
    kBadStream,     // a noise stream that is no unsigned 32-bit integer
    kNoE,           // the row reads or writes e, which is not bound
    kNoH,           // the row weighs or pushes h without an evaluation
    kNoOut,         // the row evaluates and no network output was given
    kNoXi,          // the row weighs noise, which is neither drawn nor given
    kNoSeeds,       // the row draws noise and no seeds are bound
    kBadDtype,      // an unknown dtype code
    kBadLayout,     // sizes that contradict each other
    kOverlap,       // an input that a thread may read after another has written there
    kMisaligned,    // an address that is no multiple of its element's size
    kTooLarge,      // sizes whose product passes 2^63 bytes
    kDeviceError,   // the CUDA runtime's own
};

enum class Error { kValue, kType, kIndex };

struct Sentence {
    Status status;
    const char* rule;    // without `advice` it is the whole sentence, and names no row
    const char* advice;
    Error error = Error::kValue;
};

// "{rows}" stands for the table's number of rows.
constexpr Sentence kSentences[] = {
    {kBadRow, "rows (with stage_index) lie in [0, {rows})", "Is stage_index ahead of its plan?",
     Error::kIndex},
    {kBadFlags, "flags are a sum of the bits in fastdiff.plans", "Pack the table with Plan.pack."},
    {kBadThreshold,
     "a threshold is a quantile in (0, 1] and a positive floor, with no ceiling below it and "
     "without a clip",
     "Pack the table with Plan.pack."},
    {kNoThreshold, "rows threshold where a row of the table did when it was bound or refreshed",
     "Call run.refresh(table) before the launch, or before its capture."},
    {kNoGrowth,
     "rows blend, multiply by the bank or scale where a row of the table did when it was bound or "
     "refreshed",
     "Call run.refresh(table) before the launch, or before its capture."},
    {kBadCount, "draws, n_terms and the other counts fit the layout",
     "Bind with the layout that the table was packed for."},
    {kBadSlot, "pushes and terms use slots of the bound history, each push its own",
     "Give Registers.history at least Plan.slots slots."},
    {kBadEntry, "extras, products and measures name entries of the bound bank",
     "Give Registers.bank an entry for each."},
    {kBadScalar, "scalars and measures name columns of the bound scalars",
     "Give Registers.scalars a column for each."},
    {kBadProduct, "products are of the kinds in fastdiff.plans.layout, those into y of the point",
     "Pack the table with Plan.pack."},
    {kBadMeasure, "measures are of the kinds in fastdiff.plans.layout",
     "Pack the table with Plan.pack."},
    {kBadStream, "noise streams are unsigned 32-bit integers", "Pack the table with Plan.pack."},
    {kNoE, "a row that reads or writes e needs that register", "Bind Registers.e."},
    {kNoH, "a row without an evaluation neither weighs nor pushes h",
     "Pack the table with Plan.pack."},
    {kNoOut, "a row that evaluates needs the network's output", "Give out."},
    {kNoXi, "a row that weighs noise draws it or is given it", "Give xi."},
    {kNoSeeds, "a row that draws noise needs seeds", "Bind Registers.seeds or give xi."},
    {kBadDtype, "stage: dtypes are those of the compiled core; got another code.", nullptr,
     Error::kType},
    {kOverlap,
     "stage: inputs lie apart from the registers that are written, or on one element for element; "
     "got an overlap. Clone the input first.",
     nullptr},
    {kMisaligned,
     "stage: every address is a multiple of its element's size; got another. Clone the tensor.",
     nullptr},
    {kTooLarge, "stage: a register holds less than 2^63 bytes; got more.", nullptr},
    {kBadLayout, "stage: addresses, sizes and layout agree; got others.", nullptr},
};

}  // namespace fastdiff
