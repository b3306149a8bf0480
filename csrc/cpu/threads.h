// SPDX-License-Identifier: Apache-2.0
// Work split over OpenMP's threads.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#include <pthread.h>
#endif

#include "cpu/cpu.h"

namespace fastdiff::cpu {

// Threads get multiples of this many elements: no cache line has two writers inside a sample.
constexpr int64_t kGrain = 4096;

#if defined(_OPENMP)
// Whether this process is a fork of one that had loaded the core. OpenMP's threads do not live on in
// it, and a team that waits for them would wait for ever.
inline bool forked = false;
inline const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// Calls work(lo, hi) on a partition of [0, total) into multiples of `grain` elements.
template <class Work>
void parallel(int64_t total, int threads, int64_t grain, const Work& work) {
#if defined(_OPENMP)
    const int64_t grains = (total + grain - 1) / grain;
    const int64_t most = total < kParallelFrom ? 1 : total / (kParallelFrom / 2);
    const int count = static_cast<int>(threads < most ? threads : most);
    if (count > 1 && !forked && !omp_in_parallel()) {
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

}  // namespace fastdiff::cpu
