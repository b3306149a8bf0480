// SPDX-License-Identifier: Apache-2.0
// The Python module fastdiff._native: addresses and sizes in, exceptions out.
//
// Tensors arrive as addresses (Tensor.data_ptr()); the caller answers for their shapes. Everything
// that a table or an index could do to memory is checked here or below, and reported.
#include "bindings.h"
#include "cpu.h"

using namespace fastdiff;

namespace {

// Work shorter than this is over before another thread could use the interpreter.
constexpr int64_t kReleaseGil = 65536;

class Stage {
public:
    Stage(int state, int network, int64_t batch, int64_t size, uintptr_t x, uintptr_t e,
          uintptr_t history, int64_t slots, uintptr_t m, int64_t copies,
          const std::vector<uintptr_t>& extras, uintptr_t seeds, uintptr_t table, int64_t rows,
          int64_t width, int terms, int branches, int extra_terms, uintptr_t stage_index)
        : args_(stage_args(state, network, batch, size, x, e, history, slots, m, copies, extras,
                           seeds, table, rows, width, terms, branches, extra_terms, stage_index)) {}

    // `out` 0: no network output; `xi` 0: the row draws its own noise.
    void run(int64_t row, uintptr_t out, int out_dtype, int64_t out_stride, uintptr_t xi,
             int threads) const {
        StageArgs args = args_;
        args.out = pointer<const void>(out);
        args.out_dtype = out_dtype;
        args.out_stride = out_stride;
        args.xi = pointer<const void>(xi);
        int64_t bad_row = row;
        Status status;
        if (args.batch * args.size >= kReleaseGil) {
            py::gil_scoped_release release;
            status = cpu::run(args, row, threads, &bad_row);
        } else {
            status = cpu::run(args, row, threads, &bad_row);
        }
        if (status != kOk) refuse(status, bad_row, args.rows);
    }

private:
    StageArgs args_;
};

void normal(uintptr_t z, int dtype, uintptr_t seeds, int64_t batch, int64_t size, uint32_t stream,
            int threads) {
    if (batch < 0 || size < 0 || ((z == 0 || seeds == 0) && batch * size > 0)) {
        refuse(kBadLayout, 0, 0);
    }
    Status status;
    {
        py::gil_scoped_release release;
        status = cpu::normal(pointer<void>(z), static_cast<Dtype>(dtype),
                             pointer<const uint64_t>(seeds), batch, size, stream, threads);
    }
    if (status != kOk) refuse(status, 0, 0);
}

std::vector<std::string> instruction_sets() {
    const cpu::Kernels* list[3];
    std::vector<std::string> names;
    for (int k = 0, count = cpu::available(list); k < count; ++k) names.emplace_back(list[k]->name);
    return names;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The compiled core of fastdiff. Private: addresses in, no checks of shapes.";
    module.attr("abi") = kAbi;
    module.attr("parallel_from") = cpu::kParallelFrom;

    py::class_<Stage>(module, "Stage")
        .def(py::init<int, int, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, int64_t,
                      uintptr_t, int64_t, const std::vector<uintptr_t>&, uintptr_t, uintptr_t,
                      int64_t, int64_t, int, int, int, uintptr_t>(),
             py::kw_only(), py::arg("state"), py::arg("network"), py::arg("batch"), py::arg("size"),
             py::arg("x"), py::arg("e"), py::arg("history"), py::arg("slots"), py::arg("m"),
             py::arg("copies"), py::arg("extras"), py::arg("seeds"), py::arg("table"),
             py::arg("rows"), py::arg("width"), py::arg("terms"), py::arg("branches"), py::arg("extra_terms"),
             py::arg("stage_index"))
        .def("run", &Stage::run, "run(row, out, out_dtype, out_stride, xi, threads)");

    module.def("normal", &normal, "normal(z, dtype, seeds, batch, size, stream, threads)");
    module.def(
        "philox",
        [](std::vector<uint32_t> counter, std::vector<uint32_t> key) {
            if (counter.size() != 4 || key.size() != 2) {
                throw py::value_error("philox: a counter has 4 words and a key 2; got others.");
            }
            const Words start = {{counter[0], counter[1], counter[2], counter[3]}};
            const Words words = philox(start, key[0], key[1]);
            return std::vector<uint32_t>(words.w, words.w + 4);
        },
        "The four words of one counter, by the scalar definition.");
    module.def(
        "words",
        [](uint64_t seed, uint32_t stream, int64_t quads) {
            if (quads < 0) refuse(kBadLayout, 0, 0);
            std::vector<uint32_t> words(static_cast<size_t>(4 * quads));
            cpu::active().words(seed, stream, quads, words.data());
            return words;
        },
        "The words of counters [0, quads), by the vector code in use.");
    module.def("instruction_sets", &instruction_sets, "What this machine runs, best first.");
    module.def("instruction_set", [] { return cpu::active().name; }, "The one in use.");
    module.def(
        "use_instruction_set",
        [](const std::string& name) {
            if (!cpu::select(name.c_str())) {
                throw py::value_error("use_instruction_set: not on this machine: " + name);
            }
        },
        "For tests: all give the same bits. Not while another thread computes.");
}
