# SPDX-License-Identifier: Apache-2.0
"""Errors against evaluations: the best of each side, tables, differences to diffusers, plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from problems.flows import TITLES

from fastdiff.bench.plots import COLOURS, curve, new_figure, save
from fastdiff.bench.records import Record
from fastdiff.bench.text import number, table

Row = dict[str, Any]  # problem, grid, solver, rival, nfe, error


def rows_of(records: Sequence[Record]) -> list[Row]:
    """One row for every error of every record."""
    kept = ("problem", "grid", "solver", "rival")
    return [
        {**{key: r[key] for key in kept}, "nfe": int(nfe), "error": error}
        for r in records
        for nfe, error in r["error"].items()
    ]


def page(records: Sequence[Record], place: str) -> str:
    """The best of each side; then a table for each problem and grid, diffusers' after a stroke."""
    rows = rows_of(records)
    budgets = sorted({r["nfe"] for r in rows})
    groups = same(rows)
    parts = [best_of_each(rows)] if any(r["rival"] != "fastdiff" for r in rows) else []
    for problem, grid in dict.fromkeys((r["problem"], r["grid"]) for r in rows):
        ours = errors(rows, problem, grid, "fastdiff")
        theirs = errors(rows, problem, grid, "diffusers")
        best = {n: min(e[n] for e in ours.values() if n in e) for n in budgets}
        lines = []
        for solver in groups:
            if solver not in ours:  # it cannot start here
                continue
            names = [solver, *groups[solver]]
            their = next((theirs[name] for name in names if name in theirs), {})
            cells = []
            for n in budgets:
                if n not in ours[solver]:
                    cells.append("")
                    continue
                error = ours[solver][n]
                shown = number(error)
                cell = f"**{shown}**" if error == best[n] else shown
                cells.append(cell + (f" / {number(their[n])}" if n in their else ""))
            lines.append([solver, *cells])
        title = f"**{TITLES[problem]}, grid `{grid}`**"
        parts += [title, table(["NFE", *map(str, budgets)], lines)]
    also = [
        f"`{a}` stands for {', '.join(f'`{b}`' for b in rest)}"
        for a, rest in groups.items()
        if rest
    ]
    if also:
        parts.append("One method under several names on this schedule: " + "; ".join(also) + ".")
    parts.append(comparison(rows))
    return "\n\n".join(parts)


def best_of_each(rows: Sequence[Row]) -> str:
    """For every problem and budget our best solver and grid beside the best of the others."""
    lines, behind = [], []
    for problem in dict.fromkeys(r["problem"] for r in rows):
        for n in sorted({r["nfe"] for r in rows}):
            here = [r for r in rows if (r["problem"], r["nfe"]) == (problem, n)]
            ours = min((r for r in here if r["rival"] == "fastdiff"), key=_error, default=None)
            theirs = min((r for r in here if r["rival"] != "fastdiff"), key=_error, default=None)
            if ours is None or theirs is None:
                continue
            # the samplers of diffusers round to float32 on the way
            level = ours["error"] <= theirs["error"] * (1 + 1e-4)
            if not level:
                behind.append(f"{TITLES[problem]} at {n} (by {_error(ours) / _error(theirs):.3g})")
            line = [TITLES[problem], str(n), number(_error(ours)), ours["solver"], ours["grid"]]
            line += [number(_error(theirs)), f"{theirs['rival']} {theirs['solver']}"]
            lines.append([*line, theirs["grid"], "yes" if level else "**no**"])
    head = ["problem", "NFE", "ours", "solver", "grid", "theirs", "sampler", "grid", "at or below"]
    text = (
        "**The best of ours beside the best of diffusers, k-diffusion and torchdiffeq**, over the "
        f"same grids. At or below theirs in {len(lines) - len(behind)} of {len(lines)} cases"
    )
    text += f"; above it: {'; '.join(behind)}." if behind else "."
    return text + "\n\n" + table(head, lines)


def _error(row: Row) -> float:
    return float(row["error"])


Errors = dict[str, dict[int, float]]  # solver -> NFE -> error


def errors(rows: Sequence[Row], problem: str, grid: str, rival: str) -> Errors:
    found: Errors = {}
    for r in rows:
        if (r["problem"], r["grid"], r["rival"]) == (problem, grid, rival):
            found.setdefault(r["solver"], {})[r["nfe"]] = r["error"]
    return found


def best_of_others(rows: Sequence[Row], problem: str, grid: str) -> dict[int, float]:
    """The least error of diffusers, k-diffusion and torchdiffeq, by NFE."""
    found: dict[int, float] = {}
    for r in rows:
        if (r["problem"], r["grid"]) == (problem, grid) and r["rival"] != "fastdiff":
            found[r["nfe"]] = min(r["error"], found.get(r["nfe"], r["error"]))
    return dict(sorted(found.items()))


