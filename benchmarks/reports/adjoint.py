# SPDX-License-Identifier: Apache-2.0
"""Errors of gradients against the exact flow's: tables, the targets' factors, and a plot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from problems.flows import TITLES

from fastdiff.bench.plots import curve, new_figure, save
from fastdiff.bench.records import Record
from fastdiff.bench.text import number, table

THEIRS = "torchdiffeq"
OUR_BEST, THEIR_BEST = "best of ours", "best of torchdiffeq"
HELD = ("AdjointDEIS(3), dpmpp-3m", OUR_BEST)  # what the target binds
Points = dict[str, dict[int, float]]  # rival -> evaluations -> error
Cell = tuple[str, str, str]  # problem, grid, leaf
Table = dict[Cell, Points]

MOST = 100


def page(records: Sequence[Record], place: str) -> str:
    """The errors against evaluations, then the adjoint's own."""
    errors = {key[0]: points for key, points in points_of(records, "error").items()}
    table_of = points_of(records, "table")
    blocks = [targets(errors), report_error(errors)] * bool(errors)
    blocks += [report_table(table_of)] * bool(table_of)
    return "\n\n".join(blocks)


def points_of(records: Sequence[Record], part: str) -> Table:
    """The errors of a part by problem, grid and leaf, then by rival."""
    leaves = {shown: leaf for leaf, shown in LEAVES.items()}
    found: Table = {}
    for r in records:
        if r["part"] == part:
            cell = (r["problem"], r["grid"], leaves[r["of"]])
            by = {int(count): error for count, error in r["error"].items()}
            found.setdefault(cell, {})[r["rival"]] = by
    return found


def ours_of(points: Points) -> tuple[str, ...]:
    """Names of the library's own rivals."""
    return tuple(name for name in points if not name.startswith(THEIRS))


def budgets_of(points: Points) -> list[int]:
    """The numbers of evaluations that ours were given."""
    return sorted({budget for name in ours_of(points) for budget in points[name]})


def best_of(points: Points, name: str, budgets: Sequence[int]) -> dict[int, float]:
    """The error of a rival at each budget; for a group, the least within each budget."""
    if name in ours_of(points):
        return {b: points[name][b] for b in budgets if b in points[name]}
    group = {OUR_BEST: ours_of(points), THEIR_BEST: (THEIRS,)}.get(name, (name,))
    pairs = [p for rival, by in points.items() if rival.startswith(group) for p in by.items()]
    found = {}
    for budget in budgets:
        within = [error for calls, error in pairs if calls <= budget]
        if within:
            found[budget] = min(within)
    return found


def factors(points: Points, ours: str, budgets: Sequence[int]) -> dict[int, float]:
    """The least error of torchdiffeq within each budget, over ours at that budget."""
    theirs, own = best_of(points, THEIR_BEST, budgets), best_of(points, ours, budgets)
    return {b: theirs[b] / own[b] for b in budgets if b in theirs and b in own}


def targets(errors: Mapping[str, Points]) -> str:
    """A table of the targets: each beside what was measured, and whether it is met."""
    rows = []
    for (problem, points), name in itertools.product(errors.items(), HELD):
        budgets = budgets_of(points)
        factor = factors(points, name, [b for b in budgets if b <= MOST])
        what = f"{TITLES[problem]}: error of torchdiffeq's best over that of {name}"
        bound = f"above 1 from {min(budgets)} to {MOST} evaluations"
        if not factor:
            rows.append([what, bound, "", "not measured"])
            continue
        low, high = (number(f(factor.values())) for f in (min, max))
        under = [str(b) for b, ratio in factor.items() if ratio <= 1]
        shown = f"{low} to {high}" + (f"; not at {', '.join(under)}" if under else "")
        rows.append([what, bound, shown, "not met" if under else "met"])
    return table(["target", "bound", "measured", ""], rows)


def report_error(errors: Mapping[str, Points]) -> str:
    """Our errors at each budget, with the factors to torchdiffeq's best, and torchdiffeq's."""
    parts, n = [ABOUT_ERROR], number
    for problem, points in errors.items():
        rows, budgets = [], budgets_of(points)
        for name in [*ours_of(points), OUR_BEST]:
            errors_of, factor = best_of(points, name, budgets), factors(points, name, budgets)
            shown = {b: n(error) for b, error in errors_of.items()}
            shown |= {b: f"{shown[b]} ({n(ratio)})" for b, ratio in factor.items()}
            rows.append([name, *(shown.get(b, "") for b in budgets)])
        for name in (THEIR_BEST, *(name for name in points if name.startswith(THEIRS))):
            best = best_of(points, name, budgets)
            rows.append([name, *(n(best[b]) if b in best else "" for b in budgets)])
        if not any(name.startswith(THEIRS) for name in points):
            rows = [row for row in rows if row[0] != THEIR_BEST]
        head = ["network evaluations", *map(str, budgets)]
        parts += [f"**{TITLES[problem]}**", table(head, rows)]
    return "\n\n".join(parts)


