# SPDX-License-Identifier: Apache-2.0
"""A quantile of the n magnitudes of one operand of a sample, exact but for its interpolation.

    quantile = low + weight (high - low)                in float64

low and high are the order statistics of ranks r and r + 1, where r + weight = rank (n - 1), in
float64. They are exact: magnitudes order as their bits do with the sign cleared, NaN last, so the
bits of `low` are found from the top, 4 in each pass over the sample, by counting the magnitudes
that share the bits found so far; 8 passes in float32, 16 in float64. The last pass also meets
`high`: another magnitude of the same bits, of the next digit that occurs, or else the least of
those that differ further up.

The operand is read again in every pass (y is formed, noise is made); after the first pass it lies
in a cache, but for the largest samples. The result depends on nothing but the sample: not on its
place in the batch, nor on the tile.
"""

import triton
import triton.language as tl

from .columns import (
    AT_E,
    DRAWS,
    EVALUATE,
    FLAGS,
    OF_BANK,
    OF_E,
    OF_OUT,
    OF_SLOT,
    OF_XI,
    OF_Y,
    P,
)
from .row import coefficient, drawn, form, integer, is_read, only, widen

_DIGIT = tl.constexpr(4)  # bits settled in a pass
_RADIX = tl.constexpr(16)
_BINS = tl.constexpr(32)  # the fewest tl.histogram has; _RADIX is the bin of what is not counted


