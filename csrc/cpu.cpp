// SPDX-License-Identifier: Apache-2.0
// The CPU backend: rows resolved and checked, work split over threads, an instruction set chosen.
#define FASTDIFF_ISA baseline
#define FASTDIFF_LANES 4
#include "cpu_kernels.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#include <algorithm>

namespace fastdiff::cpu {

extern const Kernels kBaseline = baseline::kKernels;

namespace {

// Threads get multiples of this many elements: no cache line has two writers inside a sample.
constexpr int64_t kGrain = 4096;

const Kernels*& chosen() {
    static const Kernels* kernels = nullptr;
    if (kernels == nullptr) {
        const Kernels* list[3];
        available(list);
        kernels = list[0];
    }
    return kernels;
}

// Calls work(lo, hi) on a partition of [0, total) into multiples of `grain` elements.
template <class Work>
void parallel(int64_t total, int threads, int64_t grain, const Work& work) {
#if defined(_OPENMP)
    const int64_t grains = (total + grain - 1) / grain;
    const int64_t most = total < kParallelFrom ? 1 : total / (kParallelFrom / 2);
    const int count = static_cast<int>(threads < most ? threads : most);
    if (count > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(count)
        {
            const int64_t team = omp_get_num_threads(), rank = omp_get_thread_num();
            const int64_t lo = grains * rank / team * grain;
            const int64_t end = grains * (rank + 1) / team * grain;
            const int64_t hi = end < total ? end : total;
            if (lo < hi) work(lo, hi);
        }
        return;
    }
#endif
    (void)threads;
    (void)grain;
    if (total > 0) work(int64_t{0}, total);
}

// Order statistics of one sample's |h|, exact. Passes over h, formed again in each, settle 11 bits
// of the wanted one at a time until those that share them fit in a block, among which it is then
// chosen: one pass for a sample of up to a block, three for nearly all others, seven where float64
// values tie.
template <class T>
class Magnitudes {
public:
    Magnitudes(FormKernel form, const void* row, const void* span, int64_t size)
        : form_(form), row_(row), span_(span), size_(size) {}

    // What they are clipped to and divided by.
    T scale(const Row<T>& row) const {
        const Position position(row.quantile, size_);
        T low, high;
        pair(position.rank, low, high);
        return scale_of(row, position.weight, low, high);
    }

private:
    using Bits = typename Magnitude<T>::Bits;
    static constexpr int kBits = Magnitude<T>::kBits, kRadix = 11;

    template <class Work>
    void each(const Work& work) const {
        alignas(64) T h[baseline::kBlock];
        for (int64_t lo = 0; lo < size_; lo += baseline::kBlock) {
            const int64_t hi = std::min(lo + baseline::kBlock, size_);
            form_(row_, span_, lo, hi, h);
            for (int64_t i = 0; i < hi - lo; ++i) work(Magnitude<T>::of(h[i]));
        }
    }

    // Those of rank `rank` and rank + 1; NaN where there is no such.
    void pair(int64_t rank, T& low, T& high) const {
        Bits prefix = 0;  // of the wanted key: its bits from `shift` on
        int shift = kBits;
        int64_t sharing = size_;  // keys with that prefix, and `rank` counts among them
        while (sharing > baseline::kBlock && shift > 0) {
            const int width = std::min(kRadix, shift);
            int64_t count[1 << kRadix] = {};
            each([&](Bits key) {
                if (key >> shift == prefix) ++count[(key >> (shift - width)) & ((1 << width) - 1)];
            });
            int digit = 0;
            while (rank >= count[digit]) rank -= count[digit++];
            prefix = prefix << width | static_cast<Bits>(digit);
            shift -= width;
            sharing = count[digit];
        }
        Bits kept[baseline::kBlock], above = Magnitude<T>::kMost;
        int64_t filled = 0;
        each([&](Bits key) {
            if (key >> shift == prefix) {
                if (filled < baseline::kBlock) kept[filled++] = key;  // past a block all are equal
            } else if (key >> shift > prefix && key < above) {
                above = key;
            }
        });
        const int64_t place = std::min(rank, filled - 1);
        std::nth_element(kept, kept + place, kept + filled);
        low = Magnitude<T>::value(kept[place]);
        if (place + 1 < filled) {
            above = *std::min_element(kept + place + 1, kept + filled);
        } else if (rank + 1 < sharing) {
            above = kept[place];
        }
        high = Magnitude<T>::value(above);
    }

    FormKernel form_;
    const void* row_;
    const void* span_;
    int64_t size_;
};

template <class T, class S>
struct Launch {
    const StageArgs& a;
    SpanKernel kernel;
    FormKernel form;

