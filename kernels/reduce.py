# SPDX-License-Identifier: Apache-2.0
"""The measures of a row: what fills the numbers S of each sample before the update, in Triton.

    S[b, into] = offset + weight ratio^power            ratio = num / den, or num; 0 where den is 0

A reduction is in float64 and in one order on every backend: lane l of 1024 adds the elements l,
l + 1024, l + 2048, ... of the sample, each by one fma; then the lanes are halved pairwise. It
depends on nothing but the sample. A standard deviation takes the mean first. A quantile is
`quantile.py`'s.

A program has one sample and makes the row's measures in their order. Operands are what `stage.py`
would read, y without the scalars of this row.
"""

import triton
import triton.language as tl

from .columns import (
    DEN,
    DOT,
    FIRST,
    FIRST_AT,
    KIND,
    MEASURE_INTO,
    MEASURE_WEIGHT,
    MEASURE_WIDTH,
    N_MEASURES,
    NORM,
    NUM,
    OFFSET,
    ORDER,
    POWER,
    RANK,
    SECOND,
    SECOND_AT,
    STD,
    SUM,
)
from .quantile import quantile, tile
from .row import integer, row_of

_LANES = tl.constexpr(1024)


@triton.jit
def raised(value, power):
    """value^power in float64.

    The powers that plans use are spelt out, each operation of them rounded once; the others go
    through exp2 and log2 and are right to a few units in the last place.
    """
    whole = tl.floor(power) == power
    odd = whole & (tl.floor(power * 0.5) * 2.0 != power)
    size = tl.exp2(power * tl.log2(tl.abs(value)))
    below = tl.where(whole, tl.where(odd, -size, size), float("nan"))
    result = tl.where(value < 0.0, below, size)
    result = tl.where(power == 0.0, 1.0, result)
    result = tl.where(power == 1.0, value, result)
    result = tl.where(power == 2.0, value * value, result)
    result = tl.where(power == 0.5, tl.sqrt(value), result)
    result = tl.where(power == -0.5, 1.0 / tl.sqrt(value), result)
    return tl.where(power == -1.0, 1.0 / value, result)


@triton.jit
def halved(lanes):
    """The sum of the lanes, pairwise: lane l takes lane l + 512, then l + 256, ..."""
    for k in tl.static_range(9):
        lanes = tl.sum(tl.reshape(lanes, [2, _LANES >> (k + 1)]), 0)
    return tl.sum(lanes, 0)


@triton.jit
def reduction(p_reduction, p_row, registers, sizes, T: tl.constexpr, MOST_DRAWS: tl.constexpr,
              BRANCHES: tl.constexpr, BRANCH_AT: tl.constexpr, PRODUCTS: tl.constexpr,
              PRODUCT_AT: tl.constexpr):  # fmt: skip
    """One number of the sample, float64.

    Args:
        p_reduction: Its columns, float64.
        registers, sizes: See `quantile.tile`.
    """
    n = sizes[1]
    scalars = (p_reduction, 0, 0)  # y is without them
    kind = integer(p_reduction, KIND)
    a, b = integer(p_reduction, FIRST), integer(p_reduction, SECOND)
    a_at = integer(p_reduction, FIRST_AT).to(tl.int64)
    b_at = integer(p_reduction, SECOND_AT).to(tl.int64)
    result = tl.full([], 0.0, tl.float64)
    if kind == ORDER:
        result = quantile(a, a_at, tl.load(p_reduction + RANK), p_row, registers, sizes, scalars,
                          T, False, MOST_DRAWS, BRANCHES, BRANCH_AT, PRODUCTS, PRODUCT_AT,
                          _LANES)  # fmt: skip
    else:
        mean = tl.full([], 0.0, tl.float64)
        passes = tl.where(kind == STD, 2, 1)
        i_pass = tl.full([], 0, tl.int32)
        while i_pass < passes:
            adds = (kind == SUM) | ((kind == STD) & (i_pass == 0))
            lanes = tl.zeros([_LANES], tl.float64)
            i_c = tl.full([], 0, tl.int64)
            while i_c < tl.cdiv(n, _LANES):
                value, m_live = tile(a, a_at, i_c, p_row, registers, sizes, scalars, T, False,
                                     MOST_DRAWS, BRANCHES, BRANCH_AT, PRODUCTS, PRODUCT_AT,
                                     _LANES)  # fmt: skip
                value = tl.where(m_live, value.to(tl.float64) - mean, 0.0)
                times = tl.where(adds, tl.full([_LANES], 1.0, tl.float64), value)
                if (kind == DOT) & (b >= 0):
                    other, _ = tile(b, b_at, i_c, p_row, registers, sizes, scalars, T, False,
                                    MOST_DRAWS, BRANCHES, BRANCH_AT, PRODUCTS, PRODUCT_AT,
                                    _LANES)  # fmt: skip
                    times = other.to(tl.float64)
                lanes = tl.fma(value, times, lanes)
                i_c += 1
            result = halved(lanes)
            mean = result / n.to(tl.float64)
            i_pass += 1
        result = tl.where(kind == STD, result / (n - 1).to(tl.float64), result)
        result = tl.where((kind == STD) | (kind == NORM), tl.sqrt(result), result)
    return result


