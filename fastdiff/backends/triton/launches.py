# SPDX-License-Identifier: Apache-2.0
"""How samples are cut into programs, what kernels are compiled for, and how they are launched."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...plans import Layout

STATES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

WARPS = 4
# Elements of a program's tile, at most: 8 a thread, two 16-byte vectors of float32 or one of 16
# bits; 4 in float64, which takes twice the registers.
BLOCK = {4: 1024, 8: 512}
# The kernel of the scales has one program a sample, so it is given more warps and a larger tile;
# and registers such that two programs fit a multiprocessor.
SCALE_WARPS = 16
SCALE_BLOCK = {4: 4096, 8: 2048}
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
SCALE_OPTIONS = {"num_warps": SCALE_WARPS, "enable_fp_fusion": False, "maxnreg": 64}
# The kernel of the measures has 1024 lanes, two a thread.
MEASURE_OPTIONS = {"num_warps": 16, "enable_fp_fusion": False}
_MOST_PROGRAMS = 2**31 - 1

Grid = tuple[int, int, int]
Launch = Callable[..., None]


@dataclass(frozen=True)
class Needs:
    """What the rows of a table need of the kernels that run them.

    Attributes:
        draws: The most draws of noise that a row makes.
        clips, thresholds, measures: Whether any row does.
        pushes_x: Whether any row pushes the x that comes in.
        raw: Whether any row weighs y, the point or v limit(y) in place of limit(y), or its own x'.
        products: Whether any row has products.
        scalars: Whether any row reads S.
    """

    draws: int = 0
    clips: bool = False
    thresholds: bool = False
    pushes_x: bool = False
    raw: bool = False
    products: bool = False
    scalars: bool = False
    measures: bool = False

    def beyond(self, bound: Needs) -> list[str]:
        """What of these needs a kernel for `bound` does not serve, in words."""
        words = {
            "draws": f"draw {self.draws} times",
            "clips": "clip",
            "thresholds": "threshold",
            "pushes_x": "push x",
            "raw": "weigh y, the point or their own x'",
            "products": "multiply by the bank",
            "scalars": "read scalars",
            "measures": "measure",
        }
        return [words[f.name] for f in dataclasses.fields(self) if _more(self, bound, f.name)]


def _more(needs: Needs, bound: Needs, name: str) -> bool:
    return bool(getattr(needs, name) > getattr(bound, name))


@dataclass(frozen=True)
class Facts:
    """What the kernels are compiled for besides dtypes, alignment and which registers exist.

    Attributes:
        layout: Of the table.
        needs: Of its rows.
        copies: Of the network's next input.
        columns: Of S.
        shared: Whether all samples have one bank.
    """

    layout: Layout
    needs: Needs
    copies: int = 0
    columns: int = 0
    shared: bool = False

    def constants(self) -> dict[str, int]:
        """By the names that the kernels give them."""
        layout, needs = self.layout, self.needs
        return {
            "TERMS": layout.terms,
            "BRANCHES": layout.branches,
            "EXTRAS": layout.extras,
            "BRANCH_AT": layout.branch_offset,
            "EXTRA_AT": layout.extra_offset,
            "PRODUCTS": layout.products if needs.products else 0,
            "PRODUCT_AT": layout.product_offset,
            "MEASURE_AT": layout.measure_offset,
            "WIDTH": layout.width,
            "SHARED": self.shared,
            "COPIES": self.copies,
            "MOST_DRAWS": needs.draws,
            "CLIPS": needs.clips,
            "PUSHES_X": needs.pushes_x,
            "RAW": needs.raw,
            "SCALARS": self.columns,
        }


def launch_shape(
    batch: int, size: int, stride: int, draws: int, apart: bool, block: int
) -> tuple[Grid, tuple[int, int, int], dict[str, int]]:
    """How B samples of n elements are cut into programs.

    Args:
        batch, size: B and n, not 0.
        stride: Elements between samples of the network's output.
        draws: Draws of noise made in the kernel.
        apart: Whether something besides the noise tells the samples apart: a row of the table, a
            scale or numbers S of their own, or a bank that they share.
        block: Elements of a tile, at most; a power of 2.

    Returns:
        The grid; the kernel's arguments (batch, size_units, out_units); and those of its constants
        that follow: UNIT, OUT_UNIT, SAMPLES and COLS.

    Raises:
        ValueError: There are more programs than a grid holds.
    """
    contiguous = stride == size
    if contiguous and not draws and not apart:
        batch, size = 1, batch * size  # nothing tells the samples apart
        stride = size
        cols = block
    else:
        cols = min(block, max(4, 1 << (size - 1).bit_length()))
    rows = block // cols if batch > 1 else 1
    programs = -(-batch // rows) * -(-size // cols)
    if programs > _MOST_PROGRAMS:
        raise ValueError(
            f"triton backend: a launch has at most {_MOST_PROGRAMS} programs of {block} elements; "
            f"got {batch} samples of {size} elements, {programs} programs. Split the batch."
        )
    unit = _unit(size)
    out_unit = 0 if contiguous else _unit(stride)
    numbers = (batch, size // unit, stride // (out_unit or 1))
    constants = {"UNIT": unit, "OUT_UNIT": out_unit, "SAMPLES": rows, "COLS": cols}
    return (programs, 1, 1), numbers, constants


def sample_shape(batch: int, size: int, bytes_each: int) -> tuple[Grid, dict[str, int]]:
    """The grid and the tile of a kernel that has one program a sample.

    Args:
        batch, size: B and n, not 0.
        bytes_each: Of a number in the arithmetic type.

    Raises:
        ValueError: There are more samples than a grid holds.
    """
    if batch > _MOST_PROGRAMS:
        raise ValueError(
            f"triton backend: a launch thresholds or measures at most {_MOST_PROGRAMS} samples; "
            f"got {batch}. Split the batch."
        )
    fewest = 32 * SCALE_WARPS  # an element a thread
    cols = max(fewest, min(SCALE_BLOCK[bytes_each], 1 << (size - 1).bit_length()))
    return (batch, 1, 1), {"COLS": cols}


def chosen(kernel: Any, constants: Mapping[str, int]) -> dict[str, int]:
    """Those of the constants that a kernel takes, in its order."""
    return {name: constants[name] for name in kernel.arg_names if name in constants}


def launcher(
    kernel: Any, grid: Grid, constants: Mapping[str, int], options: Mapping[str, int]
) -> Launch:
    """Launches `kernel` with arguments in its order, without the constants that it ends in."""
    constants = chosen(kernel, constants)
    if interpreting():

        def interpret(*arguments: Any) -> None:
            with np.errstate(all="ignore"):
                kernel[grid](*arguments, **constants)

        return interpret

    compiled: list[Callable[..., Any]] = []
    values = tuple(constants.values())

    def launch(*arguments: Any) -> None:
        if compiled:
            # past Triton's own look-up of the specialisation, which the first call has settled
            compiled[0](*arguments, *values)
            return
        compiled.append(kernel[grid](*arguments, **constants, **options)[grid])

    return launch


def interpreting() -> bool:
    """Whether the kernels run, or would run, in Triton's interpreter."""
    module = sys.modules.get("fastdiff.kernels.stage")
    if module is not None:
        return type(module.stage_kernel).__name__ == "InterpretedFunction"
    value = os.environ.get("TRITON_INTERPRET", "")
    return value.lower() in ("1", "true", "yes", "on", "y")  # what triton takes for true


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _unit(count: int) -> int:
    return 16 if count % 16 == 0 else 4 if count % 4 == 0 else 1
