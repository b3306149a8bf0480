# SPDX-License-Identifier: Apache-2.0
"""The solvers, by name: `family-order`, the number the field uses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import ArrayLike

from .._text import unknown
from ..plans import Plan
from ..schedules import Schedule
from .base import Rows, Solver
from .ddim import DDIM, DDPM
from .deis import DEIS, IPNDM, RhoAB
from .dpm import DPMSolverMultistep, DPMSolverSinglestep, LogRhoDEIS
from .reversible import Reversible
from .runge_kutta import TABLEAUS, Euler, Heun, RhoRK

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "IPNDM",
    "TABLEAUS",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "Euler",
    "Heun",
    "Info",
    "LogRhoDEIS",
    "Reversible",
    "RhoAB",
    "RhoRK",
    "Rows",
    "Solver",
    "get",
    "info",
    "names",
    "plan",
]


@dataclass(frozen=True)
class Info:
    """What is known of a named solver.

    Attributes:
        name: Its name.
        order: Measured order of convergence (with warmup="runge-kutta" where it has one).
        nfe_per_step: Evaluations a step.
        summary: One line.
        source: Paper.
        options: Keywords `fastdiff.plan` takes for it, with their defaults.
        stochastic: Whether it draws noise by default.
    """

    name: str
    order: int
    nfe_per_step: int
    summary: str
    source: str
    options: dict[str, Any]
    stochastic: bool
    make: Callable[..., Solver] = dataclasses.field(repr=False)


_REGISTRY: dict[str, Info] = {}
_DDIM = "Song et al., arXiv:2010.02502"
_DDPM = "Ho et al., arXiv:2006.11239"
_EDM = "Karras et al., arXiv:2206.00364"
_DEIS = "Zhang & Chen, arXiv:2204.13902"
_DPM = "Lu et al., arXiv:2206.00927"
_DPMPP = "Lu et al., arXiv:2211.01095"
_REX = "McCallum & Foster, arXiv:2410.11648"


def _register(
    name: str,
    measured: int,
    nfe: int,
    summary: str,
    source: str,
    make: Callable[..., Solver],
    stochastic: bool = False,
    **fixed: Any,
) -> None:
    options = {
        f.name: f.default
        for f in dataclasses.fields(make)  # type: ignore[arg-type]
        if f.name not in fixed
    }
    maker = functools.partial(make, **fixed)
    _REGISTRY[name] = Info(name, measured, nfe, summary, source, options, stochastic, maker)


_register("ddim", 1, 1, "exact flow of a constant output; eta adds noise", _DDIM, DDIM)
_register("ddpm", 1, 1, "ancestral sampling", _DDPM, DDPM, stochastic=True, eta=1.0)
_register("euler", 1, 1, "Euler in the schedule's straight variable", _EDM, Euler, tableau="euler")
_register("heun", 2, 2, "Heun in the schedule's straight variable", _EDM, Heun, tableau="heun")
for _k in (1, 2, 3, 4):
    _register(f"deis-{_k}", _k, 1, "multistep, polynomial in t (tAB)", _DEIS, DEIS, points=_k)
for _k in (1, 2, 3, 4):
    _register(f"deis-rhoab-{_k}", _k, 1, "multistep, polynomial in rho", _DEIS, RhoAB, points=_k)
for _k in (1, 2, 3):
    _register(
        f"deis-logrho-{_k}",
        _k,
        1,
        "multistep, polynomial in log rho (diffusers' DEIS)",
        _DEIS,
        LogRhoDEIS,
        order=_k,
        form="epsilon",
        solver_type="taylor",
        published=False,
        clip=None,
        threshold=None,
    )
_register("deis-heun", 2, 2, "Runge-Kutta in rho", _DEIS, RhoRK, tableau="heun")
_register("deis-kutta3", 3, 3, "Runge-Kutta in rho", _DEIS, RhoRK, tableau="kutta3")
_register("deis-rk4", 4, 4, "Runge-Kutta in rho", _DEIS, RhoRK, tableau="rk4")
for _k in (1, 2, 3, 4):
    _register(
        f"ipndm-{_k}",
        min(_k, 2),
        1,
        "uniform-grid Adams-Bashforth weights",
        _DEIS,
        IPNDM,
        points=_k,
    )
for _k in (1, 2, 3):
    _register(
        f"dpm-{_k}", _k, _k, "singlestep on epsilon", _DPM, DPMSolverSinglestep,
        order=_k, form="epsilon", clip=None, threshold=None,
    )  # fmt: skip
for _k in (2, 3):
    _register(
        f"dpm-{_k}m", _k, 1, "multistep on epsilon", _DPM, DPMSolverMultistep,
        order=_k, form="epsilon", clip=None, threshold=None,
    )  # fmt: skip
_register("dpmpp-1", 1, 1, "ddim on x0", _DPMPP, DPMSolverSinglestep, order=1, form="x0")
for _k in (2, 3):
    _register(
        f"dpmpp-{_k}s", _k, _k, "singlestep on x0", _DPMPP, DPMSolverSinglestep, order=_k, form="x0"
    )
for _k in (2, 3):
    _register(
        f"dpmpp-{_k}m", _k, 1, "multistep on x0", _DPMPP, DPMSolverMultistep, order=_k, form="x0"
    )
_register("rex-1", 1, 2, "two coupled copies, undone without stored states", _REX, Reversible)


def names() -> tuple[str, ...]:
    """Names of all solvers."""
    return tuple(_REGISTRY)


def info(name: str) -> Info:
    """What is known of a solver: order, cost, source, options.

    Raises:
        ValueError: No solver has this name; the nearest are suggested.
    """
    if not isinstance(name, str) or name not in _REGISTRY:
        raise unknown("solver", "solver", name, _REGISTRY)
    return _REGISTRY[name]


def get(name: str, **options: Any) -> Solver:
    """The solver of this name with these options.

    Raises:
        ValueError: Unknown name or a bad value.
        TypeError: An option that this solver does not have (those it has are listed).
    """
    entry = info(name)
    for option in options:
        if option not in entry.options:
            has = ", ".join(f"{k}={v!r}" for k, v in entry.options.items()) or "none"
            raise TypeError(f"{name}: no option {option!r}. It has: {has}.")
    return entry.make(**options)


def plan(
    schedule: Schedule,
    solver: str | Solver,
    steps: int,
    *,
    grid: str | ArrayLike = "auto",
    t_max: float | None = None,
    t_min: float | None = None,
    prediction: str = "epsilon",
    **options: Any,
) -> Plan:
    """Compiles a schedule, a solver and a grid to a plan: all about sampling but the network.

    Args:
        schedule: A `fastdiff.schedules.Schedule`.
        solver: A name (`fastdiff.solvers.names()`) or a `Solver`.
        steps: Intervals of the grid. Singlestep and Runge-Kutta solvers evaluate the network
            several times in each (`plan.nfe` tells), and with `published=True` take the authors'
            meaning.
        grid: A name (`fastdiff.grids.names()`; "auto": the schedule's own), a name with a
            parameter ("karras(5)"), or steps + 1 decreasing times.
        t_max, t_min: Ends of the grid in the schedule's units; None: the schedule's own.
        prediction: What the network returns: "epsilon", "x0", "v" (= alpha eps - sigma x0),
            "velocity" (= dx/dt of the flow), "score", or "edm" (raw F of EDM's preconditioning).
        **options: The solver's own (`fastdiff.solvers.info(name).options`).

    Returns:
        The plan.

    Raises:
        ValueError: An unknown name, more outputs to combine than steps, bad times, an end where the
            solver has no limit. The message names what would work.
        TypeError: A value of the wrong kind, or an option that the solver does not have.
    """
    if isinstance(solver, str):
        solver = get(solver, **options)
    elif not isinstance(solver, Solver):
        raise TypeError(f"plan: solver is a name or a fastdiff.solvers.Solver; got {solver!r}.")
    elif options:
        raise TypeError(
            f"plan: options belong to the solver given, {solver}; got {', '.join(options)} as "
            "well. Set them on it."
        )
    return solver.plan(schedule, steps, grid=grid, t_max=t_max, t_min=t_min, prediction=prediction)