@triton.jit(do_not_specialize=["row", "rows", "batch", "size_units", "out_units", "first_quad"])
def measure_kernel(
    p_scalars,  # S, [B, SCALARS] in the arithmetic type: the columns that the row's measures name
    p_exact,  # float64 [rows, WIDTH]: the table before it is rounded
    p_x,  # as in stage_kernel, here and below
    p_e,
    p_history,
    p_out,
    p_xi,
    p_bank,
    p_seeds,
    p_table,
    p_index,
    p_row_index,
    row,
    rows,
    batch,
    size_units,
    out_units,
    first_quad,
    UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    BRANCHES: tl.constexpr,
    BRANCH_AT: tl.constexpr,
    PRODUCTS: tl.constexpr,
    PRODUCT_AT: tl.constexpr,
    MEASURE_AT: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    MOST_DRAWS: tl.constexpr,
    SCALARS: tl.constexpr,
):
    """The kernel; see the module. Grid: B. A sample whose row lies outside the table has none."""
    T: tl.constexpr = p_table.dtype.element_ty

    n = size_units.to(tl.int64) * UNIT
    i_b = tl.program_id(0).to(tl.int64)
    i_row = row_of(row, p_row_index, p_index, i_b)
    m_row = (i_row >= 0) & (i_row < rows)
    i_row = tl.where(m_row, i_row, 0)
    p_row = p_table + i_row * WIDTH
    count = tl.where(m_row, integer(p_row, N_MEASURES), 0)
    out_stride = n
    if OUT_UNIT > 0:
        out_stride = out_units.to(tl.int64) * OUT_UNIT
    bank_batch = batch
    if SHARED:
        bank_batch = 1
    registers = (p_x, p_e, p_history, p_bank, p_out, p_xi, p_seeds, first_quad)
    sizes = (i_b, n, batch, out_stride, bank_batch)
    i_measure = tl.full([], 0, tl.int32)
    while i_measure < count:
        p_measure = p_exact + i_row * WIDTH + MEASURE_AT + i_measure * MEASURE_WIDTH
        ratio = tl.full([], 0.0, tl.float64)
        i_part = tl.full([], 0, tl.int32)
        while i_part < 2:  # the numerator; then what divides it
            p_part = p_measure + NUM + i_part * (DEN - NUM)
            if integer(p_part, KIND) >= 0:
                value = reduction(p_part, p_row, registers, sizes, T, MOST_DRAWS, BRANCHES,
                                  BRANCH_AT, PRODUCTS, PRODUCT_AT)  # fmt: skip
                quotient = tl.where(value == 0.0, 0.0, ratio / value)
                ratio = tl.where(i_part == 0, value, quotient)
            i_part += 1
        power = raised(ratio, tl.load(p_measure + POWER))
        s = tl.fma(tl.load(p_measure + MEASURE_WEIGHT), power, tl.load(p_measure + OFFSET))
        column = integer(p_measure, MEASURE_INTO)
        tl.store(p_scalars + i_b * SCALARS + column, s.to(T))
        i_measure += 1
