# SPDX-License-Identifier: Apache-2.0
"""A sampler as data: the immutable table of stages that every backend runs.

A `Plan` is a sequence of `Stage` rows. One stage is one network evaluation and one fused update:

    h  = p * point + q * out                      point = e if the stage before wrote e, else x
    h  = clip(h)                                  only where `clip` is given
    h  = clip(h, -s, s) / s                       only where `threshold` is given, s of each sample:
    s  = max(quantile of |h| over the sample, floor)
    xi = sum_k weight_k * normal(seed, stream_k)
    x' = a_x x + a_e e + b[0] h + sum_{j>=1} b[j] H_j + c   xi + sum_i r[i] R_i
    e' = d_x x + d_e e + g[0] h + sum_{j>=1} g[j] H_j + c_e xi + sum_i s[i] R_i

`H_j` is the h of the j-th evaluation before this one, `R_i` the i-th read-only input register.
Coefficients are float64. A coefficient of exactly 0 means that the register is not read, a stage
whose second row is all zeros writes no e (the next evaluation is then at x; e keeps what it holds),
and a stage with `a_x = 1` and nothing else in its first row leaves x untouched. Those three rules
are what the flags of the packed table (`Layout`) say; nothing else is derived from a solver's name.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import tempfile
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .._text import unknown
from ..schedules import PREDICTIONS
from .checks import floats, is_number
from .layout import (
    AT_E,
    CLIP,
    EVALUATE,
    THRESHOLD,
    WRITES_E,
    WRITES_M,
    WRITES_X,
    Layout,
    PackedMeasure,
    PackedProduct,
    PackedReduction,
    PackedRow,
    encode,
    layout_of,
)
from .stage import Stage
from .terms import Measure, Product, Reduction

if TYPE_CHECKING:
    from .transpose import Transposed

FORMAT = "fastdiff-plan"
FORMAT_VERSION = 1

# Plans of this process by their handles, for those that can hold on to a string alone.
_living: weakref.WeakValueDictionary[str, Plan] = weakref.WeakValueDictionary()
_serial = itertools.count()


def plan_of(handle: str) -> Plan:
    """The living plan of that `Plan.handle`."""
    return _living[handle]


_PLAN_FIELDS = ("stages", "times", "solver", "prediction", "variable", "schedule", "prior_scale")


@dataclass(frozen=True)
class Plan:
    """A schedule, a solver and a grid, compiled: all that a sampling run needs but the network.

    Plans come from `fastdiff.plan` (a solver) or from rows given by hand. They are immutable,
    compare by value, and survive `save` and `load` bit for bit.

    Args:
        stages: The rows, in order of execution.
        times: Times of the accepted states t_0 > t_1 > ... > t_N, in the schedule's units.
        solver: Name for people; kernels never look at it.
        prediction: What the network returns ("epsilon", "x0", "v", "velocity", "score", "edm").
        variable: What h is; "x0" is required where a stage clips or thresholds.
        schedule: Description of the schedule, for people.
        prior_scale: Standard deviation of x at t_0 (`fastdiff.noise.prior` multiplies by it).

    Raises:
        ValueError: Times do not strictly decrease, a row reads what was never written, or the last
            stage leaves its result in e.
    """

    handle: ClassVar[str]  # this object's own in this process
    made_for: ClassVar[Any] = None  # the Schedule, where `fastdiff.plan` made it; not saved

    stages: tuple[Stage, ...]
    times: tuple[float, ...]
    solver: str = "custom"
    prediction: str = "epsilon"
    variable: str = "epsilon"
    schedule: str = ""
    prior_scale: float = 1.0

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        put("stages", tuple(self.stages))
        put("times", floats("Plan", "times", self.times))
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise TypeError(
                    f"Plan: stages are fastdiff.Stage rows; got {type(stage).__name__}."
                )
        for name in ("solver", "prediction", "variable", "schedule"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"Plan: {name} is a string; got {getattr(self, name)!r}.")
        if not self.stages:
            raise ValueError("Plan: at least one stage is needed; got none.")
        for name in ("prediction", "variable"):
            if getattr(self, name) not in PREDICTIONS:
                raise unknown(f"Plan: {name}", "name", getattr(self, name), PREDICTIONS)
        if not is_number(self.prior_scale) or not 0 < self.prior_scale < math.inf:
            raise ValueError(f"Plan: prior_scale is positive and finite; got {self.prior_scale!r}.")
        put("prior_scale", float(self.prior_scale))
        self._check_times()
        self._check_registers()
        put("handle", f"plan {next(_serial)}")
        _living[self.handle] = self

    def __reduce__(self) -> Any:
        return Plan, tuple(getattr(self, field) for field in _PLAN_FIELDS)

    def _check_times(self) -> None:
        times = self.times
        if len(times) < 2:
            raise ValueError(f"Plan: at least two times (one step) are needed; got {times}.")
        for i, (cur, nxt) in enumerate(itertools.pairwise(times)):
            if not (math.isfinite(cur) and math.isfinite(nxt) and nxt < cur):
                raise ValueError(
                    "Plan: times strictly decrease from noise to data; "
                    f"got times[{i}] = {cur}, times[{i + 1}] = {nxt}."
                )
        for i, stage in enumerate(self.stages):
            if not times[-1] <= stage.t <= times[0]:
                raise ValueError(
                    f"Plan: evaluations lie within the grid [{times[-1]}, {times[0]}]; "
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

    # -- what it costs ---------------------------------------------------------------------------

    @property
    def nfe(self) -> int:
        """Network evaluations of one run; an evaluation under guidance counts one."""
        return sum(stage.evaluate for stage in self.stages)

    @property
    def steps(self) -> int:
        """Intervals of the grid."""
        return len(self.times) - 1

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
        return self._allocation[0]

    @functools.cached_property
    def structure(self) -> tuple[Hashable, ...]:
        """What a captured loop is made for: plans with equal structures differ in numbers alone.

        It holds for every stage whether it evaluates, and where; the registers; and whether rows
        draw, clip or threshold.
        """
        layout, flags = self.layout, self.table[:, 0].astype(int)
        return (
            tuple((flags & (EVALUATE + AT_E)).tolist()),
            (layout.terms, layout.extras, self.extras, self.slots, self.uses_e),
            any(stage.c_in != 1.0 for stage in self.stages),
            int(self.table[:, layout.column("draws")].max()),
            bool((flags & CLIP).any()),
            bool((flags & THRESHOLD).any()),
            (layout.products, layout.measures, self.scalars, self.branches),
            any((s.u, s.v, s.b_raw, s.g_raw, s.d_new) != (0, 1, 0, 0, 0) for s in self.stages),
            tuple(tuple(map(_kinds, stage.measures)) for stage in self.stages)
            if layout.measures
            else (),
        )

    @functools.cached_property
    def _allocation(self) -> tuple[int, tuple[int, ...], tuple[tuple[tuple[int, int], ...], ...]]:
        """Slots by liveness: (count, slot pushed to by each stage or -1, reads (j, slot) of each).

        A stage's own push may take a slot that it reads for the last time: every element is read
        before it is written.
        """
        index_of_evaluation: list[int] = []
        reads: list[list[tuple[int, int]]] = []  # (j, evaluation)
        last_read: dict[int, int] = {}
        for i, stage in enumerate(self.stages):
            done = len(index_of_evaluation)
            row = []
            for j in stage.history:
                row.append((j, done - j))
                last_read[done - j] = i
            reads.append(row)
            if stage.evaluate:
                index_of_evaluation.append(i)
        free: list[int] = []
        count = evaluation = 0
        slot_of: dict[int, int] = {}
        pushes, slotted = [], []
        for i, stage in enumerate(self.stages):
            slotted.append(tuple((j, slot_of[source]) for j, source in reads[i]))
            free += [slot_of[source] for _, source in reversed(reads[i]) if last_read[source] == i]
            push = -1
            if stage.evaluate:
                if evaluation in last_read:
                    if not free:
                        free.append(count)
                        count += 1
                    push = slot_of[evaluation] = free.pop()
                evaluation += 1
            pushes.append(push)
        return count, tuple(pushes), tuple(slotted)

    # -- the packed table ------------------------------------------------------------------------

    @functools.cached_property
    def layout(self) -> Layout:
        """Columns of `table`."""
        return layout_of(self.rows())

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
        rows = self.rows(weights)
        return encode(rows, dataclasses.replace(self.layout, branches=len(rows[0].k)))

    def rows(self, weights: Sequence[float] | None = None) -> list[PackedRow]:
        """The stages as packed rows, with the outputs of G branches weighed by `weights`.

        Raises:
            ValueError: A stage names a branch that has no weight.
        """
        weights = (1.0,) * self.branches if weights is None else weights
        if len(weights) < self.branches:
            raise ValueError(
                f"Plan: the rows name {self.branches} guidance branches; got weights of "
                f"{len(weights)}. Run the plan under a guidance of as many branches."
            )
        _, pushes, reads = self._allocation
        rows = []
        at_e = False
        for i, stage in enumerate(self.stages):
            later = self.stages[i + 1] if i + 1 < len(self.stages) else None
            writes_m = later is not None and later.evaluate
            flags = (
                EVALUATE * stage.evaluate
                + AT_E * at_e
                + WRITES_E * stage.writes_e
                + WRITES_X * stage.writes_x
                + CLIP * (stage.clip is not None)
                + THRESHOLD * (stage.threshold is not None)
                + WRITES_M * writes_m
            )
            at_e = stage.writes_e
            row = _packed(stage, dict(reads[i]), weights)
            row.flags, row.push = flags, pushes[i]
            row.c_in_next = later.c_in if later is not None and writes_m else 0.0
            rows.append(row)
        return rows

    def transpose(self) -> Transposed:
        """The table of the backward pass; see `fastdiff.transpose`."""
        return self._transposed

    @functools.cached_property
    def _transposed(self) -> Transposed:
        from .transpose import transpose

        return transpose(self)

    # -- in and out ------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as JSON text; floats are written so that they read back bit for bit."""
        defaults = {f.name: f.default for f in dataclasses.fields(Stage)}
        rows = []
        for stage in self.stages:
            row = {}
            for name, default in defaults.items():
                value = getattr(stage, name)
                if name in ("products", "measures"):
                    value = [dataclasses.asdict(each) for each in value] or default
                if value != default and not (isinstance(value, float) and math.isnan(value)):
                    row[name] = value
            rows.append(row)
        body = {name: getattr(self, name) for name in _PLAN_FIELDS if name != "stages"}
        head = {"format": FORMAT, "version": FORMAT_VERSION}
        return json.dumps({**head, **body, "stages": rows}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "text") -> Plan:
        """The plan that `to_json` wrote.

        Args:
            text: JSON text.
            source: Where it came from, named in errors.

        Raises:
            ValueError: The text is truncated, not a plan, from a newer version, or has a field that
                this version does not know.
        """

        def refuse(why: str) -> ValueError:
            return ValueError(f"Plan.load: {source}: {why}")

        try:
            data = json.loads(text, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            raise refuse(f"not complete JSON ({error}). Is the file truncated?") from None
        except (RecursionError, ValueError) as error:
            raise refuse(f"not a plan: {error}.") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise refuse(f'not a plan: a plan has "format": "{FORMAT}". Write one with Plan.save.')
        version = data.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise refuse(f"version is a positive integer; got {version!r}.")
        if version > FORMAT_VERSION:
            raise refuse(
                f"written by a newer fastdiff (plan version {version}); this one reads up to "
                f"{FORMAT_VERSION}. Upgrade fastdiff-engine."
            )
        fields = {k: v for k, v in data.items() if k not in ("format", "version")}
        for missing in sorted(set(_PLAN_FIELDS) - set(fields)):
            raise refuse(f"field {missing!r} is missing.")
        for extra in sorted(set(fields) - set(_PLAN_FIELDS)):
            raise refuse(f"unknown field {extra!r}; the fields are {', '.join(_PLAN_FIELDS)}.")
        known = [f.name for f in dataclasses.fields(Stage)]
        rows = fields["stages"]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise refuse("stages is a list of objects.")
        stages = []
        for i, row in enumerate(rows):
            for extra in sorted(set(row) - set(known)):
                raise refuse(
                    f"stage {i} has the unknown field {extra!r}; there are {', '.join(known)}."
                )
            if "t" not in row:
                raise refuse(f"stage {i} has no t.")
            try:
                stages.append(Stage(**_with_terms(row)))
            except (TypeError, ValueError, OverflowError) as error:
                raise refuse(f"stage {i}: {error}") from None
        try:
            return cls(**{**fields, "stages": tuple(stages)})
        except (TypeError, ValueError, OverflowError) as error:
            raise refuse(str(error)) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, atomically: `path` holds the old file or the whole new one.

        Raises:
            OSError: `path` cannot be written; it names `path`.
        """
        path = Path(path)
        text = self.to_json()
        temporary = None
        try:
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException as error:
            if temporary is not None:
                os.unlink(temporary)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror or str(error), str(path)) from None
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan that `save` wrote; errors as in `from_json`, and OSError."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"Plan.load: {path}: not a plan: not UTF-8 text.") from None
        return cls.from_json(text, str(path))

    # -- for people ------------------------------------------------------------------------------

    def __str__(self) -> str:
        made_of = [self.solver, f"{self.steps} steps", f"{self.nfe} NFE"]
        made_of += [f"h = {self.variable} from {self.prediction}", self.schedule]
        title = "  ".join(part for part in made_of if part)
        table = [("n", "t", "h", ["update"])]
        at_e = False
        for n, s in enumerate(self.stages):
            point = "e" if at_e else "x"
            h = _combination([(s.p, point), (s.q, "out")]) if s.evaluate else "-"
            if s.clip is not None:
                h = f"clip({h}, {s.clip[0]:g}, {s.clip[1]:g})"
            if s.threshold is not None:
                h = f"threshold({h}, {s.threshold[0]:g}, {s.threshold[1]:g})"
            rows = []
            if s.writes_x or not s.writes_e:
                terms = [(s.a_x, "x"), (s.a_e, "e"), *_history(s.b), (s.c, "xi")]
                rows.append("x' = " + _combination([*terms, *_registers(s.r)]))
            if s.writes_e:
                terms = [(s.d_x, "x"), (s.d_e, "e"), *_history(s.g), (s.c_e, "xi")]
                rows.append("e' = " + _combination([*terms, *_registers(s.s)]))
            if s.noise and s.noise != ((s.noise[0][0], 1.0),):
                rows.append("xi = " + _combination([(w, f"z_{k}") for k, w in s.noise]))
            at_e = s.writes_e
            table.append((str(n), f"{s.t:.6g}", h, rows))
        n_wide, t_wide, h_wide = (max(len(str(row[i])) for row in table) for i in range(3))
        lines = [title]
        for n_text, t_text, h, rows in table:
            head = f"{n_text:>{n_wide}}  {t_text:>{t_wide}}  {h:<{h_wide}}  "
            lines += [head + rows[0], *(" " * len(head) + row for row in rows[1:])]
        return "\n".join(lines)


def _with_terms(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a stage with their products and measures made of JSON objects."""
    row = dict(row)
    if "products" in row:
        row["products"] = [Product(**product) for product in row["products"]]
    if "measures" in row:
        row["measures"] = [
            Measure(
                **{
                    name: Reduction(**value) if name in ("num", "den") and value else value
                    for name, value in measure.items()
                }
            )
            for measure in row["measures"]
        ]
    return row


def _packed(stage: Stage, slots: dict[int, int], weights: Sequence[float]) -> PackedRow:
    """A stage's columns but those that its neighbours settle; `slots` holds each H_j."""

    def place(kind: str, at: int) -> tuple[str, int]:
        return ("slot", slots[at]) if kind == "history" else (kind, at)

    def reduction(r: Reduction | None) -> PackedReduction | None:
        if r is None:
            return None
        a, *b = (place(o[0], o[1] if len(o) == 2 else 0) for o in r.operands)
        return PackedReduction(r.kind, a, b[0] if b else None, r.rank)

    def measure(m: Measure) -> PackedMeasure:
        num = reduction(m.num)
        assert num is not None
        return PackedMeasure(m.into, num, reduction(m.den), m.power, m.weight, m.offset)

    def product(p: Product) -> PackedProduct:
        of, at = place(p.of, p.at)
        if (of, p.into) == ("new", "e") and not stage.writes_x:
            of = "x"  # x' is x
        return PackedProduct(p.into, p.weight, p.entry, of, at)

    scalars = dict(stage.scalars)

    def scalar(name: str, coefficient: float) -> int:
        return scalars.get(name, -1) if coefficient else -1

    b_0, g_0 = _at(stage.b, 0), _at(stage.g, 0)
    k = tuple(stage.q * w for w in weights)
    row = PackedRow(
        draws=stage.noise if stage.reads_noise else (),
        p=stage.p,
        u=stage.u,
        v=stage.v,
        a_x=stage.a_x,
        a_e=stage.a_e,
        b_0=b_0,
        b_raw=stage.b_raw,
        c=stage.c,
        d_x=stage.d_x if stage.writes_x else stage.d_x + stage.d_new,
        d_e=stage.d_e,
        d_new=stage.d_new if stage.writes_x else 0.0,
        g_0=g_0,
        g_raw=stage.g_raw,
        c_e=stage.c_e,
        scalar_b=scalar("b_0", b_0),
        scalar_g=scalar("g_0", g_0),
        scalar_c=scalar("c", stage.c),
        scalar_ce=scalar("c_e", stage.c_e),
        k=k,
        scalar_k=tuple(scalar(f"w_{g}", weight) for g, weight in enumerate(k)),
        terms=tuple(
            (slot, _at(stage.b, j), _at(stage.g, j))
            for j, slot in slots.items()
            if _at(stage.b, j) or _at(stage.g, j)
        ),
        extras=tuple(
            (i, _at(stage.r, i), _at(stage.s, i))
            for i in range(max(len(stage.r), len(stage.s)))
            if _at(stage.r, i) or _at(stage.s, i)
        ),
        products=tuple(map(product, stage.products)),
        measures=tuple(map(measure, stage.measures)),
    )
    if stage.clip is not None:
        row.lo, row.hi = stage.clip
    if stage.threshold is not None:
        row.quantile, row.floor, *ceiling = stage.threshold
        row.ceiling = ceiling[0] if ceiling else math.inf
    return row


def _kinds(measure: Measure) -> tuple[str, str | None]:
    return measure.num.kind, None if measure.den is None else measure.den.kind


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are unique."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the key {name!r} stands twice in one object")
    return dict(pairs)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _at(values: tuple[float, ...], j: int) -> float:
    return values[j] if j < len(values) else 0.0


def _history(weights: tuple[float, ...]) -> list[tuple[float, str]]:
    return [(w, f"H{j}" if j else "h") for j, w in enumerate(weights)]


def _registers(weights: tuple[float, ...]) -> list[tuple[float, str]]:
    return [(w, f"R{i}") for i, w in enumerate(weights)]


def _combination(terms: list[tuple[float, str]]) -> str:
    text = ""
    for weight, name in terms:
        if weight == 0.0:
            continue
        size = "" if abs(weight) == 1.0 else f"{abs(weight):.6g} "
        sign = (" - " if weight < 0 else " + ") if text else ("-" if weight < 0 else "")
        text += f"{sign}{size}{name}"
    return text or "0"
