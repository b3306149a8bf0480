// SPDX-License-Identifier: Apache-2.0
// The CUDA module with the host in the device's place: csrc/cuda/*.h run thread after thread on host
// memory, in the grids and by the launchers of csrc/cuda/launch.cpp over the runtime in
// tests/cuda_runtime/. What it cannot show is what only a GPU has: barriers, memory spaces, the
// compiled machine code.
#include "cuda/launch.h"
#include "cuda/meter.h"

#include <array>
#include <memory>
#include <stdexcept>
#include <string>

namespace fastdiff::cuda {
namespace {

// Each thread of a block does `work` before any of them goes on: what a barrier ends.
template <class Work>
void phase(int threads, const Work& work) {
    for (int k = 0; k < threads; ++k) work((k * 37 + 11) % threads);
}

// To the bit, since a coefficient may be NaN; but what lies between the fields counts for nothing.
template <class E>
bool equal(const E& a, const E& b) {
    return memcmp(&a, &b, sizeof a) == 0;
}
template <class T>
bool equal(const Term<T>& a, const Term<T>& b) {
    return equal(a.b, b.b) && equal(a.g, b.g) && a.source == b.source;
}
template <class T>
bool equal(const Product<T>& a, const Product<T>& b) {
    return equal(a.weight, b.weight) && a.of == b.of && a.at == b.at && a.entry == b.entry;
}
template <class List>
bool same(const List& a, const List& b, int count) {
    for (int i = 0; i < count; ++i) {
        if (!equal(a[i], b[i])) return false;
    }
    return true;
}

// Whether two rows say the same, as far as a stage looks at them.
template <class T>
bool same(const Row<T>& a, const Row<T>& b) {
    const auto numbers = [](const Row<T>& r) {
        return std::array{r.p + T(0), r.lo,  r.hi,  r.a_x, r.a_e, r.b_0, r.c,
                          r.d_x, r.d_e, r.g_0, r.c_e, r.c_in};
    };
    const auto others = [](const Row<T>& r) {
        return std::array<int32_t, 13>{r.flags,    r.push,     r.push_x,  r.x_reads,  r.e_reads,
                                       r.loads_x,  r.loads_e,  r.loads_xi, r.writes_m, r.branches,
                                       r.terms,    r.extras,   r.draws};
    };
    const auto limits = [](const Row<T>& r) { return std::array{r.quantile, r.floor, r.ceiling}; };
    return same(numbers(a), numbers(b), 12) && others(a) == others(b) &&
           same(limits(a), limits(b), 3) && same(a.stream, b.stream, a.draws) &&
           same(a.xi, b.xi, a.draws) && same(a.k, b.k, a.branches) &&
           same(a.branch, b.branch, a.branches) && same(a.term, b.term, a.terms) &&
           same(a.extra, b.extra, a.extras);
}
template <class T>
bool same(const GrownRow<T>& a, const GrownRow<T>& b) {
    const auto numbers = [](const GrownRow<T>& r) {
        return std::array{r.u, r.v, r.b_raw, r.g_raw, r.d_new};
    };
    const auto others = [](const GrownRow<T>& r) {
        return std::array<int32_t, 8>{r.blends,    r.scalar_b, r.scalar_g, r.scalar_c,
                                      r.scalar_ce, r.into_y,   r.into_x,   r.products};
    };
    return same(static_cast<const Row<T>&>(a), static_cast<const Row<T>&>(b)) &&
           same(numbers(a), numbers(b), 5) && others(a) == others(b) &&
           same(a.scalar_k, b.scalar_k, a.branches) && same(a.product, b.product, a.products);
}

// The row as the host's own `resolve` has it.
template <class R>
Status serial(const Launch& l, const double* columns, const Resolved<R>&, R& row) {
    if (!R::kGrown && grows(l.args, columns)) return kNoGrowth;
    return cuda::resolve(l, columns, row);
}
template <class T>
Status serial(const Launch& l, const double* columns, const Measured<T>&, GrownRow<T>& row) {
    return resolve_measures(l.args, columns, row);
}

// Each row that a warp resolves, and each that it refuses, is compared with the host's.
template <class At>
void resolve_by_warp(const Launch& l, int64_t index, At& at) {
    memset(static_cast<void*>(&at.row), 0xA5, sizeof at.row);
    at.resolve(Warp{0}, l, index);
    at.report(l, index);
    decltype(at.row) row;
    memset(static_cast<void*>(&row), 0x5A, sizeof row);
    const bool inside = index >= 0 && index < l.args.rows;
    const Status status =
        inside ? serial(l, l.args.table + index * l.args.width(), at, row) : kBadRow;
    if (status != at.status || (status == kOk && !same(at.row, row))) {
        throw std::logic_error("row " + std::to_string(index) + ": a warp says " +
                               std::to_string(at.status) + ", the host " + std::to_string(status));
    }
}

template <class R, class S>
void stage_shared(void** arguments, unsigned blocks) {
    const Launch& l = *static_cast<Launch*>(arguments[0]);
    const int64_t threads = static_cast<int64_t>(blocks) * kThreads;
    Placed<R> at;
    for (int64_t thread = 0; thread < threads; ++thread) {
        if (thread % kThreads == 0) {
            resolve_by_warp(l, row_of(l, 0), at);
            at.template find_places<S>(Warp{0}, l);
        }
        if (at.status == kOk) shared_thread<S>(l, at, thread, threads);
    }
}

template <class R, class S>
void stage_samples(void** arguments, unsigned) {
    const Launch& l = *static_cast<Launch*>(arguments[0]);
    const int64_t chunks = (quads_of(l.args.size) + kChunk - 1) / kChunk;
    Resolved<R> at;
    for (int64_t unit = l.args.batch * chunks; unit-- > 0;) {
        const int64_t b = divide(unit, chunks);
        resolve_by_warp(l, row_of(l, b), at);
        for (int lane = 0; lane < kWarp && at.status == kOk; ++lane) {
            sample_lane<S>(l, at.row, b, unit - b * chunks, lane, kWarp);
        }
    }
}

template <class R, class S>
void thresholds(void** arguments, unsigned) {
    const Launch& l = *static_cast<Launch*>(arguments[0]);
    using T = typename R::Number;
    constexpr int kBlock = kSelectors<T>, kBins = Selection<T>::kBins;
    Resolved<R> at;
    const auto memory = std::make_unique<Selection<T>>();
    Selection<T>& selection = *memory;
    for (int64_t b = 0; b < l.args.batch; ++b) {
        resolve_by_warp(l, row_of(l, b), at);
        if (at.status != kOk || !(at.row.flags & kThreshold)) continue;
        memset(static_cast<void*>(&selection), 0xA5, sizeof selection);
        const double wanted = at.row.quantile;
        phase(kBlock, [&](int thread) { selection.start(wanted, l.args.size, thread); });
        for (int pass = 0; pass < Selection<T>::kPasses; ++pass) {
            phase(kBlock, [&](int thread) { selection.clear(thread, kBlock); });
            phase(kBlock, [&](int thread) {
                count_magnitudes<S>(l, at.row, b, pass, thread, kBlock, selection);
            });
            phase(kBins, [&](int bin) { selection.sum(bin); });
            phase(kBins, [&](int bin) { selection.choose(pass, bin); });
        }
        static_cast<T*>(l.scale)[b] = scale_of(at.row, selection.quantile(wanted, l.args.size));
    }
}

template <class T, class S>
void measures(void** arguments, unsigned) {
    const Launch& l = *static_cast<Launch*>(arguments[0]);
    Measured<T> at;
    const auto memory = std::make_unique<Meter<T>>();
    Meter<T>& meter = *memory;
    for (int64_t b = 0; b < l.args.batch; ++b) {
        phase(kThreads, [&](int thread) { at.fetch(l, row_of(l, b), thread, kThreads); });
        resolve_by_warp(l, row_of(l, b), at);
        if (at.status != kOk) continue;
        memset(static_cast<void*>(&meter), 0xA5, sizeof meter);
        measure_sample<T, S>(l, at.columns, at.row, b, meter,
                             [](const auto& work) { phase(kThreads, work); });
    }
}

template <class Z>
void normals(void** arguments, unsigned blocks) {
    const Normals& n = *static_cast<Normals*>(arguments[0]);
    const bool wide = *static_cast<bool*>(arguments[1]);
    const int64_t threads = static_cast<int64_t>(blocks) * kThreads;
    for (int64_t thread = 0; thread < threads; ++thread) {
        normal_thread<Z>(n, wide, thread, threads);
    }
}

}  // namespace
}  // namespace fastdiff::cuda

#include "cuda/kernels.h"  // the tables of these kernels
