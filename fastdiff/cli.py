# SPDX-License-Identifier: Apache-2.0
"""The command line: sample and compare on the shipped problems, print plans, list what there is.

Exit codes: 0 done, 1 the work failed, 2 the command was wrong. An error is one line on stderr.
Output paths are opened before the work starts and replaced in one step when it is done.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

import fastdiff as fd

try:
    import click
except ModuleNotFoundError:
    sys.exit(
        "error: fastdiff: the command line needs click; it is not installed. "
        'Run: pip install "fastdiff-engine[cli]"'
    )

_Command = Callable[..., Any]

# Name, schedule, and what networks trained on it usually return.
_SCHEDULES: dict[str, tuple[Callable[[], fd.schedules.Schedule], str]] = {
    "vp-linear": (fd.schedules.VPLinear, "epsilon"),
    "vp-cosine": (fd.schedules.VPCosine, "epsilon"),
    "sd": (fd.schedules.VPDiscrete.scaled_linear, "epsilon"),
    "edm": (fd.schedules.EDM, "edm"),
    "flow": (fd.schedules.FlowMatching, "velocity"),
}
_COMPARED = "ddim,deis-heun,dpmpp-2m,dpmpp-3m,deis-3"
_BUDGETS = "6,9,12,16,24,36,48"
# Colours that colour-blind readers tell apart (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_TICKS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000)
_FROM_1 = click.IntRange(min=1)
_PYTHON = {"True": True, "False": False, "None": None}


# -- errors, paths and values ----------------------------------------------------------------------


class _Failure(click.ClickException):
    """An error of the work itself: one line, exit code 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {' '.join(self.message.split())}", file=file, err=file is None)


class _Commands(click.Group):
    """Turns the errors that the library raises on purpose into a line each."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, click.exceptions.Exit, click.Abort):
            raise
        except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
            raise _Failure(str(error)) from error


class _Solver(click.ParamType):
    """A solver's name; a wrong one is answered with the nearest."""

    name = "NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            fd.solvers.info(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return value


class _Solvers(_Solver):
    """Names of solvers, separated by commas."""

    name = "NAME,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        one = super().convert
        return tuple(one(name.strip(), param, ctx) for name in value.split(","))


class _Numbers(click.ParamType):
    """Whole numbers and ranges, separated by commas: "0-9", "3,5", "0-3,7"."""

    def __init__(self, smallest: int) -> None:
        self.smallest = smallest
        self.name = "N,N-N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        numbers: list[int] = []
        for part in value.split(","):
            first, _, last = part.strip().partition("-")
            if not first.isdecimal() or not (last or first).isdecimal():
                self.fail(f"{value!r} is no list of numbers such as 0-9 or 3,5.", param, ctx)
            start, stop = int(first), int(last or first)
            if stop < start or start < self.smallest or stop - start > 9999:
                self.fail(
                    f"{part.strip()!r} in {value!r}: ranges grow, from {self.smallest} on.",
                    param,
                    ctx,
                )
            numbers += range(start, stop + 1)
        return tuple(numbers)


class _Picture(click.ParamType):
    """A path that ends in .png."""

    name = "FILE.png"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        if path.suffix.lower() != ".png":
            self.fail(f"{value!r} does not end in .png, the one format written.", param, ctx)
        return path


