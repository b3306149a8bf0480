# SPDX-License-Identifier: Apache-2.0
"""torchdiffeq: the same flows by its fixed-step solvers, and gradients by its adjoint."""

from __future__ import annotations

import importlib.metadata
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fastdiff.bench.flows import ENDS, VP, Flow
from fastdiff.bench.machine import installed
from fastdiff.schedules import Schedule

from .fields import Field, Offered


def version() -> str:
    """The version that is installed, or "none"."""
    return importlib.metadata.version("torchdiffeq") if installed("torchdiffeq") else "none"


class Exhausted(RuntimeError):
    """A solver asks for more calls than it may have."""


class InLambda(nn.Module):
    """The flow dx/dlambda = sigma^2 x - sigma eps of a network on `VP`, and its calls.

    In lambda and not in t, where torchdiffeq's adaptive solvers step past the end, to t < 0.
    """

    def __init__(self, flow: Flow, cond: Mapping[str, torch.Tensor], most: float) -> None:
        super().__init__()
        self._flow, self._cond = [flow], dict(cond)  # in a list: its parameters are not this one's
        self.calls, self._most = 0, most

    def forward(self, lam: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > self._most:
            raise Exhausted(f"more than {self._most:g} calls")
        (flow,) = self._flow
        lam = lam.detach()  # the ends are fixed: their gradient is not asked for
        alpha, sigma = torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()
        # (b_1 - b_0) t^2 / 4 + b_0 t / 2 = -log alpha
        slope, b = VP.beta_max - VP.beta_min, VP.beta_min
        log_alpha = -0.5 * F.softplus(-2 * lam)
        t = -4 * log_alpha / (b + torch.sqrt(b * b - 4 * slope * log_alpha))
        out = flow.network(x, t.to(x.dtype).expand(len(x)), **self._cond)
        eps = out if flow.prediction == "epsilon" else alpha * out + sigma * x
        return sigma * sigma * x - sigma * eps


def lambda_ends(flow: Flow) -> torch.Tensor:
    lam = VP.lambda_t(np.array([ENDS["t_max"], ENDS["t_min"]]))
    return torch.tensor(lam, dtype=flow.start.dtype, device=flow.start.device)


def stepped(flow: Flow, method: str, steps: int) -> dict[str, Any]:
    """Options of a solver of fixed steps, each a hair longer, so that rounding adds none."""
    first, last = lambda_ends(flow).tolist()
    return {"method": method, "options": {"step_size": (last - first) / steps * (1 + 1e-6)}}


# name -> evaluations a step, and beside those of the steps
_FIXED = {
    "euler": (1, 0),
    "midpoint": (2, 0),
    "heun2": (2, 0),
    "heun3": (3, 0),
    "rk4": (4, 0),
    "explicit_adams": (1, 6),  # it starts with two steps of rk4
}


def offered(schedule: Schedule) -> Offered:
    """Fixed steps of dx/dt, and of dx/dlambda where lambda is finite."""
    variables = ("t",) if schedule.straight == "velocity" else ("t", "lambda")
    return {f"{name} in {v}": cost for v in variables for name, cost in _FIXED.items()}


def final_state(name: str, field: Field, times: np.ndarray) -> torch.Tensor:
    """The state in which a solver of fixed steps ends over these times."""
    import torchdiffeq

    method, _, variable = name.partition(" in ")
    schedule = field.schedule

    def in_t(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return field("velocity", x, float(t))

    def in_lambda(lam: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        t = float(np.clip(schedule.t_of_lambda(float(lam)), times[-1], times[0]))
        slope = -0.5 * float(schedule.g2(t) / schedule.sigma(t) ** 2)
        return field("velocity", x, t) / slope

    function, points = (in_t, times) if variable == "t" else (in_lambda, schedule.lambda_t(times))
    start = field.flow.start
    with torch.no_grad():
        return torchdiffeq.odeint(function, start, torch.tensor(points), method=method)[-1]


def gradients(
    flow: Flow, most: float = math.inf, **options: Any
) -> tuple[list[torch.Tensor | None], int]:
    """Gradients of the leaves by `odeint_adjoint`, and the calls of the network.

    Raises:
        Exhausted: It would take more than `most` calls.
    """
    import torchdiffeq

    x, cond, wanted = flow.leaves()
    function = InLambda(flow, cond, most)
    ends = lambda_ends(flow)
    out = torchdiffeq.odeint_adjoint(function, x, ends, adjoint_params=tuple(wanted[1:]), **options)
    total = (out[-1] * flow.cotangent).sum()
    return list(torch.autograd.grad(total, wanted, allow_unused=True)), function.calls


def settings(flow: Flow) -> dict[str, list[dict[str, Any]]]:
    """The settings that are tried, by method."""
    fixed = {
        "midpoint": (2, 3, 4, 5, 7, 10, 15, 20, 25, 50),
        "rk4": (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24),
        "euler": (5, 10, 20, 50),
    }
    adaptive = {
        "bosh3": (1e-1, 1e-2, 1e-3),
        "dopri5": (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5),
    }
    found = {
        method: [stepped(flow, method, steps) for steps in counts]
        for method, counts in fixed.items()
    }
    for method, tolerances in adaptive.items():
        found[method] = [{"method": method, "rtol": tol, "atol": tol} for tol in tolerances]
    return found


# -- states of flows in velocity -------------------------------------------------------------------

STAGES = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ADAMS = {
    "explicit_adams": [{"max_order": order} for order in range(4, 13)],
    "implicit_adams": [
        {"max_order": order, "max_iters": count}
        for order in (4, 5, 6, 8, 12)
        for count in (1, 2, 4)
    ],
}


class InTime(nn.Module):
    """The velocity of a flow's network on torchdiffeq's clock, 0 at the noise, and its calls."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self._flow, self.calls = [flow], 0

    def forward(self, clock: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        (flow,) = self._flow
        return -flow.network(x, (1 - clock).expand(len(x)))


def velocity_state(flow: Flow, method: str, steps: int, **options: Any) -> tuple[torch.Tensor, int]:
    """Where equal steps of a method of fixed steps end, and the calls that they took.

    Args:
        flow: A network that predicts velocity, from t = 1 to t = 0.
        method: A key of `STAGES` or `ADAMS`.
        steps: Of the grid.
        **options: The method's own.
    """
    import torchdiffeq

    function = InTime(flow)
    ends = torch.tensor([0.0, 1.0], dtype=flow.start.dtype)
    grid = torch.linspace(0.0, 1.0, steps + 1, dtype=flow.start.dtype)
    options = {"grid_constructor": lambda *_: grid, **options}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "Functional iteration did not converge")
        out = torchdiffeq.odeint(
            function, flow.start, ends, rtol=1e-3, atol=1e-4, method=method, options=options
        )
    return out[-1], function.calls
