// SPDX-License-Identifier: Apache-2.0
// What one GPU thread does: `stage.h` and `philox.h` over four elements at a time.
//
// The unit of work is a quad: four consecutive elements of a sample, which are the four normals of
// one Philox counter and, in float32, one access of 16 bytes. All its loads precede its stores, and
// no other thread touches its elements. The row stands in shared memory, resolved there by one
// thread: its lists are indexed at run time, which in registers would be local memory. Nothing here
// names a thread, so that a host can run the same lines in any order of threads.
#pragma once

#include "cuda.h"

namespace fastdiff::cuda {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int64_t kChunk = 256;  // quads of one sample that a warp takes at a time
constexpr int kMaxWidth = kHeadColumns + 3 * kMaxTerms + kMaxBranches + 2 * kMaxExtras;

// Keeps what follows from being moved before a loop: the row's coefficients are read from shared
// memory in each turn, where registers for all of them would halve the threads at work.
FASTDIFF_HD void reread() {
#if defined(__CUDA_ARCH__)
    asm volatile("" ::: "memory");
#endif
}

// -- the row -------------------------------------------------------------------------------------

// The row of sample b, not yet checked. Wraps where a stage index is nonsense.
FASTDIFF_HD int64_t row_of(const Launch& l, int64_t b) {
    uint64_t index = static_cast<uint64_t>(l.row);
    if (l.row_index != nullptr) index += static_cast<uint64_t>(*l.row_index);
    if (l.args.stage_index != nullptr) index += static_cast<uint64_t>(l.args.stage_index[b]);
    return static_cast<int64_t>(index);
}

// A row in shared memory. Its threads call `fetch`, one of them then `resolve`, with barriers
// before, between and after.
template <class T>
struct Resolved {
    double columns[kMaxWidth];
    Row<T> row;
    Status status;

    FASTDIFF_HD void fetch(const Launch& l, int64_t index, int lane, int lanes) {
        if (index < 0 || index >= l.args.rows) return;
        const int width = static_cast<int>(row_width(l.args));
        const double* from = l.args.table + index * width;
        for (int c = lane; c < width; c += lanes) columns[c] = from[c];
    }
    FASTDIFF_HD void resolve(const Launch& l, int64_t index) {
        status = index < 0 || index >= l.args.rows ? kBadRow
                                                   : cuda::resolve(l.args, columns, row);
        if (status == kOk) return;
        l.fault[1] = index;
        l.fault[0] = status;
    }
};

// -- four elements -------------------------------------------------------------------------------

// Four elements in one access of up to 16 bytes, or two.
template <class E>
struct alignas(sizeof(E) == 2 ? 8 : 16) Four {
    E v[4];
};

// Where a quad stands. kWide: it is whole and every address allows `Four`.
template <bool kWide, class T, class S>
struct Quad {
    struct V {
        T v[4];
    };
    static constexpr bool kNoiseFirst = true, kThresholds = false;
    const StageArgs& a;
    const Row<T>& row;
    int64_t i;  // its first element in a register
    int64_t o;  // and in the first branch of the output
    int64_t q;  // its counter within the sample
    uint64_t seed;
    int count;  // elements, 1 to 4

    template <class E>
    FASTDIFF_HD V read(const E* p) const {
        V r;
        if (kWide) {
            const Four<E> four = *reinterpret_cast<const Four<E>*>(p);
            for (int l = 0; l < 4; ++l) r.v[l] = static_cast<T>(widen(four.v[l]));
        } else {
            for (int l = 0; l < 4; ++l) r.v[l] = l < count ? static_cast<T>(widen(p[l])) : T(0);
        }
        return r;
    }
    template <class E>
    FASTDIFF_HD void write(E* p, const V& v) const {
        Four<E> four;
        for (int l = 0; l < 4; ++l) narrow(v.v[l], four.v[l]);
        if (kWide) {
            *reinterpret_cast<Four<E>*>(p) = four;
        } else {
            for (int l = 0; l < 4; ++l) {
                if (l < count) p[l] = four.v[l];
            }
        }
    }
    FASTDIFF_HD int64_t registers() const { return a.batch * a.size; }

