# SPDX-License-Identifier: Apache-2.0
"""Columns, flags and codes of a packed row as compile-time constants.

All are taken from `fastdiff.plans.layout`, the one place that knows them. A column of the head is
counted from the start of a row; one of a group, from the start of the entry it belongs to.
"""

import triton.language as tl

from fastdiff.plans import layout

EVALUATE = tl.constexpr(layout.EVALUATE)
AT_E = tl.constexpr(layout.AT_E)
WRITES_E = tl.constexpr(layout.WRITES_E)
WRITES_X = tl.constexpr(layout.WRITES_X)
CLIP = tl.constexpr(layout.CLIP)
THRESHOLD = tl.constexpr(layout.THRESHOLD)
WRITES_M = tl.constexpr(layout.WRITES_M)

FLAGS = tl.constexpr(layout.HEAD.index("flags"))
PUSH = tl.constexpr(layout.HEAD.index("push"))
PUSH_X = tl.constexpr(layout.HEAD.index("push_x"))
DRAWS = tl.constexpr(layout.HEAD.index("draws"))
STREAM_1 = tl.constexpr(layout.HEAD.index("stream_1"))
STREAM_2 = tl.constexpr(layout.HEAD.index("stream_2"))
N_TERMS = tl.constexpr(layout.HEAD.index("n_terms"))
N_EXTRAS = tl.constexpr(layout.HEAD.index("n_extras"))
P = tl.constexpr(layout.HEAD.index("p"))
LO = tl.constexpr(layout.HEAD.index("lo"))
HI = tl.constexpr(layout.HEAD.index("hi"))
FLOOR = tl.constexpr(layout.HEAD.index("floor"))
A_X = tl.constexpr(layout.HEAD.index("a_x"))
A_E = tl.constexpr(layout.HEAD.index("a_e"))
B_0 = tl.constexpr(layout.HEAD.index("b_0"))
C = tl.constexpr(layout.HEAD.index("c"))
D_X = tl.constexpr(layout.HEAD.index("d_x"))
D_E = tl.constexpr(layout.HEAD.index("d_e"))
G_0 = tl.constexpr(layout.HEAD.index("g_0"))
C_E = tl.constexpr(layout.HEAD.index("c_e"))
XI_1 = tl.constexpr(layout.HEAD.index("xi_1"))
XI_2 = tl.constexpr(layout.HEAD.index("xi_2"))
C_IN_NEXT = tl.constexpr(layout.HEAD.index("c_in_next"))

# where the first group begins; the others begin where the kernels' arguments say
TERM_AT = tl.constexpr(layout.Layout().term_offset)
TERM_WIDTH = tl.constexpr(len(layout.TERM))
SLOT = tl.constexpr(layout.TERM.index("slot"))
PAST_B = tl.constexpr(layout.TERM.index("past_b"))
PAST_G = tl.constexpr(layout.TERM.index("past_g"))
BRANCH_WIDTH = tl.constexpr(len(layout.BRANCH))
K = tl.constexpr(layout.BRANCH.index("k"))
EXTRA_WIDTH = tl.constexpr(len(layout.EXTRA))
ENTRY = tl.constexpr(layout.EXTRA.index("entry"))
R = tl.constexpr(layout.EXTRA.index("r"))
S = tl.constexpr(layout.EXTRA.index("s"))
