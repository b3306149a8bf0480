# SPDX-License-Identifier: Apache-2.0
"""The scale s of dynamic thresholding, of each sample, in Triton.

    s = min(max(quantile of |y|, floor), ceiling)       h = clip(y, -s, s) / s in `stage.py`

y is formed again in every pass over the sample, by the code that forms it for the stage, so nothing
but s is written.
"""

import triton
import triton.language as tl

from .columns import CEILING, EVALUATE, FLAGS, FLOOR, OF_Y, QUANTILE, THRESHOLD
from .quantile import quantile
from .row import integer, row_of


@triton.jit(do_not_specialize=["row", "rows", "batch", "size_units", "out_units"])
def scale_kernel(
    p_scale,  # [B] in the arithmetic type: s, written for samples whose row thresholds
    p_exact,  # float64 [rows, WIDTH]: the table before it is rounded
    p_x,  # as in stage_kernel, here and below
    p_e,
    p_out,
    p_bank,
    p_table,
    p_index,
    p_row_index,
    p_scalars,
    row,
    rows,
    batch,
    size_units,
    out_units,
    UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    BRANCHES: tl.constexpr,
    BRANCH_AT: tl.constexpr,
    PRODUCTS: tl.constexpr,
    PRODUCT_AT: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    SCALARS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The kernel; see the module. Grid: B.

    A sample whose row lies outside the table, or evaluates or thresholds nothing, has no scale.
    """
    T: tl.constexpr = p_table.dtype.element_ty

    n = size_units.to(tl.int64) * UNIT
    i_b = tl.program_id(0).to(tl.int64)
    i_row = row_of(row, p_row_index, p_index, i_b)
    m_row = (i_row >= 0) & (i_row < rows)
    i_row = tl.where(m_row, i_row, 0)
    p_row = p_table + i_row * WIDTH
    flags = integer(p_row, FLAGS)
    thresholds = (flags & (EVALUATE + THRESHOLD)) == EVALUATE + THRESHOLD
    if m_row & thresholds:
        out_stride = n
        if OUT_UNIT > 0:
            out_stride = out_units.to(tl.int64) * OUT_UNIT
        bank_batch = batch
        if SHARED:
            bank_batch = 1
        registers = (p_x, p_e, p_x, p_bank, p_out, p_x, p_x, 0)  # as far as y reads them
        sizes = (i_b, n, batch, out_stride, bank_batch)
        rank = tl.load(p_exact + i_row * WIDTH + QUANTILE)
        s = quantile(OF_Y, 0, rank, p_row, registers, sizes, (p_scalars, i_b, SCALARS), T,
                     SCALARS > 0, 0,
                     BRANCHES, BRANCH_AT, PRODUCTS, PRODUCT_AT, COLS)  # fmt: skip
        # rounded before it is compared: the larger rounds to the larger. NaN gives the floor.
        s = s.to(T)
        floor, ceiling = tl.load(p_row + FLOOR), tl.load(p_row + CEILING)
        s = tl.where(s > floor, s, floor)
        tl.store(p_scale + i_b, tl.where(s < ceiling, s, ceiling))