@triton.jit
def tile(of, at, i_c, p_row, registers, sizes, scalars, T: tl.constexpr, SCALED: tl.constexpr,
         MOST_DRAWS: tl.constexpr, BRANCHES: tl.constexpr, BRANCH_AT: tl.constexpr,
         PRODUCTS: tl.constexpr, PRODUCT_AT: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Elements i_c COLS .. of one operand of a sample, [COLS] in T; 0 beyond its end.

    Args:
        of, at: The operand's code and its slot, entry or branch.
        registers: (p_x, p_e, p_history, p_bank, p_out, p_xi, p_seeds, first_quad) as in
            `stage_kernel`.
        sizes: (i_b, n, batch, out_stride, bank_batch).
        scalars, SCALED: See `row.scaled`; of y.

    Returns:
        The values and which of them exist.
    """
    p_x, p_e, p_history, p_bank, p_out, p_xi, p_seeds, first_quad = registers
    i_b, n, batch, out_stride, bank_batch = sizes
    begin = i_c * COLS
    o = tl.arange(0, COLS)
    m_live = o < tl.minimum(n - begin, COLS).to(tl.int32)
    bank_start = tl.where(bank_batch > 1, i_b * n, 0)
    value = tl.zeros([COLS], T)
    if of == OF_Y:
        flags = integer(p_row, FLAGS)
        evaluates = (flags & EVALUATE) != 0
        at_e = (flags & AT_E) != 0
        p = coefficient(p_row, P, evaluates)
        reads_point = is_read(p)
        if PRODUCTS > 0:  # they may multiply the point
            reads_point = evaluates
        m_x = only(m_live, reads_point & ((flags & AT_E) == 0))
        point = widen(tl.load(p_x + i_b * n + begin + o, mask=m_x, other=0.0), T)
        if p_e is not None:
            m_e = only(m_live, reads_point & at_e)
            e = widen(tl.load(p_e + i_b * n + begin + o, mask=m_e, other=0.0), T)
            point = tl.where(at_e, e, point)
        bank = (p_bank, bank_start + begin + o, bank_batch * n)
        value = form(p_row, p_out + i_b * out_stride + begin, o, batch * out_stride, p, point,
                     evaluates, m_live, scalars, bank, T, SCALED, BRANCHES, BRANCH_AT, PRODUCTS,
                     PRODUCT_AT)  # fmt: skip
    elif of == OF_OUT:
        if p_out is not None:
            p_tile = p_out + (at * batch + i_b) * out_stride + begin
            value = widen(tl.load(p_tile + o, mask=m_live, other=0.0), T)
    elif (of == OF_XI) & (p_xi is None):
        if MOST_DRAWS > 0:
            i_seed = i_b + tl.zeros([1, 1], tl.int64)
            xi = drawn(p_row, p_seeds, i_seed, i_c, first_quad, integer(p_row, DRAWS), T,
                       MOST_DRAWS, 1, COLS)  # fmt: skip
            value = tl.reshape(xi, [COLS])
    else:
        p_from = p_x + i_b * n
        if p_e is not None:
            p_from = tl.where(of == OF_E, p_e + i_b * n, p_from)
        if p_history is not None:
            p_from = tl.where(of == OF_SLOT, p_history + (at * batch + i_b) * n, p_from)
        if p_bank is not None:
            p_from = tl.where(of == OF_BANK, p_bank + at * bank_batch * n + bank_start, p_from)
        if p_xi is not None:
            p_from = tl.where(of == OF_XI, p_xi + i_b * n, p_from)
        value = widen(tl.load(p_from + begin + o, mask=m_live, other=0.0), T)
    return value, m_live


@triton.jit
def quantile(of, at, rank, p_row, registers, sizes, scalars, T: tl.constexpr,
             SCALED: tl.constexpr, MOST_DRAWS: tl.constexpr, BRANCHES: tl.constexpr,
             BRANCH_AT: tl.constexpr, PRODUCTS: tl.constexpr, PRODUCT_AT: tl.constexpr,
             COLS: tl.constexpr):  # fmt: skip
    """The quantile at `rank`, a float64 in (0, 1], of the magnitudes of what `tile` reads."""
    BITS: tl.constexpr = T.primitive_bitwidth - 1  # of a key, which is not negative
    KEY: tl.constexpr = tl.int64 if BITS == 63 else tl.int32
    MOST: tl.constexpr = 2**BITS - 1
    PASSES: tl.constexpr = (BITS + _DIGIT - 1) // _DIGIT

    n = sizes[1]
    bins = tl.arange(0, _BINS)
    position = rank * (n - 1).to(tl.float64)
    first = position.to(tl.int64)
    weight = position - first.to(tl.float64)

    left = first  # the rank among the magnitudes that share the prefix
    prefix = tl.full([], 0, KEY)
    high = prefix
    shift = tl.full([], PASSES * _DIGIT, KEY)
    for _ in range(PASSES):
        shift -= _DIGIT
        counts = tl.zeros([_BINS], tl.int64)
        above = tl.full([COLS], MOST, KEY)
        i_c = tl.full([], 0, tl.int64)
        while i_c < tl.cdiv(n, COLS):  # older interpreters count no range up to a tensor
            value, m_live = tile(of, at, i_c, p_row, registers, sizes, scalars, T, SCALED,
                                 MOST_DRAWS, BRANCHES, BRANCH_AT, PRODUCTS, PRODUCT_AT,
                                 COLS)  # fmt: skip
            key = value.to(KEY, bitcast=True) & MOST
            digit = (key >> shift) - (prefix << _DIGIT)
            shares = m_live & (digit >= 0) & (digit < _RADIX)
            counted = tl.where(shares, digit, _RADIX).to(tl.int32)
            counts += tl.histogram(counted, _BINS).to(tl.int64)
            above = tl.minimum(above, tl.where(m_live & (digit >= _RADIX), key, MOST))
            i_c += 1

        # the digit in whose bin the rank falls, and how many lie below and in that bin
        reached = tl.cumsum(counts, 0)
        chosen = tl.sum((reached <= left).to(tl.int32), 0)
        left -= tl.max(tl.where(reached <= left, reached, 0), 0)
        sharing = tl.sum(tl.where(bins == chosen, counts, 0), 0)
        occurs = (bins > chosen) & (bins < _RADIX) & (counts > 0)
        following = tl.min(tl.where(occurs, bins, _RADIX), 0)
        prefix = prefix << _DIGIT
        high = tl.where(following < _RADIX, prefix + following, tl.min(above, 0))
        prefix += chosen
        high = tl.where(left + 1 < sharing, prefix, high)  # of use after the last pass

    high = tl.where(weight == 0, prefix, high)
    low_value = prefix.to(T, bitcast=True).to(tl.float64)
    high_value = high.to(T, bitcast=True).to(tl.float64)
    return low_value + weight * (high_value - low_value)
