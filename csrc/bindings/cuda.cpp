// SPDX-License-Identifier: Apache-2.0
// The Python module fastdiff._cuda: device addresses and a stream in, exceptions out.
//
// It imports where no driver is. Addresses are never read here: what the host must know of a table
// it learns from the host's copy, given to `check_table`.
#include <array>
#include <optional>

#include "bindings/bindings.h"
#include "cuda/cuda.h"

using namespace fastdiff;

#define FASTDIFF_TEXT_OF(text) #text
#define FASTDIFF_TEXT(macro) FASTDIFF_TEXT_OF(macro)
#if !defined(FASTDIFF_CUDA_ARCHS)
#define FASTDIFF_CUDA_ARCHS 80_90_100
#endif

namespace {

// The architectures that the kernels were compiled for, as setup.py has them.
constexpr const char* kArchs = FASTDIFF_TEXT(FASTDIFF_CUDA_ARCHS);

void raise_if(cuda::Outcome outcome) {
    if (outcome.status == kOk) return;
    if (outcome.status != kDeviceError) refuse(outcome.status, 0, 0);
    throw std::runtime_error(
        std::string("cuda: the launch needs NVIDIA's driver, as new as the CUDA toolkit that built "
                    "fastdiff, and a device it was built for; got: ") +
        outcome.reason +
        ". See fastdiff.backends.status(), or use backend=\"triton\" or backend=\"torch\".");
}

class Stage {
public:
    explicit Stage(const py::dict& given) : launch_(take(given, &device_)), memory_(launch_.args) {
        const StageArgs& a = launch_.args;
        const int64_t real = kBytes[a.state];
        memory_.add("fault", launch_.fault, 16, 8, true);
        memory_.add("scale", launch_.scale, a.batch * real, real, true);
        memory_.add("row_index", launch_.row_index, 8, 8, false);
    }

    // `host` is the host's copy of the table. Raises where a row could never run; keeps of each row
    // what a call must bring. Nothing is kept of a table that is refused.
    void check_table(uintptr_t host) {
        cuda::Launch launch = launch_;
        StageArgs& args = launch.args;
        args.table = pointer<const double>(host);
        bool thresholds = false, counts = false;
        launch.grown = false;
        for (int64_t row = 0; row < args.rows; ++row) {
            const double* columns = args.table + row * args.width();
            launch.grown = launch.grown || grows(args, columns);
            counts = counts || counts_magnitudes(args, columns);
        }
        std::array<Checked, kCalls> checked;
        const char given = 0;  // stands for any address
        for (int call = kCalls; call-- > 0;) {
            args.out = (call & kWithOut) ? &given : nullptr;
            args.xi = (call & kWithXi) ? &given : nullptr;
            for (int64_t row = 0; row < args.rows; ++row) {
                // with no elements nothing is touched, and addresses may be null
                const double* columns = args.table + row * args.width();
                Pair pair;
                if (memory_.states() > 0) pair = statuses(launch, columns, &thresholds);
                const Status status = pair.stage != kOk ? pair.stage : pair.measures;
                if (status != kOk && call == (kWithOut | kWithXi)) refuse(status, row, args.rows);
                checked[call].add(pair);
            }
        }
        if ((thresholds || counts) && args.size > cuda::kMostToThreshold) {
            PyErr_Format(PyExc_NotImplementedError,
                         "stage: a sample with a threshold has less than 2^32 elements; got %lld. "
                         "Use backend=\"torch\".",
                         static_cast<long long>(args.size));
            throw py::error_already_set();
        }
        checked_ = std::move(checked);
        thresholds_ = thresholds;
        launch_.grown = launch.grown;
    }

    // From now on others than this stage may write to the table on the device.
    void share_table() { launch_.own_table = false; }