    FASTDIFF_HD V zero() const { return {{T(0), T(0), T(0), T(0)}}; }
    FASTDIFF_HD V fma(T c, const V& v, const V& sum) const {
        V r;
        for (int l = 0; l < 4; ++l) r.v[l] = fused(c, v.v[l], sum.v[l]);
        return r;
    }
    FASTDIFF_HD V mul(T c, const V& v) const {
        V r;
        for (int l = 0; l < 4; ++l) r.v[l] = c * v.v[l];
        return r;
    }
    FASTDIFF_HD V clip(const V& v, T lo, T hi) const {
        V r;
        for (int l = 0; l < 4; ++l) r.v[l] = v.v[l] < lo ? lo : v.v[l] > hi ? hi : v.v[l];
        return r;
    }
    FASTDIFF_HD V x() const { return read(static_cast<const T*>(a.x) + i); }
    FASTDIFF_HD V e() const { return read(static_cast<const T*>(a.e) + i); }
    FASTDIFF_HD V out(int g) const {
        return read(static_cast<const S*>(a.out) + (row.branch[g] * a.batch * a.out_stride + o));
    }
    FASTDIFF_HD V term(int j) const {
        return read(static_cast<const T*>(a.history) + (row.term[j].source * registers() + i));
    }
    FASTDIFF_HD V extra(int k) const {
        return read(static_cast<const T*>(a.extra[row.extra[k].source]) + i);
    }
    FASTDIFF_HD V xi() const { return read(static_cast<const T*>(a.xi) + i); }
    FASTDIFF_HD V draw(int d) const {
        float z[4];
        normal_quad(seed, row.stream[d], static_cast<uint64_t>(q), z);
        return {{static_cast<T>(z[0]), static_cast<T>(z[1]), static_cast<T>(z[2]),
                 static_cast<T>(z[3])}};
    }
    FASTDIFF_HD void put_x(const V& v) const { write(static_cast<T*>(a.x) + i, v); }
    FASTDIFF_HD void put_e(const V& v) const { write(static_cast<T*>(a.e) + i, v); }
    FASTDIFF_HD void put_push(const V& v) const {
        write(static_cast<T*>(a.history) + (row.push * registers() + i), v);
    }
    FASTDIFF_HD void put_m(const V& v) const {
        FASTDIFF_ROLLED
        for (int64_t k = 0; k < a.copies; ++k) {
            const int64_t at = k * registers() + i;
            switch (a.network) {
                case kFloat32: write(static_cast<float*>(a.m) + at, v); break;
                case kFloat64: write(static_cast<double*>(a.m) + at, v); break;
                case kBfloat16: write(static_cast<Bfloat16*>(a.m) + at, v); break;
                default: write(static_cast<Float16*>(a.m) + at, v); break;
            }
        }
    }
};

// -- the work of one thread ----------------------------------------------------------------------

FASTDIFF_HD int64_t quads_of(int64_t size) { return (size + 3) / 4; }

FASTDIFF_HD int64_t divide(int64_t a, int64_t b) {
    if (((a | b) >> 32) != 0) return a / b;
    return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);  // a fifth of the instructions
}

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
    while (b < samples) {
        reread();
        work(b, q, size - 4 * q < 4 ? static_cast<int>(size - 4 * q) : 4);
        b += step_b;
        q += step_q;
        if (q >= quads) {
            q -= quads;
            ++b;
        }
    }
}

// Samples that all run `row`: the quads first, first + stride, ...
template <bool kHasE, bool kWide, class T, class S>
FASTDIFF_HD void shared_quads(const StageArgs& a, const Row<T>& row, bool joined, int64_t first,
                              int64_t stride) {
    const int64_t samples = joined ? 1 : a.batch, size = joined ? a.batch * a.size : a.size;
    each_quad(samples, size, first, stride, [&](int64_t b, int64_t q, int count) {
        const uint64_t seed = row.draws > 0 ? a.seeds[b] : 0;
        const Quad<kWide, T, S> quad{
            a, row, b * a.size + 4 * q, b * a.out_stride + 4 * q, q, seed, count};
        update<kHasE>(row, quad);
    });
}

// One warp's share of sample b: chunk c of its quads.
template <bool kHasE, bool kWide, class T, class S>
FASTDIFF_HD void chunk_quads(const StageArgs& a, const Row<T>& row, int64_t b, int64_t c, int lane,
                             int lanes) {
    const uint64_t seed = row.draws > 0 ? a.seeds[b] : 0;
    const int64_t quads = quads_of(a.size), end = (c + 1) * kChunk;
    for (int64_t q = c * kChunk + lane; q < end && q < quads; q += lanes) {
        reread();
        const int count = a.size - 4 * q < 4 ? static_cast<int>(a.size - 4 * q) : 4;
        const Quad<kWide, T, S> quad{
            a, row, b * a.size + 4 * q, b * a.out_stride + 4 * q, q, seed, count};
        update<kHasE>(row, quad);
    }
}

