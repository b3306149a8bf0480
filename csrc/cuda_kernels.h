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
constexpr int kMaxWidth = kHeadColumns + kTermColumns * kMaxTerms + kBranchColumns * kMaxBranches +
                          kExtraColumns * kMaxExtras;

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

// Words of shared memory that several threads change.
FASTDIFF_HD void add(uint32_t& to, uint32_t v) {
#if defined(__CUDA_ARCH__)
    atomicAdd(&to, v);
#else
    to += v;
#endif
}
template <class Bits>
FASTDIFF_HD void lower(Bits& to, Bits v) {
#if defined(__CUDA_ARCH__)
    using Word = std::conditional_t<sizeof(Bits) == 4, unsigned, unsigned long long>;
    atomicMin(reinterpret_cast<Word*>(&to), static_cast<Word>(v));
#else
    to = v < to ? v : to;
#endif
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
                                                   : cuda::resolve(l, columns, row);
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
    static constexpr bool kNoiseFirst = true, kThresholds = true;
    const StageArgs& a;
    const Row<T>& row;
    int64_t i;  // its first element in a register
    int64_t o;  // and in the first branch of the output
    int64_t q;  // its counter within the sample
    uint64_t seed;
    const T* s;  // the sample's scale, where the row thresholds
    int count;   // elements, 1 to 4

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
    FASTDIFF_HD V divide(const V& v, T by) const {
        V r;
        for (int l = 0; l < 4; ++l) r.v[l] = v.v[l] / by;
        return r;
    }
    FASTDIFF_HD T scale() const { return *s; }
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
    FASTDIFF_HD void put_push_x(const V& v) const {
        write(static_cast<T*>(a.history) + (row.push_x * registers() + i), v);
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
FASTDIFF_HD void shared_quads(const Launch& launch, const Row<T>& row, bool joined, int64_t first,
                              int64_t stride) {
    const StageArgs& a = launch.args;
    const int64_t samples = joined ? 1 : a.batch, size = joined ? a.batch * a.size : a.size;
    each_quad(samples, size, first, stride, [&](int64_t b, int64_t q, int count) {
        const uint64_t seed = row.draws > 0 ? a.seeds[b] : 0;
        const Quad<kWide, T, S> quad{
            a,    row, b * a.size + 4 * q, b * a.out_stride + 4 * q, q,
            seed, static_cast<const T*>(launch.scale) + b, count};
        update<kHasE>(row, quad);
    });
}

// One warp's share of sample b: chunk c of its quads.
template <bool kHasE, bool kWide, class T, class S>
FASTDIFF_HD void chunk_quads(const Launch& launch, const Row<T>& row, int64_t b, int64_t c,
                             int lane, int lanes) {
    const StageArgs& a = launch.args;
    const uint64_t seed = row.draws > 0 ? a.seeds[b] : 0;
    const int64_t quads = quads_of(a.size), end = (c + 1) * kChunk;
    for (int64_t q = c * kChunk + lane; q < end && q < quads; q += lanes) {
        reread();
        const int count = a.size - 4 * q < 4 ? static_cast<int>(a.size - 4 * q) : 4;
        const Quad<kWide, T, S> quad{
            a,    row, b * a.size + 4 * q, b * a.out_stride + 4 * q, q,
            seed, static_cast<const T*>(launch.scale) + b, count};
        update<kHasE>(row, quad);
    }
}

// Whether quads within samples are whole and aligned, the samples being `batch`, not one.
FASTDIFF_HD bool wide_samples(const Launch& l) {
    const StageArgs& a = l.args;
    return l.aligned && a.size % 4 == 0 && (a.out == nullptr || a.out_stride % 4 == 0);
}

// A thread of the launch in which all samples run one row. A gapless batch is one long sample where
// nothing, neither noise nor a scale, tells samples apart.
template <class T, class S>
FASTDIFF_HD void shared_thread(const Launch& l, const Row<T>& row, int64_t thread,
                               int64_t threads) {
    const StageArgs& a = l.args;
    const bool gapless = a.out == nullptr || a.out_stride == a.size || a.batch == 1;
    const bool joined = row.draws == 0 && !(row.flags & kThreshold) && gapless;
    const bool has_e = row.flags & kWritesE;
    if (wide_samples(l) || (l.aligned && joined && a.batch * a.size % 4 == 0)) {
        if (has_e) {
            shared_quads<true, true, T, S>(l, row, joined, thread, threads);
        } else {
            shared_quads<false, true, T, S>(l, row, joined, thread, threads);
        }
    } else if (has_e) {
        shared_quads<true, false, T, S>(l, row, joined, thread, threads);
    } else {
        shared_quads<false, false, T, S>(l, row, joined, thread, threads);
    }
}

// A lane of the warp that has chunk c of sample b and its row.
template <class T, class S>
FASTDIFF_HD void sample_lane(const Launch& l, const Row<T>& row, int64_t b, int64_t c, int lane,
                             int lanes) {
    const bool has_e = row.flags & kWritesE;
    if (wide_samples(l)) {
        if (has_e) {
            chunk_quads<true, true, T, S>(l, row, b, c, lane, lanes);
        } else {
            chunk_quads<false, true, T, S>(l, row, b, c, lane, lanes);
        }
    } else if (has_e) {
        chunk_quads<true, false, T, S>(l, row, b, c, lane, lanes);
    } else {
        chunk_quads<false, false, T, S>(l, row, b, c, lane, lanes);
    }
}

// -- thresholds ----------------------------------------------------------------------------------

// Threads of the block that has a sample: as many as a processor has registers for, since there are
// mostly fewer samples than processors.
template <class T>
constexpr int kSelectors = sizeof(T) == 4 ? 1024 : 512;

// Two quads of one sample, formed together so that twice as many loads are under way.
template <class Q>
struct Pair {
    struct V {
        typename Q::V a, b;
    };
    Q a, b;

    FASTDIFF_HD V zero() const { return {a.zero(), b.zero()}; }
    template <class T>
    FASTDIFF_HD V fma(T c, const V& v, const V& sum) const {
        return {a.fma(c, v.a, sum.a), b.fma(c, v.b, sum.b)};
    }
    FASTDIFF_HD V x() const { return {a.x(), b.x()}; }
    FASTDIFF_HD V e() const { return {a.e(), b.e()}; }
    FASTDIFF_HD V out(int g) const { return {a.out(g), b.out(g)}; }
};

// The scale of one sample, from exact order statistics of its |h|. Passes over h, formed again in
// each, settle one digit of the wanted magnitude at a time, the highest first: they count how often
// those that share the digits so far have each value of the next. In shared memory. The calls are
//     start; for each pass: clear, count, then sum and choose of every bin; scale
// with a barrier after each but `start`.
template <class T>
struct Selection {
    using Bits = typename Magnitude<T>::Bits;
    static constexpr int kRadix = 8, kBins = 1 << kRadix, kGroup = 16;
    static constexpr int kPasses = (Magnitude<T>::kBits + kRadix - 1) / kRadix;

    // What is known of the magnitude that is looked for.
    struct Digits {
        Bits prefix;
        uint32_t rank;     // its own, among those with that prefix
        uint32_t sharing;  // how many have it
    };

    uint32_t counts[kBins * kWarp];  // a copy for each lane: no two of a warp share a bank
    uint32_t total[kBins];
    uint32_t group[kBins / kGroup];  // totals of kGroup bins each
    Bits above[kWarp];               // the least magnitude above that one; a copy for each lane
    Digits digits[kPasses + 1];      // by passes done

    // The bits below `passes` digits.
    static FASTDIFF_HD int rest(int passes) {
        const int bits = Magnitude<T>::kBits - passes * kRadix;
        return bits > 0 ? bits : 0;
    }

    FASTDIFF_HD void start(const Row<T>& row, int64_t size, int thread) {
        if (thread < kWarp) above[thread] = Magnitude<T>::kMost;
        if (thread == 0) {
            const Position position(row.quantile, size);
            digits[0] = {0, static_cast<uint32_t>(position.rank), static_cast<uint32_t>(size)};
        }
    }

    FASTDIFF_HD void clear(int thread, int threads) {
        for (int k = thread; k < kBins * kWarp; k += threads) counts[k] = 0;
        for (int k = thread; k < kBins / kGroup; k += threads) group[k] = 0;
    }

    template <bool kWide, class S>
    FASTDIFF_HD void count(const StageArgs& a, const Row<T>& row, int64_t b, int pass, int thread,
                           int threads) {
        const Bits prefix = digits[pass].prefix;
        const int before = rest(pass), after = rest(pass + 1), lane = thread % kWarp;
        const Bits mask = (Bits{1} << (before - after)) - 1;
        Bits least = Magnitude<T>::kMost;
        using Q = Quad<kWide, T, S>;
        const auto tally = [&](const typename Q::V& h, int elements) {
            for (int k = 0; k < 4; ++k) {
                if (k >= elements) continue;
                const Bits key = Magnitude<T>::of(h.v[k]), shared = key >> before;
                if (shared == prefix) {
                    add(counts[static_cast<int>((key >> after) & mask) * kWarp + lane], 1);
                } else if (shared > prefix && key < least) {
                    least = key;
                }
            }
        };
        const int quads = static_cast<int>(quads_of(a.size));
        const auto quad = [&](int64_t q) {
            const int elements = a.size - 4 * q < 4 ? static_cast<int>(a.size - 4 * q) : 4;
            return Q{a,       row, b * a.size + 4 * q, b * a.out_stride + 4 * q, q, 0,
                     nullptr, elements};
        };
        for (int q = thread; q < quads; q += 2 * threads) {
            reread();
            const bool both = q + threads < quads;
            const Pair<Q> pair{quad(q), quad(both ? q + threads : q)};
            const typename Pair<Q>::V h = form(row, pair);
            tally(h.a, pair.a.count);
            if (both) tally(h.b, pair.b.count);
        }
        if (pass == kPasses - 1 && least < Magnitude<T>::kMost) lower(above[lane], least);
    }

    FASTDIFF_HD void sum(int bin) {
        uint32_t all = 0;
        FASTDIFF_ROLLED  // 32 addresses would be kept through all passes
        for (int k = 0; k < kWarp; k += 8) {
            for (int j = k; j < k + 8; ++j) all += counts[bin * kWarp + (bin + j) % kWarp];
        }
        total[bin] = all;
        add(group[bin / kGroup], all);
    }

    // In one bin is the wanted magnitude; in the last pass each of those above it is a magnitude.
    FASTDIFF_HD void choose(int pass, int bin) {
        const Digits& from = digits[pass];
        uint32_t below = 0;
        for (int k = 0; k < kBins / kGroup; ++k) below += k < bin / kGroup ? group[k] : 0;
        for (int k = 0; k < kGroup; ++k) {
            below += k < bin % kGroup ? total[bin - bin % kGroup + k] : 0;
        }
        const Bits prefix = from.prefix << (rest(pass) - rest(pass + 1)) | static_cast<Bits>(bin);
        if (below > from.rank) {
            if (pass == kPasses - 1 && total[bin] > 0) lower(above[bin % kWarp], prefix);
        } else if (from.rank - below < total[bin]) {
            digits[pass + 1] = {prefix, from.rank - below, total[bin]};
        }
    }

    FASTDIFF_HD T scale(const Row<T>& row, int64_t size) const {
        const Digits& found = digits[kPasses];
        Bits next = found.prefix;
        if (found.rank + 1 >= found.sharing) {
            next = above[0];
            for (int k = 1; k < kWarp; ++k) next = above[k] < next ? above[k] : next;
        }
        return scale_of(row, Position(row.quantile, size).weight,
                        Magnitude<T>::value(found.prefix), Magnitude<T>::value(next));
    }
};

// `count`, with accesses of four elements where they are legal.
template <class T, class S>
FASTDIFF_HD void count_magnitudes(const Launch& l, const Row<T>& row, int64_t b, int pass,
                                  int thread, int threads, Selection<T>& selection) {
    if (wide_samples(l)) {
        selection.template count<true, S>(l.args, row, b, pass, thread, threads);
    } else {
        selection.template count<false, S>(l.args, row, b, pass, thread, threads);
    }
}

// -- normals -------------------------------------------------------------------------------------

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
    if (!multiple(state | low(l.scale), state_bytes) || !multiple(m, m_bytes) ||
        !multiple(out, out_bytes) || !multiple(words, 8)) {
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
