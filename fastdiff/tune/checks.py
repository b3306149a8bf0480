# SPDX-License-Identifier: Apache-2.0
"""What is refused where an estimate goes on from a file, or its derivatives cannot be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..schedules import prediction_name

_MISMATCH = 0.2  # relative difference at which two derivatives are not of one function


def check_prediction(network: Any, prediction: str) -> None:
    """Raises where the network says that it predicts something else."""
    predicts = getattr(network, "prediction", None)
    if isinstance(predicts, str) and prediction_name(predicts) != prediction_name(prediction):
        raise ValueError(
            f"ems: the network says that it predicts {predicts!r}; got prediction={prediction!r}. "
            f"Give prediction={predicts!r}."
        )


def check_same(path: Path, known: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises unless partial sums were made with the same arguments."""
    for name, value in wanted.items():
        if known.get(name) != value:
            raise ValueError(
                f"ems: {str(path)!r} holds an estimate with other arguments: its {name} differs. "
                "Give the same arguments or another path, or delete it."
            )


def check_network(path: Path, known: Any, own: Any) -> None:
    """Raises unless a file was made with the same network."""
    if known.shape != own.shape or not np.allclose(known, own, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"ems: {str(path)!r} holds an estimate of another network, or of other conditioning. "
            "Give another path, or delete it."
        )


def check_derivative(forward: torch.Tensor, finite: torch.Tensor) -> None:
    """Raises where forward mode misses a part of the derivative, such as that of the time."""
    apart = float((forward - finite).norm() / finite.norm().clamp_min(1e-30))
    if apart > _MISMATCH:
        raise ValueError(
            "ems: derivative='forward' differentiates the network in x and in its time; got a "
            f"derivative that differs by {100 * apart:.3g} % from central differences, as where "
            "the network reads its time on the host. Give derivative='finite'."
        )
