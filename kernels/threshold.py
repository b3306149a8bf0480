# SPDX-License-Identifier: Apache-2.0
"""The scale s of dynamic thresholding, of each sample, in Triton.

    s = max(low + weight (high - low), floor)         h <- clip(h, -s, s) / s in `stage.py`

low and high are the order statistics of the sample's n magnitudes |h| of ranks r and r + 1, where
r + weight = quantile (n - 1), in float64. They are exact: magnitudes order as their bits do with
the sign cleared, NaN last, so the bits of `low` are found from the top, 4 in each pass over the
sample, by counting the magnitudes that share the bits found so far; 8 passes in float32, 16 in
float64. The last pass also meets `high`: another magnitude of the same bits, of the next digit that
occurs, or else the least of those that differ further up.

h is formed again in every pass, by the code that forms it for the stage, so nothing but s is
written; after the first pass what is read lies in a cache, but for the largest samples. s depends
on nothing but the sample's h: not on its place in the batch, nor on the tile.
"""

import triton
import triton.language as tl

from .columns import AT_E, EVALUATE, FLAGS, FLOOR, THRESHOLD, P
from .stage import _form, _integer, _only, _reads, _row_of, _widen

_DIGIT = tl.constexpr(4)  # bits settled in a pass
_RADIX = tl.constexpr(16)
_BINS = tl.constexpr(32)  # the fewest tl.histogram has; _RADIX is the bin of what is not counted


@triton.jit(do_not_specialize=["row", "rows", "batch", "size_units", "out_units"])
def scale_kernel(
    p_scale,  # [B] in the arithmetic type: s, written for samples whose row thresholds
    p_quantiles,  # float64 [rows]
    p_x,  # as in stage_kernel, here and below
    p_e,
    p_out,
    p_table,
    p_index,
    p_row_index,
    row,
    rows,
    batch,
    size_units,
    out_units,
    UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    BRANCHES: tl.constexpr,
    BRANCH_AT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
):
    """The kernel; see the module. Grid: B.

    A sample whose row lies outside the table, or evaluates or thresholds nothing, has no scale.
    """
    T: tl.constexpr = p_table.dtype.element_ty
    BITS: tl.constexpr = T.primitive_bitwidth - 1  # of a key, which is not negative
    KEY: tl.constexpr = tl.int64 if BITS == 63 else tl.int32
    MOST: tl.constexpr = 2**BITS - 1
    PASSES: tl.constexpr = (BITS + _DIGIT - 1) // _DIGIT

    n = size_units.to(tl.int64) * UNIT
    i_b = tl.program_id(0).to(tl.int64)
    i_row = _row_of(row, p_row_index, p_index, i_b)
    m_row = (i_row >= 0) & (i_row < rows)
    i_row = tl.where(m_row, i_row, 0)
    p_row = p_table + i_row * WIDTH
    flags = _integer(p_row, FLAGS)
    thresholds = (flags & (EVALUATE + THRESHOLD)) == EVALUATE + THRESHOLD
    if m_row & thresholds:
        at_e = (flags & AT_E) != 0
        p = tl.load(p_row + P)
        out_stride = n
        if OUT_UNIT > 0:
            out_stride = out_units.to(tl.int64) * OUT_UNIT
        bins, o = tl.arange(0, _BINS), tl.arange(0, COLS)

        position = tl.load(p_quantiles + i_row) * (n - 1).to(tl.float64)
        first = position.to(tl.int64)
        weight = position - first.to(tl.float64)

        rank = first  # among the magnitudes that share the prefix
        prefix = tl.full([], 0, KEY)
        high = prefix
        shift = tl.full([], PASSES * _DIGIT, KEY)
        for _ in range(PASSES):
            shift -= _DIGIT
            counts = tl.zeros([_BINS], tl.int64)
            above = tl.full([COLS], MOST, KEY)
            i_c = tl.full([], 0, tl.int64)
            while i_c < tl.cdiv(n, COLS):  # older interpreters count no range up to a tensor
                begin = i_c * COLS
                m_live = o < tl.minimum(n - begin, COLS).to(tl.int32)
                m_x = _only(m_live, _reads(p) & ((flags & AT_E) == 0))
                point = _widen(tl.load(p_x + i_b * n + begin + o, mask=m_x, other=0.0), T)
                if p_e is not None:
                    m_e = _only(m_live, _reads(p) & at_e)
                    e = _widen(tl.load(p_e + i_b * n + begin + o, mask=m_e, other=0.0), T)
                    point = tl.where(at_e, e, point)
                p_tile = p_out + i_b * out_stride + begin
                h = _form(p_tile, o, batch * out_stride, p_row, p, point, thresholds, m_live, T,
                          BRANCHES, BRANCH_AT)  # fmt: skip
                key = h.to(KEY, bitcast=True) & MOST
                digit = (key >> shift) - (prefix << _DIGIT)
                shares = m_live & (digit >= 0) & (digit < _RADIX)
                counted = tl.where(shares, digit, _RADIX).to(tl.int32)
                counts += tl.histogram(counted, _BINS).to(tl.int64)
                above = tl.minimum(above, tl.where(m_live & (digit >= _RADIX), key, MOST))
                i_c += 1

            # the digit in whose bin the rank falls, and how many lie below and in that bin
            reached = tl.cumsum(counts, 0)
            chosen = tl.sum((reached <= rank).to(tl.int32), 0)
            rank -= tl.max(tl.where(reached <= rank, reached, 0), 0)
            sharing = tl.sum(tl.where(bins == chosen, counts, 0), 0)
            occurs = (bins > chosen) & (bins < _RADIX) & (counts > 0)
            following = tl.min(tl.where(occurs, bins, _RADIX), 0)
            prefix = prefix << _DIGIT
            high = tl.where(following < _RADIX, prefix + following, tl.min(above, 0))
            prefix += chosen
            high = tl.where(rank + 1 < sharing, prefix, high)  # of use after the last pass

        high = tl.where(weight == 0, prefix, high)
        low_value = prefix.to(T, bitcast=True).to(tl.float64)
        high_value = high.to(T, bitcast=True).to(tl.float64)
        # rounded before it is compared: the larger rounds to the larger. NaN gives the floor.
        s = (low_value + weight * (high_value - low_value)).to(T)
        floor = tl.load(p_row + FLOOR)
        tl.store(p_scale + i_b, tl.where(s > floor, s, floor))
