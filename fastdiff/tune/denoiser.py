# SPDX-License-Identifier: Apache-2.0
"""The x0 prediction of a network, guided or not, and its derivatives along a direction."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import conditioning
from ..engine.job import network_dtype
from ..engine.loops import output_problem
from ..guidance import UNGUIDED, Guidance
from ..guidance.base import combine
from ..schedules import Schedule

DERIVATIVES = ("forward", "finite")
_STEP = {torch.float32: 1e-3, torch.float64: 1e-5}  # of a central difference, by dtype
_COARSE = 3e-3  # the step of the differences to compare with
_LAMBDA = 1e-4  # half the step of a difference of the schedule's own functions


@dataclass(frozen=True)
class Denoiser:
    """D(x, lambda): the x0 that a network predicts.

    Attributes:
        network: `network(x, t, **cond)`.
        schedule: The schedule.
        prediction: What the network returns.
        guidance: How the outputs of its branches become one.
        derivative: "forward" (forward-mode automatic differentiation), "finite" (central
            differences), or "" where none is taken.
        cond: Conditioning of the samples at hand.
    """

    network: Any
    schedule: Schedule
    prediction: str
    guidance: Guidance = UNGUIDED
    derivative: str = ""
    cond: Any = None

    def of(self, cond: Any) -> Denoiser:
        """The same for other samples."""
        return replace(self, cond=cond)

    def numbers(self, lam: float) -> tuple[float, float, float, float]:
        """(model time, c_in, p, q) at lambda: D = p x + q network(c_in x, model time)."""
        t = float(self.schedule.t_of_lambda(lam))
        time = float(self.schedule.model_time(t, self.prediction))
        c_in = float(self.schedule.c_in(t, self.prediction))
        return (time, c_in, *self.schedule.conversion(self.prediction, "x0", t))

    def rates(self, lam: float, first: float, last: float) -> tuple[float, ...]:
        """d/dlambda of `numbers`, by differences that stay between the ends."""
        low, high = max(lam - _LAMBDA, first), min(lam + _LAMBDA, last)
        ends = zip(self.numbers(low), self.numbers(high), strict=True)
        return tuple((b - a) / (high - low) for a, b in ends)

    def x0(self, x: torch.Tensor, lam: float) -> torch.Tensor:
        """D at x."""
        time, c_in, p, q = self.numbers(lam)
        return p * x + q * self._output(c_in * x, time)

    def change(
        self,
        x: torch.Tensor,
        lam: float,
        direction: torch.Tensor,
        rates: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0),
        derivative: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(D, its derivative along `direction` in x, with time and scales at these `rates`).

        `derivative` takes the place of the own one; "coarse" is "finite" with a longer step.
        """
        time, c_in, p, q = self.numbers(lam)
        d_time, d_in, d_p, d_q = rates
        given, moved = c_in * x, c_in * direction + d_in * x
        how = derivative or self.derivative
        if how == "forward":
            out, d_out = self._forward(given, time, moved, d_time)
        else:
            dtype = network_dtype(self.network) or x.dtype
            step = _COARSE if how == "coarse" else _STEP.get(dtype, _STEP[torch.float32])
            out, d_out = self._finite(given, time, moved, d_time, step)
        return p * x + q * out, p * direction + d_p * x + d_q * out + q * d_out

    def _forward(
        self, x: torch.Tensor, time: float, moved: torch.Tensor, d_time: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        now = torch.tensor(time, dtype=x.dtype, device=x.device)
        _load_forward_mode()
        try:
            with _differentiable_attention():
                out, d_out = torch.func.jvp(
                    self._output, (x, now), (moved, torch.full_like(now, d_time))
                )[:2]
        except (RuntimeError, NotImplementedError) as error:
            raise NotImplementedError(
                "ems: derivative='forward' needs a network that forward-mode differentiation "
                f"passes through; got {type(error).__name__}: {str(error).splitlines()[0][:160]}. "
                "Give derivative='finite'."
            ) from error
        return out, d_out

    def _finite(
        self, x: torch.Tensor, time: float, moved: torch.Tensor, d_time: float, step: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        here = self._output(x, time)
        # at an end of the schedule the difference looks inside, where the network was trained
        sides = [k for k in (-1, 1) if self._has_time(time + k * step * d_time)]
        sides = [-1, 1] if d_time == 0.0 or not sides else sides
        ends = {k: self._output(x + k * step * moved, time + k * step * d_time) for k in sides}
        if len(sides) == 2:
            return here, (ends[1] - ends[-1]) / (2.0 * step)
        (side,) = sides
        far = self._output(x + 2 * side * step * moved, time + 2 * side * step * d_time)
        return here, side * (4.0 * ends[side] - 3.0 * here - far) / (2.0 * step)

    def _has_time(self, time: float) -> bool:
        """Whether the schedule has the time that the network is told."""
        low, high = self.schedule.domain
        return low <= float(self.schedule.time_of_model(time, self.prediction)) <= high

    def _output(self, x: torch.Tensor, time: float | torch.Tensor) -> torch.Tensor:
        """The network's output, of all branches together, in x's dtype."""
        copies = self.guidance.branches
        cond = self.guidance.conditions(self.cond, x.shape[0])
        places, names = conditioning.arguments_of(cond)
        dtype = network_dtype(self.network) or x.dtype
        given = torch.cat([x] * copies).to(dtype)
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        now = torch.as_tensor(time, dtype=kind, device=x.device).expand(given.shape[0])
        out = self.network(given, now, *places, **names)
        problem = output_problem(out, given)
        if problem is not None:
            wrong = ValueError if isinstance(out, torch.Tensor) else TypeError
            raise wrong(f"ems: {problem}")
        if self.derivative and out.dtype not in _STEP:
            raise ValueError(
                "ems: derivatives are those of a network in float32 or float64; got outputs of "
                f"{out.dtype}. Give network.float(), without autocast: a network in half "
                "precision can be sampled with the statistics of the one in float32."
            )
        return combine(self.guidance.combined_weights(0, x), out.to(x.dtype).chunk(copies))


def parameters_of(network: Any) -> list[torch.Tensor]:
    """The network's parameters; none where it is no nn.Module."""
    return list(network.parameters()) if isinstance(network, torch.nn.Module) else []


@functools.cache
def _load_forward_mode() -> None:
    """Lets PyTorch load its forward mode, which warns of PyTorch's own use of TorchScript."""
    one = torch.ones(())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.sin, (one,), (one,))


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Attention by plain operations: the fused kernels have no forward-mode derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
