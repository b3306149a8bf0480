# SPDX-License-Identifier: Apache-2.0
"""One stage in one pass over memory: the one instruction every sampler compiles to, in Triton.

    h  = sum_g k_g out_g + p point                    point = e if the stage before wrote e, else x
    h  = clip(h, lo, hi)  or  clip(h, -s, s) / s      where the row says so
    x' = a_x x + a_e e + b_0 h + sum_k b_k H_k + c   xi + sum_i r_i R_i
    e' = d_x x + d_e e + g_0 h + sum_k g_k H_k + c_e xi + sum_i s_i R_i
    m' = c_in (e' if written, else x' if written, else x), cast, once per copy

s, each sample's own, is what `threshold.py` wrote just before. The arithmetic is that of
`csrc/stage.h`: fused multiply-adds in table order, each sum from 0, in float32 (float64 for a
float64 state); storage types are rounded to nearest even.

A program owns a tile of ROWS samples by COLS elements. Long samples are cut (ROWS = 1), short ones
share a program (COLS >= n); a batch whose samples need not be told apart is passed as one long
sample. So no element index is ever divided, and the quads of the noise start at column 0.

Which registers exist, the counts, dtypes and tile are compile-time constants; all that differs from
row to row is read from `p_table` in device memory at run time: overwriting the table changes what a
captured launch does. A register whose coefficients are 0 in this row is not loaded (its mask is
false), whatever it holds.

Every load of a tile precedes every store to it, and a program stores only to elements that no other
program loads: x, e and a history slot are updated in place.
"""

import triton
import triton.language as tl

from .columns import (
    A_E,
    A_X,
    AT_E,
    B_0,
    BRANCH_WIDTH,
    C_E,
    C_IN_NEXT,
    CLIP,
    D_E,
    D_X,
    DRAWS,
    ENTRY,
    EVALUATE,
    EXTRA_WIDTH,
    FLAGS,
    G_0,
    HI,
    LO,
    N_EXTRAS,
    N_TERMS,
    PAST_B,
    PAST_G,
    PUSH,
    PUSH_X,
    SLOT,
    STREAM_1,
    STREAM_2,
    TERM_AT,
    TERM_WIDTH,
    THRESHOLD,
    WRITES_E,
    WRITES_M,
    WRITES_X,
    XI_1,
    XI_2,
    C,
    K,
    P,
    R,
    S,
)
from .philox import normals


@triton.jit
def _widen(value, T: tl.constexpr):
    """A stored value in the arithmetic type T, exactly (float64 to float32 is rounded)."""
    if value.dtype == tl.bfloat16:
        # by bits: Triton's interpreter has no bfloat16 arithmetic
        wide = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return wide.to(tl.float32, bitcast=True).to(T)
    elif value.dtype == tl.float16:
        return value.to(tl.float32).to(T)
    else:
        return value.to(T)


@triton.jit
def _narrow(value, storage: tl.constexpr):
    """A value in a storage type, to nearest even; float64 to 16 bits goes through float32."""
    if storage == tl.bfloat16:
        # by bits: Triton's interpreter truncates
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif storage == tl.float16:
        return value.to(tl.float32).to(tl.float16)
    else:
        return value.to(storage)


@triton.jit
def _reads(c):
    """Whether a coefficient is not 0."""
    # by way of an integer, because the interpreter, where it spreads the result of a scalar
    # comparison over a block, gives it the type of the operands
    return (c != 0).to(tl.int32) != 0


@triton.jit
def _only(m_live, condition):
    """m_live & condition; a selection keeps the interpreter's mask one of booleans."""
    return tl.where(condition, m_live, tl.zeros_like(m_live))


@triton.jit
def _add(c, value, total):
    """fma(c, value, total); `total` itself, to the bit, where c is 0."""
    return tl.where(_reads(c), tl.fma(c, value, total), total)


@triton.jit
def _integer(p_row, COLUMN: tl.constexpr):
    return tl.load(p_row + COLUMN).to(tl.int32)


@triton.jit
def _coefficient(p_row, COLUMN: tl.constexpr, used):
    value = tl.load(p_row + COLUMN)
    return tl.where(used, value, tl.zeros_like(value))


@triton.jit
def _row_of(row, p_row_index, p_index, i_b):
    """The row that sample i_b runs, int64; it may lie outside the table."""
    i_row = row.to(tl.int64)
    if p_row_index is not None:
        i_row += tl.load(p_row_index)
    if p_index is not None:
        i_row = i_row + tl.load(p_index + i_b)
    return i_row


