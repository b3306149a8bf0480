# SPDX-License-Identifier: Apache-2.0
"""Statistics of a network: what a plan made with them reads, and the file that holds them."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import noise
from .._files import replacing
from ..guidance import UNGUIDED, Guidance
from ..plans import Plan
from ..schedules import from_dict
from ..solvers import ModelStatistics
from ..solvers.ode.dpm_v3 import bank_of
from .denoiser import Denoiser, parameters_of

FORMAT = "fastdiff-statistics"
_ARRAYS = ("lambda_grid", "l", "s", "b", "fingerprint")
_LARGEST = 1e3  # weight of a step from which on statistics follow their noise, not a network
# what numpy, zipfile and json raise of bytes that they cannot read
_DAMAGES = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    ArithmeticError,
    NotImplementedError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)
_APART = 0.02  # relative difference from which on two networks are not the same


@dataclass(frozen=True, eq=False, repr=False)
class Statistics(ModelStatistics):
    """l, s and b of a network, for plans of dpm-v3.

        plan = fd.plan(schedule, "dpm-v3-3", 8, statistics=stats, prediction=stats.prediction)
        samples = fd.sample(network, x, plan, extras=stats.extras(plan, x))

    Args:
        fingerprint: x0 predictions of the network at fixed points, float32 [2, 2, *shape], by which
            `check` knows it; empty: `check` refuses.

    The others are those of `fastdiff.solvers.ModelStatistics`.
    """

    fingerprint: Any = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "fingerprint", np.array(self.fingerprint, dtype=np.float32))

    def extras(self, plan: Plan, x: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """The tensors to give as `extras=` where `plan` is sampled.

        Args:
            plan: Made with these statistics, or loaded from its file.
            x: The state that will be given. Its shape is checked, and the tensors come in its
                arithmetic and on its device. None: float64 tensors on the CPU, which fit every x
                that they broadcast to.

        Raises:
            ValueError: The plan was made without statistics or with others, x has another shape, or
                the weights of a step are such that samples diverge, as those of too few samples.
        """
        bank = bank_of(plan, self)
        if x is not None and self.shape and tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"statistics: they belong to samples of shape {self.shape}; got x of shape "
                f"{tuple(x.shape)}. Estimate them at this shape."
            )
        factors = {product.entry for stage in plan.stages for product in stage.products}
        largest = max((float(np.abs(bank[i]).max()) for i in factors), default=0.0)
        if not largest < _LARGEST:
            raise ValueError(
                f"statistics: the weights of a step stay below {_LARGEST:g} where statistics "
                f"follow a network; got {largest:.3g}, with which samples diverge. Estimate them "
                "with more samples (256 and more), or take more steps."
            )
        single = x is not None and x.dtype != torch.float64
        place: dict[str, Any] = {"dtype": torch.float32 if single else torch.float64}
        place["device"] = "cpu" if x is None else x.device
        return tuple(torch.from_numpy(np.array(value)).to(**place)[None] for value in bank)

    def check(self, network: Any, cond: Any = None, guidance: Guidance | None = None) -> None:
        """Raises unless `network` is the one that was estimated.

        It is evaluated at two times on two samples, and compared with what it said then.

        Args:
            network: The network.
            cond: Conditioning of two samples: the first two of those given to `ems`.
            guidance: That given to `ems`.

        Raises:
            ValueError: The outputs differ by more than 2 %, or no fingerprint was kept.
        """
        if self.fingerprint.size == 0:
            raise ValueError(
                "statistics: a network is known by a fingerprint, which these do not hold. "
                "Estimate them with fastdiff.tune.ems."
            )
        held = parameters_of(network)
        device = held[0].device if held else "cpu"
        denoiser = Denoiser(
            network, self.schedule, self.prediction, guidance or UNGUIDED, cond=cond
        )
        found = fingerprint(denoiser, self.lambda_grid, self.shape, device)
        known = self.fingerprint.astype(np.float64)
        apart = float(np.linalg.norm(found - known) / np.linalg.norm(known))
        if not apart <= _APART:
            raise ValueError(
                "statistics: they belong to the network that they were estimated on; got one whose "
                f"x0 predictions differ by {100 * apart:.3g} %. Estimate them again, or give cond= "
                "and guidance= as they were."
            )

    def save(
        self, path: str | os.PathLike[str], *, estimate: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the statistics as an npz archive, atomically.

        Args:
            path: The file.
            estimate: What they were estimated with, as `ems` compares it where it finds the file;
                None: it is not known.

        Raises:
            OSError: `path` cannot be written; it names `path`.
        """
        head: dict[str, Any] = {
            "schedule": self.schedule.to_dict(),
            "prediction": self.prediction,
            "estimate": dict(estimate or {}),
        }
        write(path, FORMAT, head, {name: getattr(self, name) for name in _ARRAYS})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Reads statistics that `save` wrote; they equal the original.

        Raises:
            ValueError: The file is none of statistics, or is damaged. Nothing of it is executed.
            OSError: The file cannot be read.
        """
        head, arrays = read(path, FORMAT, _ARRAYS)
        try:
            schedule = from_dict(head["schedule"])
            return cls(schedule=schedule, prediction=head["prediction"], **arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise _refusal(path, str(error)) from None


def fingerprint(
    denoiser: Denoiser, lambda_grid: Any, shape: tuple[int, ...], device: Any
) -> NDArray[np.float32]:
    """x0 predictions at a third and two thirds of the grid, float32 [2, 2, *shape]."""
    found = []
    first, last = float(lambda_grid[0]), float(lambda_grid[-1])
    for i, part in enumerate((1 / 3, 2 / 3)):
        lam = first + part * (last - first)
        t = denoiser.schedule.t_of_lambda(lam)
        scale = float(np.hypot(denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)))
        x = scale * noise.normal((2, *shape), seeds=0, stream=i, device=device)
        with torch.no_grad():
            found.append(denoiser.x0(x, lam).double().cpu().numpy())
    return np.stack(found).astype(np.float32)


def estimate_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the statistics of a file were estimated with; empty where it does not say."""
    found = read(path, FORMAT, _ARRAYS)[0].get("estimate", {})
    if not isinstance(found, dict):
        raise _refusal(path, "what they were estimated with is no dictionary")
    return found


