# SPDX-License-Identifier: Apache-2.0
"""`fastdiff bench`: stages, loops, noise and gradients timed on this machine."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

import fastdiff as fd

from ..bench import jobs, records, roofline, tables
from ..bench.counts import instructions
from ..bench.jobs import Asked
from ..bench.machine import machine
from ..bench.rows import MOST_OUTPUTS
from ..bench.runs import Bench, Job, Run, Setting
from .errors import Commands, Failure, say
from .shared import COUNT, JSON_FILE, Command, check_writable, loaded, optional, output
from .types import Dtypes, Names, Numbers, Picture, Real, Sizes, Whole

_NOISE = {"without": (False,), "with": (True,), "both": (False, True)}
_ALL = ("float32", "float64", "float16", "bfloat16")


@click.group(cls=Commands)
def bench() -> None:
    """Time the kernels on this machine: what is timed has first agreed with the reference.

    Rivals take turns; a time is the median of the turns, with their 20th and 80th percentile. The
    largest sizes come first.

    \b
    Examples:
      fastdiff bench stage --terms 1-4 --branches 1,2 --size 16MiB
      fastdiff bench loop --network mlp --size 64x16 --steps 10
      fastdiff bench noise --size 64MiB --json results.jsonl
      fastdiff bench gradient
    """


# -- options ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _How:
    """The options that all benchmarks have."""

    device: torch.device
    setting: Setting
    threads: int
    budget: float
    json: Path | None
    plot: Path | None = None


def _common(command: Command) -> Command:
    """The options of every benchmark; the command is given them as `how`."""

    @click.pass_context
    def run(context: click.Context, **given: Any) -> Any:
        own = {name: given.pop(name) for name in _COMMON}
        return context.invoke(command, how=_how(**own, plot=given.pop("plot", None)), **given)

    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    run.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in reversed(_OPTIONS):
        run = option(run)
    return run


_COMMON = ("device", "threads", "rounds", "seconds", "budget", "commit", "json")
_OPTIONS = (
    click.option(
        "--device",
        default="auto",
        type=click.Choice(("auto", "cpu", "cuda")),
        help="Where to run; auto takes a GPU where there is one.",
    ),
    click.option("--threads", default=1, type=Whole(1, 4096), help="Threads of the CPU."),
    click.option("--rounds", default=7, type=COUNT, help="Turns of each rival, at least."),
    click.option(
        "--seconds", default=0.3, type=Real(0.0, 1e5), help="How long the rivals take turns."
    ),
    click.option("--budget", type=Real(0.0), help="Seconds; what would outlast them is left out."),
    click.option("--commit", metavar="NAME", help="What the results call this code."),
    click.option(
        "--json",
        type=click.Path(path_type=Path),
        metavar="FILE.jsonl",
        help="Add the results to this file, a line of JSON each.",
    ),
)
_BACKENDS = click.option(
    "--backend",
    "names",
    type=Names(),
    default=(),
    show_default=False,
    help="`fastdiff doctor` lists them. [default: those that run here]",
)
_TERMS = click.option(
    "--terms",
    default="2",
    type=Numbers(1, MOST_OUTPUTS),
    help="M: network outputs combined, the new one too.",
)
_NOISY = click.option(
    "--noise", default="without", type=click.Choice(tuple(_NOISE)), help="Whether rows draw."
)
_STEPS = click.option("--steps", default=20, type=COUNT, help="Steps of a run, a stage each.")
_PLAN = click.option("--plan", "file", help="A plan that `fastdiff plan --out` saved.", **JSON_FILE)
_PLOT = click.option("--plot", type=Picture(), help="Draw the roofline.")


def _sizes(default: str) -> Callable[[Command], Command]:
    """The option of sizes."""
    said = "Shapes such as 64x4x64x64, or bytes of x such as 256MiB."
    return click.option(
        "--size", "sizes", type=Sizes(), help=f"{said} [default: {default}]", show_default=False
    )


def _dtypes(allowed: Sequence[str], pairs: bool = False) -> Callable[[Command], Command]:
    """The option of dtypes."""
    what = "The network's dtype; STATE/NETWORK gives the registers' too." if pairs else "Of x."
    return click.option(
        "--dtype", "dtypes", default="float32", type=Dtypes(allowed, pairs), help=what
    )


def _how(
    *,
    device: str,
    threads: int,
    rounds: int,
    seconds: float,
    budget: float | None,
    commit: str | None,
    json: Path | None,
    plot: Path | None,
) -> _How:
    """Where and how long, and that the results can be written."""
    here = torch.cuda.is_available()
    if device == "cuda" and not here:
        raise ValueError(
            "--device cuda: PyTorch finds no CUDA device here. `fastdiff doctor` says more."
        )
    on_cuda = device == "cuda" or (device == "auto" and here)
    place = torch.device("cuda", 0) if on_cuda else torch.device("cpu")
    about = machine(place) | ({"commit": commit} if commit else {})
    known = instructions(place)
    about |= {"instructions": known} if known else {}
    if json is not None:
        _check_results(json)
    if plot is not None:
        optional("matplotlib.figure")
    setting = Setting(place, True, rounds, seconds, tuple(about.items()))
    return _How(place, setting, threads, math.inf if budget is None else budget, json, plot)


def _check_results(path: Path) -> None:
    """Refuses a file that cannot be added to, before anything is timed."""
    check_writable(path, "--json")
    try:
        found = records.read(path)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"--json: {path} holds results, a line of JSON each, or does not exist yet; got "
            f"something else ({error}). Name another file."
        ) from error
    if not all(isinstance(line, dict) for line in found):
        raise ValueError(f"--json: lines of {path} are results; got others. Name another file.")


def _run(name: str, how: _How, made: Sequence[Job], table: Callable[..., str]) -> None:
    """Runs the jobs, prints the page, and writes what was asked for."""
    with contextlib.ExitStack() as stack:
        file = None if how.plot is None else stack.enter_context(output(how.plot, "--plot"))
        run = Run(Bench(name, "", lambda setting: [], table), how.setting, how.json)
        known = dict(how.setting.about).get("instructions")
        if known:
            run.notes.append(f"The compiled core runs {known} code here.")
        try:
            run.go([replace(job, threads=how.threads) for job in made], how.budget)
        finally:  # whoever breaks off after minutes wants what was measured
            say(run.page())
        if run.refused or run.lost:
            raise Failure(
                f"bench {name}: {run.refused} gates stayed shut and {len(run.lost)} rivals or jobs "
                "failed; the page says which."
            )
        if file is not None:
            about = dict(how.setting.about)
            title = f"fastdiff bench {name}: {about.get('gpu') or run.records[0]['cpu']}"
            roofline.draw(run.records, title, file)
    if how.plot is not None:
        say(f"plot: {how.plot}")


def _plan_in(file: Path | None, unused: Sequence[str]) -> fd.Plan | None:
    return None if file is None else loaded("--plan", file, unused)


def _default(device: torch.device, cpu: str, cuda: str) -> Any:
    """The sizes to take where none are given."""
    return Sizes().convert(cuda if device.type == "cuda" else cpu, None, None)


# -- the benchmarks --------------------------------------------------------------------------------


@bench.command()
@_common
@_BACKENDS
@_dtypes(_ALL, pairs=True)
@_sizes("64KiB,1MiB,16MiB; on CUDA 4KiB,1MiB,64MiB,256MiB")
@_TERMS
@click.option("--branches", default="1", type=Numbers(1), help="G: guidance branches.")
@_NOISY
@_PLAN
@_PLOT
def stage(
    *,
    how: _How,
    names: tuple[str, ...],
    dtypes: tuple[Any, ...],
    sizes: tuple[Any, ...] | None,
    terms: tuple[int, ...],
    branches: tuple[int, ...],
    noise: str,
    file: Path | None,
) -> None:
    """Time one stage: the work between two evaluations of the network.

    A saved plan gives its heaviest row. Bytes are those that the row's flags say it must move, and
    the share is of what `copy_` reaches: at the same size from 64 MiB on (256 MiB on CUDA), below
    in one large copy of the same run.

    \b
    Examples:
      fastdiff bench stage --terms 1-4 --branches 1,2 --noise both --size 256MiB
      fastdiff bench stage --dtype float32/bfloat16 --size 64x4x64x64 --backend cpu
      fastdiff bench stage --plan dpmpp-3m.json --plot roofline.png
    """
    plan = _plan_in(file, ("terms", "noise"))
    sizes = sizes or _default(how.device, "64KiB,1MiB,16MiB", "4KiB,1MiB,64MiB,256MiB")
    asked = Asked(names, dtypes, sizes, terms, branches, _NOISE[noise], plan)
    _run("stage", how, jobs.stage_jobs(how.setting, asked), tables.stage)


@bench.command()
@_common
@_BACKENDS
@_dtypes(_ALL)
@_sizes("1x4x64x64 for null; 1x16,64x16 for mlp")
@_TERMS
@click.option("--branches", default="1", type=Numbers(1), help="1, or 2: guidance.")
@_NOISY
@_STEPS
@click.option(
    "--network",
    "networks",
    default="null",
    type=Names(("null", "mlp")),
    help="null costs nothing, mlp is a policy of three layers.",
)
@_PLAN
def loop(
    *,
    how: _How,
    names: tuple[str, ...],
    dtypes: tuple[Any, ...],
    sizes: tuple[Any, ...] | None,
    terms: tuple[int, ...],
    branches: tuple[int, ...],
    noise: str,
    steps: int,
    networks: tuple[str, ...],
    file: Path | None,
) -> None:
    """Time whole sampling runs, eager and on CUDA captured, beside the network alone.

    \b
    Examples:
      fastdiff bench loop
      fastdiff bench loop --network mlp --size 1x16,64x16 --steps 10
      fastdiff bench loop --plan ddim-20.json --size 8x4x64x64
    """
    if max(branches) > 2:
        raise click.BadParameter(
            f"1 or 2 is allowed; got {max(branches)}.", param_hint="'--branches'"
        )
    plan = _plan_in(file, ("terms", "noise", "steps"))
    asked = Asked(names, dtypes, sizes or (), terms, branches, _NOISE[noise], plan, networks, steps)
    _run("loop", how, jobs.loop_jobs(how.setting, asked), tables.loop)


@bench.command()
@_common
@_BACKENDS
@_dtypes(("float32", "float64"))
@_sizes("64KiB,4MiB; on CUDA 1MiB,256MiB")
@_PLOT
def noise(
    *, how: _How, names: tuple[str, ...], dtypes: tuple[Any, ...], sizes: tuple[Any, ...] | None
) -> None:
    """Time normals: `fastdiff.noise.normal`, a stage that only draws, and torch's own.

    \b
    Examples:
      fastdiff bench noise --size 64MiB
      fastdiff bench noise --backend cpu --dtype float32,float64
    """
    sizes = sizes or _default(how.device, "64KiB,4MiB", "1MiB,256MiB")
    asked = Asked(names, dtypes, sizes)
    _run("noise", how, jobs.noise_jobs(how.setting, asked), tables.noise)


@bench.command()
@_common
@_BACKENDS
@_dtypes(("float32", "float64"))
@_sizes("1x16,64x16")
@_STEPS
@_PLAN
def gradient(
    *,
    how: _How,
    names: tuple[str, ...],
    dtypes: tuple[Any, ...],
    sizes: tuple[Any, ...] | None,
    steps: int,
    file: Path | None,
) -> None:
    """Time a run and its gradient on a small policy, beside backpropagation, with peak memory.

    \b
    Examples:
      fastdiff bench gradient
      fastdiff bench gradient --size 256x16 --steps 50
    """
    plan = _plan_in(file, ("steps",))
    sizes = sizes or ((1, 16), (64, 16))
    asked = Asked(names, dtypes, sizes, plan=plan, networks=("mlp",), steps=steps)
    _run("gradient", how, jobs.gradient_jobs(how.setting, asked), tables.gradient)