def same(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Solvers whose errors agree to five digits everywhere, by the first name of each group."""
    signature: dict[str, list[Any]] = {}
    for r in rows:
        if r["rival"] == "fastdiff":
            case = (r["problem"], r["grid"], r["nfe"], f"{r['error']:.4e}")
            signature.setdefault(r["solver"], []).append(case)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for solver, cases in signature.items():
        groups.setdefault(tuple(cases), []).append(solver)
    return {names[0]: names[1:] for names in groups.values()}


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
    lines = []
    for case in [*order[: -shown - 1 : -1], *order[shown - 1 :: -1]]:
        problem, grid, solver, nfe = case
        ours, their = theirs[case] / ratios[case], theirs[case]
        row = [solver, TITLES[problem], grid, str(nfe)]
        lines.append([*row, *map(number, (ours, their, ratios[case]))])
    head = ["solver", "problem", "grid", "NFE", "fastdiff", "diffusers", "diffusers / fastdiff"]
    return text + "\n\n" + table(head, lines)


def _case(row: Row) -> tuple[str, str, str, int]:
    return row["problem"], row["grid"], row["solver"], row["nfe"]


_PANELS = {
    "DEIS": ("deis-2", "deis-3", "deis-4", "deis-rhoab-3", "deis-logrho-3"),
    "DPM-Solver": ("dpm-2", "dpm-3", "dpm-2m", "dpm-3m"),
    "DPM-Solver++": ("dpmpp-2s", "dpmpp-3s", "dpmpp-2m", "dpmpp-3m"),
    "UniPC and RES": ("unipc-2", "unipc-3", "res-2m", "res-3m"),
    "PNDM and LMS": ("plms", "ipndm-2", "ipndm-4", "lms-4"),
    "Runge-Kutta": ("heun", "deis-kutta3", "deis-rk4", "midpoint", "rk4"),
    "Adams in velocity": ("ab-2", "ab-3", "abm-2", "abm-3"),
}


def draw(records: Sequence[Record], folder: Path) -> None:
    """`accuracy-PROBLEM.png` for every problem of the records."""
    rows = rows_of(records)
    for problem in dict.fromkeys(r["problem"] for r in rows):
        draw_problem(rows, problem, folder / f"accuracy-{problem}.png")


def draw_problem(rows: Sequence[Row], problem: str, path: Path) -> None:
    """Draws error against NFE: a row for each grid, a panel for each family of solvers."""
    grids = list(dict.fromkeys(r["grid"] for r in rows if r["problem"] == problem))
    measured = {r["solver"] for r in rows if r["problem"] == problem}
    panels = {family: of for family, of in _PANELS.items() if measured.intersection(of)}
    size = (2.8 * len(panels), 2.4 * len(grids) + 0.3)
    figure = new_figure(size)
    axes = figure.subplots(len(grids), len(panels), sharex=True, sharey="row", squeeze=False)
    budgets = sorted({r["nfe"] for r in rows})
    for k, (row, grid) in enumerate(zip(axes, grids, strict=True)):
        ours = errors(rows, problem, grid, "fastdiff")
        theirs = errors(rows, problem, grid, "diffusers")
        best = best_of_others(rows, problem, grid)
        for panel, (family, solvers) in zip(row, panels.items(), strict=True):
            if best:
                panel.plot(*curve(best), color="k", ls=":", lw=1.2, label="best of others")
            if "ddim" in ours:
                panel.plot(*curve(ours["ddim"]), color="0.6", lw=1.2, label="ddim")
            for solver, colour in zip(solvers, COLOURS, strict=False):
                if solver not in ours:
                    continue
                style = {"color": colour, "lw": 1.4}
                panel.plot(*curve(ours[solver]), marker="o", ms=3.5, label=solver, **style)
                if solver in theirs:
                    style |= {"ls": "--", "lw": 1.0, "marker": "x", "ms": 5}
                    panel.plot(*curve(theirs[solver]), **style)
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(budgets, [str(n) for n in budgets])
            panel.minorticks_off()
            panel.grid(alpha=0.25, lw=0.5)
            if k == 0:
                panel.set_title(family, fontsize=10)
                panel.legend(fontsize=7, frameon=False, handlelength=1.5)
            if k + 1 == len(grids):
                panel.set_xlabel("network evaluations", fontsize=9)
            panel.tick_params(labelsize=8)
        row[0].set_ylabel(f"rms error, grid {grid}", fontsize=9)
    title = "fastdiff solid, diffusers dashed, the best of all others on the grid dotted"
    figure.suptitle(f"{TITLES[problem]}: {title}", fontsize=10)
    figure.tight_layout()
    save(figure, path)
