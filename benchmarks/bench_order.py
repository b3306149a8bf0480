# SPDX-License-Identifier: Apache-2.0
"""Error against network evaluations: every solver, beside diffusers' of the same name.

The error is the root mean square distance, over all elements of all samples, to the exact flow at
t_min = 1e-3: a fourth-order Runge-Kutta of 2000 steps in float64. All is deterministic: the numbers
do not depend on the machine.

    python benchmarks/bench_order.py --out benchmarks/results/order.jsonl --docs docs/accuracy.md
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import harness
import numpy as np
import torch
from harness import Record

import fastdiff as fd

VP = fd.schedules.VPLinear(beta_min=0.1, beta_max=20.0)
NFE = (5, 6, 8, 10, 15, 20)
GRIDS = ("logsnr", "uniform")
SOLVERS = tuple(name for name in fd.solvers.names() if not fd.solvers.info(name).stochastic)

# Three components in eight dimensions, variances between 0.04 and 0.25.
WEIGHTS = (0.5, 0.3, 0.2)
MEANS = (
    (1.0, -0.5, 0.3, 0.8, -1.2, 0.4, 0.9, -0.7),
    (-0.9, 0.6, -1.1, 0.2, 0.7, -0.3, -0.4, 1.3),
    (0.2, 1.4, 0.5, -1.0, 0.1, -1.3, 0.6, 0.0),
)
VARIANCES = (
    (0.04, 0.09, 0.05, 0.16, 0.07, 0.10, 0.06, 0.12),
    (0.10, 0.05, 0.08, 0.06, 0.20, 0.04, 0.11, 0.09),
    (0.07, 0.12, 0.25, 0.05, 0.06, 0.08, 0.04, 0.15),
)


# -- the problems ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A network on `VP`, and where to start.

    Attributes:
        title: As printed.
        network: `network(x, t, **cond)`, in float64.
        prediction: What it returns.
        start: State at t = 1, float64 [B, ...].
        cond: Conditioning by keyword.
    """

    title: str
    network: Callable[..., torch.Tensor]
    prediction: str
    start: torch.Tensor
    cond: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def run(self, plan: fd.Plan) -> torch.Tensor:
        return fd.sample(self.network, self.start, plan, cond=dict(self.cond) or None)

    def exact(self, steps: int) -> torch.Tensor:
        """The flow at t_min by classical Runge-Kutta."""
        return self.run(fd.plan(VP, "deis-rk4", steps, grid="logsnr", prediction=self.prediction))


def mixture(batch: int = 64) -> Problem:
    model = fd.models.GaussianMixture(WEIGHTS, MEANS, VARIANCES)
    start = fd.noise.normal((batch, 8), 0, 0, dtype=torch.float64)
    return Problem("Gaussian mixture, 8 dimensions", model.network(VP), "epsilon", start)


def empirical(batch: int = 16) -> Problem:
    images, _ = fd.models.digits_data("train")
    model = fd.models.EmpiricalDenoiser(images.double())
    start = fd.noise.normal((batch, *images.shape[1:]), 0, 0, dtype=torch.float64)
    return Problem("Exact denoiser of 1437 digits", model.network(VP), "epsilon", start)


def digits(batch: int = 10) -> Problem:
    network = fd.models.digits().double()
    start = fd.noise.normal((batch, *network.shape), 0, 0, dtype=torch.float64)
    cond = {"y": torch.arange(batch) % 10}
    return Problem("Digits network, by class", network, network.prediction, start, cond)


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "mixture": mixture,
    "empirical": empirical,
    "digits": digits,
}


# -- diffusers' solvers on our grids ---------------------------------------------------------------

_BUDGET_SOLVERS = {"dpm-2": 2, "dpm-3": 3, "dpmpp-2s": 2, "dpmpp-3s": 3}
_MULTISTEP = {"dpm-2m": 2, "dpm-3m": 3, "dpmpp-2m": 2, "dpmpp-3m": 3}
_LOGRHO = {"deis-logrho-1": 1, "deis-logrho-2": 2, "deis-logrho-3": 3}
THEIRS = ("ddim", "heun", *_BUDGET_SOLVERS, *_MULTISTEP, *_LOGRHO)
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def nodes(plan: fd.Plan) -> np.ndarray:
    """Times of all evaluations of a plan, and its end."""
    return np.array([*(stage.t for stage in plan.stages), plan.times[-1]])


