// SPDX-License-Identifier: Apache-2.0
// What one GPU thread does with a stage, and with normals. Nothing here names a thread, so that a
// host can run the same lines in any order of threads.
#pragma once

#include "cuda/quad.h"

namespace fastdiff::cuda {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int64_t kChunk = 256;  // quads of one sample that a warp takes at a time
// Keeps what follows from being moved before a loop: the row's coefficients are read from shared
// memory in each turn, where registers for all of them would halve the threads at work.
FASTDIFF_HD void reread() {
#if defined(__CUDA_ARCH__)
    asm volatile("" ::: "memory");
#endif
}

// What stands in shared memory, with its address in a register: each block of code would make that
// address anew, which takes three instructions and a special register.
template <class A>
FASTDIFF_HD const A& kept_address(const A& shared) {
#if defined(__CUDA_ARCH__)
    const A* p = &shared;
    asm volatile("" : "+l"(p));
    __builtin_assume(__isShared(p));
    return *p;
#else
    return shared;
#endif
}

FASTDIFF_HD int64_t quads_of(int64_t size) { return (size + 3) / 4; }

FASTDIFF_HD int64_t divide(int64_t a, int64_t b) {
    if (((a | b) >> 32) != 0) return a / b;
    return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);  // a fifth of the instructions
}

// From a quad to the one `stride` further on, of samples of `quads` each.
struct Steps {
    int64_t samples, quads, b, q;
};

// Quads first, first + stride, ... of `samples` samples of `size` elements, by calling
// work(b, q, elements of the quad).
template <class Work>
FASTDIFF_HD void each_quad(int64_t samples, int64_t size, int64_t first, int64_t stride,
                           const Work& work) {
    const int64_t quads = quads_of(size);
    int64_t b = first >= quads, q = first, step_b = 0, step_q = stride;
    if (samples > 1) {
        b = divide(first, quads);
        q = first - b * quads;
        step_b = divide(stride, quads);
        step_q = stride - step_b * quads;
    }
#if defined(__CUDA_ARCH__)
    __shared__ Steps steps;  // registers are for loads; all threads write the same, once
#else
    Steps steps;
#endif
    steps = {samples, quads, step_b, step_q};
    while (true) {
        reread();
        if (b >= steps.samples) break;
        work(b, q, size - 4 * q < 4 ? static_cast<int>(size - 4 * q) : 4);
        b += steps.b;
        q += steps.q;
        if (q >= steps.quads) {
            q -= steps.quads;
            ++b;
        }
    }
}

// Samples that all run `row`: the quads first, first + stride, ...
template <bool kHasE, bool kWide, class S, class R>
FASTDIFF_HD void shared_quads(const Launch& launch, const Placed<R>& at, bool joined,
                              int64_t first, int64_t stride) {
    const R& row = at.row;
    const StageArgs& a = launch.args;
    const int64_t samples = joined ? 1 : a.batch, size = joined ? a.batch * a.size : a.size;
    each_quad(samples, size, first, stride, [&](int64_t b, int64_t q, int count) {
        const uint64_t seed = row.draws > 0 ? a.seeds[b] : 0;
        update<kHasE>(
            row, quad_at<kWide, kWide, R, S>(launch, row, b, q, seed, count, &at.places));
    });
}

// One warp's share of sample b: chunk c of its quads.
template <bool kHasE, bool kWide, class S, class R>
FASTDIFF_HD void chunk_quads(const Launch& launch, const R& row, int64_t b, int64_t c,
                             int lane, int lanes) {
    const StageArgs& a = launch.args;
    const uint64_t seed = row.draws > 0 ? a.seeds[b] : 0;
    for (int64_t q = c * kChunk + lane; q < quads_of(again(a.size));) {
        reread();
        const int count = a.size - 4 * q < 4 ? static_cast<int>(a.size - 4 * q) : 4;
        update<kHasE>(row, quad_at<kWide, false, R, S>(launch, row, b, q, seed, count));
        q += lanes;
        if (q % kChunk < lanes) break;  // the next chunk's: no register holds the end of this one
    }
}

// Whether quads within samples are whole and aligned, the samples being `batch`, not one.
FASTDIFF_HD bool wide_samples(const Launch& l) {
    const StageArgs& a = l.args;
    return l.aligned && a.size % 4 == 0 && (a.out == nullptr || a.out_stride % 4 == 0);
}

