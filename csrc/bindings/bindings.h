// SPDX-License-Identifier: Apache-2.0
// What the Python modules share: a bound stage's arguments, its memory, and statuses as exceptions.
//
// Tensors arrive as addresses (Tensor.data_ptr()); the caller answers for their shapes. Everything
// that a table, an index or an overlap could do to memory is checked here or below, and reported.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "table.h"

namespace fastdiff {

namespace py = pybind11;

[[noreturn]] inline void refuse(Status status, int64_t row, int64_t rows) {
    const Sentence* found = nullptr;
    for (const Sentence& sentence : kSentences) {
        if (sentence.status == status || (found == nullptr && sentence.status == kBadLayout)) {
            found = &sentence;
        }
    }
    std::string text = found->rule;
    const std::string placeholder = "{rows}";
    if (const size_t at = text.find(placeholder); at != std::string::npos) {
        text.replace(at, placeholder.size(), std::to_string(rows));
    }
    if (found->advice != nullptr) {
        text = "stage: " + text + "; got row " + std::to_string(row) + ". " + found->advice;
    }
    if (found->error == Error::kIndex) throw py::index_error(text);
    if (found->error == Error::kType) throw py::type_error(text);
    throw py::value_error(text);
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Arguments by name. Each is taken once, and none is left over.
class __attribute__((visibility("hidden"))) Fields {
public:
    explicit Fields(const py::dict& fields) : fields_(fields) {}

    template <class T>
    T take(const char* name) {
        if (!fields_.contains(name)) {
            throw py::type_error(std::string("stage: every field is given; got none for ") + name +
                                 ".");
        }
        ++taken_;
        return py::cast<T>(fields_[name]);
    }
    template <class T>
    T* address(const char* name) {
        return pointer<T>(take<uintptr_t>(name));
    }
    void done() const {
        if (taken_ != fields_.size()) {
            throw py::type_error("stage: the fields are those of the compiled core; got " +
                                 std::to_string(fields_.size() - taken_) + " others.");
        }
    }

private:
    const py::dict& fields_;
    size_t taken_ = 0;
};

inline int64_t product_of(std::initializer_list<int64_t> factors) {
    int64_t total = 1;
    for (int64_t factor : factors) {
        if (__builtin_mul_overflow(total, factor, &total)) refuse(kTooLarge, 0, 0);
    }
    return total;
}

// The arguments of a stage that stay for its life. Raises where they contradict each other.
inline StageArgs stage_args(Fields& fields) {
    StageArgs a{};
    a.state = fields.take<int32_t>("state");
    a.network = a.out_dtype = fields.take<int32_t>("network");
    a.batch = fields.take<int64_t>("batch");
    a.size = fields.take<int64_t>("size");
    a.x = fields.address<void>("x");
    a.e = fields.address<void>("e");
    a.history = fields.address<void>("history");
    const int64_t slots = fields.take<int64_t>("slots");
    a.slots = a.history == nullptr ? 0 : slots;
    a.m = fields.address<void>("m");
    a.copies = fields.take<int64_t>("copies");
    a.bank = fields.address<const void>("bank");
    a.entries = fields.take<int64_t>("entries");
    a.bank_batch = fields.take<int64_t>("bank_batch");
    a.scalars = fields.address<void>("scalars");
    a.scalar_columns = fields.take<int64_t>("scalar_columns");
    a.seeds = fields.address<const uint64_t>("seeds");
    a.table = fields.address<const double>("table");
    a.rows = fields.take<int64_t>("rows");
    a.stage_index = fields.address<const int64_t>("stage_index");
    a.terms = fields.take<int32_t>("terms");
    a.branches = fields.take<int32_t>("branches");
    a.extras = fields.take<int32_t>("extras");
    a.products = fields.take<int32_t>("products");
    a.measures = fields.take<int32_t>("measures");
    const int64_t width = fields.take<int64_t>("width"), offset = fields.take<int64_t>("offset");
    if (a.terms > kMaxTerms || a.branches > kMaxBranches || a.extras > kMaxExtras ||
        a.products > kMaxProducts || a.measures > kMaxMeasures) {
        PyErr_Format(PyExc_NotImplementedError,
                     "stage: a row of the compiled core has up to %d history terms, %d branches, "
                     "%d extra registers, %d products and %d measures; got %d, %d, %d, %d and %d. "
                     "Use backend=\"torch\".",
                     kMaxTerms, kMaxBranches, kMaxExtras, kMaxProducts, kMaxMeasures, a.terms,
                     a.branches, a.extras, a.products, a.measures);
        throw py::error_already_set();
    }
    if ((a.state != kFloat32 && a.state != kFloat64) || a.network < 0 || a.network >= kDtypes) {
        refuse(kBadDtype, 0, a.rows);
    }
    const bool sizes = a.batch >= 0 && a.size >= 0 && slots >= 0 && a.copies >= 0 && a.rows >= 0 &&
                       a.entries >= 0 && a.scalar_columns >= 0 && offset >= 0 && offset % 4 == 0;
    const bool groups = a.terms >= 0 && a.branches >= 1 && a.extras >= 0 && a.products >= 0 &&
                        a.measures >= 0 && width == a.width();
    const bool bank = a.entries == 0 || a.bank_batch == 1 || a.bank_batch == a.batch;
    if (!sizes || !groups || !bank || (a.table == nullptr && a.rows > 0) ||
        (a.x == nullptr && a.batch * a.size > 0)) {
        refuse(kBadLayout, 0, a.rows);
    }
    a.first_quad = offset / 4;
    return a;
}

// Bytes [begin, end) that a launch reads or writes.
struct Range {
    const char* name;
    uintptr_t begin, end;
    int64_t element;  // bytes of one
    bool written;
};

// The memory of a bound stage.
class Memory {
public:
    // Raises where a written register shares memory with another, or an address is no multiple of
    // its element's size.
    explicit Memory(const StageArgs& a) : states_(product_of({a.batch, a.size})) {
        const int64_t real = kBytes[a.state], all = product_of({states_, 8}) / 8 * real;
        add("x", a.x, all, real, true);
        add("e", a.e, all, real, true);
        add("history", a.history, product_of({all, a.slots}), real, true);
        add("m", a.m, product_of({states_, kBytes[a.network], a.copies}), kBytes[a.network], true);
        product_of({states_, 8, a.branches});
        add("scalars", a.scalars, product_of({a.batch, a.scalar_columns, real}), real, true);
        add("bank", a.bank, product_of({a.entries, a.bank_batch, a.size, real}), real, false);
        add("seeds", a.seeds, product_of({8, a.batch}), 8, false);
        add("stage_index", a.stage_index, product_of({8, a.batch}), 8, false);
        add("table", a.table, product_of({8, a.rows, a.width()}), 8, false);
    }

    void add(const char* name, const void* at, int64_t bytes, int64_t element, bool written) {
        const uintptr_t begin = reinterpret_cast<uintptr_t>(at);
        if (begin == 0 || bytes <= 0) return;
        if (begin % static_cast<uintptr_t>(element) != 0) refuse(kMisaligned, 0, 0);
        const Range range = {name, begin, begin + static_cast<uintptr_t>(bytes), element, written};
        for (const Range& other : ranges_) {
            if (!(written || other.written) || !meet(range, other)) continue;
            throw py::value_error(std::string("stage: a register that is written shares no memory "
                                              "with another; got ") +
                                  (written && !other.written ? name : other.name) + " and " +
                                  (written && !other.written ? other.name : name) +
                                  ". Clone one of them.");
        }
        ranges_.push_back(range);
    }

    // Elements of x.
    int64_t states() const { return states_; }

    // The register that a call's inputs overlap, or null. An input may lie on a written register
    // where each thread writes just what it has read.
    const Range* overlapped(const StageArgs& a, const char** input) const {
        if (a.out != nullptr) {
            const int64_t element = kBytes[a.out_dtype], samples = a.batch * a.branches;
            const int64_t bytes = product_of({samples - 1, a.out_stride, element});
            const uintptr_t out = reinterpret_cast<uintptr_t>(a.out);
            const bool gapless = a.out_stride == a.size || samples == 1;
            *input = "the network's output";
            if (const Range* found = overlapped(out, states_ == 0 ? 0 : bytes + a.size * element,
                                                element, gapless)) {
                return found;
            }
        }
        *input = "xi";
        return overlapped(reinterpret_cast<uintptr_t>(a.xi), states_ * kBytes[a.state],
                          kBytes[a.state], true);
    }

private:
    static bool meet(const Range& a, const Range& b) { return a.begin < b.end && b.begin < a.end; }

    const Range* overlapped(uintptr_t begin, int64_t bytes, int64_t element, bool gapless) const {
        const Range input = {"", begin, begin + static_cast<uintptr_t>(bytes), element, false};
        for (const Range& other : ranges_) {
            if (begin == 0 || !other.written || !meet(input, other)) continue;
            const int64_t distance = static_cast<int64_t>(begin - other.begin);
            const bool same = gapless && element == other.element &&
                              distance % (states_ * element) == 0;
            if (!same) return &other;
        }
        return nullptr;
    }

    int64_t states_;
    std::vector<Range> ranges_;
};

// What the library compares with fastdiff/plans/layout.py when it loads a module.
inline void describe(py::module_& module) {
    module.attr("abi") = kAbi;
    const auto names = [](const auto& list) {
        py::list out;
        for (const char* name : list) out.append(name);
        return py::tuple(out);
    };
    py::dict columns;
    columns["HEAD"] = names(head::kNames);
    columns["TERM"] = names(term::kNames);
    columns["BRANCH"] = names(branch::kNames);
    columns["EXTRA"] = names(extra::kNames);
    columns["PRODUCT"] = names(product::kNames);
    columns["MEASURE"] = names(measure::kNames);
    columns["INTO"] = names(kIntoNames);
    columns["OF"] = names(kOfNames);
    columns["REDUCTIONS"] = names(kReduceNames);
    module.attr("columns") = columns;
    py::dict flags;
    int bit = 1;
    for (const char* name : kFlagNames) {
        flags[name] = bit;
        bit *= 2;
    }
    flags["ALL_FLAGS"] = kAllFlags;
    module.attr("flags") = flags;
    py::dict most;
    most["terms"] = kMaxTerms;
    most["branches"] = kMaxBranches;
    most["extras"] = kMaxExtras;
    most["products"] = kMaxProducts;
    most["measures"] = kMaxMeasures;
    module.attr("most") = most;
}

}  // namespace fastdiff