    // Points `at` at sample b; with a contiguous output and b = 0, at the whole batch.
    void place(const Row<T>& row, int64_t b, Span<T, S>& at) const {
        const int64_t offset = b * a.size, sample = a.batch * a.size;
        at.x = static_cast<T*>(a.x) + offset;
        at.e = a.e == nullptr ? nullptr : static_cast<T*>(a.e) + offset;
        T* history = static_cast<T*>(a.history) + offset;
        at.push = row.push < 0 ? nullptr : history + row.push * sample;
        at.push_x = row.push_x < 0 ? nullptr : history + row.push_x * sample;
        at.xi = a.xi == nullptr ? nullptr : static_cast<const T*>(a.xi) + offset;
        for (int j = 0; j < row.terms; ++j) at.term[j] = history + row.term[j].source * sample;
        for (int k = 0; k < row.extras; ++k) {
            at.extra[k] = static_cast<const T*>(a.extra[row.extra[k].source]) + offset;
        }
        for (int g = 0; g < row.branches; ++g) {
            at.out[g] = static_cast<const S*>(a.out) + (row.branch[g] * a.batch + b) * a.out_stride;
        }
        constexpr int64_t kBytes[kDtypes] = {4, 8, 2, 2};
        at.m = row.writes_m ? static_cast<char*>(a.m) + offset * kBytes[a.network] : nullptr;
        at.copies = a.copies;
        at.copy_stride = sample;
        at.network = a.network;
    }

    void sample(const Row<T>& row, int64_t b, int64_t lo, int64_t hi) const {
        Span<T, S> at;
        place(row, b, at);
        if (row.flags & kThreshold) {  // the sample is whole then
            const Magnitudes<T> magnitudes(form, &row, &at, a.size);
            at.scale = magnitudes.scale(row);
        }
        kernel(&row, &at, a.seeds == nullptr ? nullptr : a.seeds + b, a.size, lo, hi);
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
        Row<T> row;
        const Status status = resolve(a, index, row);
        if (status != kOk) return status;
        const bool thresholds = row.flags & kThreshold;
        const bool gapless = row.branches == 0 || a.out_stride == a.size || a.batch == 1;
        const bool joined = gapless && !thresholds;
        parallel(a.batch * a.size, threads, grain(thresholds), [&](int64_t lo, int64_t hi) {
            if (joined) {
                sample(row, 0, lo, hi);
            } else {
                samples(lo, hi,
                        [&](int64_t b, int64_t from, int64_t to) { sample(row, b, from, to); });
            }
        });
        return kOk;
    }

    Status per_sample(int64_t index, int threads, int64_t* bad_row) const {
        Row<T> checked;
        bool thresholds = false;
        for (int64_t b = 0; b < a.batch; ++b) {
            if (b > 0 && a.stage_index[b] == a.stage_index[b - 1]) continue;
            *bad_row = index + a.stage_index[b];
            const Status status = resolve(a, *bad_row, checked);
            if (status != kOk) return status;
            thresholds = thresholds || (checked.flags & kThreshold);
        }
        parallel(a.batch * a.size, threads, grain(thresholds), [&](int64_t lo, int64_t hi) {
            Row<T> row;
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

template <class T, class S>
Status launch(const StageArgs& a, int64_t row, int threads, int64_t* bad_row) {
    const Kernels& kernels = active();
    const bool wide = sizeof(T) == 8;
    const Launch<T, S> launch{a, kernels.span[wide][a.out_dtype], kernels.form[wide][a.out_dtype]};
    return a.stage_index == nullptr ? launch.shared(row, threads)
                                    : launch.per_sample(row, threads, bad_row);
}

}  // namespace

int available(const Kernels* list[3]) {
    int count = 0;
#if defined(FASTDIFF_X86)
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
    const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (v3 && v4) list[count++] = &kAvx512;
    if (v3) list[count++] = &kAvx2;
#endif
    list[count++] = &kBaseline;
    return count;
}

const Kernels& active() { return *chosen(); }

bool select(const char* name) {
    const Kernels* list[3];
    const int count = available(list);
    for (int k = 0; k < count; ++k) {
        if (strcmp(list[k]->name, name) == 0) {
            chosen() = list[k];
            return true;
        }
    }
    return false;
}

Status run(const StageArgs& a, int64_t row, int threads, int64_t* bad_row) {
    *bad_row = row;
    if (a.out_dtype < 0 || a.out_dtype >= kDtypes) return kBadDtype;
    if (a.batch * a.size == 0) return row < 0 || row >= a.rows ? kBadRow : kOk;
    const bool wide = a.state == kFloat64;
    switch (a.out_dtype) {
        case kFloat32:
            return wide ? launch<double, float>(a, row, threads, bad_row)
                        : launch<float, float>(a, row, threads, bad_row);
        case kFloat64:
            return wide ? launch<double, double>(a, row, threads, bad_row)
                        : launch<float, double>(a, row, threads, bad_row);
        case kBfloat16:
            return wide ? launch<double, Bfloat16>(a, row, threads, bad_row)
                        : launch<float, Bfloat16>(a, row, threads, bad_row);
        default:
            return wide ? launch<double, Float16>(a, row, threads, bad_row)
                        : launch<float, Float16>(a, row, threads, bad_row);
    }
}

Status normal(void* z, Dtype dtype, const uint64_t* seeds, int64_t batch, int64_t size,
              uint32_t stream, int threads) {
    const Kernels& kernels = active();
    if (dtype == kFloat32) {
        parallel(batch * size, threads, kGrain, [&](int64_t lo, int64_t hi) {
            kernels.normals(seeds, size, stream, lo, hi, static_cast<float*>(z) + lo);
        });
    } else if (dtype == kFloat64) {
        parallel(batch * size, threads, kGrain, [&](int64_t lo, int64_t hi) {
            float block[baseline::kBlock];
            while (lo < hi) {
                const int64_t end = hi - lo < baseline::kBlock ? hi : lo + baseline::kBlock;
                kernels.normals(seeds, size, stream, lo, end, block);
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
