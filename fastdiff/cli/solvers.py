# SPDX-License-Identifier: Apache-2.0
"""`fastdiff solvers`: what there is to choose from, as a list or as the page docs/solvers.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
import numpy as np

import fastdiff as fd

from .shared import columns

_INTRODUCTION = """\
# Solvers

Every solver by its name, made from the registry by `fastdiff solvers --markdown > docs/solvers.md`;
`fd.solvers.info(name)` has the same in Python. [Choosing](choosing.md) says which to take.

The order is measured: the slope of log error on log steps, with `warmup="runge-kutta"` where the
solver has a warm-up; a dash means that more steps converge to nothing. NFE counts network
evaluations. The form is the variable that a step combines; where it depends on the schedule or an
option, those of the defaults on VPLinear and FlowMatching are given."""

_ADAPTIVE = """\
## With steps of their own choice

For `fd.adaptive`, which takes steps as long as a tolerance allows."""

_NAMES = """\
## Names elsewhere

Accepted in the place of ours, with the options that make them the same sampler: by `fd.plan`, and
by `fd.adaptive` for those with steps of their own choice. The times are not part of a name."""

_SAME = """\
## One table under several names

With the default options and on the same grid, the solvers of a line give the same samples on a
schedule whose straight variable is epsilon (the variance preserving ones and EDM)."""

_OPTIONS = """\
## Options

What `fd.plan` and `fd.solvers.get` take for each name, with the defaults. The docstrings of the
classes in `fastdiff.solvers` explain them."""

_QUIRKS = """\
## What published code gets wrong

Where a solver has `published=True`, that option reproduces it."""


@click.command()
@click.option("--markdown", is_flag=True, help="Print the page docs/solvers.md.")
def solvers(markdown: bool) -> None:
    """List the solvers: name, measured order, evaluations a step, what each is, and its source.

    After them stand those that choose their own steps, for `fastdiff.adaptive`.
    """
    entries = [fd.solvers.info(name) for name in fd.solvers.names()]
    adaptive = [fd.solvers.adaptive_info(name) for name in fd.solvers.adaptive_names()]
    if markdown:
        click.echo(page(entries, adaptive))
        return
    head = ["name", "order", "NFE/step", "what", "source"]
    click.echo(columns([head, *map(_row, entries)]))
    click.echo("\nWith steps of their own choice (fastdiff.adaptive):")
    click.echo(columns([head, *map(_row, adaptive)]))


def _row(entry: fd.solvers.Info) -> list[str]:
    return [entry.name, _order(entry), _nfe(entry), entry.summary, entry.source]


def page(entries: Sequence[fd.solvers.Info], adaptive: Sequence[fd.solvers.Info]) -> str:
    """The solvers, and those that choose their own steps, as a page of Markdown."""
    every = [*entries, *adaptive]
    facts = ((f"`{e.name}`", _order(e), _nfe(e), _form(e), _what(e), e.source) for e in entries)
    chosen = ((f"`{e.name}`", _order(e), _nfe(e), e.summary, e.source) for e in adaptive)
    names = ((f"`{e.name}`", *_columns_of(e)) for e in every if e.aliases)
    options = ((f"`{e.name}`", _options(e.options)) for e in entries)
    chosen_options = ((f"`{e.name}`, adaptive", _options(e.options)) for e in adaptive)
    same = _groups((e.same, e.name) for e in every if e.same)
    quirks = _groups((e.quirks, e.name) for e in every if e.quirks)
    parts = [
        _INTRODUCTION,
        _table(("name", "order", "NFE a step", "form", "what it is", "source"), facts),
        _ADAPTIVE,
        _table(("name", "order", "NFE a step", "what it is", "source"), chosen),
        _NAMES,
        _table(("here", "diffusers", "k-diffusion", "ComfyUI"), names),
        _SAME,
        "\n".join(f"- `{first}`: {_listed(rest)}" for first, rest in same.items()),
        _QUIRKS,
        "\n".join(f"- {_listed(of)}: {_sentence(text)}" for text, of in quirks.items()),
        _OPTIONS,
        _table(("name", "options"), [*options, *chosen_options]),
    ]
    return "\n\n".join(parts)


def _order(entry: fd.solvers.Info) -> str:
    return "-" if entry.measured_order is None else f"{entry.measured_order:g}"


def _nfe(entry: fd.solvers.Info) -> str:
    more = f" {'-' if entry.nfe_extra < 0 else '+'} {abs(entry.nfe_extra):g}"
    return f"{entry.nfe_per_step:g}" + (more if entry.nfe_extra else "")


def _what(entry: fd.solvers.Info) -> str:
    return entry.summary + ("; draws noise" if entry.stochastic else "")


def _form(entry: fd.solvers.Info) -> str:
    """The variables of the defaults, inside a variance preserving schedule and a flow."""
    solver, times = fd.solvers.get(entry.name), np.array([0.9, 0.1])
    schedules = (fd.schedules.VPLinear(), fd.schedules.FlowMatching())
    return ", ".join(dict.fromkeys(solver.variable(schedule, times) for schedule in schedules))


def _columns_of(entry: fd.solvers.Info) -> tuple[str, str, str]:
    """The names of other libraries, by library."""
    cells: dict[str, list[str]] = {"diffusers": [], "k-diffusion": [], "ComfyUI": []}
    for alias, options in entry.aliases.items():
        if alias.endswith("Scheduler"):
            library = "diffusers"
        else:
            library = "k-diffusion" if alias.startswith("sample_") else "ComfyUI"
        given = f" ({_options(options)})" if options else ""
        cells[library].append(f"`{alias}`{given}")
    found = ("; ".join(names) for names in cells.values())
    theirs, kats, comfys = found
    return theirs, kats, comfys


def _options(options: Mapping[str, Any]) -> str:
    shown = []
    for name, value in options.items():
        given = value is not dataclasses.MISSING
        shown.append(f"`{name}={value!r}`" if given else f"`{name}`")
    return ", ".join(shown) or "none"


def _groups(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, name in pairs:
        found.setdefault(key, []).append(name)
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _sentence(text: str) -> str:
    return text if text.endswith(".") else text + "."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
