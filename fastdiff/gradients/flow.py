# SPDX-License-Identifier: Apache-2.0
"""The probability flow that a plan approximates: its schedule, and the nodes of its adjoint."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..guidance import Guidance
from ..plans import Plan, Stage
from ..schedules import Schedule
from ..solvers import DPMSolverMultistep, Row, Rows
from ..solvers.exponential import phi
from .options import AdjointDEIS
from .pools import Recent

WHO = "AdjointDEIS"
_SAME = 1e-6  # relative difference of two schedules' numbers that rounding can make
_POINTS = 257  # times at which two schedules are compared


@dataclass(frozen=True, eq=False)
class Adjoint:
    """What the continuous adjoint of a plan stands on.

    Attributes:
        schedule: Of the flow.
        own: The plan on the adjoint's nodes, whose transposed rows are the adjoint's.
    """

    schedule: Schedule
    own: Plan


def adjoint_of(gradient: AdjointDEIS, plan: Plan, recent: Recent) -> Adjoint:
    """The adjoint of a plan, made and checked once.

    Raises:
        ValueError, NotImplementedError: It has no meaning or no limit, or its schedule is not the
            plan's.
    """

    def made() -> Adjoint:
        _check_rows(plan)
        schedule = schedule_of(gradient, plan)
        _check_ends(gradient, schedule, plan)
        return Adjoint(schedule, _nodes(gradient, schedule, plan))

    return recent.get(plan, ("adjoint", gradient), made)


def check_guidance(guidance: Guidance, plan: Plan) -> None:
    """Raises where the weights of the branches change along a run."""
    first = guidance.weights(0)
    for i in range(1, len(plan.stages)):
        if not all(map(_equal, guidance.weights(i), first)):
            raise NotImplementedError(
                f"{WHO}: guidance by one scale a stage has no value between stages; use a number "
                'or a tensor of one a sample, or gradient="discrete".'
            )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    return bool(a == b)


def _check_rows(plan: Plan) -> None:
    if any(stage.clip is not None or stage.threshold is not None for stage in plan.stages):
        raise ValueError(
            f"{WHO}: the flow has no clip and no threshold, so its gradient cannot pass those of "
            'the plan. Use gradient="discrete".'
        )
    if plan.extras or plan.scalars:
        what = "extra input registers" if plan.extras else "measures of the samples"
        raise NotImplementedError(
            f'{WHO}: {what} are not part of the flow. Use gradient="discrete".'
        )
    _check_times(plan)


def _check_ends(gradient: AdjointDEIS, schedule: Schedule, plan: Plan) -> None:
    ends = (plan.times[0], plan.times[-1])
    last = plan.stages[-1]
    if last.evaluate and not plan.at_e[-1] and float(schedule.sigma(ends[1])) > 0.0:
        p, q = schedule.conversion(plan.variable, "x0", last.t)
        if (last.a_x, last.b, last.c) == (p, (q,), 0.0):
            raise NotImplementedError(
                f"{WHO}: the last row of the plan jumps to x0, which is no state of the flow at "
                f't = {ends[1]:g}. Use gradient="discrete", or a schedule that reaches sigma = 0.'
            )
    finite = bool(np.isfinite(schedule.lambda_t(np.array(ends))).all())
    if plan.stochastic:
        _check_stochastic(gradient, schedule, plan)
    if not finite and (gradient.published or gradient.states == "resolve"):
        what = "published=True" if gradient.published else 'states="resolve"'
        raise ValueError(
            f"{WHO}: {what} needs alpha > 0 at the start and sigma > 0 at the end; got times "
            f"{ends[0]:g} to {ends[1]:g} of {schedule}. Make the plan with t_max and t_min inside, "
            "or leave it out."
        )


def _check_times(plan: Plan) -> None:
    for i, (cur, nxt) in enumerate(itertools.pairwise(plan.times)):
        if not nxt < cur:
            raise NotImplementedError(
                f"{WHO}: states are found by their time, so the plan's times decrease throughout; "
                f'got times[{i}] = {cur:g}, times[{i + 1}] = {nxt:g}. Use gradient="discrete".'
            )


def _check_stochastic(gradient: AdjointDEIS, schedule: Schedule, plan: Plan) -> None:
    if gradient.states == "resolve" or gradient.form == "epsilon":
        raise NotImplementedError(
            f"{WHO}: along drawn noise the adjoint takes recorded states and x0 form; got "
            f"states={gradient.states!r}, form={gradient.form!r}. Leave them out."
        )
    if gradient.steps is not None or gradient.grid is not None:
        raise NotImplementedError(
            f"{WHO}: a path of noise cannot be interpolated, so the adjoint of a stochastic "
            "plan stands on the plan's own times. Leave steps and grid out."
        )
    _check_reverse_sde(schedule, plan)


def _check_reverse_sde(schedule: Schedule, plan: Plan) -> None:
    """Raises unless the plan's noise is that of the reverse SDE with tau = 1."""
    for i, stage in enumerate(plan.stages):
        if not stage.c or len(plan.stages) != plan.steps:
            continue
        s, t = plan.times[i], plan.times[i + 1]
        h = float(schedule.lambda_t(t) - schedule.lambda_t(s))
        wanted = float(schedule.sigma(t)) * np.sqrt(-np.expm1(-2.0 * h))
        if abs(stage.c - wanted) <= 1e-6 * wanted:
            continue
        raise NotImplementedError(
            f"{WHO}: the adjoint of a stochastic plan is that of the reverse SDE (tau = 1, "
            f"such as ddim with eta=1); {plan.solver} draws {stage.c:.6g} at t = {s:g} where that "
            f'draws {wanted:.6g}. Use gradient="discrete".'
        )
    if len(plan.stages) != plan.steps:
        raise NotImplementedError(
            f"{WHO}: the adjoint of a stochastic plan needs one stage a step; got "
            f'{len(plan.stages)} stages in {plan.steps} steps. Use gradient="discrete".'
        )