    // `out` 0: no network output; `xi` 0: the row draws its own noise.
    void run(int64_t row, uintptr_t out, int out_dtype, int64_t out_stride, uintptr_t xi,
             uintptr_t stream) const {
        cuda::Launch launch = launch_of(row, {out, out_dtype, out_stride, xi}, &Pair::stage);
        if (!thresholds_) launch.scale = nullptr;
        raise_if(cuda::run_stage(launch, device_, pointer<void>(stream)));
    }
    void measure(int64_t row, uintptr_t out, int out_dtype, int64_t out_stride, uintptr_t xi,
                 uintptr_t stream) const {
        const cuda::Launch launch = launch_of(row, {out, out_dtype, out_stride, xi},
                                              &Pair::measures);
        raise_if(cuda::run_measures(launch, device_, pointer<void>(stream)));
    }

private:
    enum Call : int { kWithOut = 1, kWithXi = 2, kCalls = 4 };

    struct Inputs {
        uintptr_t out;
        int out_dtype;
        int64_t out_stride;
        uintptr_t xi;
    };

    // Of one row: what keeps its update and its measures from running.
    struct Pair {
        Status stage = kOk, measures = kOk;
    };

    // Of all rows, for calls that bring the same.
    struct Checked {
        std::vector<Pair> rows;
        int64_t worst = -1, worst_measures = -1;  // the first row that cannot run; -1: none

        void add(Pair pair) {
            const int64_t row = static_cast<int64_t>(rows.size());
            if (pair.stage != kOk && worst < 0) worst = row;
            if (pair.measures != kOk && worst_measures < 0) worst_measures = row;
            rows.push_back(pair);
        }
    };

    static cuda::Launch take(const py::dict& given, int* device) {
        Fields fields(given);
        cuda::Launch launch{};
        launch.args = stage_args(fields);
        launch.row_index = fields.address<const int64_t>("row_index");
        launch.fault = fields.address<int64_t>("fault");
        launch.scale = fields.address<void>("scale");
        launch.own_table = fields.take<bool>("own_table");
        *device = fields.take<int>("device");
        fields.done();
        if (launch.fault == nullptr || (launch.scale == nullptr && launch.args.batch > 0)) {
            refuse(kBadLayout, 0, launch.args.rows);
        }
        return launch;
    }

    // A launch of this row with these inputs, checked as far as the host knows.
    cuda::Launch launch_of(int64_t row, const Inputs& inputs, Status Pair::* which) const {
        cuda::Launch launch = launch_;
        StageArgs& args = launch.args;
        launch.row = row;
        args.out = pointer<const void>(inputs.out);
        args.out_stride = inputs.out_stride;
        args.xi = pointer<const void>(inputs.xi);
        if (inputs.out != 0) {
            if (inputs.out_dtype < 0 || inputs.out_dtype >= kDtypes) {
                refuse(kBadDtype, row, args.rows);
            }
            args.out_dtype = inputs.out_dtype;
        }
        const Checked& checked =
            checked_[(inputs.out != 0 ? kWithOut : 0) | (inputs.xi != 0 ? kWithXi : 0)];
        int64_t asked = row;
        if (args.stage_index != nullptr || launch.row_index != nullptr) {
            // the device alone knows the row: any must be able to run
            asked = which == &Pair::stage ? checked.worst : checked.worst_measures;
        } else if (row < 0 || row >= args.rows) {
            refuse(kBadRow, row, args.rows);
        }
        if (asked >= 0) {
            const Status status = checked.rows.at(static_cast<size_t>(asked)).*which;
            if (status != kOk) refuse(status, asked, args.rows);
        }
        const char* input = nullptr;
        if (const Range* other = memory_.overlapped(args, &input)) {
            throw py::value_error(std::string("stage: ") + input +
                                  " lies apart from the registers that are written, or on one "
                                  "element for element; got an overlap with " +
                                  other->name + ". Clone it first.");
        }
        return launch;
    }

    // Whether a measure of a row takes a quantile.
    static bool counts_magnitudes(const StageArgs& a, const double* columns) {
        const double* m = columns + a.measure_offset();
        for (int i = 0; i < a.measures && i < columns[head::n_measures]; ++i) {
            if (m[measure::num_kind] == kQuantile || m[measure::den_kind] == kQuantile) return true;
            m += measure::kColumns;
        }
        return false;
    }