@triton.jit
def _form(p_out, o_out, branch_stride, p_row, p, point, evaluates, m_live, T: tl.constexpr,
          BRANCHES: tl.constexpr, BRANCH_AT: tl.constexpr):  # fmt: skip
    """sum_g k_g out_g + p point: h before it is limited, of `point`'s shape."""
    h = tl.zeros_like(point)
    for g in tl.static_range(BRANCHES):
        k_g = _coefficient(p_row, BRANCH_AT + g * BRANCH_WIDTH + K, evaluates)
        p_branch = p_out + g * branch_stride
        out = tl.load(p_branch + o_out, mask=_only(m_live, _reads(k_g)), other=0.0)
        h = _add(k_g, _widen(out, T), h)
    return _add(p, point, h)


@triton.jit
def _clip(h, lo, hi):
    """NaN stays."""
    return tl.where(h < lo, lo, tl.where(h > hi, hi, h))


@triton.jit
def _divide(a, b):
    """a / b, to nearest."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _xi(p_row, p_seeds, i_b, i_c, draws, T: tl.constexpr, MOST_DRAWS: tl.constexpr,
        ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """The row's own noise, [ROWS, COLS]."""
    seed = tl.load(p_seeds + i_b)
    quad = i_c * (COLS // 4) + tl.arange(0, COLS // 4)[None, :].to(tl.int64)
    zero = tl.zeros([ROWS, COLS], T)
    stream = tl.load(p_row + STREAM_1).to(tl.int64).to(tl.uint32)
    z = normals(seed, stream, quad, ROWS, COLS).to(T)
    xi = tl.fma(tl.load(p_row + XI_1), z, zero)
    if MOST_DRAWS > 1:
        stream = tl.load(p_row + STREAM_2).to(tl.int64).to(tl.uint32)
        z = normals(seed, stream, quad, ROWS, COLS).to(T)
        xi = tl.where(draws > 1, tl.fma(tl.load(p_row + XI_2), z, xi), xi)
    return xi


@triton.jit(do_not_specialize=["row", "rows", "batch", "size_units", "out_units"])
def stage_kernel(
    p_x,  # [B, n], the state's dtype; like it e and the bank
    p_e,  # None where the run has no e
    p_history,  # [slots, B, n], or None
    p_m,  # [COPIES, B, n], the network's dtype, or None
    p_out,  # branch g, sample b at (g B + b) out_stride; None: no row run here evaluates
    p_xi,  # [B, n] noise used instead of the row's own, or None
    p_bank,  # [entries, B, n], or [entries, 1, n] where SHARED; None: no row reads one
    p_seeds,  # int64 [B], or None
    p_table,  # [rows, WIDTH] in the arithmetic type
    p_index,  # int64 [B]: sample b runs row `row + index[b]`; None: all run `row`
    p_row_index,  # int64 [1], added to `row`, or None: a captured launch has its row there
    p_scale,  # [B] in the arithmetic type, s where a sample's row thresholds; None: none does
    row,
    rows,
    batch,  # B
    size_units,  # n / UNIT
    out_units,  # out_stride / OUT_UNIT
    UNIT: tl.constexpr,  # 16, 4 or 1: the divisor of n that lets vectors be proved aligned
    OUT_UNIT: tl.constexpr,  # likewise of out_stride; 0: out_stride = n
    TERMS: tl.constexpr,
    BRANCHES: tl.constexpr,
    EXTRAS: tl.constexpr,
    BRANCH_AT: tl.constexpr,  # where the groups begin in a row, and its width
    EXTRA_AT: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED: tl.constexpr,  # whether all samples have one bank
    COPIES: tl.constexpr,
    MOST_DRAWS: tl.constexpr,  # the most that a row of the table draws
    CLIPS: tl.constexpr,  # whether any row clips
    PUSHES_X: tl.constexpr,  # whether any row pushes the x that comes in
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The kernel; see the module. Grid: ceil(B / ROWS) * ceil(n / COLS).

    A sample whose row lies outside the table, or evaluates without `p_out`, is left as it is.
    """
    T: tl.constexpr = p_table.dtype.element_ty
    STATE: tl.constexpr = p_x.dtype.element_ty
    OWN_ROWS: tl.constexpr = p_index is not None
    HAS_E: tl.constexpr = p_e is not None

    # int64 throughout: a register may hold more than 2^31 elements
    n = size_units.to(tl.int64) * UNIT
    total = batch * n
    if ROWS == 1:
        # a grid has fewer than 2^31 programs: a 32-bit division, once a program
        col_tiles = tl.cdiv(n, COLS).to(tl.int32)
        i_row_tile = (tl.program_id(0) // col_tiles).to(tl.int64)
        i_c = (tl.program_id(0) % col_tiles).to(tl.int64)
    else:  # COLS >= n
        i_row_tile = tl.program_id(0).to(tl.int64)
        i_c = i_row_tile - i_row_tile
    o_c = i_c * COLS + tl.arange(0, COLS)[None, :].to(tl.int64)  # [1, COLS]
    m_live = o_c < n
    if ROWS == 1:
        i_b = i_row_tile
        o_b = i_b
        i_seed = i_b + tl.zeros([1, 1], tl.int64)
    else:
        o_b = i_row_tile * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)  # [ROWS, 1]
        m_live = m_live & (o_b < batch)
        i_b = tl.minimum(o_b, batch - 1)
        i_seed = i_b
    o = o_b * n + o_c

    # -- the row: scalars where the tile shares it, [ROWS, 1] otherwise ----------------------------
    i_row = _row_of(row, p_row_index, p_index, i_b)
    if OWN_ROWS or p_row_index is not None:
        m_row = (i_row >= 0) & (i_row < rows)
        m_live = _only(m_live, m_row)
        i_row = tl.where(m_row, i_row, 0)
    p_row = p_table + i_row * WIDTH
    flags = _integer(p_row, FLAGS)
    evaluates = (flags & EVALUATE) != 0
    writes_x = (flags & WRITES_X) != 0
    writes_e = (flags & WRITES_E) != 0
    at_e = (flags & AT_E) != 0
    if p_out is None:
        m_live = _only(m_live, (flags & EVALUATE) == 0)
    a_x = _coefficient(p_row, A_X, writes_x)
    b_0 = _coefficient(p_row, B_0, writes_x)
    p = _coefficient(p_row, P, evaluates)
    if HAS_E:
        a_e = _coefficient(p_row, A_E, writes_x)
        d_x = _coefficient(p_row, D_X, writes_e)
        d_e = _coefficient(p_row, D_E, writes_e)
        g_0 = _coefficient(p_row, G_0, writes_e)
    if p_m is not None:
        writes_m = (flags & WRITES_M) != 0
        c_in = _coefficient(p_row, C_IN_NEXT, writes_m)
    n_terms = _integer(p_row, N_TERMS)

    # -- x, e, h -----------------------------------------------------------------------------------
    reads_x = _reads(a_x)
    if HAS_E:
        reads_x = reads_x | _reads(d_x) | (_reads(p) & ((flags & AT_E) == 0))
        reads_e = _reads(a_e) | _reads(d_e) | (_reads(p) & at_e)
    else:
        reads_x = reads_x | _reads(p)
    if p_m is not None:
        reads_x = reads_x | (_reads(c_in) & ((flags & (WRITES_X + WRITES_E)) == 0))
    if PUSHES_X:
        push_x = _integer(p_row, PUSH_X)
        reads_x = reads_x | (push_x >= 0)
    x = _widen(tl.load(p_x + o, mask=_only(m_live, reads_x), other=0.0), T)
    point = x
    if HAS_E:
        e = _widen(tl.load(p_e + o, mask=_only(m_live, reads_e), other=0.0), T)
        point = tl.where(at_e, e, x)
    h = tl.zeros([ROWS, COLS], T)
    if p_out is not None:
        if OUT_UNIT == 0:
            out_stride = n
            o_out = o
        else:
            out_stride = out_units.to(tl.int64) * OUT_UNIT
            o_out = o_b * out_stride + o_c
        h = _form(p_out, o_out, batch * out_stride, p_row, p, point, evaluates, m_live, T, BRANCHES,
                  BRANCH_AT)  # fmt: skip
        if p_scale is not None:
            thresholds = (flags & (EVALUATE + THRESHOLD)) == EVALUATE + THRESHOLD
            s = tl.load(p_scale + i_b)
            h = tl.where(thresholds, _divide(_clip(h, -s, s), s), h)
        if CLIPS:
            clips = (flags & (EVALUATE + CLIP)) == EVALUATE + CLIP
            clipped = _clip(h, tl.load(p_row + LO), tl.load(p_row + HI))
            h = tl.where(clips, clipped, h)

    x_next = tl.zeros([ROWS, COLS], T)
    e_next = x_next
    x_next = _add(a_x, x, x_next)
    if HAS_E:
        x_next = _add(a_e, e, x_next)
        e_next = _add(d_x, x, e_next)
        e_next = _add(d_e, e, e_next)
        e_next = _add(g_0, h, e_next)
    x_next = _add(b_0, h, x_next)

    # -- history -----------------------------------------------------------------------------------
    if p_history is not None:
        for k in tl.static_range(TERMS):
            b_k = _coefficient(p_row, TERM_AT + k * TERM_WIDTH + PAST_B, writes_x & (k < n_terms))
            reads = _reads(b_k)
            if HAS_E:
                g_k = _coefficient(
                    p_row, TERM_AT + k * TERM_WIDTH + PAST_G, writes_e & (k < n_terms)
                )
                reads = reads | _reads(g_k)
            slot = _integer(p_row, TERM_AT + k * TERM_WIDTH + SLOT)
            p_slot = p_history + slot.to(tl.int64) * total
            past = _widen(tl.load(p_slot + o, mask=_only(m_live, reads), other=0.0), T)
            x_next = _add(b_k, past, x_next)
            if HAS_E:
                e_next = _add(g_k, past, e_next)

    # -- noise -------------------------------------------------------------------------------------
    if p_xi is not None or MOST_DRAWS > 0:
        c = _coefficient(p_row, C, writes_x)
        reads = _reads(c)
        if HAS_E:
            c_e = _coefficient(p_row, C_E, writes_e)
            reads = reads | _reads(c_e)
        if p_xi is not None:
            xi = _widen(tl.load(p_xi + o, mask=_only(m_live, reads), other=0.0), T)
        else:
            draws = _integer(p_row, DRAWS)
            if OWN_ROWS and ROWS > 1:
                xi = _xi(p_row, p_seeds, i_seed, i_c, draws, T, MOST_DRAWS, ROWS, COLS)
            else:
                xi = tl.zeros([ROWS, COLS], T)
                if reads:  # uniform over the program
                    xi = _xi(p_row, p_seeds, i_seed, i_c, draws, T, MOST_DRAWS, ROWS, COLS)
        x_next = _add(c, xi, x_next)
        if HAS_E:
            e_next = _add(c_e, xi, e_next)

    # -- read-only inputs --------------------------------------------------------------------------
    if p_bank is not None:
        n_extras = _integer(p_row, N_EXTRAS)
        for i in tl.static_range(EXTRAS):
            r = _coefficient(p_row, EXTRA_AT + i * EXTRA_WIDTH + R, writes_x & (i < n_extras))
            reads = _reads(r)
            if HAS_E:
                s = _coefficient(p_row, EXTRA_AT + i * EXTRA_WIDTH + S, writes_e & (i < n_extras))
                reads = reads | _reads(s)
            entry = _integer(p_row, EXTRA_AT + i * EXTRA_WIDTH + ENTRY).to(tl.int64)
            if SHARED:
                p_entry, o_entry = p_bank + entry * n, o_c
            else:
                p_entry, o_entry = p_bank + entry * total, o
            extra = tl.load(p_entry + o_entry, mask=_only(m_live, reads), other=0.0)
            extra = _widen(extra, T)
            x_next = _add(r, extra, x_next)
            if HAS_E:
                e_next = _add(s, extra, e_next)

    # -- stores ------------------------------------------------------------------------------------
    # Vectors of 16-bit and of 32-bit elements differ in length, so an element may be stored by
    # another thread than loaded it: all threads have loaded before one stores.
    tl.debug_barrier()
    # m' is formed from what the registers hold, which for a 16-bit state is rounded
    x_stored = _narrow(x_next, STATE)
    tl.store(p_x + o, x_stored, mask=_only(m_live, writes_x))
    if p_m is not None:
        point = tl.where(writes_x, _widen(x_stored, T), x)
    if HAS_E:
        e_stored = _narrow(e_next, STATE)
        tl.store(p_e + o, e_stored, mask=_only(m_live, writes_e))
        if p_m is not None:
            point = tl.where(writes_e, _widen(e_stored, T), point)
    if p_history is not None and p_out is not None:
        push = _integer(p_row, PUSH)
        p_slot = p_history + tl.maximum(push, 0).to(tl.int64) * total
        tl.store(p_slot + o, _narrow(h, STATE), mask=_only(m_live, push >= 0))
    if PUSHES_X:
        p_slot = p_history + tl.maximum(push_x, 0).to(tl.int64) * total
        tl.store(p_slot + o, _narrow(x, STATE), mask=_only(m_live, push_x >= 0))
    if p_m is not None:
        # zeros at c_in = 0, whatever the point holds
        m = tl.where(_reads(c_in), c_in * point, tl.zeros_like(point))
        m = _narrow(m, p_m.dtype.element_ty)
        for copy in tl.static_range(COPIES):
            tl.store(p_m + copy * total + o, m, mask=_only(m_live, writes_m))