# -- the schedule ----------------------------------------------------------------------------------


def schedule_of(gradient: AdjointDEIS, plan: Plan) -> Schedule:
    """The schedule of a plan.

    Raises:
        ValueError: It is not known, or the one that was given contradicts the plan.
    """
    own, given = plan.schedule, gradient.schedule
    lacking = _lacking(own, plan)
    if given is None:
        if own is None or lacking is not None:
            raise ValueError(
                f"{WHO}: the flow needs the plan's schedule, and this plan does not carry it: "
                f"{lacking} Give AdjointDEIS(schedule=...)."
            )
        return own
    if own is not None and lacking is None:
        if own != given and not _agree(own, given, plan):
            raise ValueError(
                f"{WHO}: schedule is the plan's own, {own}; got {given}, which differs from it. "
                "Leave it out."
            )
        return own
    problem = _contradiction(given, plan)
    if problem is not None:
        raise ValueError(
            f"{WHO}: schedule is the one that the plan was made for; got {given}, and {problem}. "
            "Give the plan's."
        )
    return given


def _lacking(schedule: Schedule | None, plan: Plan) -> str | None:
    """Why a plan's schedule cannot be asked; None where it can."""
    if schedule is None:
        return "it was made by hand."
    try:
        schedule.alpha(plan.times[0])
    except ValueError as error:
        return str(error)
    return None


def _agree(a: Schedule, b: Schedule, plan: Plan) -> bool:
    """Whether two schedules have the same numbers between the ends of a plan."""
    times = np.array([*plan.times, *np.linspace(plan.times[0], plan.times[-1], _POINTS)])
    try:
        pairs = [(a.alpha(times), b.alpha(times)), (a.sigma(times), b.sigma(times))]
        pairs.append((a.model_time(times, plan.prediction), b.model_time(times, plan.prediction)))
        pairs.append((a.c_in(times, plan.prediction), b.c_in(times, plan.prediction)))
    except ValueError:  # the plan's times lie outside the domain of one of them
        return False
    return all(_close(p, q) for p, q in pairs)


def _close(a: Any, b: Any) -> bool:
    return bool(np.allclose(a, b, rtol=_SAME, atol=1e-12, equal_nan=True))


def _contradiction(schedule: Schedule, plan: Plan) -> str | None:
    """What a plan's rows say against a schedule, as far as they tell; None where nothing does."""
    low, high = schedule.domain
    if plan.times[0] > high or plan.times[-1] < low:
        return (
            f"it is defined from {low:g} to {high:g} where the plan has times from "
            f"{plan.times[-1]:g} to {plan.times[0]:g}"
        )
    wanted = float(schedule.prior_scale(plan.times[0]))
    if not _close(plan.prior_scale, wanted):
        return f"the plan has prior_scale {plan.prior_scale:.6g} where it gives {wanted:.6g}"
    for i, stage in enumerate(plan.stages):
        for name, got, expected in _numbers(schedule, plan, stage) if stage.evaluate else ():
            if not _close(got, expected):
                return f"stage {i} (t = {stage.t:.6g}) has {name} {got} where it gives {expected}"
    return None