ABOUT_ERROR = (
    "Error of a_x against the gradient of the exact flow: the median over the samples of each "
    "one's relative error. Evaluations are those of the forward and of the backward pass, as "
    "counted. In brackets the factor: the least error of any method and setting of torchdiffeq's "
    "adjoint within as many evaluations, over ours."
)
ABOUT_TABLE = (
    "Relative errors: of a_x and a_z the median over the samples of each one's own, of a_theta "
    "(all parameters, summed over the batch) in all. An error of 1 is that of no gradient at all; "
    "the least of a column is bold where it is below a half. AdjointDEIS stands at the states of a "
    "fine run, so that its own error shows; discrete gradients are those of samplers of as many "
    "steps. Along drawn noise all stand at the states of the run itself, and the truth is the "
    "gradient of the reverse SDE along a path with the same noise."
)
LEAVES = {"x": "a_x", "z": "a_z", "theta": "a_theta"}


def report_table(errors: Table) -> str:
    """A table for each problem and grid."""
    parts = [ABOUT_TABLE]
    for problem, grid in dict.fromkeys(key[:2] for key in errors):
        leaves = [leaf for leaf in LEAVES if (problem, grid, leaf) in errors]
        by = {leaf: errors[problem, grid, leaf] for leaf in leaves}
        counts = sorted({steps for points in by.values() for e in points.values() for steps in e})
        columns = [(leaf, steps) for leaf in leaves for steps in counts]
        least = {
            (leaf, steps): min(e[steps] for e in by[leaf].values() if steps in e)
            for leaf, steps in columns
        }
        rows = []
        for rival in by[leaves[0]]:
            cells = []
            for leaf, steps in columns:
                error = by[leaf][rival][steps]
                shown = number(error)
                bold = error == least[leaf, steps] and error < 0.5
                cells.append(f"**{shown}**" if bold else shown)
            rows.append([rival, *cells])
        head = ["steps", *(f"{LEAVES[leaf]}, {steps}" for leaf, steps in columns)]
        parts += [f"**{TITLES[problem]}, grid `{grid}`**", table(head, rows)]
    return "\n\n".join(parts)


# Colours that colour-blind readers tell apart (Okabe and Ito).
_COLOURS = {
    "discrete, dpmpp-2m": "#999999",
    "discrete, deis-logrho-3": "#56b4e9",
    "AdjointDEIS(1), dpmpp-3m": "#e69f00",
    "AdjointDEIS(2), dpmpp-3m": "#009e73",
    "AdjointDEIS(3), dpmpp-3m": "#0072b2",
}
_THEIRS = {"midpoint": "o", "rk4": "s", "bosh3": "^", "dopri5": "D"}


def draw(records: Sequence[Record], path: Path) -> None:
    """Draws the errors against evaluations, and below them torchdiffeq's best over ours."""
    errors = {key[0]: points for key, points in points_of(records, "error").items()}
    budgets = sorted({budget for points in errors.values() for budget in budgets_of(points)})
    size = (3.9 * len(errors), 5.2)
    figure = new_figure(size)
    axes = figure.subplots(
        *(2, len(errors)),
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=(2.0, 1.0),
    )
    for column, (problem, points) in zip(axes.T, errors.items(), strict=True):
        above, below = column
        for name, colour in _COLOURS.items():
            if name not in points:
                continue
            style = {"color": colour, "lw": 1.4, "marker": ".", "ms": 5}
            above.plot(*curve(points[name]), label=name, **style)
            if factor := factors(points, name, budgets):
                below.plot(*curve(factor), **style)
        for method, marker in _THEIRS.items():
            name = f"torchdiffeq {method}"
            if name in points:
                style = {"color": "#d55e00", "lw": 0.8, "ls": "--", "marker": marker, "ms": 3}
                above.plot(*curve(points[name]), label=name, **style)
        below.axhline(1.0, color="0.3", lw=0.8)
        below.axhspan(1e-4, 1.0, color="#d55e00", alpha=0.08)
        above.set(xscale="log", yscale="log", ylim=(1e-6, 3))
        below.set(xscale="log", yscale="log", ylim=(2e-2, 2e2))
        shown = [b for b in (10, 20, 40, 100, 200) if b in budgets]
        below.set_xticks(shown, [str(b) for b in shown])
        for panel in column:
            panel.minorticks_off()
            panel.set_xlim(min(budgets) * 0.9, max(budgets) * 1.1)
            panel.grid(alpha=0.25, lw=0.5)
            panel.tick_params(labelsize=8)
        above.set_title(TITLES[problem], fontsize=10)
        below.set_xlabel("network evaluations, forward and backward", fontsize=9)
    axes[0, 0].set_ylabel("relative error of a_x, median", fontsize=9)
    axes[1, 0].set_ylabel("torchdiffeq's best\nover ours", fontsize=9)
    axes[0, 0].legend(fontsize=6.5, frameon=False, handlelength=2.0, loc="lower left")
    figure.tight_layout()
    save(figure, path)
