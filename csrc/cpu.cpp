// SPDX-License-Identifier: Apache-2.0
// The CPU backend: rows resolved and checked, work split over threads, an instruction set chosen.
#define FASTDIFF_ISA baseline
#define FASTDIFF_LANES 4
#include "cpu_kernels.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#include <string.h>

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

// Calls work(lo, hi) on a partition of [0, total).
template <class Work>
void parallel(int64_t total, int threads, const Work& work) {
#if defined(_OPENMP)
    const int64_t grains = (total + kGrain - 1) / kGrain;
    const int64_t most = total < kParallelFrom ? 1 : total / (kParallelFrom / 2);
    const int count = static_cast<int>(threads < most ? threads : most);
    if (count > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(count)
        {
            const int64_t team = omp_get_num_threads(), rank = omp_get_thread_num();
            const int64_t lo = grains * rank / team * kGrain;
            const int64_t end = grains * (rank + 1) / team * kGrain;
            const int64_t hi = end < total ? end : total;
            if (lo < hi) work(lo, hi);
        }
        return;
    }
#endif
    (void)threads;
    if (total > 0) work(int64_t{0}, total);
}

template <class T, class S>
struct Launch {
    const StageArgs& a;
    SpanKernel kernel;

    // Points `at` at sample b; with a contiguous output and b = 0, at the whole batch.
    void place(const Row<T>& row, int64_t b, Span<T, S>& at) const {
        const int64_t offset = b * a.size, sample = a.batch * a.size;
        at.x = static_cast<T*>(a.x) + offset;
        at.e = a.e == nullptr ? nullptr : static_cast<T*>(a.e) + offset;
        T* history = static_cast<T*>(a.history) + offset;
        at.push = row.push < 0 ? nullptr : history + row.push * sample;
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

    Status shared(int64_t index, int threads) const {
        Row<T> row;
        const Status status = resolve(a, index, row);
        if (status != kOk) return status;
        const bool joined = row.branches == 0 || a.out_stride == a.size || a.batch == 1;
        parallel(a.batch * a.size, threads, [&](int64_t lo, int64_t hi) {
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
        for (int64_t b = 0; b < a.batch; ++b) {
            if (b > 0 && a.stage_index[b] == a.stage_index[b - 1]) continue;
            *bad_row = index + a.stage_index[b];
            const Status status = resolve(a, *bad_row, checked);
            if (status != kOk) return status;
        }
        parallel(a.batch * a.size, threads, [&](int64_t lo, int64_t hi) {
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
    const SpanKernel kernel = active().span[sizeof(T) == 8][a.out_dtype];
    const Launch<T, S> launch{a, kernel};
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
        parallel(batch * size, threads, [&](int64_t lo, int64_t hi) {
            kernels.normals(seeds, size, stream, lo, hi, static_cast<float*>(z) + lo);
        });
    } else if (dtype == kFloat64) {
        parallel(batch * size, threads, [&](int64_t lo, int64_t hi) {
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