def _numbers(schedule: Schedule, plan: Plan, stage: Stage) -> list[tuple[str, Any, Any]]:
    """Numbers of an evaluating stage that a schedule gives too: (name, the stage's, its)."""

    def shown(*values: Any) -> tuple[float, ...]:
        return tuple(float(f"{float(value):.9g}") for value in values)

    t, prediction = stage.t, plan.prediction
    found = [
        ("model_time", shown(stage.model_time), shown(schedule.model_time(t, prediction))),
        ("c_in", shown(stage.c_in), shown(schedule.c_in(t, prediction))),
    ]
    conversion = shown(*schedule.conversion(prediction, plan.variable, t))
    found.append(("(p, q)", shown(stage.p, stage.q), conversion))
    if not math.isnan(stage.x0_p):  # a row made by hand need not say it
        x0 = shown(*schedule.conversion(prediction, "x0", t))
        found.append(("(x0_p, x0_q)", shown(stage.x0_p, stage.x0_q), x0))
    return found


# -- the nodes -------------------------------------------------------------------------------------


def on_the_plans_times(gradient: AdjointDEIS, plan: Plan) -> AdjointDEIS:
    """The adjoint on the plan's own times, where a conditioning has one value a stage.

    Raises:
        NotImplementedError: It stands on others, or a stage of the plan stands between its times.
    """
    same = gradient.steps in (None, plan.steps) and gradient.grid in (None, plan.times)
    if not same or gradient.published or [s.t for s in plan.stages] != [*plan.times[:-1]]:
        raise NotImplementedError(
            f"{WHO}: a PerStage has values at the stages alone, so the adjoint stands on the "
            f"plan's own times, with one stage a step; got {gradient}. Leave steps, grid and "
            'published out, or use gradient="discrete".'
        )
    return gradient if plan.stochastic else replace(gradient, grid=plan.times)


def _nodes(gradient: AdjointDEIS, schedule: Schedule, plan: Plan) -> Plan:
    times = np.array(plan.times)
    finite = bool(np.isfinite(schedule.lambda_t(times[[0, -1]])).all())
    form = gradient.form or ("epsilon" if float(schedule.alpha(times[0])) > 0.0 else "x0")
    if plan.stochastic:
        return _reverse_sde(schedule, plan, gradient.order)
    steps = gradient.steps or plan.steps
    grid = gradient.grid
    if grid is None:
        grid = "logsnr" if finite else times
        if not finite and steps != plan.steps:
            raise ValueError(
                f"{WHO}: lambda is infinite at an end of the plan, where only its own times "
                f"are known to serve; got steps={steps}, and the plan has {plan.steps}. Give grid=."
            )
    ends: dict[str, Any] = {}
    if isinstance(grid, str):
        ends = {"t_max": plan.times[0], "t_min": plan.times[-1]}
    solver = DPMSolverMultistep(order=min(gradient.order, steps), form=form, solver_type="taylor")
    return solver.plan(schedule, steps, grid=grid, prediction=plan.prediction, **ends)


def _reverse_sde(schedule: Schedule, plan: Plan, order: int) -> Plan:
    """Rows of the exponential Adams method of the reverse SDE in x0 form, without their noise.

    x_t = (sigma_t/sigma_s) e^{-h} x_s + sum_j B_j x0_j,   B from
    J_p = 2 alpha_t p! h^{p+1} phi_{p+1}(-2h)
    """
    rows = Rows(schedule, plan.prediction, "x0")
    times = np.array(plan.times)
    lam = schedule.lambda_t(times)
    for i in range(len(times) - 1):
        s, t = times[i], times[i + 1]
        h, alpha, sigma = float(lam[i + 1] - lam[i]), float(schedule.alpha(t)), schedule.sigma
        k = min(order, max(int(np.isfinite(lam[: i + 1]).sum()), 1)) if np.isfinite(h) else 1
        if np.isfinite(h):
            j = [
                2.0 * alpha * math.factorial(p) * h ** (p + 1) * phi(p + 1, -2.0 * h)
                for p in range(k)
            ]
            a = float(sigma(t) / sigma(s)) * np.exp(-h)
        else:
            j, a = [alpha], 0.0
        u = lam[i::-1][:k] - lam[i] if k > 1 else np.zeros(1)
        b = np.linalg.solve(np.vander(u, increasing=True).T, np.array(j))
        outputs = dict(zip(range(i, i - k, -1), b.tolist(), strict=True))
        rows.add(float(s), x=Row(a, outputs=outputs))
    return Plan(
        stages=tuple(rows.stages),
        times=plan.times,
        prediction=plan.prediction,
        variable="x0",
    )
