# SPDX-License-Identifier: Apache-2.0
"""The solvers by name: `family-order`, the number the field uses, and other libraries' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import ArrayLike

from .._text import unknown
from ..plans import Plan
from ..schedules import Schedule
from . import distilled, embedded, embedded_dpm
from .base import Solver
from .embedded import Embedded
from .entry import Info
from .ode import (
    ddim,
    deis,
    dpm_multistep,
    dpm_singlestep,
    dpm_v3,
    gradient_estimation,
    ipndm,
    lms,
    pndm,
    res,
    reversible,
    runge_kutta,
    unipc,
    velocity,
)
from .sde import ddpm, restart

_FAMILIES = (
    ddim,
    ddpm,
    runge_kutta,
    deis,
    ipndm,
    lms,
    pndm,
    dpm_singlestep,
    dpm_multistep,
    res,
    gradient_estimation,
    unipc,
    velocity,
    dpm_v3,
    reversible,
    distilled,
    restart,
)
_REGISTRY = {entry.name: entry for family in _FAMILIES for entry in family.SOLVERS}
_ALIASES = {alias: entry for entry in _REGISTRY.values() for alias in entry.aliases}
_ADAPTIVE = {e.name: e for family in (embedded_dpm, embedded) for e in family.ADAPTIVE}
_ADAPTIVE_ALIASES = {alias: entry for entry in _ADAPTIVE.values() for alias in entry.aliases}


def names() -> tuple[str, ...]:
    """Names of all solvers, without the aliases."""
    return tuple(_REGISTRY)


def info(name: str) -> Info:
    """What is known about a solver, as docs/solvers.md has it.

    Args:
        name: A name or an alias.

    Returns:
        Measured order, cost, source, options, the names that other libraries give it, whose samples
        these are under another name, and what published code gets wrong.

    Raises:
        ValueError: No solver has this name; the nearest are suggested.
    """
    entry = (_REGISTRY | _ALIASES).get(name) if isinstance(name, str) else None
    if entry is None and isinstance(name, str) and name in _ADAPTIVE | _ADAPTIVE_ALIASES:
        raise ValueError(
            f"plan: {name} chooses its own steps while it runs, and has no plan before; got it as "
            f"the solver of one. Use fastdiff.adaptive(network, x, schedule, {name!r}), whose "
            "accepted times are a plan afterwards."
        )
    if entry is None:
        listing = f"`fastdiff solvers` and fastdiff.solvers.names() list all {len(_REGISTRY)}."
        if isinstance(name, str) and any(word in name.lower() for word in ("sde", "ancestral")):
            raise ValueError(
                f"solver: unknown solver {name!r}. The samplers here that draw noise at every step "
                f"are 'ddpm', and 'ddim' with eta. {listing}"
            )
        raise unknown("solver", "solver", name, _REGISTRY, listing)
    return entry


def adaptive_names() -> tuple[str, ...]:
    """Names of the embedded pairs that `fastdiff.adaptive` takes, without the aliases.

    A name may be that of a solver of `names` as well: there it takes steps that are given to it.
    """
    return tuple(_ADAPTIVE)


def adaptive_info(name: str) -> Info:
    """What is known about an embedded pair, as `info` says it of a solver.

    Raises:
        ValueError: No pair has this name; the nearest are suggested.
    """
    entry = (_ADAPTIVE | _ADAPTIVE_ALIASES).get(name) if isinstance(name, str) else None
    if entry is None:
        raise unknown("adaptive", "adaptive solver", name, _ADAPTIVE)
    return entry


def adaptive_get(solver: Any, options: Mapping[str, Any]) -> Embedded:
    """The embedded pair of a name with these options, or the pair itself.

    Raises:
        ValueError: The name is unknown, or an option has a bad value.
        TypeError: There is no such option; or solver is neither.
    """
    if isinstance(solver, Embedded):
        if options:
            raise TypeError(
                f"adaptive: options belong to the solver given, {solver}; got "
                f"{', '.join(options)} as well. Set them on it."
            )
        return solver
    if not isinstance(solver, str):
        raise TypeError(
            "adaptive: solver is a name in fastdiff.solvers.adaptive_names() or an embedded pair; "
            f"got {solver!r}."
        )
    made = _make(adaptive_info(solver), solver, options)
    assert isinstance(made, Embedded)
    return made


def get(name: str, **options: Any) -> Solver:
    """The solver of this name with these options.

    Args:
        name: A name or an alias; an alias brings the options that make it the same sampler.
        **options: The solver's own (`info(name).options`).

    Raises:
        ValueError: The name is unknown, or an option has a bad value.
        TypeError: The solver has no such option; the message lists those that it has.
    """
    return _make(info(name), name, options)


def _make(entry: Info, name: str, options: Mapping[str, Any]) -> Solver:
    """The solver of an entry, by the name that it was called."""
    allowed = entry.options
    for option in options:
        if option not in allowed:
            has = ", ".join(f"{k}={v!r}" for k, v in allowed.items()) or "none"
            raise TypeError(f"{name}: no option {option!r}. It has: {has}.")
    made = {**entry.fixed, **entry.aliases.get(name, {}), **options}
    if isinstance(made.get("inner"), str):  # a solver around another one
        made["inner"] = get(made["inner"])
    return entry.make(**made)


def plan(
    schedule: Schedule,
    solver: str | Solver,
    steps: int,
    *,
    grid: str | ArrayLike = "auto",
    t_max: float | None = None,
    t_min: float | None = None,
    prediction: str = "epsilon",
    jump: bool = False,
    **options: Any,
) -> Plan:
    """Compiles a schedule, a solver and a grid to a plan: all that sampling needs but the network.

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
        jump: True ends with a jump to x0. The last interval of the grid is replaced by one
            evaluation at its start, whose x0 prediction is the result, whatever the grid's last
            time; the plan's last time is that of sigma = 0 where the schedule has one. A solver of
            one evaluation a step costs as many as before. A solver of several spends one on the
            jump, and one that combines k outputs needs k steps before it.
        **options: The solver's own (`fastdiff.solvers.info(name).options`).

    Returns:
        The plan.

    Raises:
        ValueError: A name is unknown, the times are bad, the solver combines more outputs than
            there are steps, or it has no limit at an end of the grid. The message names what would
            work.
        TypeError: A value has the wrong kind, or the solver has no such option.
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
    ends = {"t_max": t_max, "t_min": t_min}
    return solver.plan(schedule, steps, grid=grid, prediction=prediction, jump=jump, **ends)
