// SPDX-License-Identifier: Apache-2.0
// One element's stage update, the one instruction every sampler compiles to.
//
// `update` is the arithmetic: fused multiply-adds in table order, each sum starting from 0. It is
// written over an accessor, so one definition serves a scalar, a pack of CPU vectors and a GPU
// thread, and all of them give the same bits. `resolve` turns a packed table row (float64 columns,
// `fastdiff.plan.Layout`) into coefficients of the arithmetic type, without the terms whose
// coefficient is exactly 0: their registers are never read and may hold anything.
#pragma once

#include "philox.h"

#include <string.h>

#include <type_traits>

namespace fastdiff {

// Raised whenever the columns, the flags or a signature of the compiled core change.
constexpr int kAbi = 5;

enum Dtype : int32_t { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2, kFloat16 = 3 };
constexpr int kDtypes = 4;

// Bits of the flags column, as in fastdiff/plans/layout.py.
enum Flag : int32_t {
    kEvaluate = 1, kAtE = 2, kWritesE = 4, kWritesX = 8, kClip = 16, kThreshold = 32, kWritesM = 64
};
constexpr int32_t kAllFlags = 127;

// Columns of the fixed head of a row, as in fastdiff/plans/layout.py.
enum Column : int {
    kFlagsColumn, kPushColumn, kPushXColumn, kDrawsColumn, kStream1Column, kStream2Column,
    kNTermsColumn, kNExtrasColumn, kNProductsColumn, kNMeasuresColumn,
    kPColumn, kUColumn, kVColumn, kLoColumn, kHiColumn, kQuantileColumn, kFloorColumn,
    kCeilingColumn, kAxColumn, kAeColumn, kB0Column, kBRawColumn, kCColumn,
    kDxColumn, kDeColumn, kDNewColumn, kG0Column, kGRawColumn, kCeColumn,
    kXi1Column, kXi2Column, kCInNextColumn,
    kScalarBColumn, kScalarGColumn, kScalarCColumn, kScalarCeColumn, kHeadColumns
};
// Columns of one entry of the groups after the head.
constexpr int kTermColumns = 3, kBranchColumns = 2, kExtraColumns = 3, kProductColumns = 5,
              kMeasureColumns = 16;

constexpr int kMaxTerms = 64, kMaxBranches = 16, kMaxExtras = 16, kMaxDraws = 2;

enum Status : int32_t {
    kOk = 0,
    kBadRow,        // row (+ stage_index[b]) outside the table
    kBadFlags,      // flags column is no combination of the known bits
    kBadThreshold,  // a quantile outside (0, 1], a floor that is not positive, or a clip as well
    kNoThreshold,   // the row thresholds and nothing was launched to find its scale
    kBadCount,      // draws or n_terms outside the layout
    kBadSlot,       // a history slot outside the ring
    kBadStream,     // a noise stream that is no unsigned 32-bit integer
    kNoE,           // the row reads or writes e, which is not bound
    kNoH,           // the row weighs or pushes h without an evaluation
    kNoOut,         // the row evaluates and no network output was given
    kNoXi,          // the row weighs noise, which is neither drawn nor given
    kNoSeeds,       // the row draws noise and no seeds are bound
    kBadDtype,      // an unknown dtype code
    kBadLayout,     // sizes that contradict each other
    kOverlap,       // an input that a thread may read after another has written there
    kMisaligned,    // an address that is no multiple of its element's size
    kTooLarge,      // sizes whose product passes 2^63 bytes
    kDeviceError,   // the CUDA runtime's own
};

// Everything one launch needs besides the row. Registers are contiguous [batch, size].
struct StageArgs {
    void* x;
    void* e;                      // null where absent
    void* history;                // [slots, batch, size]
    void* m;                      // [copies, batch, size] or null
    const void* extra[kMaxExtras];
    const uint64_t* seeds;        // [batch] or null
    const double* table;          // [rows, width]
    const int64_t* stage_index;   // [batch] or null
    const void* out;              // branch g, sample b at (g batch + b) out_stride, or null
    const void* xi;               // noise [batch, size] instead of the row's own, or null
    int64_t batch, size;          // samples, elements of each
    int64_t rows, slots, copies, out_stride;
    int32_t terms, branches, extras;  // layout
    int32_t entries;                  // extra registers
    int32_t state, network, out_dtype;  // Dtype of x; of m; of out
};

FASTDIFF_HD int64_t row_width(const StageArgs& a) {
    return kHeadColumns + kTermColumns * static_cast<int64_t>(a.terms) +
           kBranchColumns * a.branches + kExtraColumns * a.extras;
}

enum Reads : int32_t { kReadsX = 1, kReadsE = 2, kReadsH = 4, kReadsXi = 8 };

template <class T>
struct Term {
    T b, g;
    int32_t source;  // history slot or extra register
};

// A table row in the arithmetic type. Lists hold only what is read.
template <class T>
struct Row {
    int32_t flags, push, push_x;
    int32_t x_reads, e_reads;  // Reads of each sum
    bool loads_x, loads_e, loads_xi, writes_m;
    int32_t branches, terms, extras, draws;
    uint32_t stream[kMaxDraws];
    T p, lo, hi, c_in;
    double quantile, floor;  // of the threshold: what the float64 columns say
    T a_x, a_e, b_0, c, d_x, d_e, g_0, c_e;
    T xi[kMaxDraws];
    T k[kMaxBranches];
    int32_t branch[kMaxBranches];
    Term<T> term[kMaxTerms];
    Term<T> extra[kMaxExtras];
};

// Whether `value` is an integer in [lo, hi]; false for NaN.
FASTDIFF_HD bool is_index(double value, double lo, double hi) {
    return value >= lo && value <= hi && value == static_cast<double>(static_cast<int64_t>(value));
}

// From the columns `v` of a row, wherever they lie. Writes nothing but `row`.
template <class T>
FASTDIFF_HD Status resolve(const StageArgs& a, const double* v, Row<T>& row) {
    const double* terms = v + kHeadColumns;
    const double* weights = terms + kTermColumns * a.terms;
    const double* extras = weights + kBranchColumns * a.branches;
    if (!is_index(v[kFlagsColumn], 0, kAllFlags)) return kBadFlags;
    if (!is_index(v[kPushColumn], -1, static_cast<double>(a.slots) - 1)) return kBadSlot;
    if (!is_index(v[kPushXColumn], -1, static_cast<double>(a.slots) - 1)) return kBadSlot;
    if (!is_index(v[kDrawsColumn], 0, kMaxDraws)) return kBadCount;
    if (!is_index(v[kNTermsColumn], 0, a.terms)) return kBadCount;
    if (!is_index(v[kNExtrasColumn], 0, a.extras)) return kBadCount;
    const int32_t flags = static_cast<int32_t>(v[kFlagsColumn]);
    const bool evaluates = flags & kEvaluate;
    row.flags = evaluates ? flags : flags & ~kThreshold;  // without h there is nothing to limit
    const bool writes_e = flags & kWritesE, writes_x = flags & kWritesX;
    row.push = static_cast<int32_t>(v[kPushColumn]);
    row.push_x = static_cast<int32_t>(v[kPushXColumn]);
    if (row.push_x >= 0 && row.push_x == row.push) return kBadSlot;

    const auto reads = [&](int x_or_d, int e_or_d, int h, int noise) {
        return (v[x_or_d] != 0 ? kReadsX : 0) | (v[e_or_d] != 0 ? kReadsE : 0) |
               (v[h] != 0 ? kReadsH : 0) | (v[noise] != 0 ? kReadsXi : 0);
    };
    row.x_reads = writes_x ? reads(kAxColumn, kAeColumn, kB0Column, kCColumn) : 0;
    row.e_reads = writes_e ? reads(kDxColumn, kDeColumn, kG0Column, kCeColumn) : 0;
    const int32_t either = row.x_reads | row.e_reads;
    if (!evaluates && ((either & kReadsH) || row.push >= 0)) return kNoH;
    row.writes_m = a.m != nullptr && (flags & kWritesM);
    const bool reads_point = evaluates && v[kPColumn] != 0;
    row.loads_x = (either & kReadsX) || (reads_point && !(flags & kAtE)) ||
                  (row.writes_m && v[kCInNextColumn] != 0 && !writes_x && !writes_e);
    row.loads_e = (either & kReadsE) || (reads_point && (flags & kAtE));
    if ((row.loads_e || writes_e) && a.e == nullptr) return kNoE;

    row.p = reads_point ? static_cast<T>(v[kPColumn]) : T(0);
    row.lo = static_cast<T>(v[kLoColumn]);
    row.hi = static_cast<T>(v[kHiColumn]);
    row.quantile = v[kQuantileColumn];
    row.floor = v[kFloorColumn];
    if (flags & kThreshold) {
        const T floor = static_cast<T>(row.floor);
        const bool legal = row.quantile > 0 && row.quantile <= 1 && floor > 0 &&
                           floor - floor == 0;  // finite in the arithmetic type
        if (!legal || (flags & kClip)) return kBadThreshold;
    }
    row.a_x = static_cast<T>(v[kAxColumn]);
    row.a_e = static_cast<T>(v[kAeColumn]);
    row.b_0 = static_cast<T>(v[kB0Column]);
    row.c = static_cast<T>(v[kCColumn]);
    row.d_x = static_cast<T>(v[kDxColumn]);
    row.d_e = static_cast<T>(v[kDeColumn]);
    row.g_0 = static_cast<T>(v[kG0Column]);
    row.c_e = static_cast<T>(v[kCeColumn]);
    row.c_in = static_cast<T>(v[kCInNextColumn]);

    row.branches = 0;
    for (int g = 0; evaluates && g < a.branches; ++g) {
        if (weights[kBranchColumns * g] == 0) continue;
        if (a.out == nullptr) return kNoOut;
        row.k[row.branches] = static_cast<T>(weights[kBranchColumns * g]);
        row.branch[row.branches++] = g;
    }
    row.terms = 0;
    const int n_terms = static_cast<int>(v[kNTermsColumn]);
    for (int j = 0; j < n_terms; ++j, terms += kTermColumns) {
        const double b = writes_x ? terms[1] : 0, g = writes_e ? terms[2] : 0;
        if (b == 0 && g == 0) continue;
        if (!is_index(terms[0], 0, static_cast<double>(a.slots) - 1)) return kBadSlot;
        row.term[row.terms++] = {static_cast<T>(b), static_cast<T>(g),
                                 static_cast<int32_t>(terms[0])};
    }
    row.extras = 0;
    const int n_extras = static_cast<int>(v[kNExtrasColumn]);
    for (int i = 0; i < n_extras; ++i, extras += kExtraColumns) {
        const double r = writes_x ? extras[1] : 0, s = writes_e ? extras[2] : 0;
        if (r == 0 && s == 0) continue;
        if (!is_index(extras[0], 0, a.entries - 1)) return kBadSlot;
        row.extra[row.extras++] = {static_cast<T>(r), static_cast<T>(s),
                                   static_cast<int32_t>(extras[0])};
    }

    row.draws = 0;
    row.loads_xi = (either & kReadsXi) != 0;
    if (row.loads_xi && a.xi == nullptr) {
        row.draws = static_cast<int32_t>(v[kDrawsColumn]);
        if (row.draws == 0) return kNoXi;
        if (a.seeds == nullptr) return kNoSeeds;
        for (int d = 0; d < row.draws; ++d) {
            if (!is_index(v[kStream1Column + d], 0, 4294967295.0)) return kBadStream;
            row.stream[d] = static_cast<uint32_t>(v[kStream1Column + d]);
            row.xi[d] = static_cast<T>(v[kXi1Column + d]);
        }
    }
    return kOk;
}

template <class T>
FASTDIFF_HD Status resolve(const StageArgs& a, int64_t index, Row<T>& row) {
    if (index < 0 || index >= a.rows) return kBadRow;
    return resolve(a, a.table + index * row_width(a), row);
}

template <class T, class IO>
FASTDIFF_HD typename IO::V noise_of(const Row<T>& row, const IO& io) {
    if (row.draws == 0) return io.xi();
    typename IO::V xi = io.zero();
    FASTDIFF_ROLLED
    for (int d = 0; d < row.draws; ++d) xi = io.fma(row.xi[d], io.draw(d), xi);
    return xi;
}

// What the outputs add to h.
template <class T, class IO>
FASTDIFF_HD typename IO::V outputs_of(const Row<T>& row, const IO& io) {
    typename IO::V h = io.zero();
    FASTDIFF_ROLLED
    for (int g = 0; g < row.branches; ++g) h = io.fma(row.k[g], io.out(g), h);
    return h;
}

// The h of what `io` stands at, not yet limited. x and e by value: with a reference to either a GPU
// would keep both in memory.
template <class T, class IO>
FASTDIFF_HD typename IO::V form(const Row<T>& row, const IO& io, typename IO::V x,
                                typename IO::V e) {
    typename IO::V h = outputs_of(row, io);
    if (row.p != T(0)) {
        if (row.flags & kAtE) {
            h = io.fma(row.p, e, h);
        } else {
            h = io.fma(row.p, x, h);
        }
    }
    return h;
}

// The same, with what it takes of x or e loaded.
template <class T, class IO>
FASTDIFF_HD typename IO::V form(const Row<T>& row, const IO& io) {
    typename IO::V point = io.zero();
    if (row.p != T(0)) point = (row.flags & kAtE) ? io.e() : io.x();
    const typename IO::V h = outputs_of(row, io);
    return row.p != T(0) ? io.fma(row.p, point, h) : h;
}

// The update of what `io` stands at: one element or a pack of them. Every load precedes every
// store but that of push_x, so x', e', the pushes and m' may overwrite what the same elements were read from.
//
// IO supplies the value type V; zero(), fma(T, V, V), mul(T, V), clip(V, T, T); loads x(), e(),
// out(g), term(j), extra(i), xi(), draw(d) (list positions of the row); and stores put_x, put_e,
// put_push, put_push_x, put_m; kNoiseFirst: whether the noise is made before anything is loaded (where
// making it takes registers) or when it is added (where it is read); and kThresholds: whether it has
// scale(), the sample's s, and divide(V, T); rows that threshold run on such alone.
template <bool kHasE, class T, class IO>
FASTDIFF_HD void update(const Row<T>& row, const IO& io) {
    using V = typename IO::V;
    V x = io.zero(), e = io.zero(), h = io.zero(), x_next = io.zero(), e_next = io.zero();
    V xi = io.zero();
    if (IO::kNoiseFirst && row.loads_xi) xi = noise_of(row, io);
    if (row.loads_x) x = io.x();
    if (row.loads_e) e = io.e();
    if (row.flags & kEvaluate) {
        h = form(row, io, x, e);
        if constexpr (IO::kThresholds) {
            if (row.flags & kThreshold) {
                h = io.divide(io.clip(h, -io.scale(), io.scale()), io.scale());
            }
        }
        if (row.flags & kClip) h = io.clip(h, row.lo, row.hi);
    }
    if (row.x_reads & kReadsX) x_next = io.fma(row.a_x, x, x_next);
    if (row.x_reads & kReadsE) x_next = io.fma(row.a_e, e, x_next);
    if (row.x_reads & kReadsH) x_next = io.fma(row.b_0, h, x_next);
    if (kHasE) {
        if (row.e_reads & kReadsX) e_next = io.fma(row.d_x, x, e_next);
        if (row.e_reads & kReadsE) e_next = io.fma(row.d_e, e, e_next);
        if (row.e_reads & kReadsH) e_next = io.fma(row.g_0, h, e_next);
    }
    FASTDIFF_ROLLED
    for (int j = 0; j < row.terms; ++j) {
        const V past = io.term(j);
        if (!kHasE || row.term[j].b != T(0)) x_next = io.fma(row.term[j].b, past, x_next);
        if (kHasE && row.term[j].g != T(0)) e_next = io.fma(row.term[j].g, past, e_next);
    }
    if (row.loads_xi) {
        if (!IO::kNoiseFirst) xi = noise_of(row, io);
        if (row.x_reads & kReadsXi) x_next = io.fma(row.c, xi, x_next);
        if (kHasE && (row.e_reads & kReadsXi)) e_next = io.fma(row.c_e, xi, e_next);
    }
    FASTDIFF_ROLLED
    for (int i = 0; i < row.extras; ++i) {
        const V extra = io.extra(i);
        if (!kHasE || row.extra[i].b != T(0)) x_next = io.fma(row.extra[i].b, extra, x_next);
        if (kHasE && row.extra[i].g != T(0)) e_next = io.fma(row.extra[i].g, extra, e_next);
    }
    if (row.push_x >= 0) io.put_push_x(io.x());  // again: to keep it would cost registers
    if (row.flags & kWritesX) io.put_x(x_next);
    if (kHasE) io.put_e(e_next);
    if (row.push >= 0) io.put_push(h);
    if (row.writes_m) {
        if (kHasE) {
            x = e_next;
        } else if (row.flags & kWritesX) {
            x = x_next;
        }
        io.put_m(row.c_in != T(0) ? io.mul(row.c_in, x) : io.zero());
    }
}

// -- thresholds ----------------------------------------------------------------------------------

// The magnitude of a T as an integer: these order as magnitudes do, NaN last.
template <class T>
struct Magnitude {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    static constexpr int kBits = 8 * sizeof(T) - 1;
    static constexpr Bits kMost = ~Bits{0} >> 1;  // a NaN

