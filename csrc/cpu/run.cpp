// SPDX-License-Identifier: Apache-2.0
// The CPU backend: rows resolved and checked, work split over threads.
#include "cpu/order.h"
#include "cpu/threads.h"

namespace fastdiff::cpu {
namespace {

// A launch whose rows are R: Row<T> or GrownRow<T>.
template <class R, class S>
struct Launch {
    using T = typename R::Number;

    const StageArgs& a;
    const Kernels& kernels;

    static constexpr bool kWide = sizeof(T) == 8;

    // Points `at` at sample b; with a contiguous output and b = 0, at the whole batch.
    void place(const R& row, int64_t b, Span<T, S>& at) const {
        const int64_t offset = b * a.size, sample = a.batch * a.size;
        const int64_t in_bank = a.bank_shared() ? 0 : offset;
        at.x = static_cast<T*>(a.x) + offset;
        at.e = a.e == nullptr ? nullptr : static_cast<T*>(a.e) + offset;
        T* history = static_cast<T*>(a.history) + offset;
        at.push = row.push < 0 ? nullptr : history + row.push * sample;
        at.push_x = row.push_x < 0 ? nullptr : history + row.push_x * sample;
        at.xi = a.xi == nullptr ? nullptr : static_cast<const T*>(a.xi) + offset;
        for (int j = 0; j < row.terms; ++j) at.term[j] = history + row.term[j].source * sample;
        const T* bank = static_cast<const T*>(a.bank) + in_bank;
        const int64_t entry = a.bank_batch * a.size;
        for (int k = 0; k < row.extras; ++k) at.extra[k] = bank + row.extra[k].source * entry;
        for (int g = 0; g < row.branches; ++g) {
            at.out[g] = static_cast<const S*>(a.out) + (row.branch[g] * a.batch + b) * a.out_stride;
        }
        at.m = row.writes_m ? static_cast<char*>(a.m) + offset * kBytes[a.network] : nullptr;
        at.copies = a.copies;
        at.copy_stride = sample;
        at.network = a.network;
        at.seeds = a.seeds == nullptr ? nullptr : a.seeds + b;
        at.size = a.size;
        at.first_quad = a.first_quad;
        if constexpr (R::kGrown) {
            at.history = history;
            at.history_stride = sample;
            at.bank = bank;
            at.bank_stride = entry;
            at.outputs = static_cast<const S*>(a.out) + b * a.out_stride;
            at.output_stride = a.batch * a.out_stride;
            at.scalars = static_cast<const T*>(a.scalars) + b * a.scalar_columns;
        }
    }

    void sample(const R& row, int64_t b, int64_t lo, int64_t hi) const {
        Span<T, S> at;
        place(row, b, at);
        if (row.flags & kThreshold) {  // the sample is whole then
            const auto form = kernels.form[R::kGrown][kWide][a.out_dtype];
            const auto read = [&](int64_t from, int64_t to, T* h) { form(&row, &at, from, to, h); };
            const Magnitudes<T, decltype(read)> magnitudes(a.size, read);
            at.scale = scale_of(row, magnitudes.quantile(row.quantile));
        }
        kernels.span[R::kGrown][kWide][a.out_dtype](&row, &at, lo, hi);
    }

    // Elements [lo, hi) of the batch, sample by sample; calls work(b, first, last element of b).
    template <class Work>
    void samples(int64_t lo, int64_t hi, const Work& work) const {
        for (int64_t b = lo / a.size; lo < hi; ++b) {
            const int64_t begin = b * a.size;
            const int64_t end = hi < begin + a.size ? hi : begin + a.size;
            work(b, lo - begin, end - begin);
            lo = end;
        }
    }

    // Where h is thresholded a sample belongs to one thread.
    int64_t grain(bool thresholds) const { return thresholds ? a.size : kGrain; }

    Status shared(int64_t index, int threads) const {
        R row;
        const Status status = resolve(a, index, row);
        if (status != kOk) return status;
        const bool thresholds = row.flags & kThreshold;
        const bool gapless = row.branches == 0 || a.out_stride == a.size;
        const bool alike = !row.scaled() && !(row.reads_bank() && a.bank_shared());
        const bool joined = a.batch == 1 || (gapless && alike);
        parallel(a.batch * a.size, threads, grain(thresholds), [&](int64_t lo, int64_t hi) {
            if (joined && !thresholds) {
                sample(row, 0, lo, hi);
            } else {
                samples(lo, hi,
                        [&](int64_t b, int64_t from, int64_t to) { sample(row, b, from, to); });
            }
        });
        return kOk;
    }

