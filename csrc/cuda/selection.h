// SPDX-License-Identifier: Apache-2.0
// Quantiles of a sample's magnitudes by one block: for thresholds, and for measures.
#pragma once

#include "cuda/thread.h"

namespace fastdiff::cuda {

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
    static constexpr int kOutputs = 0, kTerms = 0;
    Q a, b;

    FASTDIFF_HD V zero() const { return {a.zero(), b.zero()}; }
    template <class T>
    FASTDIFF_HD V fma(T c, const V& v, const V& sum) const {
        return {a.fma(c, v.a, sum.a), b.fma(c, v.b, sum.b)};
    }
    FASTDIFF_HD V fuse(const V& f, const V& v, const V& sum) const {
        return {a.fuse(f.a, v.a, sum.a), b.fuse(f.b, v.b, sum.b)};
    }
    template <class T>
    FASTDIFF_HD V mul(T c, const V& v) const {
        return {a.mul(c, v.a), b.mul(c, v.b)};
    }
    FASTDIFF_HD V entry(int k) const { return {a.entry(k), b.entry(k)}; }
    FASTDIFF_HD typename Q::T scalar(int c) const { return a.scalar(c); }
    FASTDIFF_HD V x() const { return {a.x(), b.x()}; }
    FASTDIFF_HD V e() const { return {a.e(), b.e()}; }
    FASTDIFF_HD V out(int g) const { return {a.out(g), b.out(g)}; }
};

// A quantile of one sample's magnitudes, from exact order statistics. Passes over them, formed again
// in each, settle one digit of the wanted magnitude at a time, the highest first: they count how often
// those that share the digits so far have each value of the next. In shared memory. The calls are
//     start; for each pass: clear, count, then sum and choose of every bin; quantile
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

    FASTDIFF_HD void start(double quantile, int64_t size, int thread) {
        if (thread < kWarp) above[thread] = Magnitude<T>::kMost;
        if (thread == 0) {
            const Position position(quantile, size);
            digits[0] = {0, static_cast<uint32_t>(position.rank), static_cast<uint32_t>(size)};
        }
    }

    FASTDIFF_HD void clear(int thread, int threads) {
        for (int k = thread; k < kBins * kWarp; k += threads) counts[k] = 0;
        for (int k = thread; k < kBins / kGroup; k += threads) group[k] = 0;
    }

    // A thread's counting in one pass.
    struct Tally {
        Selection& to;
        Bits prefix, mask, least;
        int before, after, lane;

        FASTDIFF_HD Tally(Selection& selection, int pass, int thread)
            : to(selection),
              prefix(selection.digits[pass].prefix),
              least(Magnitude<T>::kMost),
              before(rest(pass)),
              after(rest(pass + 1)),
              lane(thread % kWarp) {
            mask = (Bits{1} << (before - after)) - 1;
        }
        FASTDIFF_HD void add_all(const T h[4], int elements) {
            for (int k = 0; k < 4; ++k) {
                if (k >= elements) continue;
                const Bits key = Magnitude<T>::of(h[k]), shared = key >> before;
                if (shared == prefix) {
                    add(to.counts[static_cast<int>((key >> after) & mask) * kWarp + lane], 1);
                } else if (shared > prefix && key < least) {
                    least = key;
                }
            }
        }
        FASTDIFF_HD void end(int pass) {
            if (pass == kPasses - 1 && least < Magnitude<T>::kMost) lower(to.above[lane], least);
        }
    };

    // Of a stage's h before its limit.
    template <bool kWide, class S, class R>
    FASTDIFF_HD void count(const Launch& l, const R& row, int64_t b, int pass, int thread,
                           int threads) {
        const int64_t size = l.args.size;
        using Q = Quad<kWide, false, R, S>;
        Tally tally(*this, pass, thread);
        const int quads = static_cast<int>(quads_of(size));
        const auto quad = [&](int64_t q) {
            const int elements = size - 4 * q < 4 ? static_cast<int>(size - 4 * q) : 4;
            return quad_at<kWide, false, R, S>(l, row, b, q, 0, elements);
        };
        for (int q = thread; q < quads; q += 2 * threads) {
            reread();
            const bool both = q + threads < quads;
            // `again`: what follows from q for the first quad takes no registers in the second
            const Pair<Q> pair{quad(q), quad(both ? again(q) + threads : q)};
            const typename Pair<Q>::V h = form(row, pair);
            tally.add_all(h.a.v, pair.a.count);
            if (both) tally.add_all(h.b.v, pair.b.count);
        }
        tally.end(pass);
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

    FASTDIFF_HD double quantile(double quantile, int64_t size) const {
        const Digits& found = digits[kPasses];
        Bits next = found.prefix;
        if (found.rank + 1 >= found.sharing) {
            next = above[0];
            for (int k = 1; k < kWarp; ++k) next = above[k] < next ? above[k] : next;
        }
        return between(Position(quantile, size).weight, Magnitude<T>::value(found.prefix),
                       Magnitude<T>::value(next));
    }
};

// `count`, with accesses of four elements where they are legal.
template <class S, class R>
FASTDIFF_HD void count_magnitudes(const Launch& l, const R& row, int64_t b, int pass, int thread,
                                  int threads, Selection<typename R::Number>& selection) {
    if (wide_samples(l)) {
        selection.template count<true, S>(l, row, b, pass, thread, threads);
    } else {
        selection.template count<false, S>(l, row, b, pass, thread, threads);
    }
}

}  // namespace fastdiff::cuda
