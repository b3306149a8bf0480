// SPDX-License-Identifier: Apache-2.0
// The accessor of `stage.h` over packs of vectors.
#pragma once

#include "cpu/vectors.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

// U vectors of T that one `update` works on; U > 1 spreads the row's branches over more elements.
template <class T, class S, int U>
struct Pack {
    struct V {
        Vector<T> v[U];
    };
    static constexpr bool kNoiseFirst = false, kKeepsX = false;
    static constexpr int kOutputs = 0, kTerms = 0;
    static constexpr bool kThresholds = U == 1;  // a test that other rows need not make
    const Span<T, S>& at;
    int64_t i;

    template <class From>
    FASTDIFF_INLINE V read(const From* p) const {
        V r;
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) r.v[u] = load_as<T>(p + i + u * kWidth<T>);
        return r;
    }
    template <class M>
    FASTDIFF_INLINE void write(M* p, const V& v) const {
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) store_as(p + i + u * kWidth<T>, v.v[u]);
    }
    FASTDIFF_INLINE V zero() const {
        V r;
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) r.v[u] = Vector<T>{};
        return r;
    }
    FASTDIFF_INLINE V fma(T c, const V& v, const V& sum) const {
        const Vector<T> k = splat(c);
        V r;
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) r.v[u] = vector_fma(k, v.v[u], sum.v[u]);
        return r;
    }
    FASTDIFF_INLINE V fuse(const V& a, const V& b, const V& sum) const {
        V r;
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) r.v[u] = vector_fma(a.v[u], b.v[u], sum.v[u]);
        return r;
    }
    FASTDIFF_INLINE V mul(T c, const V& v) const {
        V r;
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) r.v[u] = v.v[u] * splat(c);
        return r;
    }
    FASTDIFF_INLINE V clip(const V& v, T lo, T hi) const {
        V r;
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
            const Vector<T> raised = v.v[u] < splat(lo) ? splat(lo) : v.v[u];
            r.v[u] = v.v[u] > splat(hi) ? splat(hi) : raised;
        }
        return r;
    }
    FASTDIFF_INLINE V divide(const V& v, T by) const {
        V r;
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) r.v[u] = v.v[u] / splat(by);
        return r;
    }
    FASTDIFF_INLINE T scale() const { return at.scale; }
    FASTDIFF_INLINE V x() const { return read(at.x); }
    FASTDIFF_INLINE V e() const { return read(at.e); }
    FASTDIFF_INLINE V out(int g) const { return read(at.out[g]); }
    FASTDIFF_INLINE V term(int j) const { return read(at.term[j]); }
    FASTDIFF_INLINE V extra(int k) const { return read(at.extra[k]); }
    FASTDIFF_INLINE V slot(int s) const { return read(at.history + s * at.history_stride); }
    FASTDIFF_INLINE V entry(int k) const { return read(at.bank + k * at.bank_stride); }
    FASTDIFF_INLINE V output(int g) const { return read(at.outputs + g * at.output_stride); }
    FASTDIFF_INLINE T scalar(int c) const { return at.scalars == nullptr ? T(1) : at.scalars[c]; }
    FASTDIFF_INLINE V xi() const { return read(at.xi); }
    FASTDIFF_INLINE V draw(int d) const { return read(at.draw[d]); }
    FASTDIFF_INLINE void put_x(const V& v) const { write(at.x, v); }
    FASTDIFF_INLINE void put_e(const V& v) const { write(at.e, v); }
    FASTDIFF_INLINE void put_push(const V& v) const { write(at.push, v); }
    FASTDIFF_INLINE void put_push_x(const V& v) const { write(at.push_x, v); }
    FASTDIFF_INLINE void put_m(const V& v) const {
        for (int64_t k = 0; k < at.copies; ++k) {
            const int64_t offset = k * at.copy_stride;
            switch (at.network) {
                case kFloat32: write(static_cast<float*>(at.m) + offset, v); break;
                case kFloat64: write(static_cast<double*>(at.m) + offset, v); break;
                case kBfloat16: write(static_cast<Bfloat16*>(at.m) + offset, v); break;
                default: write(static_cast<Float16*>(at.m) + offset, v); break;
            }
        }
    }
};

}  // namespace fastdiff::cpu::FASTDIFF_ISA
