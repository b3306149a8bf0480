// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of one instruction set: stages, the operands of measures, and noise.
#pragma once

#include "cpu/normals.h"
#include "cpu/plain.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

// The noise of elements [lo, hi), at most kBlock of them, where the row draws it.
template <class T, class S>
FASTDIFF_INLINE void draw(const Row<T>& row, Span<T, S>& at, int64_t lo, int64_t hi,
                          float z[kMaxDraws][kBlock]) {
    for (int d = 0; d < row.draws; ++d) {
        normals({at.seeds, at.size, at.first_quad, row.stream[d]}, lo, hi, z[d]);
        at.draw[d] = z[d] - lo;
    }
}

template <bool kHasE, class R, class T, class S>
FASTDIFF_INLINE void update_range(const R& row, const Span<T, S>& at, int64_t lo, int64_t hi) {
    constexpr int kUnroll = kLanes > 4 && !R::kGrown ? 4 : 1;
    constexpr int64_t kWide = kUnroll * kWidth<T>;
    const int64_t packed = row.flags & kThreshold ? lo : hi;
    int64_t i = lo;
    if constexpr (kUnroll > 1) {
        for (; i + kWide <= packed; i += kWide) update<kHasE>(row, Pack<T, S, kUnroll>{at, i});
    }
    for (; i + kWidth<T> <= hi; i += kWidth<T>) update<kHasE>(row, Pack<T, S, 1>{at, i});
    for (; i < hi; ++i) update<kHasE>(row, Element<T, S>{at, i});
}

template <class R, class S>
static void span(const void* row_, void* span_, int64_t lo, int64_t hi) {
    using T = typename R::Number;
    const R& row = *static_cast<const R*>(row_);
    Span<T, S>& at = *static_cast<Span<T, S>*>(span_);
    alignas(64) float z[kMaxDraws][kBlock];
    while (lo < hi) {
        const int64_t end = row.draws == 0 || hi - lo <= kBlock ? hi : lo + kBlock;
        draw(row, at, lo, end, z);
        if (row.has_e()) {
            update_range<true>(row, at, lo, end);
        } else if constexpr (R::kGrown) {
            update_range<false>(row, at, lo, end);
        } else {
            update_range<false>(row, at, plain(row, at, lo, end), end);
        }
        lo = end;
    }
}

template <class R, class S>
static void form_range(const void* row_, const void* span_, int64_t lo, int64_t hi, void* h_) {
    using T = typename R::Number;
    const R& row = *static_cast<const R*>(row_);
    const Span<T, S>& at = *static_cast<const Span<T, S>*>(span_);
    T* h = static_cast<T*>(h_) - lo;
    constexpr int kUnroll = kLanes > 4 ? 4 : 1;
    constexpr int64_t kWide = kUnroll * kWidth<T>;
    int64_t i = lo;
    for (; i + kWide <= hi; i += kWide) {
        const Pack<T, S, kUnroll> pack{at, i};
        pack.write(h, form(row, pack));
    }
    for (; i < hi; ++i) h[i] = form(row, Element<T, S>{at, i});
}

template <class T, class S>
static void operand_range(const void* row_, void* span_, Operand operand, int64_t lo, int64_t hi,
                          void* to_) {
    const GrownRow<T>& row = *static_cast<const GrownRow<T>*>(row_);
    Span<T, S>& at = *static_cast<Span<T, S>*>(span_);
    alignas(64) float z[kMaxDraws][kBlock];
    if (operand.of == kOfXi) draw(row, at, lo, hi, z);
    T* to = static_cast<T*>(to_) - lo;
    int64_t i = lo;
    for (; i + kWidth<T> <= hi; i += kWidth<T>) {
        const Pack<T, S, 1> pack{at, i};
        pack.write(to, operand_of(row, pack, operand));
    }
    for (; i < hi; ++i) to[i] = operand_of(row, Element<T, S>{at, i}, operand);
}

template <int kKind, class T>
FASTDIFF_INLINE void add_block(const T* a, const T* b, double mean, int64_t count, double* lanes) {
    for (int64_t l = 0; l < count; ++l) lanes[l] = added(kKind, a[l], b[l], mean, lanes[l]);
}

template <class T>
static void accumulate(int32_t kind, const void* a_, const void* b_, double mean, int64_t count,
                       double* lanes) {
    const T* a = static_cast<const T*>(a_);
    const T* b = static_cast<const T*>(b_);
    if (kind == kSum) {
        add_block<kSum>(a, b, mean, count, lanes);
    } else if (kind == kStd) {
        add_block<kStd>(a, b, mean, count, lanes);
    } else {
        add_block<kDot>(a, b, mean, count, lanes);
    }
}

#define FASTDIFF_STRING(s) #s
#define FASTDIFF_NAME(isa) FASTDIFF_STRING(isa)
#define FASTDIFF_OUTPUTS(kernel, T) \
    { kernel<T, float>, kernel<T, double>, kernel<T, Bfloat16>, kernel<T, Float16> }

constexpr Kernels kKernels = {
    FASTDIFF_NAME(FASTDIFF_ISA),
    {{FASTDIFF_OUTPUTS(span, Row<float>), FASTDIFF_OUTPUTS(span, Row<double>)},
     {FASTDIFF_OUTPUTS(span, GrownRow<float>), FASTDIFF_OUTPUTS(span, GrownRow<double>)}},
    {{FASTDIFF_OUTPUTS(form_range, Row<float>), FASTDIFF_OUTPUTS(form_range, Row<double>)},
     {FASTDIFF_OUTPUTS(form_range, GrownRow<float>),
      FASTDIFF_OUTPUTS(form_range, GrownRow<double>)}},
    {FASTDIFF_OUTPUTS(operand_range, float), FASTDIFF_OUTPUTS(operand_range, double)},
    {accumulate<float>, accumulate<double>},
    normals,
    words,
};

}  // namespace fastdiff::cpu::FASTDIFF_ISA
