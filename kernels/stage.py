# SPDX-License-Identifier: Apache-2.0
"""One stage in one pass over memory: the one instruction every sampler compiles to, in Triton.

    y  = sum_g k_g out_g + p point + products         point = e if the stage before wrote e, else x
    h  = clip(y, lo, hi)  or  clip(y, -s, s) / s      where the row says so
    h  = u point + v h                                likewise
    x' = a_x x + a_e e + b_0 h + b_raw y + sum_k b_k H_k + c   xi + sum_i r_i R_i + products
    e' = d_x x + d_e e + g_0 h + g_raw y + sum_k g_k H_k + c_e xi + sum_i s_i R_i + d_new x'
         + products
    m' = c_in (e' if written, else x' if written, else x), cast, once per copy

A product is (weight R_k) times x, e, h, xi, H_j, R_j, the point or x'. A sample's own s is what
`threshold.py` wrote just before, and its own numbers S, which multiply k_g, b_0, g_0, c and c_e
where the row names them, are what `reduce.py` wrote. The arithmetic is that of `csrc/stage.h`:
fused multiply-adds in table order, each sum from 0, in float32 (float64 for a float64 state);
storage types are rounded to nearest even.

A program owns a tile of SAMPLES samples by COLS elements. Long samples are cut (SAMPLES = 1), short
ones share a program (COLS >= n); a batch whose samples need not be told apart is passed as one long
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
    B_RAW,
    C_E,
    C_IN_NEXT,
    CLIP,
    D_E,
    D_NEW,
    D_X,
    DRAWS,
    ENTRY,
    EVALUATE,
    EXTRA_WIDTH,
    FLAGS,
    G_0,
    G_RAW,
    HI,
    INTO_E,
    INTO_X,
    LO,
    N_EXTRAS,
    N_TERMS,
    OF_E,
    OF_NEW,
    OF_POINT,
    OF_X,
    OF_XI,
    PAST_B,
    PAST_G,
    PUSH,
    PUSH_X,
    SCALAR_B,
    SCALAR_C,
    SCALAR_CE,
    SCALAR_G,
    SLOT,
    TERM_AT,
    TERM_WIDTH,
    THRESHOLD,
    WRITES_E,
    WRITES_M,
    WRITES_X,
    C,
    P,
    R,
    S,
    U,
    V,
)
from .row import (
    add,
    add_products,
    clip,
    coefficient,
    divide,
    drawn,
    form,
    integer,
    is_read,
    narrow,
    only,
    operands_of_products,
    row_of,
    scaled,
    widen,
)


@triton.jit(do_not_specialize=["row", "rows", "batch", "size_units", "out_units", "first_quad"])
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
    p_scalars,  # S, [B, SCALARS] in the arithmetic type; None: no row reads it
    row,
    rows,
    batch,  # B
    size_units,  # n / UNIT
    out_units,  # out_stride / OUT_UNIT
    first_quad,  # element i of a sample takes the noise of i + 4 first_quad; None: 0
    UNIT: tl.constexpr,  # 16, 4 or 1: the divisor of n that lets vectors be proved aligned
    OUT_UNIT: tl.constexpr,  # likewise of out_stride; 0: out_stride = n
    TERMS: tl.constexpr,
    BRANCHES: tl.constexpr,
    EXTRAS: tl.constexpr,
    BRANCH_AT: tl.constexpr,  # where the groups begin in a row, and its width
    EXTRA_AT: tl.constexpr,
    PRODUCTS: tl.constexpr,
    PRODUCT_AT: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED: tl.constexpr,  # whether all samples have one bank
    COPIES: tl.constexpr,
    MOST_DRAWS: tl.constexpr,  # the most that a row of the table draws
    CLIPS: tl.constexpr,  # whether any row clips
    PUSHES_X: tl.constexpr,  # whether any row pushes the x that comes in
    RAW: tl.constexpr,  # whether any row weighs what stands around the limit, or its own x'
    SCALARS: tl.constexpr,
    SAMPLES: tl.constexpr,
    COLS: tl.constexpr,
):
    """The kernel; see the module. Grid: ceil(B / SAMPLES) * ceil(n / COLS).

    A sample whose row lies outside the table, or evaluates without `p_out`, is left as it is.
    """
    T: tl.constexpr = p_table.dtype.element_ty
    STATE: tl.constexpr = p_x.dtype.element_ty
    OWN_ROW: tl.constexpr = p_index is not None
    HAS_E: tl.constexpr = p_e is not None

    # int64 throughout: a register may hold more than 2^31 elements
    n = size_units.to(tl.int64) * UNIT
    total = batch * n
    if SAMPLES == 1:
        # a grid has fewer than 2^31 programs: a 32-bit division, once a program
        col_tiles = tl.cdiv(n, COLS).to(tl.int32)
        i_row_tile = (tl.program_id(0) // col_tiles).to(tl.int64)
        i_c = (tl.program_id(0) % col_tiles).to(tl.int64)
    else:  # COLS >= n
        i_row_tile = tl.program_id(0).to(tl.int64)
        i_c = i_row_tile - i_row_tile
    o_c = i_c * COLS + tl.arange(0, COLS)[None, :].to(tl.int64)  # [1, COLS]
    m_live = o_c < n
    if SAMPLES == 1:
        i_b = i_row_tile
        o_b = i_b
        i_seed = i_b + tl.zeros([1, 1], tl.int64)
    else:
        o_b = i_row_tile * SAMPLES + tl.arange(0, SAMPLES)[:, None].to(tl.int64)  # [SAMPLES, 1]
        m_live = m_live & (o_b < batch)
        i_b = tl.minimum(o_b, batch - 1)
        i_seed = i_b
    o = o_b * n + o_c
    bank = (p_bank, o, total)
    if SHARED:
        bank = (p_bank, o_c + o_b * 0, n)
    scalars = (p_scalars, i_b, SCALARS)

    # -- the row: scalars where the tile shares it, [SAMPLES, 1] otherwise -------------------------
    i_row = row_of(row, p_row_index, p_index, i_b)
    if OWN_ROW or p_row_index is not None:
        m_row = (i_row >= 0) & (i_row < rows)
        m_live = only(m_live, m_row)
        i_row = tl.where(m_row, i_row, 0)
    p_row = p_table + i_row * WIDTH
    flags = integer(p_row, FLAGS)
    evaluates = (flags & EVALUATE) != 0
    writes_x = (flags & WRITES_X) != 0
    writes_e = (flags & WRITES_E) != 0
    at_e = (flags & AT_E) != 0
    if p_out is None:
        m_live = only(m_live, (flags & EVALUATE) == 0)
    a_x = coefficient(p_row, A_X, writes_x)
    b_0 = coefficient(p_row, B_0, writes_x)
    p = coefficient(p_row, P, evaluates)
    if HAS_E:
        a_e = coefficient(p_row, A_E, writes_x)
        d_x = coefficient(p_row, D_X, writes_e)
        d_e = coefficient(p_row, D_E, writes_e)
        g_0 = coefficient(p_row, G_0, writes_e)
    if p_m is not None:
        writes_m = (flags & WRITES_M) != 0
        c_in = coefficient(p_row, C_IN_NEXT, writes_m)
    if RAW:
        u = coefficient(p_row, U, evaluates)
        b_raw = coefficient(p_row, B_RAW, writes_x)
        if HAS_E:
            g_raw = coefficient(p_row, G_RAW, writes_e)
            d_new = coefficient(p_row, D_NEW, writes_e)
    n_terms = integer(p_row, N_TERMS)

    # -- x, e, h -----------------------------------------------------------------------------------
    reads_x = is_read(a_x)
    reads_point = is_read(p)
    if RAW:
        reads_point = reads_point | is_read(u)
        if HAS_E:  # x' is x where the row leaves it
            reads_x = reads_x | (is_read(d_new) & ((flags & WRITES_X) == 0))
    if PRODUCTS > 0:
        operands = operands_of_products(p_row, evaluates, writes_x, writes_e, PRODUCTS, PRODUCT_AT)
        reads_point = reads_point | (((operands >> OF_POINT) & 1) != 0)
        reads_x = reads_x | (((operands >> OF_X) & 1) != 0)
        reads_x = reads_x | (((operands >> OF_NEW) & 1) != 0) & ((flags & WRITES_X) == 0)
    if HAS_E:
        reads_x = reads_x | is_read(d_x) | (reads_point & ((flags & AT_E) == 0))
        reads_e = is_read(a_e) | is_read(d_e) | (reads_point & at_e)
        if PRODUCTS > 0:
            reads_e = reads_e | (((operands >> OF_E) & 1) != 0)
    else:
        reads_x = reads_x | reads_point
    if p_m is not None:
        reads_x = reads_x | (is_read(c_in) & ((flags & (WRITES_X + WRITES_E)) == 0))
    if PUSHES_X:
        push_x = integer(p_row, PUSH_X)
        reads_x = reads_x | (push_x >= 0)
    x = widen(tl.load(p_x + o, mask=only(m_live, reads_x), other=0.0), T)
    point = x
    if HAS_E:
        e = widen(tl.load(p_e + o, mask=only(m_live, reads_e), other=0.0), T)
        point = tl.where(at_e, e, x)
    h = tl.zeros([SAMPLES, COLS], T)
    if p_out is not None:
        if OUT_UNIT == 0:
            out_stride = n
            o_out = o
        else:
            out_stride = out_units.to(tl.int64) * OUT_UNIT
            o_out = o_b * out_stride + o_c
        h = form(p_row, p_out, o_out, batch * out_stride, p, point, evaluates, m_live, scalars,
                 bank, T, SCALARS > 0, BRANCHES, BRANCH_AT, PRODUCTS, PRODUCT_AT)  # fmt: skip
        y = h
        if p_scale is not None:
            thresholds = (flags & (EVALUATE + THRESHOLD)) == EVALUATE + THRESHOLD
            s = tl.load(p_scale + i_b)
            h = tl.where(thresholds, divide(clip(h, -s, s), s), h)
        if CLIPS:
            clips = (flags & (EVALUATE + CLIP)) == EVALUATE + CLIP
            clipped = clip(h, tl.load(p_row + LO), tl.load(p_row + HI))
            h = tl.where(clips, clipped, h)
        if RAW:  # where (u, v) is (0, 1), 1 h is h
            v = tl.load(p_row + V)
            h = add(u, point, tl.where(is_read(v), v * h, tl.zeros_like(h)))

    x_next = tl.zeros([SAMPLES, COLS], T)
    e_next = x_next
    x_next = add(a_x, x, x_next)
    if HAS_E:
        x_next = add(a_e, e, x_next)
        e_next = add(d_x, x, e_next)
        e_next = add(d_e, e, e_next)
        e_next = add(g_0, h, e_next, scaled(g_0, p_row, SCALAR_G, scalars, SCALARS > 0))
    x_next = add(b_0, h, x_next, scaled(b_0, p_row, SCALAR_B, scalars, SCALARS > 0))
    if RAW and p_out is not None:
        x_next = add(b_raw, y, x_next)
        if HAS_E:
            e_next = add(g_raw, y, e_next)

    # -- history -----------------------------------------------------------------------------------
    if p_history is not None:
        for k in tl.static_range(TERMS):
            b_k = coefficient(p_row, TERM_AT + k * TERM_WIDTH + PAST_B, writes_x & (k < n_terms))
            reads = is_read(b_k)
            if HAS_E:
                g_k = coefficient(
                    p_row, TERM_AT + k * TERM_WIDTH + PAST_G, writes_e & (k < n_terms)
                )
                reads = reads | is_read(g_k)
            slot = integer(p_row, TERM_AT + k * TERM_WIDTH + SLOT)
            p_slot = p_history + slot.to(tl.int64) * total
            past = widen(tl.load(p_slot + o, mask=only(m_live, reads), other=0.0), T)
            x_next = add(b_k, past, x_next)
            if HAS_E:
                e_next = add(g_k, past, e_next)

    # -- noise -------------------------------------------------------------------------------------
    if PRODUCTS > 0:
        xi = x_next  # where there is none
    if p_xi is not None or MOST_DRAWS > 0:
        c = coefficient(p_row, C, writes_x)
        reads = is_read(c)
        if HAS_E:
            c_e = coefficient(p_row, C_E, writes_e)
            reads = reads | is_read(c_e)
        if PRODUCTS > 0:
            reads = reads | (((operands >> OF_XI) & 1) != 0)
        if p_xi is not None:
            xi = widen(tl.load(p_xi + o, mask=only(m_live, reads), other=0.0), T)
        else:
            draws = integer(p_row, DRAWS)
            if OWN_ROW and SAMPLES > 1:
                xi = drawn(
                    p_row, p_seeds, i_seed, i_c, first_quad, draws, T, MOST_DRAWS, SAMPLES, COLS
                )
            else:
                xi = tl.zeros([SAMPLES, COLS], T)
                if reads:  # uniform over the program
                    xi = drawn(
                        p_row, p_seeds, i_seed, i_c, first_quad, draws, T, MOST_DRAWS, SAMPLES, COLS
                    )
        x_next = add(c, xi, x_next, scaled(c, p_row, SCALAR_C, scalars, SCALARS > 0))
        if HAS_E:
            e_next = add(c_e, xi, e_next, scaled(c_e, p_row, SCALAR_CE, scalars, SCALARS > 0))

    # -- read-only inputs --------------------------------------------------------------------------
    if p_bank is not None:
        n_extras = integer(p_row, N_EXTRAS)
        for i in tl.static_range(EXTRAS):
            r = coefficient(p_row, EXTRA_AT + i * EXTRA_WIDTH + R, writes_x & (i < n_extras))
            reads = is_read(r)
            if HAS_E:
                s = coefficient(p_row, EXTRA_AT + i * EXTRA_WIDTH + S, writes_e & (i < n_extras))
                reads = reads | is_read(s)
            entry = integer(p_row, EXTRA_AT + i * EXTRA_WIDTH + ENTRY).to(tl.int64)
            p_entry = p_bank + entry * bank[2]
            extra = tl.load(p_entry + bank[1], mask=only(m_live, reads), other=0.0)
            extra = widen(extra, T)
            x_next = add(r, extra, x_next)
            if HAS_E:
                e_next = add(s, extra, e_next)

    # -- products, and x' in e' --------------------------------------------------------------------
    if PRODUCTS > 0:
        e_operand = x
        if HAS_E:
            e_operand = e
        slots = (p_history, o, total)
        x_next = add_products(x_next, INTO_X, writes_x, p_row, (x, e_operand, h, xi, point, x),
                              slots, bank, m_live, T, PRODUCTS, PRODUCT_AT)  # fmt: skip
    if HAS_E:
        if RAW or PRODUCTS > 0:
            x_new = tl.where(writes_x, x_next, x)
        if RAW:
            e_next = add(d_new, x_new, e_next)
        if PRODUCTS > 0:
            e_next = add_products(e_next, INTO_E, writes_e, p_row, (x, e, h, xi, point, x_new),
                                  slots, bank, m_live, T, PRODUCTS, PRODUCT_AT)  # fmt: skip

    # -- stores ------------------------------------------------------------------------------------
    # Vectors of 16-bit and of 32-bit elements differ in length, so an element may be stored by
    # another thread than loaded it: all threads have loaded before one stores.
    tl.debug_barrier()
    # m' is formed from what the registers hold, which for a 16-bit state is rounded
    x_stored = narrow(x_next, STATE)
    tl.store(p_x + o, x_stored, mask=only(m_live, writes_x))
    if p_m is not None:
        point = tl.where(writes_x, widen(x_stored, T), x)
    if HAS_E:
        e_stored = narrow(e_next, STATE)
        tl.store(p_e + o, e_stored, mask=only(m_live, writes_e))
        if p_m is not None:
            point = tl.where(writes_e, widen(e_stored, T), point)
    if p_history is not None and p_out is not None:
        push = integer(p_row, PUSH)
        p_slot = p_history + tl.maximum(push, 0).to(tl.int64) * total
        tl.store(p_slot + o, narrow(h, STATE), mask=only(m_live, push >= 0))
    if PUSHES_X:
        p_slot = p_history + tl.maximum(push_x, 0).to(tl.int64) * total
        tl.store(p_slot + o, narrow(x, STATE), mask=only(m_live, push_x >= 0))
    if p_m is not None:
        # zeros at c_in = 0, whatever the point holds
        m = tl.where(is_read(c_in), c_in * point, tl.zeros_like(point))
        m = narrow(m, p_m.dtype.element_ty)
        for copy in tl.static_range(COPIES):
            tl.store(p_m + copy * total + o, m, mask=only(m_live, writes_m))
