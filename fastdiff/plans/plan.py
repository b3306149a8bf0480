# SPDX-License-Identifier: Apache-2.0
"""A sampler as data: the immutable table of stages that every backend runs.

A `Plan` is a value: it is checked when it is built, compares by its fields, and knows the schedule
that it was made for. Slots, packed rows, printing, files and the transposed table are worked out of
its stages by the modules beside this one, none of which knows a Plan.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .._text import unknown
from ..schedules import PREDICTIONS, Schedule
from . import files, handles
from .allocate import Allocation, allocate
from .checks import MOST_SHOWN, floats, is_number, label, shown
from .layout import Layout, PackedRow, encode, layout_of
from .pack import pack
from .stage import Stage, evaluated_at_e
from .terms import Measure
from .text import show
from .transposed import Transposed, transpose

_FIELDS = ("stages", "times", "solver", "prediction", "variable", "schedule", "prior_scale")


@dataclass(frozen=True)
class Plan:
    """A schedule, a solver and a grid, compiled: all that a sampling run needs but the network.

    Plans come from `fastdiff.plan` (a solver) or from rows given by hand. They are immutable,
    compare by value, and survive `save` and `load` bit for bit.

    Args:
        stages: The rows, in order of execution.
        times: Times of the accepted states t_0, t_1, ..., t_N, in the schedule's units. They
            decrease, from noise to data; or increase throughout, for a plan that encodes; or rise
            where a stage between the two times draws noise, for one that restarts.
        solver: Name for people; kernels never look at it.
        prediction: What the network returns ("epsilon", "x0", "v", "velocity", "score", "edm").
        variable: The variable that the rows combine. Where a stage clips or thresholds it is "x0",
            unless the stage makes its h of the limited y by `u` and `v`.
        schedule: The schedule that the rows were made for; None for rows given by hand. A `Custom`
            schedule is saved by its name and numbers, and a plan that is loaded has it without its
            functions.
        prior_scale: Standard deviation of x at t_0 (`fastdiff.noise.prior` multiplies by it).

    Raises:
        ValueError: Times rise without noise or stay, a row reads what was never written, or the
            last stage leaves its result in e.
        TypeError: A field has the wrong kind.
    """

    handle: ClassVar[str]  # this object's own in this process

    stages: tuple[Stage, ...]
    times: tuple[float, ...]
    solver: str = "custom"
    prediction: str = "epsilon"
    variable: str = "epsilon"
    schedule: Schedule | None = None
    prior_scale: float = 1.0

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        put("stages", self._checked_stages())
        put("times", floats("Plan", "times", self.times))
        put("solver", label("Plan", "solver", self.solver))
        if not isinstance(self.schedule, Schedule | None):
            raise TypeError(
                "Plan: schedule is a fastdiff.schedules.Schedule or None; got "
                f"{shown(self.schedule)}."
            )
        label("Plan", "schedule", "" if self.schedule is None else str(self.schedule))
        for name in ("prediction", "variable"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"Plan: {name} is a string; got {shown(value)}.")
            if value not in PREDICTIONS:
                raise unknown(f"Plan: {name}", "name", value[:MOST_SHOWN], PREDICTIONS)
        scale = self.prior_scale
        if not is_number(scale) or not 0 < scale < 2**1023:
            raise ValueError(f"Plan: prior_scale is positive and finite; got {shown(scale)}.")
        put("prior_scale", float(scale))
        self._check_times()
        self._check_registers()
        put("handle", handles.register(self))

    def __reduce__(self) -> Any:
        return Plan, tuple(getattr(self, field) for field in _FIELDS)

    def _checked_stages(self) -> tuple[Stage, ...]:
        if not isinstance(self.stages, Iterable):
            raise TypeError(
                f"Plan: stages is a sequence of fastdiff.Stage rows; got {shown(self.stages)}."
            )
        stages = tuple(self.stages)
        for stage in stages:
            if not isinstance(stage, Stage):
                raise TypeError(
                    f"Plan: stages are fastdiff.Stage rows; got {type(stage).__name__}."
                )
        if not stages:
            raise ValueError("Plan: at least one stage is needed; got none.")
        return stages

    def _check_times(self) -> None:
        times = self.times
        if len(times) < 2:
            raise ValueError(f"Plan: at least two times (one step) are needed; got {shown(times)}.")
        stages = iter(self.stages)
        for i, (cur, nxt) in enumerate(itertools.pairwise(times)):
            legal = math.isfinite(cur) and math.isfinite(nxt) and cur != nxt
            if legal and nxt > cur and not self.ascends:
                # rises and the stages that draw for them come in the same order
                legal = any(s.reads_noise and cur <= s.t <= nxt for s in stages)
            if not legal:
                raise ValueError(
                    "Plan: times are finite and strictly decrease from noise to data, or strictly "
                    "increase throughout (encoding), or rise where a stage between the two times "
                    f"draws noise; got times[{i}] = {cur}, times[{i + 1}] = {nxt}."
                )
        least, most = min(times), max(times)
        for i, stage in enumerate(self.stages):
            if not least <= stage.t <= most:
                raise ValueError(
                    f"Plan: evaluations lie within the grid [{least}, {most}]; "
                    f"got stage {i} at t = {stage.t}."
                )

    def _check_registers(self) -> None:
        evaluations, has_e, at_e = 0, False, False
        columns: set[int] = set()
        for i, stage in enumerate(self.stages):
            reach = max(stage.history, default=0)
            if reach > evaluations:
                raise ValueError(
                    f"Plan: a row reads only outputs that exist; stage {i} reads one from {reach} "
                    f"evaluations before, and {evaluations} came before it."
                )
            if stage.reads_e is not None and not has_e:
                raise ValueError(
                    f"Plan: stage {i} reads e ({stage.reads_e}), but no stage before wrote one."
                )
            columns |= {measure.into for measure in stage.measures}
            for name, column in stage.scalars:
                if column not in columns:
                    raise ValueError(
                        f"Plan: a row reads only columns of S that a measure wrote; stage {i} "
                        f"scales {name} by column {column}. Add a Measure(into={column}, ...) to "
                        "it or to a stage before."
                    )
            self._check_limit(i, stage)
            evaluations += stage.evaluate
            has_e, at_e = has_e or stage.writes_e, stage.writes_e
        if at_e:
            raise ValueError(
                "Plan: the last stage must leave the result in x; its e row (d_x, d_e, g, c_e, s) "
                "is not zero."
            )

    def _check_limit(self, i: int, stage: Stage) -> None:
        """Raises where a limit applies to something that is no x0."""
        if self.variable == "x0" or (stage.u, stage.v) != (0.0, 1.0):
            return  # h is made of the limited y, which is an x0, and is itself what it may be
        if stage.clip is not None:
            raise ValueError(
                f"Plan: clipping applies to x0 predictions; stage {i} clips {self.variable!r}. "
                "Use a solver in x0 form (dpmpp-..., or ddim)."
            )
        if stage.threshold is not None:
            raise ValueError(
                f"Plan: thresholds apply to x0 predictions; stage {i} thresholds "
                f"{self.variable!r}. Use a solver in x0 form (dpmpp-..., or ddim)."
            )

    # -- what the plan is ------------------------------------------------------------------------

    @property
    def nfe(self) -> int:
        """Network evaluations of one run; an evaluation under guidance counts one."""
        return sum(stage.evaluate for stage in self.stages)

    @property
    def steps(self) -> int:
        """Intervals of the grid."""
        return len(self.times) - 1

    @functools.cached_property
    def descends(self) -> bool:
        """Whether every time is less than the one before: the plan goes from noise to data."""
        return all(nxt < cur for cur, nxt in itertools.pairwise(self.times))

    @functools.cached_property
    def ascends(self) -> bool:
        """Whether every time is greater than the one before: the plan goes from data to noise."""
        return all(nxt > cur for cur, nxt in itertools.pairwise(self.times))

    @functools.cached_property
    def at_e(self) -> tuple[bool, ...]:
        """For each stage, whether its evaluation is at e."""
        return evaluated_at_e(self.stages)

    @functools.cached_property
    def stochastic(self) -> bool:
        """Whether any stage draws noise."""
        return any(stage.reads_noise for stage in self.stages)

    @functools.cached_property
    def uses_e(self) -> bool:
        """Whether any stage evaluates away from x."""
        return any(stage.writes_e for stage in self.stages)

    @functools.cached_property
    def extras(self) -> int:
        """Entries of the bank: read-only tensors that the rows name."""
        return max(stage.entries for stage in self.stages)

    @functools.cached_property
    def scalars(self) -> int:
        """Columns C of S, the numbers of each sample that measures write."""
        return max((m.into + 1 for stage in self.stages for m in stage.measures), default=0)

    @functools.cached_property
    def branches(self) -> int:
        """The least number of guidance branches that the rows name, at least 1."""
        return max(stage.branches for stage in self.stages)

    @property
    def slots(self) -> int:
        """History registers a run needs."""
        return self._allocation.slots

    @functools.cached_property
    def structure(self) -> tuple[Hashable, ...]:
        """What a captured loop is made for: plans with equal structures differ in numbers alone.

        The structure says of every stage whether and where it evaluates, which registers there are,
        and whether rows draw, clip or threshold and have terms, products, scalars and measures.
        """
        layout, stages = self.layout, self.stages
        kinds = [tuple(map(_kinds, stage.measures)) for stage in stages]
        return (
            tuple(zip((stage.evaluate for stage in stages), self.at_e, strict=True)),
            (layout.terms, layout.extras, self.extras, self.slots, self.uses_e),
            any(stage.c_in != 1.0 for stage in stages),
            max(len(stage.noise) if stage.reads_noise else 0 for stage in stages),
            any(stage.clip is not None for stage in stages),
            any(stage.threshold is not None for stage in stages),
            (layout.products, layout.measures, self.scalars, self.branches),
            any((s.u, s.v, s.b_raw, s.g_raw, s.d_new) != (0, 1, 0, 0, 0) for s in stages),
            tuple(kinds) if self.scalars else (),
        )

    @functools.cached_property
    def _allocation(self) -> Allocation:
        return allocate(self.stages)

    # -- the packed table ------------------------------------------------------------------------

    @functools.cached_property
    def layout(self) -> Layout:
        """Columns of `table`."""
        return layout_of(self._rows)

    @functools.cached_property
    def _rows(self) -> list[PackedRow]:
        """The rows of `table`."""
        return pack(self.stages, self._allocation, (1.0,) * self.branches)

    @functools.cached_property
    def table(self) -> NDArray[np.float64]:
        """The rows packed for the kernels, float64 [len(stages), layout.width], read-only."""
        table = self.pack()
        table.setflags(write=False)
        return table

    def pack(self, weights: Sequence[float] | None = None) -> NDArray[np.float64]:
        """The packed table with the outputs of G guidance branches weighed by `weights`.

        Args:
            weights: w_g of each branch, length G; None: one for each of `branches`.

        Returns:
            float64 [len(stages), width] in the columns of `layout` with G branches.
        """
        rows = self._rows if weights is None else self.rows(weights)
        return encode(rows, dataclasses.replace(self.layout, branches=len(rows[0].k)))

    def rows(self, weights: Sequence[float] | None = None) -> list[PackedRow]:
        """The stages as packed rows, with the outputs of G branches weighed by `weights`.

        Raises:
            ValueError: A stage names a branch that has no weight.
        """
        weights = (1.0,) * self.branches if weights is None else tuple(weights)
        if weights == (1.0,) * self.branches:
            return list(self._rows)
        if len(weights) < self.branches:
            raise ValueError(
                f"Plan: the rows name {self.branches} guidance branches; got weights of "
                f"{len(weights)}. Run the plan under a guidance of as many branches."
            )
        return pack(self.stages, self._allocation, weights)

    def transpose(self) -> Transposed:
        """The table of the backward pass; see `fastdiff.plans.transposed`."""
        return self._transposed

    @functools.cached_property
    def _transposed(self) -> Transposed:
        return transpose(self.stages, self.solver)

    # -- in and out ------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as JSON text; floats are written so that they read back bit for bit."""
        return files.dump({name: getattr(self, name) for name in _FIELDS})

    @classmethod
    def from_json(cls, text: str, source: str = "text") -> Plan:
        """The plan that `to_json` wrote.

        Args:
            text: JSON text.
            source: Where it came from, named in errors.

        Raises:
            ValueError: The text is truncated, not a plan, of another version, or has a field that
                this version does not know.
            TypeError: text or source is no string.
        """
        fields = files.parse(text, source, _FIELDS)
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise files.refusal(source, str(error)) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, atomically: `path` holds the old file or the whole new one.

        Raises:
            OSError: `path` cannot be written, or is no regular file; it names `path`.
        """
        files.write(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, max_bytes: int = files.MOST_BYTES) -> Plan:
        """Reads a plan that `save` wrote.

        Args:
            path: A regular file.
            max_bytes: A larger file is refused.

        Raises:
            ValueError: The file is larger, no regular file, or not UTF-8; or its text is refused by
                `from_json`.
            OSError: The file cannot be read.
        """
        return cls.from_json(files.read(path, max_bytes), os.fsdecode(path))

    # -- for people ------------------------------------------------------------------------------

    def __str__(self) -> str:
        made_of = [self.solver, f"{self.steps} steps", f"{self.nfe} NFE"]
        made_of += [f"h = {self.variable} from {self.prediction}"]
        made_of += [] if self.schedule is None else [str(self.schedule)]
        return show("  ".join(part for part in made_of if part), self.stages)


def _kinds(measure: Measure) -> tuple[str, str | None]:
    return measure.num.kind, None if measure.den is None else measure.den.kind
