// SPDX-License-Identifier: Apache-2.0
// The Python module fastdiff._native: addresses and sizes in, exceptions out.
#include "bindings/bindings.h"
#include "cpu/cpu.h"

using namespace fastdiff;

namespace {

// Work shorter than this is over before another thread could use the interpreter.
constexpr int64_t kReleaseGil = 65536;

class Stage {
public:
    explicit Stage(const py::dict& given) : args_(take(given)), memory_(args_) {}

    // `out` 0: no network output; `xi` 0: the row draws its own noise. False where one of them lies
    // on a register otherwise than element for element: nothing is written then.
    bool run(int64_t row, uintptr_t out, int out_dtype, int64_t out_stride, uintptr_t xi,
             int threads) const {
        return call(cpu::run_stage, row, {out, out_dtype, out_stride, xi}, threads);
    }
    bool measure(int64_t row, uintptr_t out, int out_dtype, int64_t out_stride, uintptr_t xi,
                 int threads) const {
        return call(cpu::run_measures, row, {out, out_dtype, out_stride, xi}, threads);
    }

private:
    struct Inputs {
        uintptr_t out;
        int out_dtype;
        int64_t out_stride;
        uintptr_t xi;
    };
    using Entry = Status (*)(const StageArgs&, int64_t, int, int64_t*);

    static StageArgs take(const py::dict& given) {
        Fields fields(given);
        const StageArgs args = stage_args(fields);
        fields.done();
        return args;
    }

    bool call(Entry entry, int64_t row, const Inputs& inputs, int threads) const {
        StageArgs args = args_;
        args.out = pointer<const void>(inputs.out);
        args.out_dtype = inputs.out_dtype;
        args.out_stride = inputs.out_stride;
        args.xi = pointer<const void>(inputs.xi);
        if (args.out_dtype < 0 || args.out_dtype >= kDtypes) refuse(kBadDtype, row, args.rows);
        const char* input = nullptr;
        if (memory_.overlapped(args, &input) != nullptr) return false;
        int64_t bad_row = row;
        Status status;
        if (memory_.states() >= kReleaseGil) {
            py::gil_scoped_release release;
            status = entry(args, row, threads, &bad_row);
        } else {
            status = entry(args, row, threads, &bad_row);
        }
        if (status != kOk) refuse(status, bad_row, args.rows);
        return true;
    }

    StageArgs args_;
    Memory memory_;
};

void normal(uintptr_t z, int dtype, uintptr_t seeds, int64_t batch, int64_t size, uint32_t stream,
            int64_t offset, int threads) {
    if (batch < 0 || size < 0 || offset < 0 || offset % 4 != 0 ||
        ((z == 0 || seeds == 0) && batch * size > 0)) {
        refuse(kBadLayout, 0, 0);
    }
    const cpu::Draws draws = {pointer<const uint64_t>(seeds), size, offset / 4, stream};
    Status status;
    {
        py::gil_scoped_release release;
        status = cpu::normal(pointer<void>(z), static_cast<Dtype>(dtype), batch, draws, threads);
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
    describe(module);
    module.attr("parallel_from") = cpu::kParallelFrom;

    py::class_<Stage>(module, "Stage")
        .def(py::init<const py::dict&>(), "Stage(fields)")
        .def("run", &Stage::run, "run(row, out, out_dtype, out_stride, xi, threads)")
        .def("measure", &Stage::measure, "measure(row, out, out_dtype, out_stride, xi, threads)");

    module.def("normal", &normal, 
               "normal(z, dtype, seeds, batch, size, stream, offset, threads)");
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