def scheduler(name: str, plan: fd.Plan, **their_options: Any) -> Any:
    """diffusers' scheduler of this name with its defaults, told to step through a plan's nodes.

    Its sigmas (sigma_t/alpha_t) are put in after `set_timesteps`, in float64. Its own use of a
    singlestep solver takes the inner nodes from the time grid; here they are ours.
    """
    import diffusers

    points = nodes(plan)
    count = len(points) - 1
    made: Any
    common = {"prediction_type": _PREDICTIONS[plan.prediction], **their_options}
    last = {"final_sigmas_type": "sigma_min"}
    if name == "ddim":
        made = diffusers.DDIMScheduler(
            num_train_timesteps=count,
            trained_betas=[0.5] * count,
            clip_sample=False,
            set_alpha_to_one=False,
            **common,
        )
        alpha_squared = torch.from_numpy(VP.alpha(points) ** 2)
        made.alphas_cumprod = alpha_squared[:-1].flip(0)
        made.final_alpha_cumprod = alpha_squared[-1]
        made.set_timesteps(count)
        return made
    if name == "heun":
        made = diffusers.HeunDiscreteScheduler(**common)
        made.set_timesteps(len(plan.times) - 1)
        rho = torch.from_numpy(VP.rho(np.array(plan.times)))
        made.sigmas = torch.cat([rho[:1], rho[1:].repeat_interleave(2)])[: count + 1]
        made.timesteps = torch.arange(count)
        made.set_begin_index(0)
        return made
    if name in _LOGRHO:
        made = diffusers.DEISMultistepScheduler(solver_order=_LOGRHO[name], **common)
    else:
        algorithm = "dpmsolver++" if name.startswith("dpmpp") else "dpmsolver"
        options = {**common, **last, "algorithm_type": algorithm}
        if name in _MULTISTEP:
            order = _MULTISTEP[name]
            made = diffusers.DPMSolverMultistepScheduler(solver_order=order, **options)
        else:
            order = _BUDGET_SOLVERS[name]
            options["lower_order_final"] = False
            made = diffusers.DPMSolverSinglestepScheduler(solver_order=order, **options)
    made.set_timesteps(count)
    made.sigmas = torch.from_numpy(VP.rho(points))
    made.timesteps = torch.arange(count)
    made.set_begin_index(0)
    if name in _BUDGET_SOLVERS:
        made.order_list = made.get_order_list(count)
    return made