// Whether quads within samples are whole and aligned, the samples being `batch`, not one.
FASTDIFF_HD bool wide_samples(const Launch& l) {
    const StageArgs& a = l.args;
    return l.aligned && a.size % 4 == 0 && (a.out == nullptr || a.out_stride % 4 == 0);
}

// A thread of the launch in which all samples run one row. Without noise a gapless batch is one
// long sample.
template <class T, class S>
FASTDIFF_HD void shared_thread(const Launch& l, const Row<T>& row, int64_t thread,
                               int64_t threads) {
    const StageArgs& a = l.args;
    const bool gapless = a.out == nullptr || a.out_stride == a.size || a.batch == 1;
    const bool joined = row.draws == 0 && gapless;
    const bool has_e = row.flags & kWritesE;
    if (wide_samples(l) || (l.aligned && joined && a.batch * a.size % 4 == 0)) {
        if (has_e) {
            shared_quads<true, true, T, S>(a, row, joined, thread, threads);
        } else {
            shared_quads<false, true, T, S>(a, row, joined, thread, threads);
        }
    } else if (has_e) {
        shared_quads<true, false, T, S>(a, row, joined, thread, threads);
    } else {
        shared_quads<false, false, T, S>(a, row, joined, thread, threads);
    }
}

// A lane of the warp that has chunk c of sample b and its row.
template <class T, class S>
FASTDIFF_HD void sample_lane(const Launch& l, const Row<T>& row, int64_t b, int64_t c, int lane,
                             int lanes) {
    const bool has_e = row.flags & kWritesE;
    if (wide_samples(l)) {
        if (has_e) {
            chunk_quads<true, true, T, S>(l.args, row, b, c, lane, lanes);
        } else {
            chunk_quads<false, true, T, S>(l.args, row, b, c, lane, lanes);
        }
    } else if (has_e) {
        chunk_quads<true, false, T, S>(l.args, row, b, c, lane, lanes);
    } else {
        chunk_quads<false, false, T, S>(l.args, row, b, c, lane, lanes);
    }
}

// A thread of the launch that fills z [batch, size] with normals.
template <class Z>
FASTDIFF_HD void normal_thread(Z* z, const uint64_t* seeds, int64_t batch, int64_t size,
                               uint32_t stream, bool wide, int64_t thread, int64_t threads) {
    each_quad(batch, size, thread, threads, [&](int64_t b, int64_t q, int count) {
        float normals[4];
        normal_quad(seeds[b], stream, static_cast<uint64_t>(q), normals);
        Z* at = z + (b * size + 4 * q);
        Four<Z> four;
        for (int l = 0; l < 4; ++l) four.v[l] = static_cast<Z>(normals[l]);
        if (wide) {
            *reinterpret_cast<Four<Z>*>(at) = four;
        } else {
            for (int l = 0; l < 4; ++l) {
                if (l < count) at[l] = four.v[l];
            }
        }
    });
}

// -- what a launch must be -----------------------------------------------------------------------

constexpr int64_t kBytes[kDtypes] = {4, 8, 2, 2};

// kOk where each pointer is a multiple of its element's size; sets l.aligned.
inline Status check_alignment(Launch& l) {
    const StageArgs& a = l.args;
    uint64_t state = 0;  // the low bits of all addresses
    const auto low = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
    state |= low(a.x) | low(a.e) | low(a.history) | low(a.xi);
    for (int k = 0; k < a.extras; ++k) state |= low(a.extra[k]);
    const uint64_t words = low(a.seeds) | low(a.table) | low(a.stage_index) | low(l.row_index) |
                           low(l.fault);
    const uint64_t m = low(a.m), out = low(a.out);
    const auto multiple = [](uint64_t bits, int64_t bytes) {
        return bits % static_cast<uint64_t>(bytes) == 0;
    };
    const int64_t state_bytes = kBytes[a.state], m_bytes = kBytes[a.network];
    const int64_t out_bytes = kBytes[a.out_dtype];
    if (!multiple(state, state_bytes) || !multiple(m, m_bytes) || !multiple(out, out_bytes) ||
        !multiple(words, 8)) {
        return kMisaligned;
    }
    const bool even = a.batch * a.size % 4 == 0;  // slots, copies and branches start aligned
    const bool single = (a.history == nullptr || a.slots <= 1) && (a.m == nullptr || a.copies <= 1);
    const bool branches = a.out == nullptr || a.branches <= 1 || a.batch * a.out_stride % 4 == 0;
    l.aligned = (even || single) && branches && multiple(state, 16) &&
                multiple(m, m_bytes == 2 ? 8 : 16) && multiple(out, out_bytes == 2 ? 8 : 16);
    return kOk;
}

}  // namespace fastdiff::cuda
