// SPDX-License-Identifier: Apache-2.0
// Four elements at a time: the accessor of `stage.h` on a GPU.
//
// A quad is four consecutive elements of a sample, which are the four normals of one Philox counter
// and, in float32, one access of 16 bytes. All its loads precede its stores, and no other thread
// touches its elements.
#pragma once

#include "cuda/resolved.h"

namespace fastdiff::cuda {

// Four elements in one access of up to 16 bytes, or two.
template <class E>
struct alignas(sizeof(E) == 2 ? 8 : 16) Four {
    E v[4];
};

// In one access of 16 bytes (8 for two-byte types), or in two. Said in PTX: from C++ ptxas makes
// four of it in some places, and a cast to `float4` changes nothing. "memory": what is read before
// it in the source is read before it.
template <class E>
FASTDIFF_HD void store(E* p, const Four<E>& from) {
#if defined(__CUDA_ARCH__)
    const size_t at = __cvta_generic_to_global(p);
    if constexpr (sizeof(E) == 2) {
        asm volatile("st.global.v4.u16 [%0], {%1, %2, %3, %4};" ::"l"(at), "h"(from.v[0].bits),
                     "h"(from.v[1].bits), "h"(from.v[2].bits), "h"(from.v[3].bits)
                     : "memory");
    } else if constexpr (sizeof(E) == 4) {
        asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(from.v[0]),
                     "f"(from.v[1]), "f"(from.v[2]), "f"(from.v[3])
                     : "memory");
    } else {
        asm volatile("st.global.v2.f64 [%0], {%1, %2};\n\tst.global.v2.f64 [%0 + 16], {%3, %4};" ::
                         "l"(at), "d"(from.v[0]), "d"(from.v[1]), "d"(from.v[2]), "d"(from.v[3])
                     : "memory");
    }
#else
    *reinterpret_cast<Four<E>*>(p) = from;
#endif
}

// v: what follows from it is made where it is wanted, not before a loop and kept in registers.
FASTDIFF_HD int64_t again(int64_t v) {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+l"(v));
#endif
    return v;
}

// Where the outputs and terms begin that a row reads before any arithmetic, and the slots that it
// pushes to. A warp finds them once, since products of 64 bits for each quad would be a third of all
// instructions.
struct Places {
    enum : int { kOutputs = 2, kTerms = 3, kPush = kOutputs + kTerms, kPushX, kCount };
    uint64_t at[kCount];

    // S: what the outputs are.
    template <class S, class R>
    FASTDIFF_HD void find(const Warp& warp, const StageArgs& a, const R& row) {
        using T = typename R::Number;
        warp.run([&](int lane) {
            if (lane >= kCount) return;
            const bool out = lane < kOutputs;
            int32_t number = lane == kPush ? row.push : row.push_x;
            if (out) number = lane < row.branches ? row.branch[lane] : 0;
            if (!out && lane < kPush) {
                number = lane - kOutputs < row.terms ? row.term[lane - kOutputs].source : 0;
            }
            const void* base = out ? a.out : a.history;
            const int64_t stride = out ? a.out_stride * sizeof(S) : a.size * sizeof(T);
            at[lane] = reinterpret_cast<uintptr_t>(base) +
                       static_cast<uint64_t>(number) * static_cast<uint64_t>(a.batch * stride);
        });
    }
    template <class E>
    FASTDIFF_HD E* of(int place) const {
        E* p = reinterpret_cast<E*>(static_cast<uintptr_t>(at[place]));
#if defined(__CUDA_ARCH__)
        __builtin_assume(__isGlobal(p));
#endif
        return p;
    }
};

// A row that all samples share, and its places. One warp resolves it, as a Resolved.
template <class R>
struct Placed : Resolved<R> {
    Places places;

    template <class S>
    FASTDIFF_HD void find_places(const Warp& warp, const Launch& l) {
#if defined(__CUDA_ARCH__)
        __syncwarp();  // lanes wrote the row
#endif
        if (this->status == kOk) places.template find<S>(warp, l.args, this->row);
    }
};