    Status per_sample(int64_t index, int threads, int64_t* bad_row) const {
        R checked;
        bool thresholds = false;
        for (int64_t b = 0; b < a.batch; ++b) {
            if (b > 0 && a.stage_index[b] == a.stage_index[b - 1]) continue;
            *bad_row = index + a.stage_index[b];
            const Status status = resolve(a, *bad_row, checked);
            if (status != kOk) return status;
            thresholds = thresholds || (checked.flags & kThreshold);
        }
        parallel(a.batch * a.size, threads, grain(thresholds), [&](int64_t lo, int64_t hi) {
            R row;
            int64_t resolved = -1;
            samples(lo, hi, [&](int64_t b, int64_t from, int64_t to) {
                const int64_t own = index + a.stage_index[b];
                if (own != resolved) resolve(a, own, row);
                resolved = own;
                sample(row, b, from, to);
            });
        });
        return kOk;
    }
};

// -- measures ------------------------------------------------------------------------------------

template <class T, class S>
struct Meter {
    using R = GrownRow<T>;

    const StageArgs& a;
    const Kernels& kernels;

    static constexpr bool kWide = sizeof(T) == 8;

    // Calls work(elements, first, number of them) for each block of an operand.
    template <class Work>
    void blocks(const R& row, Span<T, S>& at, Operand operand, const Work& work) const {
        alignas(64) T block[kBlock];
        for (int64_t lo = 0; lo < a.size; lo += kBlock) {
            const int64_t hi = std::min(lo + kBlock, a.size);
            kernels.operand[kWide][a.out_dtype](&row, &at, operand, lo, hi, block);
            work(block, lo, hi - lo);
        }
    }

    double total(const R& row, Span<T, S>& at, const Reduction& r, int32_t kind,
                 double mean) const {
        double lanes[kLaneCount] = {};
        alignas(64) T second[kBlock];
        const bool same = r.b.of == r.a.of && r.b.at == r.a.at;
        blocks(row, at, r.a, [&](const T* first, int64_t lo, int64_t count) {
            if (!same) {
                kernels.operand[kWide][a.out_dtype](&row, &at, r.b, lo, lo + count, second);
            }
            kernels.lanes[kWide](kind, first, same ? first : second, mean, count, lanes);
        });
        for (int half = kLaneCount / 2; half > 0; half /= 2) {
            for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
        }
        return lanes[0];
    }

    double reduce(const R& row, Span<T, S>& at, const Reduction& r) const {
        if (r.kind == kQuantile) {
            const auto read = [&](int64_t lo, int64_t hi, T* h) {
                kernels.operand[kWide][a.out_dtype](&row, &at, r.a, lo, hi, h);
            };
            return Magnitudes<T, decltype(read)>(a.size, read).quantile(r.rank);
        }
        double mean = 0;
        if (r.kind == kStd) mean = total(row, at, r, kSum, 0) / static_cast<double>(a.size);
        return reduced(r.kind, total(row, at, r, r.kind, mean), a.size);
    }

    void sample(const double* columns, const R& row, int64_t b) const {
        Span<T, S> at;
        Launch<R, S>{a, kernels}.place(row, b, at);
        at.scalars = nullptr;  // a measure is taken without them
        T* to = static_cast<T*>(a.scalars) + b * a.scalar_columns;
        for (int i = 0; i < static_cast<int>(columns[head::n_measures]); ++i) {
            const Measure m = measure_of(a, columns, i);
            const double num = reduce(row, at, m.num);
            const double den = m.divides ? reduce(row, at, m.den) : 1;
            to[m.into] = static_cast<T>(measured(m, num, den));
        }
    }

