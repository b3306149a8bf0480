// SPDX-License-Identifier: Apache-2.0
// The Python module fastdiff._cuda: device addresses and a stream in, exceptions out.
//
// It imports where no driver is. Addresses are never read here: what the host must know of a table
// it learns from the host's copy, given to `check_table`.
#include <array>

#include "bindings.h"
#include "cuda.h"

using namespace fastdiff;

namespace {

void raise_if(cuda::Outcome outcome) {
    if (outcome.status == kOk) return;
    if (outcome.status != kDeviceError) refuse(outcome.status, 0, 0);
    throw std::runtime_error(
        std::string("cuda: the launch needs NVIDIA's driver, as new as the CUDA toolkit that built "
                    "fastdiff, and a device it was built for; got: ") +
        outcome.reason +
        ". See fastdiff.backends.status(), or use backend=\"triton\" or backend=\"torch\".");
}

// Bytes [begin, end) that a launch reads or writes.
struct Range {
    const char* name;
    uintptr_t begin, end;
    int64_t element;  // bytes of one
    bool written;
};

bool meet(const Range& a, const Range& b) { return a.begin < b.end && b.begin < a.end; }

int64_t bytes_of(int32_t dtype) {
    return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

class Stage {
public:
    Stage(int state, int network, int64_t batch, int64_t size, uintptr_t x, uintptr_t e,
          uintptr_t history, int64_t slots, uintptr_t m, int64_t copies,
          const std::vector<uintptr_t>& extras, uintptr_t seeds, uintptr_t table, int64_t rows,
          int64_t width, int terms, int branches, int extra_terms, uintptr_t stage_index, uintptr_t row_index,
          uintptr_t fault, uintptr_t scale, int device)
        : device_(device) {
        launch_.args = stage_args(state, network, batch, size, x, e, history, slots, m, copies,
                                  extras, seeds, table, rows, width, terms, branches, extra_terms, stage_index);
        launch_.row_index = pointer<const int64_t>(row_index);
        launch_.fault = pointer<int64_t>(fault);
        launch_.scale = pointer<void>(scale);
        if (fault == 0 || (scale == 0 && batch > 0)) refuse(kBadLayout, 0, rows);
        const int64_t real = bytes_of(state), all = product({batch, size, 8});
        add("x", x, all / 8 * real, real, true);
        add("e", e, all / 8 * real, real, true);
        add("history", history, product({all / 8 * real, slots}), real, true);
        add("m", m, product({all / 8 * bytes_of(network), copies}), bytes_of(network), true);
        product({all, branches});
        add("fault", fault, 16, 8, true);
        add("scale", scale, batch * real, real, true);
        for (uintptr_t extra : extras) add("extras", extra, all / 8 * real, real, false);
        add("seeds", seeds, 8 * batch, 8, false);
        add("table", table, product({8, rows, width}), 8, false);
        add("stage_index", stage_index, 8 * batch, 8, false);
        add("row_index", row_index, 8, 8, false);
        for (const Range& a : ranges_) {
            for (const Range& b : ranges_) {
                if (&a == &b || !a.written || !meet(a, b)) continue;
                throw py::value_error(std::string("stage: a register that is written shares no "
                                                  "memory with another; got ") +
                                      a.name + " and " + b.name + ". Clone one of them.");
            }
        }
        states_ = all / 8;
    }

    // `host` is the host's copy of the table. Raises where a row could never run; keeps of each row
    // what a call must bring. Nothing is kept of a table that is refused.
    void check_table(uintptr_t host) {
        cuda::Launch launch = launch_;
        StageArgs& args = launch.args;
        args.table = pointer<const double>(host);
        bool thresholds = false;
        std::array<std::vector<Status>, kCalls> statuses;
        std::array<int64_t, kCalls> worst;
        worst.fill(-1);
        const char given = 0;  // stands for any address
        for (int call = kCalls; call-- > 0;) {
            args.out = (call & kWithOut) ? &given : nullptr;
            args.xi = (call & kWithXi) ? &given : nullptr;
            for (int64_t row = 0; row < args.rows; ++row) {
                // with no elements nothing is touched, and addresses may be null
                const double* columns = args.table + row * row_width(args);
                Status status = kOk;
                if (states_ > 0) {
                    status = args.state == kFloat64
                                 ? resolved<double>(launch, columns, &thresholds)
                                 : resolved<float>(launch, columns, &thresholds);
                }
                if (status != kOk && call == (kWithOut | kWithXi)) refuse(status, row, args.rows);
                if (status != kOk && worst[call] < 0) worst[call] = row;
                statuses[call].push_back(status);
            }
        }
        if (thresholds && args.size > cuda::kMostToThreshold) {
            PyErr_Format(PyExc_NotImplementedError,
                         "stage: a sample with a threshold has less than 2^32 elements; got %lld. "
                         "Use backend=\"torch\".",
                         static_cast<long long>(args.size));
            throw py::error_already_set();
        }
        statuses_ = std::move(statuses);
        worst_ = worst;
        thresholds_ = thresholds;
    }

    // `out` 0: no network output; `xi` 0: the row draws its own noise.
    void run(int64_t row, uintptr_t out, int out_dtype, int64_t out_stride, uintptr_t xi,
             uintptr_t stream) const {
        cuda::Launch launch = launch_;
        StageArgs& args = launch.args;
        launch.row = row;
        if (!thresholds_) launch.scale = nullptr;
        args.out = pointer<const void>(out);
        args.out_stride = out_stride;
        args.xi = pointer<const void>(xi);
        if (out != 0) {
            if (out_dtype < 0 || out_dtype >= kDtypes) refuse(kBadDtype, row, args.rows);
            args.out_dtype = out_dtype;
        }
        const int call = (out != 0 ? kWithOut : 0) | (xi != 0 ? kWithXi : 0);
        if (args.stage_index == nullptr && launch.row_index == nullptr) {
            if (row < 0 || row >= args.rows) refuse(kBadRow, row, args.rows);
            const Status status = statuses_[call].at(static_cast<size_t>(row));
            if (status != kOk) refuse(status, row, args.rows);
        } else if (worst_[call] >= 0) {  // the device alone knows the row: any must be able to run
            refuse(statuses_[call][static_cast<size_t>(worst_[call])], worst_[call], args.rows);
        }
        if (out != 0) {
            const int64_t element = bytes_of(args.out_dtype);
            const int64_t apart = product({args.batch * args.branches - 1, out_stride, element});
            const int64_t bytes = states_ == 0 ? 0 : apart + args.size * element;
            const bool gapless = out_stride == args.size || args.batch * args.branches == 1;
            check_apart({"the network's output", out, out + static_cast<uintptr_t>(bytes), element,
                         false}, gapless);
        }
        if (xi != 0) {
            const int64_t element = bytes_of(args.state);
            check_apart({"xi", xi, xi + static_cast<uintptr_t>(states_ * element), element, false},
                        true);
        }
        raise_if(cuda::run(launch, device_, pointer<void>(stream)));
    }

private:
    enum Call : int { kWithOut = 1, kWithXi = 2, kCalls = 4 };

    // The status of a row in the state's type; sets *thresholds where it runs and thresholds.
    template <class T>
    static Status resolved(const cuda::Launch& launch, const double* columns, bool* thresholds) {
        Row<T> row;
        const Status status = cuda::resolve(launch, columns, row);
        *thresholds = *thresholds || (status == kOk && (row.flags & kThreshold));
        return status;
    }

    static int64_t product(std::initializer_list<int64_t> factors) {
        int64_t total = 1;
        for (int64_t factor : factors) {
            if (__builtin_mul_overflow(total, factor, &total)) refuse(kTooLarge, 0, 0);
        }
        return total;
    }

    void add(const char* name, uintptr_t begin, int64_t bytes, int64_t element, bool written) {
        if (begin == 0 || bytes <= 0) return;
        if (begin % static_cast<uintptr_t>(element) != 0) refuse(kMisaligned, 0, 0);
        ranges_.push_back({name, begin, begin + static_cast<uintptr_t>(bytes), element, written});
    }

    // An input may lie on a written register where each thread writes just what it has read.
    void check_apart(const Range& input, bool gapless) const {
        for (const Range& other : ranges_) {
            if (!other.written || !meet(input, other)) continue;
            const int64_t step = states_ * input.element;
            const int64_t distance = static_cast<int64_t>(input.begin - other.begin);
            if (gapless && input.element == other.element && distance % step == 0) continue;
            throw py::value_error(std::string("stage: ") + input.name +
                                  " lies apart from the registers that are written, or on one "
                                  "element for element; got an overlap with " +
                                  other.name + ". Clone it first.");
        }
    }

    cuda::Launch launch_{};
    int device_;
    int64_t states_ = 0;  // elements of x
    std::vector<Range> ranges_;
    std::array<std::vector<Status>, kCalls> statuses_;  // [what a call brings][row]
    std::array<int64_t, kCalls> worst_{{-1, -1, -1, -1}};
    bool thresholds_ = false;  // whether a row of the table does
};

void normal(uintptr_t z, int dtype, uintptr_t seeds, int64_t batch, int64_t size, uint32_t stream,
            int device, uintptr_t cuda_stream) {
    int64_t total = 0, bytes = 0;
    if (batch < 0 || size < 0 || __builtin_mul_overflow(batch, size, &total) ||
        __builtin_mul_overflow(total, int64_t{8}, &bytes) ||
        ((z == 0 || seeds == 0) && total > 0)) {
        refuse(kBadLayout, 0, 0);
    }
    if (dtype != kFloat32 && dtype != kFloat64) refuse(kBadDtype, 0, 0);
    if (z % static_cast<uintptr_t>(bytes_of(dtype)) != 0 || seeds % 8 != 0) {
        refuse(kMisaligned, 0, 0);
    }
    raise_if(cuda::normal(pointer<void>(z), static_cast<Dtype>(dtype),
                          pointer<const uint64_t>(seeds), batch, size, stream, device,
                          pointer<void>(cuda_stream)));
}

// None where this module can launch; else the runtime's words.
py::object problem() {
    const cuda::Outcome outcome = cuda::probe();
    return outcome.status == kOk ? py::object(py::none()) : py::object(py::str(outcome.reason));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "The CUDA part of fastdiff. Private: device addresses in, no checks of shapes.";
    module.attr("abi") = kAbi;

    py::class_<Stage>(module, "Stage", py::module_local())
        .def(py::init<int, int, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, int64_t,
                      uintptr_t, int64_t, const std::vector<uintptr_t>&, uintptr_t, uintptr_t,
                      int64_t, int64_t, int, int, int, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                      int>(),
             py::kw_only(), py::arg("state"), py::arg("network"), py::arg("batch"), py::arg("size"),
             py::arg("x"), py::arg("e"), py::arg("history"), py::arg("slots"), py::arg("m"),
             py::arg("copies"), py::arg("extras"), py::arg("seeds"), py::arg("table"),
             py::arg("rows"), py::arg("width"), py::arg("terms"), py::arg("branches"), py::arg("extra_terms"),
             py::arg("stage_index"), py::arg("row_index"), py::arg("fault"), py::arg("scale"),
             py::arg("device"))
        .def("check_table", &Stage::check_table, "check_table(host): the host's copy of the table")
        .def("run", &Stage::run, "run(row, out, out_dtype, out_stride, xi, stream)");

    module.def("normal", &normal,
               "normal(z, dtype, seeds, batch, size, stream, device, cuda_stream)");
    module.def("problem", &problem, "What keeps this module from launching, or None.");
    module.def(
        "refuse",
        [](int status, int64_t row, int64_t rows) {
            refuse(static_cast<Status>(status), row, rows);
        },
        "Raises what a kernel wrote to `fault`.");
}