// A thread of the launch in which all samples run one row. A gapless batch is one long sample where
// nothing, neither noise nor a scale nor a shared bank, tells samples apart.
template <class S, class R>
FASTDIFF_HD void shared_thread(const Launch& l, const Placed<R>& placed, int64_t thread,
                               int64_t threads) {
    const Placed<R>& at = kept_address(placed);
    const R& row = at.row;
    const StageArgs& a = l.args;
    const bool gapless = a.out == nullptr || a.out_stride == a.size || a.batch == 1;
    const bool alike = !row.scaled() && !(row.reads_bank() && a.bank_shared());
    const bool joined = row.draws == 0 && !(row.flags & kThreshold) && gapless && alike;
    const bool has_e = row.has_e();
    if (wide_samples(l) || (l.aligned && joined && a.batch * a.size % 4 == 0)) {
        if (has_e) {
            shared_quads<true, true, S>(l, at, joined, thread, threads);
        } else {
            shared_quads<false, true, S>(l, at, joined, thread, threads);
        }
    } else if (has_e) {
        shared_quads<true, false, S>(l, at, joined, thread, threads);
    } else {
        shared_quads<false, false, S>(l, at, joined, thread, threads);
    }
}

// A lane of the warp that has chunk c of sample b and its row.
template <class S, class R>
FASTDIFF_HD void sample_lane(const Launch& l, const R& row, int64_t b, int64_t c, int lane,
                             int lanes) {
    const bool has_e = row.has_e();
    if (wide_samples(l)) {
        if (has_e) {
            chunk_quads<true, true, S>(l, row, b, c, lane, lanes);
        } else {
            chunk_quads<false, true, S>(l, row, b, c, lane, lanes);
        }
    } else if (has_e) {
        chunk_quads<true, false, S>(l, row, b, c, lane, lanes);
    } else {
        chunk_quads<false, false, S>(l, row, b, c, lane, lanes);
    }
}

// -- normals -------------------------------------------------------------------------------------

// A thread of the launch that fills z [batch, size] with normals.
template <class Z>
FASTDIFF_HD void normal_thread(const Normals& n, bool wide, int64_t thread, int64_t threads) {
    each_quad(n.batch, n.size, thread, threads, [&](int64_t b, int64_t q, int count) {
        float normals[4];
        normal_quad(n.seeds[b], n.stream, static_cast<uint64_t>(q + n.first_quad), normals);
        Z* at = static_cast<Z*>(n.z) + (b * n.size + 4 * q);
        Four<Z> four;
        for (int l = 0; l < 4; ++l) four.v[l] = static_cast<Z>(normals[l]);
        if (wide) {
            store(at, four);
        } else {
            for (int l = 0; l < 4; ++l) {
                if (l < count) at[l] = four.v[l];
            }
        }
    });
}

// -- what a launch must be -----------------------------------------------------------------------

// kOk where each pointer is a multiple of its element's size; sets l.aligned.
inline Status check_alignment(Launch& l) {
    const StageArgs& a = l.args;
    uint64_t state = 0;  // the low bits of all addresses
    const auto low = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
    state |= low(a.x) | low(a.e) | low(a.history) | low(a.xi) | low(a.bank);
    const uint64_t words = low(a.seeds) | low(a.table) | low(a.stage_index) | low(l.row_index) |
                           low(l.fault);
    const uint64_t m = low(a.m), out = low(a.out);
    const auto multiple = [](uint64_t bits, int64_t bytes) {
        return bits % static_cast<uint64_t>(bytes) == 0;
    };
    const int64_t state_bytes = kBytes[a.state], m_bytes = kBytes[a.network];
    const int64_t out_bytes = kBytes[a.out_dtype];
    if (!multiple(state | low(l.scale) | low(a.scalars), state_bytes) || !multiple(m, m_bytes) ||
        !multiple(out, out_bytes) || !multiple(words, 8)) {
        return kMisaligned;
    }
    const bool even = a.batch * a.size % 4 == 0;  // slots, copies and branches start aligned
    const bool single = (a.history == nullptr || a.slots <= 1) && (a.m == nullptr || a.copies <= 1) &&
                        (a.bank == nullptr || a.entries <= 1);
    const bool branches = a.out == nullptr || a.branches <= 1 || a.batch * a.out_stride % 4 == 0;
    l.aligned = (even || single) && branches && multiple(state, 16) &&
                multiple(m, m_bytes == 2 ? 8 : 16) && multiple(out, out_bytes == 2 ? 8 : 16);
    return kOk;
}

}  // namespace fastdiff::cuda
