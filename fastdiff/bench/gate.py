# SPDX-License-Identifier: Apache-2.0
"""The gate before a benchmark: rivals that disagree are not timed."""

from __future__ import annotations

import torch


class GateError(RuntimeError):
    """Rivals that should agree do not: no time is worth printing."""


def agree(who: str, got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Checks that ||got - wanted|| <= tolerance ||wanted||, and that both are finite.

    Raises:
        GateError: They differ by more.
    """
    norm = float(wanted.double().norm())
    error = float((got.double() - wanted.double()).norm()) / norm
    if not error <= tolerance:
        raise GateError(
            f"{who}: rivals agree to {tolerance:g} before they are timed; got a relative "
            f"difference of {error:.3g}. Nothing was timed."
        )
