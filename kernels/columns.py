# SPDX-License-Identifier: Apache-2.0
"""Columns, flags and codes of a packed row as compile-time constants.

All are taken from `fastdiff.plans.layout`, the one place that knows them. A column of the head is
counted from the start of a row; one of a group, from the start of the entry it belongs to; one of
a reduction, from the first column of its measure's `num` or `den`.
"""

import triton.language as tl

import fastdiff.plans.layout as layout

EVALUATE = tl.constexpr(layout.EVALUATE)
AT_E = tl.constexpr(layout.AT_E)
WRITES_E = tl.constexpr(layout.WRITES_E)
WRITES_X = tl.constexpr(layout.WRITES_X)
CLIP = tl.constexpr(layout.CLIP)
THRESHOLD = tl.constexpr(layout.THRESHOLD)
WRITES_M = tl.constexpr(layout.WRITES_M)

# -- the head --------------------------------------------------------------------------------------

FLAGS = tl.constexpr(layout.HEAD.index("flags"))
PUSH = tl.constexpr(layout.HEAD.index("push"))
PUSH_X = tl.constexpr(layout.HEAD.index("push_x"))
DRAWS = tl.constexpr(layout.HEAD.index("draws"))
STREAM_1 = tl.constexpr(layout.HEAD.index("stream_1"))
STREAM_2 = tl.constexpr(layout.HEAD.index("stream_2"))
N_TERMS = tl.constexpr(layout.HEAD.index("n_terms"))
N_EXTRAS = tl.constexpr(layout.HEAD.index("n_extras"))
N_PRODUCTS = tl.constexpr(layout.HEAD.index("n_products"))
N_MEASURES = tl.constexpr(layout.HEAD.index("n_measures"))
P = tl.constexpr(layout.HEAD.index("p"))
U = tl.constexpr(layout.HEAD.index("u"))
V = tl.constexpr(layout.HEAD.index("v"))
LO = tl.constexpr(layout.HEAD.index("lo"))
HI = tl.constexpr(layout.HEAD.index("hi"))
QUANTILE = tl.constexpr(layout.HEAD.index("quantile"))
FLOOR = tl.constexpr(layout.HEAD.index("floor"))
CEILING = tl.constexpr(layout.HEAD.index("ceiling"))
A_X = tl.constexpr(layout.HEAD.index("a_x"))
A_E = tl.constexpr(layout.HEAD.index("a_e"))
B_0 = tl.constexpr(layout.HEAD.index("b_0"))
B_RAW = tl.constexpr(layout.HEAD.index("b_raw"))
C = tl.constexpr(layout.HEAD.index("c"))
D_X = tl.constexpr(layout.HEAD.index("d_x"))
D_E = tl.constexpr(layout.HEAD.index("d_e"))
D_NEW = tl.constexpr(layout.HEAD.index("d_new"))
G_0 = tl.constexpr(layout.HEAD.index("g_0"))
G_RAW = tl.constexpr(layout.HEAD.index("g_raw"))
C_E = tl.constexpr(layout.HEAD.index("c_e"))
XI_1 = tl.constexpr(layout.HEAD.index("xi_1"))
XI_2 = tl.constexpr(layout.HEAD.index("xi_2"))
C_IN_NEXT = tl.constexpr(layout.HEAD.index("c_in_next"))
SCALAR_B = tl.constexpr(layout.HEAD.index("scalar_b"))
SCALAR_G = tl.constexpr(layout.HEAD.index("scalar_g"))
SCALAR_C = tl.constexpr(layout.HEAD.index("scalar_c"))
SCALAR_CE = tl.constexpr(layout.HEAD.index("scalar_ce"))

# -- the groups; where all but the first begin the kernels' arguments say --------------------------

TERM_AT = tl.constexpr(layout.Layout().term_offset)
TERM_WIDTH = tl.constexpr(len(layout.TERM))
SLOT = tl.constexpr(layout.TERM.index("slot"))
PAST_B = tl.constexpr(layout.TERM.index("past_b"))
PAST_G = tl.constexpr(layout.TERM.index("past_g"))

BRANCH_WIDTH = tl.constexpr(len(layout.BRANCH))
K = tl.constexpr(layout.BRANCH.index("k"))
SCALAR_K = tl.constexpr(layout.BRANCH.index("scalar_k"))

EXTRA_WIDTH = tl.constexpr(len(layout.EXTRA))
ENTRY = tl.constexpr(layout.EXTRA.index("entry"))
R = tl.constexpr(layout.EXTRA.index("r"))
S = tl.constexpr(layout.EXTRA.index("s"))

PRODUCT_WIDTH = tl.constexpr(len(layout.PRODUCT))
INTO = tl.constexpr(layout.PRODUCT.index("into"))
OF = tl.constexpr(layout.PRODUCT.index("of"))
AT = tl.constexpr(layout.PRODUCT.index("at"))
BANK = tl.constexpr(layout.PRODUCT.index("bank"))
WEIGHT = tl.constexpr(layout.PRODUCT.index("weight"))

MEASURE_WIDTH = tl.constexpr(len(layout.MEASURE))
MEASURE_INTO = tl.constexpr(layout.MEASURE.index("measure_into"))
POWER = tl.constexpr(layout.MEASURE.index("power"))
MEASURE_WEIGHT = tl.constexpr(layout.MEASURE.index("measure_weight"))
OFFSET = tl.constexpr(layout.MEASURE.index("offset"))
NUM = tl.constexpr(layout.MEASURE.index("num_kind"))
DEN = tl.constexpr(layout.MEASURE.index("den_kind"))
KIND = tl.constexpr(0)
FIRST = tl.constexpr(layout.MEASURE.index("num_a") - NUM.value)
FIRST_AT = tl.constexpr(layout.MEASURE.index("num_a_at") - NUM.value)
SECOND = tl.constexpr(layout.MEASURE.index("num_b") - NUM.value)
SECOND_AT = tl.constexpr(layout.MEASURE.index("num_b_at") - NUM.value)
RANK = tl.constexpr(layout.MEASURE.index("num_rank") - NUM.value)

# -- codes -----------------------------------------------------------------------------------------

INTO_Y = tl.constexpr(layout.INTO.index("y"))
INTO_X = tl.constexpr(layout.INTO.index("x"))
INTO_E = tl.constexpr(layout.INTO.index("e"))

OF_X = tl.constexpr(layout.OF.index("x"))
OF_E = tl.constexpr(layout.OF.index("e"))
OF_H = tl.constexpr(layout.OF.index("h"))
OF_XI = tl.constexpr(layout.OF.index("xi"))
OF_SLOT = tl.constexpr(layout.OF.index("slot"))
OF_BANK = tl.constexpr(layout.OF.index("bank"))
OF_NEW = tl.constexpr(layout.OF.index("new"))
OF_POINT = tl.constexpr(layout.OF.index("point"))
OF_OUT = tl.constexpr(layout.OF.index("out"))
OF_Y = tl.constexpr(layout.OF.index("y"))

SUM = tl.constexpr(layout.REDUCTIONS.index("sum"))
DOT = tl.constexpr(layout.REDUCTIONS.index("dot"))
NORM = tl.constexpr(layout.REDUCTIONS.index("norm"))
STD = tl.constexpr(layout.REDUCTIONS.index("std"))
ORDER = tl.constexpr(layout.REDUCTIONS.index("quantile"))