def write(
    path: str | os.PathLike[str], kind: str, head: Mapping[str, Any], arrays: Mapping[str, Any]
) -> None:
    """Writes arrays with a JSON head as one npz archive, atomically."""
    text = json.dumps({"format": kind, "version": 1, **head})
    content = io.BytesIO()
    np.savez(content, head=np.array(text), **arrays)
    with replacing(path) as file:
        file.write(content.getvalue())


def read(
    path: str | os.PathLike[str], kind: str, names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(head, arrays of these names) of a file that `write` wrote."""
    try:
        with open(path, "rb") as file:  # what is no file is an OSError; what is in it is none
            content = io.BytesIO(file.read())
        with np.load(content, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        head = json.loads(str(arrays.pop("head")))
    except _DAMAGES:
        # numpy's own words advise to unpickle the file, which is unsafe and no help
        raise _refusal(path, "no archive that fastdiff wrote") from None
    told = (head.pop("format", None), head.pop("version", None)) if isinstance(head, dict) else ()
    if told != (kind, 1):
        raise _refusal(path, f"no archive of format {kind!r}, version 1")
    real = all(array.dtype.kind == "f" for array in arrays.values())
    if set(arrays) != set(names) or not real:
        raise _refusal(path, f"its arrays are real, and {', '.join(names)}")
    return head, arrays


def _refusal(path: str | os.PathLike[str], why: str) -> ValueError:
    return ValueError(f"statistics: {os.fsdecode(path)!r} holds no statistics: {why[:200]}.")
