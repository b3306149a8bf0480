# SPDX-License-Identifier: Apache-2.0
"""`fastdiff plan`: the table that a solver writes, printed and saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

import fastdiff as fd

from .errors import say
from .shared import JSON_FILE, PLAN_OPTIONS, loaded, output, plan_options
from .types import Real

# The schedules by name, and what networks trained on each usually return.
_SCHEDULES: dict[str, tuple[Callable[[], fd.schedules.Schedule], str]] = {
    "vp-linear": (fd.schedules.VPLinear, "epsilon"),
    "vp-cosine": (fd.schedules.VPCosine, "epsilon"),
    "sd": (fd.schedules.VPDiscrete.scaled_linear, "epsilon"),
    "edm": (fd.schedules.EDM, "edm"),
    "flow": (fd.schedules.FlowMatching, "velocity"),
}


@click.command()
@plan_options
@click.option("--schedule", "kind", default="vp-linear", type=click.Choice(tuple(_SCHEDULES)))
@click.option("--prediction", help="What the network returns. [default: what is usual on it]")
@click.option("--t-max", type=Real(), help="The first time. [default: the schedule's own]")
@click.option("--t-min", type=Real(), help="The last time. [default: the schedule's own]")
@click.option("--load", help="Show a saved plan, in place of the options above.", **JSON_FILE)
@click.option("--out", help="Save the plan as well.", **JSON_FILE)
def plan(
    *,
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
        made = loaded(
            *("--load", load),
            unused=(*PLAN_OPTIONS, "kind", "prediction", "t_max", "t_min"),
        )
    else:
        schedule, usual = _SCHEDULES[kind]
        asked: dict[str, Any] = {"t_max": t_max, "t_min": t_min, "prediction": prediction or usual}
        made = fd.plan(schedule(), solver, steps, grid=grid, **asked, **dict(options))
    say(str(made))
    if out is not None:
        with output(out) as file:
            file.write(made.to_json().encode())
        say(f"plan: {out}")