class _Option(click.ParamType):
    """NAME=VALUE with a value in JSON or as Python writes it; anything else is taken as text."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        name, equals, text = value.partition("=")
        if not equals or not name.isidentifier():
            self.fail(f"{value!r} is not NAME=VALUE, such as eta=0.5.", param, ctx)
        if text in _PYTHON:
            return name, _PYTHON[text]
        try:
            return name, json.loads(text)
        except json.JSONDecodeError:
            return name, text


def _loaded(option: str, path: Path) -> fd.Plan:
    try:
        return fd.Plan.load(path)
    except OSError as error:
        raise ValueError(f"{option}: {path} cannot be read ({error.strerror}).") from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` when the block ends well, and vanishes when not.

    Entering proves that `path` can be written.
    """
    if path.is_dir():
        raise ValueError(f"--out: a file is needed; got the folder {path}.")
    if not path.parent.is_dir():
        raise ValueError(f"--out: the folder {path.parent} does not exist. Make it first.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        file = temporary.open("xb")
    except OSError as error:
        raise ValueError(f"--out: {path} cannot be written ({error.strerror}).") from error
    try:
        with file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Networks this small gain little from threads, and lose tenfold to them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _optional(module: str) -> Any:
    try:
        return __import__(module)
    except ModuleNotFoundError:
        raise _Failure(
            f"fastdiff: this command needs {module}; it is not installed. "
            'Run: pip install "fastdiff-engine[cli]"'
        ) from None


# -- the commands ----------------------------------------------------------------------------------


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(fd.__version__, prog_name="fastdiff", message="%(prog)s %(version)s")
def main() -> None:
    """Training-free samplers for diffusion and flow models.

    \b
    Examples:
      fastdiff sample --solver dpmpp-2m --steps 10 --out digits.png
      fastdiff compare --solvers ddim,dpmpp-2m,deis-3 --out compare.png
      fastdiff plan --schedule flow --solver euler --steps 4
      fastdiff solvers
      fastdiff doctor
    """


def _plan_options(command: _Command) -> _Command:
    """The options that say which plan, shared by the commands that make one."""
    grids = f"Times of the steps: auto, {', '.join(fd.grids.names())}. karras(5) sets karras's rho."
    option = "An option of the solver, e.g. -o eta=0.5; repeatable."
    command = click.option("-o", "options", type=_Option(), multiple=True, help=option)(command)
    command = click.option("--grid", default="auto", metavar="NAME", help=grids)(command)
    command = click.option("--steps", default=10, type=_FROM_1, help="Intervals of the grid.")(
        command
    )
    solver = click.option(
        "--solver", default="dpmpp-2m", type=_Solver(), help="See `fastdiff solvers`."
    )
    return solver(command)


_progress = click.option("--progress/--no-progress", default=True, help="A bar on stderr.")
_PLAN_IN = "A plan that `fastdiff plan --out` saved, in place of the options above."
_JSON: dict[str, Any] = {"type": click.Path(path_type=Path), "metavar": "FILE.json"}


@main.command()
@_plan_options
@click.option("--plan", "plan_file", help=_PLAN_IN, **_JSON)
@click.option("--guidance", default=1.0, help="Classifier-free guidance scale; 1 is none.")
@click.option("--classes", default="0-9", type=_Numbers(0), help="Digits to draw, in turn.")
@click.option("--count", default=80, type=_FROM_1, help="How many pictures.")
@click.option("--seed", default=0, help="Picture i has the seed SEED + i.")
@click.option("--backend", default="auto", metavar="NAME", help="See `fastdiff doctor`.")
@click.option("--out", default="digits.png", type=_Picture(), help="Where the sheet goes.")
@_progress
def sample(
    solver: str,
    steps: int,
    grid: str,
    options: Sequence[tuple[str, Any]],
    plan_file: Path | None,
    guidance: float,
    classes: tuple[int, ...],
    count: int,
    seed: int,
    backend: str,
    out: Path,
    progress: bool,
) -> None:
    """Draw handwritten digits with the network that is shipped, and write them as one picture.

    \b
    Examples:
      fastdiff sample --solver deis-3 --steps 8
      fastdiff sample --classes 3,5 --guidance 3 --out threes-and-fives.png
      fastdiff sample --solver ddim -o eta=1 --steps 50 --seed 7
    """
    network = fd.models.digits()
    if max(classes) >= network.null_class:
        raise click.BadParameter(
            f"the network knows the classes 0-{network.null_class - 1}; got {max(classes)}.",
            param_hint="--classes",
        )
    if plan_file is None:
        plan = fd.plan(
            network.schedule,
            solver,
            steps,
            grid=grid,
            prediction=network.prediction,
            **dict(options),
        )
    else:
        plan = _loaded("--plan", plan_file)
        needed = (network.prediction, network.schedule)
        if (plan.prediction, plan.schedule) != needed:
            raise ValueError(
                f"--plan: the digits network needs prediction {needed[0]!r} on {needed[1]}; got "
                f"{plan.prediction!r} on {plan.schedule}. Make one: fastdiff plan --schedule "
                f"vp-linear --prediction {needed[0]} --out {plan_file}"
            )
    with _replacing(out) as file, _one_thread():
        labels = torch.tensor([classes[i % len(classes)] for i in range(count)])
        none = torch.full_like(labels, network.null_class)
        images = fd.sample(
            network,
            fd.noise.prior(plan, (count, *network.shape), seeds=seed),
            plan,
            cond={"y": labels},
            guidance=fd.CFG(guidance, uncond={"y": none}),
            seed=seed,
            backend=None if backend == "auto" else backend,
            progress=progress,
        )
        columns = len(classes) * max(1, round(count**0.5 / len(classes)))
        _write_pictures(file, images[:, 0], min(columns, count))
    click.echo(f"{out}: {count} pictures, {plan.solver}, {plan.nfe} evaluations")


def _write_pictures(file: IO[bytes], images: torch.Tensor, columns: int, zoom: int = 5) -> None:
    """Images [B, H, W] in [-1, 1], ink = +1, as dark ink on one white sheet, row by row."""
    pillow = _optional("PIL.Image")
    ink = images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    ink = ink.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    count, height, width = ink.shape
    rows = -(-count // columns)
    sheet = torch.zeros(rows * columns, height + zoom, width + zoom, dtype=torch.uint8)
    sheet[:count, zoom:, zoom:] = ink
    sheet = sheet.view(rows, columns, *sheet.shape[1:]).transpose(1, 2).flatten(2).flatten(0, 1)
    page = torch.zeros(sheet.shape[0] + zoom, sheet.shape[1] + zoom, dtype=torch.uint8)
    page[: sheet.shape[0], : sheet.shape[1]] = sheet
    pillow.Image.fromarray(255 - page.numpy()).save(file, format="PNG")


@main.command()
@click.option("--solvers", "names", default=_COMPARED, type=_Solvers(), help="Deterministic ones.")
@click.option("--nfe", "budgets", default=_BUDGETS, type=_Numbers(1), help="Evaluations to spend.")
@click.option("--grid", default="auto", metavar="NAME", help="Times of the steps.")
@click.option("--count", default=16, type=_FROM_1, help="Samples of each problem.")
@click.option("--seed", default=0, help="Of the starting noise.")
@click.option("--out", default="compare.png", type=_Picture(), help="Where the plot goes.")
@_progress
def compare(
    names: tuple[str, ...],
    budgets: tuple[int, ...],
    grid: str,
    count: int,
    seed: int,
    out: Path,
    progress: bool,
) -> None:
    """Plot the error of solvers against what they cost, on two problems.

    The problems are the shipped digits network and a Gaussian mixture, whose denoiser is known
    exactly. The error is ||x - x*|| / ||x*|| from the same starting noise, where x* is
    what dpmpp-3m reaches in 400 steps uniform in log SNR. All in float64.

    \b
    Examples:
      fastdiff compare
      fastdiff compare --solvers ddim,heun,dpm-2,dpm-3 --nfe 6-30 --out singlestep.png
    """
    with _replacing(out) as file, _one_thread():
        plot = _optional("matplotlib.figure")
        figure = plot.figure.Figure(figsize=(10, 4.2), layout="constrained")
        panels = figure.subplots(1, 2)
        for panel, problem in zip(panels, _problems(count), strict=True):
            results = _errors(problem, names, budgets, grid, seed, progress)
            click.echo(f"{problem.title}: error with at most N evaluations")
            click.echo(_table_of(results, budgets) + "\n")
            _draw(panel, problem.title, results)
        panels[0].legend()
        figure.savefig(file, format="png", dpi=120)
    click.echo(f"plot: {out}")


_Errors = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class _Problem:
    """A network with what it was trained for, in float64, and the samples asked of it."""

    title: str
    network: Callable[..., torch.Tensor]
    schedule: fd.schedules.Schedule
    prediction: str
    shape: tuple[int, ...]
    cond: dict[str, torch.Tensor] | None = None

    def plan(self, solver: str, steps: int, grid: str) -> fd.Plan:
        return fd.plan(self.schedule, solver, steps, grid=grid, prediction=self.prediction)

    def solve(self, plan: fd.Plan, seed: int) -> torch.Tensor:
        x = fd.noise.prior(plan, self.shape, seeds=seed, dtype=torch.float64)
        return fd.sample(self.network, x, plan, cond=self.cond)


def _problems(count: int) -> Iterator[_Problem]:
    digits = fd.models.digits().double()
    cond = {"y": torch.arange(count) % digits.null_class}
    shape = (count, *digits.shape)
    yield _Problem("digits, 8x8", digits, digits.schedule, digits.prediction, shape, cond)
    angle = torch.arange(8) * (math.tau / 8)
    ring = fd.models.GaussianMixture(1.0, torch.stack([angle.cos(), angle.sin()], 1), 0.01)
    schedule = fd.schedules.VPLinear()
    network = ring.network(schedule, "epsilon")
    yield _Problem("ring of eight Gaussians", network, schedule, "epsilon", (count, 2))


def _errors(
    problem: _Problem,
    names: Sequence[str],
    budgets: Sequence[int],
    grid: str,
    seed: int,
    progress: bool,
) -> _Errors:
    """Per solver, (NFE, relative error) of the largest plan within each budget."""
    plans: dict[str, list[fd.Plan]] = {}
    for name in names:
        least, nfe = fd.solvers.info(name).least_steps, fd.solvers.info(name).nfe_per_step
        steps = [budget // nfe for budget in budgets if budget // nfe >= least]
        plans[name] = [problem.plan(name, each, grid) for each in steps]
        if any(plan.stochastic for plan in plans[name]):
            raise ValueError(f"--solvers: {name} draws noise, so it has no one right answer.")
    reference = problem.solve(problem.plan("dpmpp-3m", 400, "logsnr"), seed)
    scale = torch.linalg.vector_norm(reference)
    total = sum(len(each) for each in plans.values())
    results: _Errors = {}
    with _optional("tqdm").tqdm(
        total=total, desc=problem.title, leave=False, disable=not progress
    ) as bar:
        for name, each in plans.items():
            results[name] = []
            for plan in each:
                error = torch.linalg.vector_norm(problem.solve(plan, seed) - reference) / scale
                results[name].append((plan.nfe, float(error)))
                bar.update()
    return results


def _table_of(results: _Errors, budgets: Sequence[int]) -> str:
    rows = [["solver", *(f"N={budget}" for budget in budgets)]]
    for name, points in results.items():
        best = [max((p for p in points if p[0] <= budget), default=None) for budget in budgets]
        rows.append([name, *("-" if point is None else f"{point[1]:.2e}" for point in best)])
    return _columns(rows)


def _draw(panel: Any, title: str, results: _Errors) -> None:
    for i, (name, points) in enumerate(results.items()):
        nfe, error = zip(*sorted(points), strict=True) if points else ((), ())
        panel.loglog(nfe, error, "o-", label=name, color=_COLOURS[i % len(_COLOURS)], markersize=4)
    spent = [nfe for points in results.values() for nfe, _ in points]
    ticks = [n for n in _TICKS if min(spent, default=1) <= n <= max(spent, default=1)]
    panel.set_xticks([], minor=True)
    panel.set_xticks(ticks, [str(n) for n in ticks])
    panel.set(title=title, xlabel="network evaluations", ylabel="relative error")
    panel.grid(which="major", alpha=0.3)


@main.command("plan")
@_plan_options
@click.option("--schedule", "kind", default="vp-linear", type=click.Choice(tuple(_SCHEDULES)))
@click.option("--prediction", help="What the network returns; the schedule's usual if not given.")
@click.option("--t-max", type=float, help="First time; the schedule's own if not given.")
@click.option("--t-min", type=float, help="Last time; the schedule's own if not given.")
@click.option("--load", help="Show a saved plan; the options above are not used.", **_JSON)
@click.option("--out", help="Save the plan as well.", **_JSON)
def plan_command(
    solver: str,
    steps: int,
    grid: str,
    options: Sequence[tuple[str, Any]],
    kind: str,
    prediction: str | None,
    t_max: float | None,
    t_min: float | None,
    load: Path | None,
    out: Path | None,
) -> None:
    """Print the plan that a solver writes: every row, with its coefficients.

    \b
    Examples:
      fastdiff plan --solver deis-3 --steps 6
      fastdiff plan --schedule edm --solver heun --steps 9 --grid "karras(7)"
      fastdiff plan --schedule sd --solver ddim --steps 20 --grid trailing --out ddim-20.json
      fastdiff plan --load ddim-20.json
    """
    if load is not None:
        plan = _loaded("--load", load)
    else:
        make, usual = _SCHEDULES[kind]
        prediction = prediction or usual
        plan = fd.plan(
            make(), solver, steps,
            grid=grid, t_max=t_max, t_min=t_min, prediction=prediction, **dict(options),
        )  # fmt: skip
    click.echo(str(plan))
    if out is not None:
        with _replacing(out) as file:
            file.write(plan.to_json().encode())
        click.echo(f"plan: {out}")


@main.command()
def solvers() -> None:
    """List the solvers: name, measured order, evaluations a step, what it is, its source."""
    rows = [["name", "order", "NFE/step", "what", "source"]]
    for name in fd.solvers.names():
        info = fd.solvers.info(name)
        order, nfe = f"{info.measured_order:g}", f"{info.nfe_per_step:g}"
        rows.append([name, order, nfe, info.summary, info.source])
    click.echo(_columns(rows))


@main.command()
def doctor() -> None:
    """Say which backends run here, what the others need, and the versions that matter."""
    rows = [["backend", "here"], *map(list, fd.backends.status().items())]
    click.echo(_columns(rows))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = [
        ["fastdiff", fd.__version__],
        ["torch", torch.__version__],
        ["python", platform.python_version()],
        ["platform", platform.platform()],
        ["cuda devices", ", ".join(devices) or "none"],
        ["threads", str(torch.get_num_threads())],
    ]
    versions += [
        [name, value] for name, value in sorted(os.environ.items()) if name.startswith("FASTDIFF_")
    ]
    click.echo("\n" + _columns(versions))


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    main()