    Status run(int64_t index, int threads, int64_t* bad_row) const {
        R checked;
        const auto row_of = [&](int64_t b) {
            return index + (a.stage_index == nullptr ? 0 : a.stage_index[b]);
        };
        for (int64_t b = 0; b < a.batch; ++b) {
            if (b > 0 && row_of(b) == row_of(b - 1)) continue;
            *bad_row = row_of(b);
            if (*bad_row < 0 || *bad_row >= a.rows) return kBadRow;
            const Status status = resolve_measures(a, a.table + *bad_row * a.width(), checked);
            if (status != kOk) return status;
        }
        parallel(a.batch * a.size, threads, a.size, [&](int64_t lo, int64_t hi) {
            for (int64_t b = lo / a.size; b * a.size < hi; ++b) {
                R row;
                const double* columns = a.table + row_of(b) * a.width();
                resolve_measures(a, columns, row);
                sample(columns, row, b);
            }
        });
        return kOk;
    }
};

// -- dispatch ------------------------------------------------------------------------------------

bool any_grows(const StageArgs& a, int64_t row) {
    const auto one = [&](int64_t index) {
        return index >= 0 && index < a.rows && grows(a, a.table + index * a.width());
    };
    if (a.stage_index == nullptr) return one(row);
    for (int64_t b = 0; b < a.batch; ++b) {
        if ((b == 0 || a.stage_index[b] != a.stage_index[b - 1]) && one(row + a.stage_index[b])) {
            return true;
        }
    }
    return false;
}

template <class R, class S>
Status launch(const StageArgs& a, int64_t row, int threads, int64_t* bad_row) {
    const Launch<R, S> launch{a, active()};
    return a.stage_index == nullptr ? launch.shared(row, threads)
                                    : launch.per_sample(row, threads, bad_row);
}

struct RunRow {
    template <class T, class S>
    static Status run(const StageArgs& a, int64_t row, int threads, int64_t* bad_row) {
        return any_grows(a, row) ? launch<GrownRow<T>, S>(a, row, threads, bad_row)
                                 : launch<Row<T>, S>(a, row, threads, bad_row);
    }
};

struct RunMeasures {
    template <class T, class S>
    static Status run(const StageArgs& a, int64_t row, int threads, int64_t* bad_row) {
        return Meter<T, S>{a, active()}.run(row, threads, bad_row);
    }
};

template <class What>
Status dispatch(const StageArgs& a, int64_t row, int threads, int64_t* bad_row) {
    *bad_row = row;
    if (a.out_dtype < 0 || a.out_dtype >= kDtypes) return kBadDtype;
    if (a.batch * a.size == 0) return row < 0 || row >= a.rows ? kBadRow : kOk;
    const bool wide = a.state == kFloat64;
    switch (a.out_dtype) {
        case kFloat32:
            return wide ? What::template run<double, float>(a, row, threads, bad_row)
                        : What::template run<float, float>(a, row, threads, bad_row);
        case kFloat64:
            return wide ? What::template run<double, double>(a, row, threads, bad_row)
                        : What::template run<float, double>(a, row, threads, bad_row);
        case kBfloat16:
            return wide ? What::template run<double, Bfloat16>(a, row, threads, bad_row)
                        : What::template run<float, Bfloat16>(a, row, threads, bad_row);
        default:
            return wide ? What::template run<double, Float16>(a, row, threads, bad_row)
                        : What::template run<float, Float16>(a, row, threads, bad_row);
    }
}

}  // namespace

Status run_stage(const StageArgs& a, int64_t row, int threads, int64_t* bad_row) {
    return dispatch<RunRow>(a, row, threads, bad_row);
}

Status run_measures(const StageArgs& a, int64_t row, int threads, int64_t* bad_row) {
    return dispatch<RunMeasures>(a, row, threads, bad_row);
}

Status normal(void* z, Dtype dtype, int64_t batch, const Draws& draws, int threads) {
    const Kernels& kernels = active();
    const int64_t total = batch * draws.size;
    if (dtype == kFloat32) {
        parallel(total, threads, kGrain, [&](int64_t lo, int64_t hi) {
            kernels.normals(draws, lo, hi, static_cast<float*>(z) + lo);
        });
    } else if (dtype == kFloat64) {
        parallel(total, threads, kGrain, [&](int64_t lo, int64_t hi) {
            float block[kBlock];
            while (lo < hi) {
                const int64_t end = hi - lo < kBlock ? hi : lo + kBlock;
                kernels.normals(draws, lo, end, block);
                for (int64_t i = lo; i < end; ++i) static_cast<double*>(z)[i] = block[i - lo];
                lo = end;
            }
        });
    } else {
        return kBadDtype;
    }
    return kOk;
}

}  // namespace fastdiff::cpu
