# SPDX-License-Identifier: Apache-2.0
"""RES, refined exponential solvers on x0, and exponential Heun."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from ...schedules import Array, Schedule
from ...schedules.base import real
from ..base import X0Limits, choice, enough_steps
from ..entry import Info
from ..exponential import phi, transfer
from ..rows import Row, Rows
from .dpm_multistep import DPMSolverMultistep
from .dpm_singlestep import singlestep

RES = "Zhang et al., arXiv:2308.02157"


@dataclass(frozen=True)
class RESMultistep(X0Limits):
    """RES multistep: x0 extrapolated by a polynomial in lambda, integrated exactly.

        x_{i+1} = (sigma_{i+1}/sigma_i) x_i + alpha_{i+1} h sum_j b_j x0_{i-j},  z = -h

    At order 2, with c = -h_{i-1}/h_i, b = (phi_1(z) - phi_2(z)/c, phi_2(z)/c); at order 3 the
    parabola. The stiff order conditions sum b_j = phi_1, sum b_j c_j = phi_2, sum b_j c_j²/2 =
    phi_3 hold exactly. These are the rows of `DPMSolverMultistep` in x0 form with
    solver_type="taylor". Order `order` with the runge-kutta warm-up, at most 2 without. Steps from
    alpha = 0 or to sigma = 0 are of order 1.

    Args:
        order: Outputs combined, 2 or 3.
        lower_order_final, warmup: The options of `DPMSolverMultistep`. As published, and in
            ComfyUI's res_multistep, a step is lowered to sigma = 0 alone: lower_order_final=False.
        clip, threshold: Limits of x0, as in `X0Limits`.

    Source: Zhang et al., "Improved Order Analysis and Design of Exponential Integrator for
    Diffusion Models Sampling", arXiv:2308.02157; ComfyUI's res_multistep.
    """

    order: int = 2
    lower_order_final: bool | str = "auto"
    warmup: str = "lower"

    def __post_init__(self) -> None:
        choice(self.name, "order", self.order, (2, 3))
        choice(self.name, "lower_order_final", self.lower_order_final, ("auto", True, False))
        choice(self.name, "warmup", self.warmup, ("lower", "runge-kutta"))
        self.check_limits("x0")

    @property
    def name(self) -> str:
        return f"res-{self.order}m"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return "x0"

    def write(self, rows: Rows, times: Array) -> None:
        enough_steps(self.name, self.order, times)
        same = DPMSolverMultistep(
            order=self.order,
            form="x0",
            solver_type="taylor",
            lower_order_final=self.lower_order_final,
            warmup=self.warmup,
            clip=self.clip,
            threshold=self.threshold,
        )
        same.write(rows, times)


@dataclass(frozen=True)
class RESSinglestep(X0Limits):
    """RES singlestep: exponential Runge-Kutta on x0 in lambda, by the stiff order conditions.

    A step of length h from x, with D_1 = x0 at its start, D_2 at c2 h, D_3 at c3 h, z = -h:

        order 2:  b_2 = phi_2(z)/c2
        order 3:  a_32 = gamma c2 phi_2(c2 z) + (c3²/c2) phi_2(c3 z)
                  b_3 = phi_2(z)/(gamma c2 + c3),  b_2 = gamma b_3

    where rows sum to those of DDIM and gamma = c3 (3 c3 - 2)/(c2 (2 - 3 c2)), which is what the
    third condition 2 (gamma c2 + c3) = 3 (gamma c2² + c3²) asks for. Order `order` on any grid,
    `order` evaluations a step. Order 2 is `DPMSolverSinglestep` in x0 form with
    solver_type="taylor" if c2 = 1/2; order 3 with c2 = 1/3 and c3 = 2/3 is the one with
    "dpmsolver". A step from alpha = 0 or to sigma = 0 is of order 1.

    Args:
        order: 2 or 3.
        c2: Where D_2 is, as a share of the step in lambda, in (0, 1].
        c3: Where D_3 is, likewise; not c2. Order 3 does not allow c2 = 2/3, which has no solution.
        clip, threshold: Limits of x0, as in `X0Limits`.

    Source: Zhang et al., arXiv:2308.02157, Algorithm 1 for order 2; conditions and methods of
    Hochbruck & Ostermann, "Explicit exponential Runge-Kutta methods for semilinear parabolic
    problems", SIAM J. Numer. Anal. 43 (2005), section 5.
    """

    order: int = 2
    c2: float = 0.5
    c3: float = 1.0

    def __post_init__(self) -> None:
        choice(self.name, "order", self.order, (2, 3))
        for option, value in (("c2", self.c2), ("c3", self.c3)):
            if not 0.0 < real(self.name, option, value) <= 1.0:
                raise ValueError(f"{self.name}: {option} lies in (0, 1]; got {value!r}.")
        if self.order == 3 and min(abs(self.c2 - c) for c in (self.c3, 2 / 3)) < 1e-6:
            raise ValueError(
                f"{self.name}: c2 differs from c3 and from 2/3, where the third-order condition "
                f"has no solution; got c2 = {self.c2!r}, c3 = {self.c3!r}. Take c2 = 0.5, c3 = 1."
            )
        self.check_limits("x0")

    @property
    def name(self) -> str:
        return f"res-{self.order}s"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return "x0"

    def write(self, rows: Rows, times: Array) -> None:
        self.limit(rows)
        for s, t in itertools.pairwise(times):
            h = float(rows.schedule.h(s, t))
            if self.order == 2 or math.isinf(h):
                _second_order(rows, s, t, h, self.c2)
            else:
                self._third_order(rows, s, t, h)

    def _third_order(self, rows: Rows, s: float, t: float, h: float) -> None:
        """Writes the step of three evaluations from s to t, of finite length h."""
        schedule, k, c2, c3 = rows.schedule, rows.current, self.c2, self.c3
        u, v = _inside(schedule, s, t, c2), _inside(schedule, s, t, c3)
        gamma = c3 * (3.0 * c3 - 2.0) / (c2 * (2.0 - 3.0 * c2))
        a_32 = h * (gamma * c2 * phi(2, -c2 * h) + c3**2 / c2 * phi(2, -c3 * h))
        b_3 = h * phi(2, -h) / (gamma * c2 + c3)
        rows.add(s, e=_row(schedule, s, u, c2 * h, k, {}))
        rows.add(u, e=_row(schedule, s, v, c3 * h, k, {k + 1: a_32}))
        rows.add(v, x=_row(schedule, s, t, h, k, {k + 1: gamma * b_3, k + 2: b_3}))


def _second_order(rows: Rows, s: float, t: float, h: float, c2: float) -> None:
    """Writes the step of two evaluations from s to t, or DDIM's where h is infinite."""
    if math.isinf(h):
        singlestep(rows, 1, s, t, "taylor")
        return
    schedule, k = rows.schedule, rows.current
    u = _inside(schedule, s, t, c2)
    rows.add(s, e=_row(schedule, s, u, c2 * h, k, {}))
    rows.add(u, x=_row(schedule, s, t, h, k, {k + 1: h * phi(2, -h) / c2}))


