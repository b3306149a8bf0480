# SPDX-License-Identifier: Apache-2.0
"""What an estimate refuses: arguments, files of others, derivatives that cannot be right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import conditioning
from ..guidance import Guidance
from ..schedules import Schedule, prediction_name

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


def check_partial(path: Path, done: Any, total: int, sums: Any, wanted: Any) -> int:
    """How many batches partial sums hold; raises where they cannot be sums of this estimate."""
    whole = isinstance(done, int) and not isinstance(done, bool) and 0 < done <= total
    if not whole or sums.shape != wanted.shape or sums.dtype != wanted.dtype:
        raise ValueError(
            f"ems: {str(path)!r} holds sums {list(wanted.shape)} of 1 to {total} batches; got sums "
            f"{list(sums.shape)} of {sums.dtype}, and {done!r} batches. It is damaged: delete it."
        )
    return int(done)


def check_derivative(how: str, found: torch.Tensor, coarse: torch.Tensor) -> None:
    """Raises where a derivative is not that of longer central differences.

    Forward mode may miss a part, such as that of the time; differences may be those of rounding.
    """
    apart = float((found - coarse).norm() / coarse.norm().clamp_min(1e-30))
    if apart <= _MISMATCH:
        return
    if not math.isfinite(apart):
        raise ValueError("ems: the network returns finite numbers; got NaN or infinity.")
    if how == "finite":
        raise ValueError(
            "ems: derivative='finite' takes differences of the network's outputs; got some that "
            f"differ by {100 * apart:.3g} % from those over a longer step, as where a part of the "
            "network computes in half precision, or draws random numbers. Give it in float32 or "
            "float64, and in eval mode."
        )
    raise ValueError(
        "ems: derivative='forward' differentiates the network in x and in its time; got a "
        f"derivative that differs by {100 * apart:.3g} % from central differences, as where "
        "the network reads its time on the host. Give derivative='finite'."
    )


def check_counts(counts: dict[str, Any], seed: Any) -> None:
    """Raises unless every count is an integer of at least 1, and the seed an integer."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"ems: {name} is an integer of at least 1; got {value!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"ems: seed is an integer; got {seed!r}.")


def check_kinds(network: Any, schedule: Any, guidance: Any, cond: Any) -> None:
    """Raises unless the arguments are what their names say."""
    if not callable(network):
        raise TypeError(f"ems: network is callable as network(x, t); got {network!r}.")
    if not isinstance(schedule, Schedule):
        raise TypeError(f"ems: schedule is a fastdiff.schedules.Schedule; got {schedule!r}.")
    if guidance is not None and not isinstance(guidance, Guidance):
        raise TypeError(f"ems: guidance is a fastdiff.CFG or None; got {guidance!r}.")
    if conditioning.varies(cond):
        raise ValueError(
            "ems: statistics belong to one conditioning at all times; got a PerStage in cond. Give "
            "tensors of one entry a sample."
        )


def check_folder(path: Path | None) -> None:
    """Raises where a file is to stand in a folder that does not exist, before any work is done."""
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(
            f"ems: save stands in a folder that exists; got {str(path)!r}. Make "
            f"{str(path.parent)!r} first."
        )


def check_source(data: Any, shape: Any) -> None:
    """Raises unless states come either from data or from runs of samples of a shape."""
    if (data is None) == (shape is None):
        raise ValueError(
            "ems: states come from data= or, without data, from runs of samples of shape=; got "
            f"{'neither' if data is None else 'both'}. Give one."
        )
    if data is None:
        sizes = tuple(shape) if isinstance(shape, Sequence) else ()
        if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(
                "ems: shape is that of one sample, such as (3, 32, 32), its sizes at least 1; got "
                f"{shape!r}."
            )
        return
    if not (isinstance(data, torch.Tensor) and data.is_floating_point()):
        raise TypeError(f"ems: data is a floating tensor [N, *shape]; got {type(data).__name__}.")
    if data.ndim < 2 or not data.numel():
        raise ValueError(f"ems: data is [N, *shape] with N > 0; got {tuple(data.shape)}.")
    if not bool(data.isfinite().all()):
        raise ValueError("ems: data is finite; got NaN or infinity in it.")
