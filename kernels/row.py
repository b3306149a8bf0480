# SPDX-License-Identifier: Apache-2.0
"""What the kernels share: numbers of a row, storage types, and the sums that a row forms.

Most of a row's numbers are scalars where a program runs one row, and [SAMPLES, 1] where the
samples of a tile have rows of their own; the functions take both.
"""

import triton
import triton.language as tl

from .columns import (
    AT,
    BANK,
    BRANCH_WIDTH,
    INTO,
    INTO_E,
    INTO_X,
    INTO_Y,
    N_PRODUCTS,
    OF,
    OF_BANK,
    OF_E,
    OF_H,
    OF_POINT,
    OF_SLOT,
    OF_X,
    OF_XI,
    PRODUCT_WIDTH,
    SCALAR_K,
    STREAM_1,
    STREAM_2,
    WEIGHT,
    XI_1,
    XI_2,
    K,
)
from .philox import normals


@triton.jit
def widen(value, T: tl.constexpr):
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
def narrow(value, storage: tl.constexpr):
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
def is_read(c):
    """Whether a coefficient is not 0."""
    # by way of an integer, because the interpreter, where it spreads the result of a scalar
    # comparison over a block, gives it the type of the operands
    return (c != 0).to(tl.int32) != 0


@triton.jit
def only(m_live, condition):
    """m_live & condition; a selection keeps the interpreter's mask one of booleans."""
    return tl.where(condition, m_live, tl.zeros_like(m_live))


@triton.jit
def add(c, value, total, weight=None):
    """fma(c, value, total); `total` itself, to the bit, where c is 0.

    Where `weight` is given it is what multiplies; c still says whether the value is read.
    """
    if weight is None:
        return tl.where(is_read(c), tl.fma(c, value, total), total)
    else:
        return tl.where(is_read(c), tl.fma(weight, value, total), total)


@triton.jit
def integer(p_row, COLUMN: tl.constexpr):
    return tl.load(p_row + COLUMN).to(tl.int32)


@triton.jit
def coefficient(p_row, COLUMN: tl.constexpr, used):
    value = tl.load(p_row + COLUMN)
    return tl.where(used, value, tl.zeros_like(value))


@triton.jit
def row_of(row, p_row_index, p_index, i_b):
    """The row that sample i_b runs, int64; it may lie outside the table."""
    i_row = row.to(tl.int64)
    if p_row_index is not None:
        i_row += tl.load(p_row_index)
    if p_index is not None:
        i_row = i_row + tl.load(p_index + i_b)
    return i_row


@triton.jit
def scaled(c, p_row, COLUMN: tl.constexpr, scalars, SCALED: tl.constexpr):
    """c times the number of the sample that the row's column names, rounded; c where it names none.

    Args:
        scalars: (p_scalars, i_b, columns of S).
        SCALED: Whether any row names one.
    """
    if SCALED:
        p_scalars, i_b, columns = scalars
        column = integer(p_row, COLUMN)
        number = tl.load(p_scalars + i_b * columns + tl.maximum(column, 0))
        return tl.where(column >= 0, c * number, c)
    else:
        return c


@triton.jit
def form(p_row, p_out, o_out, branch_stride, p, point, evaluates, m_live, scalars, bank,
         T: tl.constexpr, SCALED: tl.constexpr, BRANCHES: tl.constexpr, BRANCH_AT: tl.constexpr,
         PRODUCTS: tl.constexpr, PRODUCT_AT: tl.constexpr):  # fmt: skip
    """y = sum_g k_g out_g + p point + products into y, of `point`'s shape.

    Args:
        scalars, bank: See `scaled` and `factor`.
    """
    y = tl.zeros_like(point)
    for g in tl.static_range(BRANCHES):
        k_g = coefficient(p_row, BRANCH_AT + g * BRANCH_WIDTH + K, evaluates)
        p_branch = p_out + g * branch_stride
        out = tl.load(p_branch + o_out, mask=only(m_live, is_read(k_g)), other=0.0)
        weight = scaled(k_g, p_row, BRANCH_AT + g * BRANCH_WIDTH + SCALAR_K, scalars, SCALED)
        y = add(k_g, widen(out, T), y, weight)
    y = add(p, point, y)
    if PRODUCTS > 0:
        n_products = integer(p_row, N_PRODUCTS)
        for j in range(PRODUCTS):
            p_product = p_row + PRODUCT_AT + j * PRODUCT_WIDTH
            weight = weight_of(p_product, INTO_Y, evaluates & (j < n_products))
            y = add(weight, point, y, factor(p_product, weight, bank, m_live, T))
    return y


@triton.jit
def weight_of(p_product, SUM: tl.constexpr, used):
    """The weight of a product; 0 where it is not used or is added to another sum."""
    return coefficient(p_product, WEIGHT, used & (integer(p_product, INTO) == SUM))