    static FASTDIFF_HD Bits of(T v) {
        Bits bits;
        memcpy(&bits, &v, sizeof bits);
        return bits & kMost;
    }
    static FASTDIFF_HD T value(Bits bits) {
        T v;
        memcpy(&v, &bits, sizeof v);
        return v;
    }
};

// Where a quantile of n magnitudes lies: `weight` of the way from the one of rank `rank` to the
// next, the least having rank 0.
struct Position {
    int64_t rank;
    double weight;

    FASTDIFF_HD Position(double quantile, int64_t n) {
        const double position = quantile * static_cast<double>(n - 1);
        rank = static_cast<int64_t>(position);
        weight = position - static_cast<double>(rank);
    }
};

// The scale s of a sample from the two; `high` may be anything where `weight` is 0.
template <class T>
FASTDIFF_HD T scale_of(const Row<T>& row, double weight, T low, T high) {
    if (weight == 0) high = low;
    const double s = low + weight * (static_cast<double>(high) - low);
    return static_cast<T>(s > row.floor ? s : row.floor);
}

// -- storage types -------------------------------------------------------------------------------

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

FASTDIFF_HD float widen(float v) { return v; }
FASTDIFF_HD double widen(double v) { return v; }
FASTDIFF_HD float widen(Bfloat16 v) {
    return ScalarLanes::from_bits(static_cast<uint32_t>(v.bits) << 16);
}
FASTDIFF_HD float widen(Float16 v) {
    const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
    const uint32_t rest = v.bits & 0x7FFFu;
#if defined(__CUDA_ARCH__)
    if (rest <= 0x7C00u) {
        float wide;
        asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
        return wide;
    }
#endif
    if (rest >= 0x7C00u) {  // infinity; NaN keeps its payload and turns quiet
        return ScalarLanes::from_bits(sign | 0x7F800000u | (rest & 0x3FFu) << 13 |
                                      (rest > 0x7C00u ? 0x400000u : 0u));
    }
    if (rest >= 0x400u) return ScalarLanes::from_bits(sign | ((rest << 13) + 0x38000000u));
    return ScalarLanes::from_bits(ScalarLanes::bits(static_cast<float>(rest) * 0x1p-24f) | sign);
}

// Rounded to nearest even. From float64, 16-bit types go through float32, as PyTorch's cast does.
FASTDIFF_HD void narrow(float v, float& to) { to = v; }
FASTDIFF_HD void narrow(float v, double& to) { to = v; }
FASTDIFF_HD void narrow(float v, Bfloat16& to) {
    const uint32_t u = ScalarLanes::bits(v);
    const bool nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
    to.bits = static_cast<uint16_t>(nan ? 0x7FC0u : (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}
FASTDIFF_HD void narrow(float v, Float16& to) {
    const uint32_t u = ScalarLanes::bits(v);
    const uint32_t sign = (u >> 16) & 0x8000u, a = u & 0x7FFFFFFFu;
#if defined(__CUDA_ARCH__)
    if (a <= 0x7F800000u) {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(v));
        return;
    }
#endif
    uint32_t half;
    if (a > 0x7F800000u) {
        half = 0x7E00u | ((a >> 13) & 0x3FFu);
    } else if (a >= 0x47800000u) {  // 2^16
        half = 0x7C00u;
    } else if (a >= 0x38800000u) {  // 2^-14, the least normal
        const uint32_t r = a - 0x38000000u;
        half = (r + 0xFFFu + ((r >> 13) & 1u)) >> 13;
    } else if (a > 0x33000000u) {  // above 2^-25: a multiple of 2^-24
        const uint32_t mantissa = (a & 0x7FFFFFu) | 0x800000u, shift = 126u - (a >> 23);
        const uint32_t rest = mantissa & ((1u << shift) - 1u), middle = 1u << (shift - 1u);
        half = mantissa >> shift;
        half += rest > middle || (rest == middle && (half & 1u));
    } else {
        half = 0;
    }
    to.bits = static_cast<uint16_t>(sign | half);
}
template <class S>
FASTDIFF_HD void narrow(double v, S& to) {
    narrow(static_cast<float>(v), to);
}
FASTDIFF_HD void narrow(double v, double& to) { to = v; }

// -- one element ---------------------------------------------------------------------------------

// Where the elements of one sample (or of a whole batch whose samples share a row) stand. T is the
// state's type, S the network output's; `draw` holds float32 normals.
template <class T, class S>
struct Span {
    T* x;
    T* e;
    T* push;
    T* push_x;
    void* m;
    int64_t copies, copy_stride;
    int32_t network;  // Dtype of m
    T scale;          // s of the sample, where the row thresholds
    const T* xi;
    const float* draw[kMaxDraws];
    const S* out[kMaxBranches];
    const T* term[kMaxTerms];
    const T* extra[kMaxExtras];
};

template <class T, class S>
struct Element {
    using V = T;
    static constexpr bool kNoiseFirst = false, kThresholds = true;
    const Span<T, S>& at;
    int64_t i;

    FASTDIFF_HD T zero() const { return T(0); }
    FASTDIFF_HD T fma(T c, T v, T sum) const { return fused(c, v, sum); }
    FASTDIFF_HD T mul(T c, T v) const { return c * v; }
    // NaN stays.
    FASTDIFF_HD T clip(T v, T lo, T hi) const { return v < lo ? lo : v > hi ? hi : v; }
    FASTDIFF_HD T divide(T v, T by) const { return v / by; }
    FASTDIFF_HD T scale() const { return at.scale; }
    FASTDIFF_HD T x() const { return at.x[i]; }
    FASTDIFF_HD T e() const { return at.e[i]; }
    FASTDIFF_HD T out(int g) const { return static_cast<T>(widen(at.out[g][i])); }
    FASTDIFF_HD T term(int j) const { return at.term[j][i]; }
    FASTDIFF_HD T extra(int k) const { return at.extra[k][i]; }
    FASTDIFF_HD T xi() const { return at.xi[i]; }
    FASTDIFF_HD T draw(int d) const { return static_cast<T>(at.draw[d][i]); }
    FASTDIFF_HD void put_x(T v) const { at.x[i] = v; }
    FASTDIFF_HD void put_e(T v) const { at.e[i] = v; }
    FASTDIFF_HD void put_push(T v) const { at.push[i] = v; }
    FASTDIFF_HD void put_push_x(T v) const { at.push_x[i] = v; }
    FASTDIFF_HD void put_m(T v) const {
        switch (at.network) {
            case kFloat32: put(static_cast<float*>(at.m), v); break;
            case kFloat64: put(static_cast<double*>(at.m), v); break;
            case kBfloat16: put(static_cast<Bfloat16*>(at.m), v); break;
            default: put(static_cast<Float16*>(at.m), v); break;
        }
    }
    template <class M>
    FASTDIFF_HD void put(M* m, T v) const {
        M value;
        narrow(v, value);
        for (int64_t k = 0; k < at.copies; ++k) m[k * at.copy_stride + i] = value;
    }
};

}  // namespace fastdiff
