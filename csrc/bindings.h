// SPDX-License-Identifier: Apache-2.0
// What the Python modules share: a bound stage's arguments, and statuses as exceptions.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "stage.h"

namespace fastdiff {

namespace py = pybind11;

// A message is "stage: <the rule>; got row <row>. <what to do>".
[[noreturn]] inline void refuse(Status status, int64_t row, int64_t rows) {
    const auto message = [row](const std::string& rule, const char* advice) {
        return "stage: " + rule + "; got row " + std::to_string(row) + ". " + advice;
    };
    switch (status) {
        case kBadRow:
            throw py::index_error(
                message("rows (with stage_index) lie in [0, " + std::to_string(rows) + ")",
                        "Is stage_index ahead of its plan?"));
        case kBadFlags:
            throw py::value_error(message("flags are a sum of the bits in fastdiff.plan",
                                          "Pack the table with Plan.pack."));
        case kBadThreshold:
            throw py::value_error(message("a threshold is a quantile in (0, 1] and a positive "
                                          "floor, without a clip", "Pack the table with Plan.pack."));
        case kNoThreshold:
            throw py::value_error(message("rows threshold where a row of the table did when it was "
                                          "bound or refreshed",
                                          "Call run.refresh(table) before the launch, or before "
                                          "its capture."));
        case kBadCount:
            throw py::value_error(message("draws and n_terms fit the layout",
                                          "Bind with the layout that the table was packed for."));
        case kBadSlot:
            throw py::value_error(message("pushes and terms use slots of the bound history, each push its own",
                                          "Give Registers.history at least Plan.slots slots."));
        case kBadStream:
            throw py::value_error(message("noise streams are unsigned 32-bit integers",
                                          "Pack the table with Plan.pack."));
        case kNoE:
            throw py::value_error(message("a row that reads or writes e needs that register",
                                          "Bind Registers.e."));
        case kNoH:
            throw py::value_error(
                message("a row without an evaluation neither weighs nor pushes h",
                        "Pack the table with Plan.pack."));
        case kNoOut:
            throw py::value_error(
                message("a row that evaluates needs the network's output", "Give out."));
        case kNoXi:
            throw py::value_error(
                message("a row that weighs noise draws it or is given it", "Give xi."));
        case kNoSeeds:
            throw py::value_error(message("a row that draws noise needs seeds",
                                          "Bind Registers.seeds or give xi."));
        case kBadDtype:
            throw py::type_error("stage: dtypes are those of the compiled core; got another code.");
        case kMisaligned:
            throw py::value_error("stage: every address is a multiple of its element's size; got "
                                  "another. Clone the tensor.");
        case kTooLarge:
            throw py::value_error("stage: a register holds less than 2^63 bytes; got more.");
        default:
            throw py::value_error("stage: addresses, sizes and layout agree; got others.");
    }
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// The arguments of a stage that stay for its life. Raises where they contradict each other.
inline StageArgs stage_args(int state, int network, int64_t batch, int64_t size, uintptr_t x,
                            uintptr_t e, uintptr_t history, int64_t slots, uintptr_t m,
                            int64_t copies, const std::vector<uintptr_t>& extras, uintptr_t seeds,
                            uintptr_t table, int64_t rows, int64_t width, int terms, int branches,
                            int extra_terms, uintptr_t stage_index) {
    StageArgs args{};
    const int count = static_cast<int>(extras.size());
    if (terms > kMaxTerms || branches > kMaxBranches || count > kMaxExtras ||
        extra_terms > kMaxExtras) {
        PyErr_Format(PyExc_NotImplementedError,
                     "stage: the compiled core takes up to %d history terms, %d branches and "
                     "%d extra registers; got %d, %d and %d. Use backend=\"torch\".",
                     kMaxTerms, kMaxBranches, kMaxExtras, terms, branches, count);
        throw py::error_already_set();
    }
    if ((state != kFloat32 && state != kFloat64) || network < 0 || network >= kDtypes) {
        refuse(kBadDtype, 0, rows);
    }
    args.state = state;
    args.network = network;
    args.out_dtype = network;
    args.batch = batch;
    args.size = size;
    args.x = pointer<void>(x);
    args.e = pointer<void>(e);
    args.history = pointer<void>(history);
    args.slots = history == 0 ? 0 : slots;
    args.m = pointer<void>(m);
    args.copies = copies;
    for (int i = 0; i < count; ++i) args.extra[i] = pointer<const void>(extras[i]);
    args.seeds = pointer<const uint64_t>(seeds);
    args.table = pointer<const double>(table);
    args.rows = rows;
    args.stage_index = pointer<const int64_t>(stage_index);
    args.terms = terms;
    args.branches = branches;
    args.extras = extra_terms;
    args.entries = count;
    const bool sizes = batch >= 0 && size >= 0 && slots >= 0 && copies >= 0 && rows >= 0;
    if (!sizes || terms < 0 || branches < 1 || width != row_width(args) ||
        (table == 0 && rows > 0) || (x == 0 && batch * size > 0)) {
        refuse(kBadLayout, 0, rows);
    }
    return args;
}

}  // namespace fastdiff