    // Of a row in the state's type; sets *thresholds where it runs and thresholds.
    static Pair statuses(const cuda::Launch& launch, const double* columns, bool* thresholds) {
        return launch.args.state == kFloat64 ? resolved<double>(launch, columns, thresholds)
                                             : resolved<float>(launch, columns, thresholds);
    }
    template <class T>
    static Pair resolved(const cuda::Launch& launch, const double* columns, bool* thresholds) {
        GrownRow<T> row;
        Pair pair;
        pair.measures = resolve_measures(launch.args, columns, row);
        pair.stage = cuda::resolve(launch, columns, row);
        *thresholds = *thresholds || (pair.stage == kOk && (row.flags & kThreshold));
        return pair;
    }

    int device_ = 0;
    cuda::Launch launch_;
    Memory memory_;
    std::array<Checked, kCalls> checked_;  // [what a call brings]
    bool thresholds_ = false;              // whether a row of the table does
};

void normal(uintptr_t z, int dtype, uintptr_t seeds, int64_t batch, int64_t size, uint32_t stream,
            int64_t offset, int device, uintptr_t cuda_stream) {
    int64_t total = 0, bytes = 0;
    if (batch < 0 || size < 0 || offset < 0 || offset % 4 != 0 ||
        __builtin_mul_overflow(batch, size, &total) ||
        __builtin_mul_overflow(total, int64_t{8}, &bytes) ||
        ((z == 0 || seeds == 0) && total > 0)) {
        refuse(kBadLayout, 0, 0);
    }
    if (dtype != kFloat32 && dtype != kFloat64) refuse(kBadDtype, 0, 0);
    if (z % static_cast<uintptr_t>(kBytes[dtype]) != 0 || seeds % 8 != 0) {
        refuse(kMisaligned, 0, 0);
    }
    const cuda::Normals normals = {pointer<void>(z), pointer<const uint64_t>(seeds), batch, size,
                                   offset / 4, stream};
    raise_if(cuda::normal(normals, static_cast<Dtype>(dtype), device, pointer<void>(cuda_stream)));
}

// None where this module can launch, on a device where one is named; else the runtime's words.
py::object problem(const std::optional<int>& device) {
    cuda::Outcome outcome = cuda::probe();
    if (outcome.status == kOk && device) outcome = cuda::probe(*device);
    return outcome.status == kOk ? py::object(py::none()) : py::object(py::str(outcome.reason));
}

// Of each kernel its name and what it takes, or None where they do not run.
py::object kernels(int device) {
    constexpr const char* kNames[kDtypes] = {"float32", "float64", "bfloat16", "float16"};
    py::list list;
    const cuda::Outcome outcome = cuda::usages(device, [&](const cuda::Usage& usage) {
        const std::string name = std::string(usage.family) + (usage.grown ? " grown " : " ") +
                                 kNames[usage.wide] + " " + kNames[usage.out];
        list.append(py::make_tuple(name, usage.registers, usage.local, usage.shared, usage.threads,
                                   usage.blocks));
    });
    return outcome.status == kOk ? py::object(list) : py::object(py::none());
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "The CUDA part of fastdiff. Private: device addresses in, no checks of shapes.";
    describe(module);
    module.attr("archs") = kArchs;

    py::class_<Stage>(module, "Stage", py::module_local())
        .def(py::init<const py::dict&>(), "Stage(fields)")
        .def("check_table", &Stage::check_table, "check_table(host): the host's copy of the table")
        .def("share_table", &Stage::share_table, "Others may write to the device's table now.")
        .def("run", &Stage::run, "run(row, out, out_dtype, out_stride, xi, stream)")
        .def("measure", &Stage::measure, "measure(row, out, out_dtype, out_stride, xi, stream)");

    module.def("normal", &normal,
               "normal(z, dtype, seeds, batch, size, stream, offset, device, cuda_stream)");
    module.def("problem", &problem, py::arg("device") = py::none(),
               "problem(device=None): what keeps this module from launching (there), or None");
    module.def("kernels", &kernels, py::arg("device") = 0,
               "kernels(device=0): (name, registers and local bytes of a thread, shared bytes and "
               "threads of a block, blocks at once on a multiprocessor) of each; None: no device");
    module.def(
        "refuse",
        [](int status, int64_t row, int64_t rows) {
            refuse(static_cast<Status>(status), row, rows);
        },
        "Raises what a kernel wrote to `fault`.");
}