def _inside(schedule: Schedule, s: float, t: float, share: float) -> float:
    """The time at this share of the step from s to t in lambda."""
    if share == 1.0:
        return t
    return float(schedule.t_of_lambda(schedule.lambda_t(s) + share * schedule.h(s, t)))


def _row(
    schedule: Schedule, s: float, t: float, h: float, first: int, later: dict[int, float]
) -> Row:
    """From s to t, h further in lambda, with weights over alpha_t of the later outputs.

    The first output has what is left of DDIM's weight. h is given, because the rounding of an inner
    time t loses the digits of a short step.
    """
    alpha = float(schedule.alpha(t))
    outputs = {first: alpha * (-math.expm1(-h) - sum(later.values()))}
    outputs |= {k: alpha * weight for k, weight in later.items()}
    return Row(x=transfer(schedule, "x0", s, t), outputs=outputs)


@dataclass(frozen=True)
class ExponentialHeun(X0Limits):
    """Exponential Heun on x0: a DDIM step, then the line through the outputs at both its ends.

        e  = (sigma'/sigma) x + J_0 D_s
        x' = (sigma'/sigma) x + (J_0 - J_1/h) D_s + (J_1/h) D_e

    with J_p = alpha' p! h^{p+1} phi_{p+1}(-h). Order 2, two evaluations a step. It is
    `RESSinglestep` of order 2 with c2 = 1. A step from alpha = 0 or to sigma = 0 is of order 1.

    Args:
        clip, threshold: Limits of x0, as in `X0Limits`.

    Source: Hochbruck & Ostermann, SIAM J. Numer. Anal. 43 (2005), section 5, with c2 = 1; in x0
    Gonzalez et al., "SEEDS", arXiv:2305.14267; ComfyUI's exp_heun_2_x0.
    """

    def __post_init__(self) -> None:
        self.check_limits("x0")

    @property
    def name(self) -> str:
        return "exp-heun-2"

    def variable(self, schedule: Schedule, times: Array) -> str:
        return "x0"

    def write(self, rows: Rows, times: Array) -> None:
        self.limit(rows)
        for s, t in itertools.pairwise(times):
            _second_order(rows, s, t, float(rows.schedule.h(s, t)), 1.0)


_RES4LYF = (
    "RES4LYF takes 3 c3³ for 3 c3² in gamma: its res_3m is of order 2, and so is its res_3s with "
    "any c3 but 1."
)

SOLVERS = (
    *(
        Info(
            f"res-{order}m",
            RESMultistep,
            measured_order=order,
            nfe_per_step=1,
            summary='refined exponential, multistep; dpmpp with solver_type="taylor"',
            source=RES,
            fixed={"order": order},
            least_steps=order,
            aliases={"res_multistep": {"lower_order_final": False}} if order == 2 else {},
            quirks=_RES4LYF if order == 3 else "",
        )
        for order in (2, 3)
    ),
    *(
        Info(
            f"res-{order}s",
            RESSinglestep,
            measured_order=order,
            nfe_per_step=order,
            summary="refined exponential, singlestep on x0",
            source=RES,
            fixed={"order": order} | ({"c3": 1.0} if order == 2 else {}),
            quirks=_RES4LYF if order == 3 else "",
        )
        for order in (2, 3)
    ),
    Info(
        "exp-heun-2",
        ExponentialHeun,
        measured_order=2,
        nfe_per_step=2,
        summary="exponential Heun on x0",
        source="Gonzalez et al., arXiv:2305.14267",
        aliases={"exp_heun_2_x0": {}},
    ),
)