@triton.jit
def factor(p_product, weight, bank, m_live, T: tl.constexpr):
    """weight * R, rounded: what a product multiplies its operand with.

    Args:
        bank: (p_bank, offsets in an entry, elements of an entry).
    """
    p_bank, o_bank, stride = bank
    p_entry = p_bank + integer(p_product, BANK).to(tl.int64) * stride
    entry = tl.load(p_entry + o_bank, mask=only(m_live, is_read(weight)), other=0.0)
    return weight * widen(entry, T)


@triton.jit
def add_products(total, SUM: tl.constexpr, used, p_row, operands, slots, bank, m_live,
                 T: tl.constexpr, PRODUCTS: tl.constexpr, PRODUCT_AT: tl.constexpr):  # fmt: skip
    """`total` and the products into it, in their order.

    Args:
        used: Whether the row forms this sum.
        operands: (x, e, h, xi, point, new). Anything stands for one that does not exist, and for
            `new` in the sum of x', which is that sum so far.
        slots: (p_history, offsets in a slot, elements of a slot).
        bank: See `factor`.
    """
    x, e, h, xi, point, new = operands
    p_history, o, slot_stride = slots
    p_bank, o_bank, entry_stride = bank
    n_products = integer(p_row, N_PRODUCTS)
    for j in range(PRODUCTS):
        p_product = p_row + PRODUCT_AT + j * PRODUCT_WIDTH
        weight = weight_of(p_product, SUM, used & (j < n_products))
        weighed = is_read(weight)
        of, at = integer(p_product, OF), integer(p_product, AT).to(tl.int64)
        operand = total
        if SUM == INTO_E:
            operand = new
        operand = tl.where(of == OF_X, x, operand)
        operand = tl.where(of == OF_H, h, operand)
        operand = tl.where(of == OF_POINT, point, operand)
        operand = tl.where(of == OF_E, e, operand)
        operand = tl.where(of == OF_XI, xi, operand)
        if p_history is not None:
            m_slot = only(m_live, weighed & (of == OF_SLOT))
            past = tl.load(p_history + at * slot_stride + o, mask=m_slot, other=0.0)
            operand = tl.where(of == OF_SLOT, widen(past, T), operand)
        m_entry = only(m_live, weighed & (of == OF_BANK))
        entry = tl.load(p_bank + at * entry_stride + o_bank, mask=m_entry, other=0.0)
        operand = tl.where(of == OF_BANK, widen(entry, T), operand)
        total = add(weight, operand, total, factor(p_product, weight, bank, m_live, T))
    return total


@triton.jit
def operands_of_products(p_row, evaluates, writes_x, writes_e, PRODUCTS: tl.constexpr,
                         PRODUCT_AT: tl.constexpr):  # fmt: skip
    """What the products of a row read: the bits 1 << code of their operands."""
    n_products = integer(p_row, N_PRODUCTS)
    found = n_products - n_products
    for j in range(PRODUCTS):
        p_product = p_row + PRODUCT_AT + j * PRODUCT_WIDTH
        into = integer(p_product, INTO)
        used = (into == INTO_Y) & evaluates | (into == INTO_X) & writes_x
        used = (used | (into == INTO_E) & writes_e) & (j < n_products)
        bit = tl.full([], 1, tl.int32) << integer(p_product, OF)
        found |= tl.where(is_read(coefficient(p_product, WEIGHT, used)), bit, 0)
    return found


@triton.jit
def clip(h, lo, hi):
    """NaN stays."""
    return tl.where(h < lo, lo, tl.where(h > hi, hi, h))


@triton.jit
def divide(a, b):
    """a / b, to nearest."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def drawn(p_row, p_seeds, i_b, i_c, first_quad, draws, T: tl.constexpr, MOST_DRAWS: tl.constexpr,
        SAMPLES: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """The row's own noise, [SAMPLES, COLS].

    Args:
        i_b: int64 [SAMPLES, 1], the samples.
        i_c: int64, the tile of a sample.
        first_quad: int64, added to the quads of the sample; None: 0.
        draws: The row's draws, of which MOST_DRAWS are made.
    """
    seed = tl.load(p_seeds + i_b)
    quad = i_c * (COLS // 4) + tl.arange(0, COLS // 4)[None, :].to(tl.int64)
    if first_quad is not None:
        quad += first_quad
    zero = tl.zeros([SAMPLES, COLS], T)
    stream = tl.load(p_row + STREAM_1).to(tl.int64).to(tl.uint32)
    z = normals(seed, stream, quad, SAMPLES, COLS).to(T)
    xi = tl.fma(tl.load(p_row + XI_1), z, zero)
    if MOST_DRAWS > 1:
        stream = tl.load(p_row + STREAM_2).to(tl.int64).to(tl.uint32)
        z = normals(seed, stream, quad, SAMPLES, COLS).to(T)
        xi = tl.where(draws > 1, tl.fma(tl.load(p_row + XI_2), z, xi), xi)
    return xi
