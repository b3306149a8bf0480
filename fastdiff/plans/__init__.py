# SPDX-License-Identifier: Apache-2.0
"""Plans: stages, the table that they pack to, files, text, and the transposed table."""

from .handles import living
from .layout import (
    AT_E,
    CLIP,
    EVALUATE,
    THRESHOLD,
    WRITES_E,
    WRITES_M,
    WRITES_X,
    Layout,
    PackedRow,
    decode,
    encode,
)
from .plan import Plan
from .stage import LEAST_FLOOR, Stage
from .terms import Measure, Product, Reduction
from .transposed import Transposed, alternates, transpose

__all__ = [
    "AT_E",
    "CLIP",
    "EVALUATE",
    "LEAST_FLOOR",
    "THRESHOLD",
    "WRITES_E",
    "WRITES_M",
    "WRITES_X",
    "Layout",
    "Measure",
    "PackedRow",
    "Plan",
    "Product",
    "Reduction",
    "Stage",
    "Transposed",
    "alternates",
    "decode",
    "encode",
    "living",
    "transpose",
]