def run_theirs(name: str, plan: fd.Plan, problem: Problem, **their_options: Any) -> torch.Tensor:
    """Final state of diffusers' solver over a plan's nodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers calls some of its own options deprecated
        made = scheduler(name, plan, **their_options)
        points = nodes(plan)
        if name == "heun":  # it evaluates at the ends of each step; ours names the same times
            points = np.repeat(np.array(plan.times), 2)[1:]
        x = problem.start
        variance_exploding = name == "heun"  # its state is x/alpha
        if variance_exploding:
            x = x / float(VP.alpha(points[0]))
        for k, t in enumerate(made.timesteps):
            alpha = float(VP.alpha(points[k])) if variance_exploding else 1.0
            told = torch.full((len(x),), float(points[k]), dtype=torch.float64)
            output = problem.network((x * alpha).double(), told, **problem.cond)
            x = made.step(output, t, x, return_dict=False)[0]
        return x * float(VP.alpha(points[-1])) if variance_exploding else x


# -- the gate --------------------------------------------------------------------------------------


def gate() -> None:
    """Where diffusers can run the same table it ends where ours ends: both are run rightly.

    Raises:
        harness.GateError: It does not.
    """
    problem = mixture(4)
    options: dict[str, dict[str, Any]] = {name: {} for name in THEIRS}
    for name in (*_MULTISTEP, *_LOGRHO):
        if fd.solvers.info(name).least_steps > 1:  # a first-order method has no order to lower
            options[name] = {"lower_order_final": True}
    for name in ("dpm-3m", "dpmpp-3m"):
        options[name]["published"] = True
    theirs: dict[str, dict[str, Any]] = {name: {} for name in THEIRS}
    for name in ("dpm-3", "dpmpp-3s"):  # by default its inner steps follow another rule
        options[name], theirs[name] = {"solver_type": "taylor"}, {"solver_type": "heun"}
    for name in THEIRS:
        plan = fd.plan(VP, name, 6, grid="logsnr", **options[name])
        # diffusers' state is float32, and so are its differences of exponentials
        got = run_theirs(name, plan, problem, **theirs[name])
        harness.agree(name, got, problem.run(plan), 1e-5)


# -- measuring -------------------------------------------------------------------------------------


def plan_of(name: str, budget: int, grid: str, prediction: str) -> fd.Plan | None:
    """The plan that spends the budget exactly, or None where there is none."""
    steps, rest = divmod(budget, fd.solvers.info(name).nfe_per_step)
    if rest or steps < fd.solvers.info(name).least_steps:
        return None
    plan = fd.plan(VP, name, steps, grid=grid, prediction=prediction)
    assert plan.nfe == budget
    return plan


Row = dict[str, Any]  # problem, grid, solver, rival, nfe, error


def measure(
    problem: str,
    solvers: Sequence[str],
    budgets: Sequence[int],
    grids: Sequence[str],
    reference: int,
    theirs: bool,
) -> list[Row]:
    """The error of every solver on every grid at every budget it can spend."""
    made = PROBLEMS[problem]()
    exact = made.exact(reference)
    rows: list[Row] = []

    def note(rival: str, got: torch.Tensor, **what: Any) -> None:
        error = float((got.double() - exact).square().mean().sqrt())
        rows.append({"problem": problem, **what, "rival": rival, "error": float(f"{error:.6g}")})

    for grid in grids:
        for solver in solvers:
            for budget in budgets:
                plan = plan_of(solver, budget, grid, made.prediction)
                if plan is None:
                    continue
                what = {"grid": grid, "solver": solver, "nfe": budget}
                note("fastdiff", made.run(plan), **what)
                if theirs and solver in THEIRS:
                    note("diffusers", run_theirs(solver, plan, made), **what)
    return rows


def lines(rows: Sequence[Row], reference: int) -> list[Record]:
    """The rows as records: one a problem, grid, solver and rival, with its errors by NFE."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for r in rows:
        key = (r["problem"], r["grid"], r["solver"], r["rival"])
        found.setdefault(key, {})[str(r["nfe"])] = r["error"]
    return [
        harness.record(
            "order",
            rival,
            {"error": by_nfe},
            problem=problem,
            shape=list(PROBLEMS[problem]().start.shape),
            dtype="float64",
            reference=reference,
            grid=grid,
            solver=solver,
        )
        for (problem, grid, solver, rival), by_nfe in found.items()
    ]


# -- reports ---------------------------------------------------------------------------------------

Errors = dict[str, dict[int, float]]  # solver -> NFE -> error


def errors(rows: Sequence[Row], problem: str, grid: str, rival: str) -> Errors:
    found: Errors = {}
    for r in rows:
        if (r["problem"], r["grid"], r["rival"]) == (problem, grid, rival):
            found.setdefault(r["solver"], {})[r["nfe"]] = r["error"]
    return found