// Where a quad stands. kWide: it is whole and every address allows `Four`. kAhead: what most rows
// read is loaded before any arithmetic, which takes registers.
template <bool kWide, bool kAhead, class R, class S>
struct Quad {
    using T = typename R::Number;
    struct V {
        T v[4];
    };
    static constexpr bool kNoiseFirst = true, kKeepsX = kAhead, kThresholds = true;
    static constexpr int kOutputs = kAhead ? Places::kOutputs : 0;
    static constexpr int kTerms = kAhead ? Places::kTerms : 0;
    const StageArgs& a;
    const R& row;
    int64_t i;  // its first element in a register
    int64_t o;  // and in the first branch of the output
    int64_t q;  // its counter within the sample
    uint64_t seed;
    const T* s;        // the sample's scale, where the row thresholds
    const T* scalars;  // its row of S; null: each counts as 1
    int count;         // elements, 1 to 4
    const Places* places;  // null without kAhead

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
            store(p, four);
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
    FASTDIFF_HD V fuse(const V& a, const V& b, const V& sum) const {
        V r;
        for (int l = 0; l < 4; ++l) r.v[l] = fused(a.v[l], b.v[l], sum.v[l]);
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
        if (g < kOutputs) return read(places->of<const S>(g) + o);
        return read(static_cast<const S*>(a.out) + (row.branch[g] * a.batch * a.out_stride + o));
    }
    FASTDIFF_HD V term(int j) const {
        if (j < kTerms) return read(places->of<const T>(Places::kOutputs + j) + i);
        return read(static_cast<const T*>(a.history) + (row.term[j].source * registers() + i));
    }
    FASTDIFF_HD V slot(int s) const {
        return read(static_cast<const T*>(a.history) + (s * registers() + i));
    }
    // In a bank that all samples share an element stands where it does in the sample.
    FASTDIFF_HD V entry(int k) const {
        const int64_t at = k * a.bank_batch * a.size + (a.bank_shared() ? 4 * again(q) : i);
        return read(static_cast<const T*>(a.bank) + at);
    }
    FASTDIFF_HD V extra(int k) const { return entry(row.extra[k].source); }
    FASTDIFF_HD V output(int g) const {
        return read(static_cast<const S*>(a.out) + (g * a.batch * a.out_stride + o));
    }
    FASTDIFF_HD T scalar(int c) const { return scalars == nullptr ? T(1) : scalars[c]; }
    FASTDIFF_HD V xi() const { return read(static_cast<const T*>(a.xi) + i); }
    FASTDIFF_HD V draw(int d) const {
        float z[4];
        normal_quad(seed, row.stream[d], static_cast<uint64_t>(q + a.first_quad), z);
        return {{static_cast<T>(z[0]), static_cast<T>(z[1]), static_cast<T>(z[2]),
                 static_cast<T>(z[3])}};
    }
    FASTDIFF_HD void put_x(const V& v) const { write(static_cast<T*>(a.x) + i, v); }
    FASTDIFF_HD void put_e(const V& v) const { write(static_cast<T*>(a.e) + i, v); }
    FASTDIFF_HD void put_push(const V& v) const { write(pushed(Places::kPush, row.push), v); }
    FASTDIFF_HD void put_push_x(const V& v) const {
        write(pushed(Places::kPushX, row.push_x), v);
    }
    FASTDIFF_HD T* pushed(int place, int32_t slot) const {
        if (kAhead) return places->of<T>(place) + i;
        return static_cast<T*>(a.history) + (slot * registers() + i);
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

// The quad q of sample b, of `count` elements.
template <bool kWide, bool kAhead, class R, class S>
FASTDIFF_HD Quad<kWide, kAhead, R, S> quad_at(const Launch& l, const R& row, int64_t b, int64_t q,
                                              uint64_t seed, int count,
                                              const Places* places = nullptr) {
    using T = typename R::Number;
    const StageArgs& a = l.args;
    const T* scalars = nullptr;
    if (R::kGrown) scalars = static_cast<const T*>(a.scalars) + b * a.scalar_columns;
    return {a,    row, b * a.size + 4 * q,                  b * a.out_stride + 4 * q, q,
            seed, static_cast<const T*>(l.scale) + b, scalars, count, places};
}

}  // namespace fastdiff::cuda