def same(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Solvers that are one on these problems (equal errors to five digits), by their first name."""
    signature: dict[str, list[Any]] = {}
    for r in rows:
        if r["rival"] == "fastdiff":
            case = (r["problem"], r["grid"], r["nfe"], f"{r['error']:.4e}")
            signature.setdefault(r["solver"], []).append(case)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for solver, cases in signature.items():
        groups.setdefault(tuple(cases), []).append(solver)
    return {names[0]: names[1:] for names in groups.values()}


def report(rows: Sequence[Row], budgets: Sequence[int]) -> str:
    """One table for each problem and grid: ours, and diffusers' after a stroke where it exists."""
    groups = same(rows)
    parts = []
    for problem, grid in dict.fromkeys((r["problem"], r["grid"]) for r in rows):
        ours = errors(rows, problem, grid, "fastdiff")
        theirs = errors(rows, problem, grid, "diffusers")
        best = {n: min(e[n] for e in ours.values() if n in e) for n in budgets}
        table = []
        for solver in groups:
            names = [solver, *groups[solver]]
            their = next((theirs[name] for name in names if name in theirs), {})
            cells = []
            for n in budgets:
                if n not in ours[solver]:
                    cells.append("")
                    continue
                error = ours[solver][n]
                shown = harness.number(error)
                cell = f"**{shown}**" if error == best[n] else shown
                cells.append(cell + (f" / {harness.number(their[n])}" if n in their else ""))
            table.append([solver, *cells])
        title = f"**{_TITLES[problem]}, grid `{grid}`**"
        parts += [title, harness.table(["NFE", *map(str, budgets)], table)]
    also = [
        f"`{a}` stands for {', '.join(f'`{b}`' for b in rest)}"
        for a, rest in groups.items()
        if rest
    ]
    if also:
        parts.append("One method under several names on this schedule: " + "; ".join(also) + ".")
    parts.append(comparison(rows))
    return "\n\n".join(parts)


def comparison(rows: Sequence[Row], shown: int = 6) -> str:
    """How often ours ends nearer than diffusers', and the largest differences both ways."""
    theirs = {_case(r): r["error"] for r in rows if r["rival"] == "diffusers"}
    groups = same(rows)
    seen = {name for names in groups.values() for name in names}
    ratios = {
        _case(r): theirs[_case(r)] / r["error"]
        for r in rows
        if r["rival"] == "fastdiff" and _case(r) in theirs and r["solver"] not in seen
    }
    if not ratios:
        return ""
    order = sorted(ratios, key=lambda case: ratios[case])
    better = sum(ratio > 1.01 for ratio in ratios.values())
    worse = sum(ratio < 1 / 1.01 for ratio in ratios.values())
    text = (
        f"Of {len(ratios)} pairs, ours ends nearer to the exact flow in {better}, diffusers' in "
        f"{worse}, and {len(ratios) - better - worse} agree within 1 %. The largest differences:"
    )
    table = []
    for case in [*order[: -shown - 1 : -1], *order[shown - 1 :: -1]]:
        problem, grid, solver, nfe = case
        ours, their = theirs[case] / ratios[case], theirs[case]
        row = [solver, _TITLES[problem], grid, str(nfe)]
        table.append([*row, *map(harness.number, (ours, their, ratios[case]))])
    head = ["solver", "problem", "grid", "NFE", "fastdiff", "diffusers", "diffusers / fastdiff"]
    return text + "\n\n" + harness.table(head, table)


def _case(row: Row) -> tuple[str, str, str, int]:
    return row["problem"], row["grid"], row["solver"], row["nfe"]


_TITLES = {
    "mixture": "Gaussian mixture",
    "empirical": "Exact denoiser of the digits",
    "digits": "Digits network",
}
_PANELS = {
    "DEIS": ("deis-2", "deis-3", "deis-4", "deis-rhoab-3", "deis-logrho-3"),
    "DPM-Solver": ("dpm-2", "dpm-3", "dpm-2m", "dpm-3m"),
    "DPM-Solver++": ("dpmpp-2s", "dpmpp-3s", "dpmpp-2m", "dpmpp-3m"),
    "Runge-Kutta and iPNDM": ("heun", "deis-kutta3", "deis-rk4", "ipndm-2", "ipndm-4"),
}
# Colours that colour-blind readers tell apart (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")


def draw(rows: Sequence[Row], problem: str, path: Path) -> None:
    """Error against NFE: a row a grid, a panel a family; DDIM in grey, diffusers' dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grids = list(dict.fromkeys(r["grid"] for r in rows if r["problem"] == problem))
    size = (3.1 * len(_PANELS), 2.7 * len(grids) + 0.3)
    figure, axes = pyplot.subplots(
        len(grids), len(_PANELS), figsize=size, sharex=True, sharey="row", squeeze=False
    )
    for k, (row, grid) in enumerate(zip(axes, grids, strict=True)):
        ours = errors(rows, problem, grid, "fastdiff")
        theirs = errors(rows, problem, grid, "diffusers")
        for panel, (family, solvers) in zip(row, _PANELS.items(), strict=True):
            if "ddim" in ours:
                panel.plot(*_line(ours["ddim"]), color="0.6", lw=1.2, label="ddim")
            for solver, colour in zip(solvers, _COLOURS, strict=False):
                if solver not in ours:
                    continue
                style = {"color": colour, "lw": 1.4}
                panel.plot(*_line(ours[solver]), marker="o", ms=3.5, label=solver, **style)
                if solver in theirs:
                    style |= {"ls": "--", "lw": 1.0, "marker": "x", "ms": 5}
                    panel.plot(*_line(theirs[solver]), **style)
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(NFE, [str(n) for n in NFE])
            panel.minorticks_off()
            panel.grid(alpha=0.25, lw=0.5)
            if k == 0:
                panel.set_title(family, fontsize=10)
                panel.legend(fontsize=7, frameon=False, handlelength=1.5)
            if k + 1 == len(grids):
                panel.set_xlabel("network evaluations", fontsize=9)
            panel.tick_params(labelsize=8)
        row[0].set_ylabel(f"rms error, grid {grid}", fontsize=9)
    figure.suptitle(f"{_TITLES[problem]}: fastdiff solid, diffusers dashed", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def _line(found: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return sorted(found), [found[n] for n in sorted(found)]


def _names(allowed: Sequence[str]) -> Callable[..., tuple[str, ...]]:
    def convert(context: Any, parameter: Any, value: str) -> tuple[str, ...]:
        chosen = tuple(name.strip() for name in value.split(",")) if value else tuple(allowed)
        for name in chosen:
            if name not in allowed:
                raise click.BadParameter(f"one or more of {', '.join(allowed)}; got {name!r}.")
        return chosen

    return convert


@click.command(context_settings={"show_default": True})
@click.option("--problems", default="", callback=_names(tuple(PROBLEMS)), help="Default: all.")
@click.option("--solvers", default="", callback=_names(SOLVERS), help="Default: all without noise.")
@click.option("--grids", default=",".join(GRIDS), callback=_names(fd.grids.names()))
@click.option("--nfe", default=",".join(map(str, NFE)), help="Budgets of evaluations.")
@click.option(
    "--reference", default=2000, type=click.IntRange(min=1), help="Steps of the exact flow."
)
@click.option("--diffusers/--no-diffusers", "theirs", default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON lines.")
@click.option("--docs", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--images", type=click.Path(file_okay=False, path_type=Path), help="PNG plots.")
def main(
    problems: tuple[str, ...],
    solvers: tuple[str, ...],
    grids: tuple[str, ...],
    nfe: str,
    reference: int,
    theirs: bool,
    out: Path | None,
    docs: Path | None,
    images: Path | None,
) -> None:
    """Error of every solver against network evaluations, beside diffusers' of the same name."""
    budgets = tuple(map(int, nfe.split(",")))
    if theirs:
        gate()
    rows: list[Row] = []
    for problem in problems:
        rows += measure(problem, solvers, budgets, grids, reference, theirs)
    text = report(rows, budgets)
    click.echo(harness.where() + "\n\n" + text)
    if out is not None:
        harness.write(out, lines(rows, reference))
    if docs is not None:
        harness.replace_section(docs, "order", text)
    if images is not None:
        for problem in problems:
            draw(rows, problem, images / f"accuracy-{problem}.png")


if __name__ == "__main__":
    main()
