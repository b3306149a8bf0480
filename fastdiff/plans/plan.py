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
from .layout import (
    AT_E,
    CLIP,
    EVALUATE,
    THRESHOLD,
    WRITES_E,
    WRITES_M,
    WRITES_X,
    Layout,
    PackedRow,
    encode,
)

if TYPE_CHECKING:
    from .transpose import Transposed

FORMAT = "fastdiff-plan"
FORMAT_VERSION = 1

LEAST_FLOOR = 2.0**-126  # the least normal float32: a floor is not 0 in any state
MAX_STREAM = 1 << 24  # streams survive a table packed as float32


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _floats(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list | tuple | np.ndarray) or not all(map(_is_number, values)):
        raise TypeError(f"Stage: {name} is a sequence of floats; got {values!r}.")
    return tuple(float(v) for v in values)


@dataclass(frozen=True)
class Stage:
    """One row of a plan: an evaluation and the linear update after it (see the module's formulas).

    Args:
        t: Time of the evaluation, in the schedule's units.
        model_time: Time the network is told, in the network's units.
        c_in: The network is given `c_in * point`.
        p, q: From the network's output to the solver's variable: h = p * point + q * out.
        x0_p, x0_q: The same to the x0 prediction, for callbacks: x0 = x0_p * point + x0_q * out.
            NaN where no x0 exists (alpha = 0).
        a_x, a_e, b, c, r: The row of x'. `b[0]` weighs h, `b[j]` the h of j evaluations before.
        d_x, d_e, g, c_e, s: The row of e'. All zeros: no e' is written.
        noise: Up to two draws (stream, weight), stream >= 1; xi is their weighted sum.
        clip: (lo, hi) applied to h; for plans whose variable is x0.
        threshold: (quantile, floor), 0 < quantile <= 1, floor > 0; likewise, and instead of `clip`.
            Each sample's h is clipped to [-s, s] and divided by s, with s the quantile of the
            sample's |h|, interpolated linearly at position quantile (n - 1) among its n ordered
            values (as torch.quantile does, in float64), or the floor where that is greater.
        evaluate: False for a stage without a network call: h does not exist and NFE is not counted.

    Raises:
        ValueError: A coefficient is not finite, or the row contradicts itself.
        TypeError: A field has the wrong kind.
    """

    t: float
    model_time: float = 0.0
    c_in: float = 1.0
    p: float = 0.0
    q: float = 1.0
    x0_p: float = math.nan
    x0_q: float = math.nan
    a_x: float = 1.0
    a_e: float = 0.0
    b: tuple[float, ...] = ()
    c: float = 0.0
    r: tuple[float, ...] = ()
    d_x: float = 0.0
    d_e: float = 0.0
    g: tuple[float, ...] = ()
    c_e: float = 0.0
    s: tuple[float, ...] = ()
    noise: tuple[tuple[int, float], ...] = ()
    clip: tuple[float, float] | None = None
    threshold: tuple[float, float] | None = None
    evaluate: bool = True

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        for name in _SCALARS:
            value = getattr(self, name)
            if not _is_number(value):
                raise TypeError(f"Stage: {name} is a float; got {value!r}.")
            put(name, math.nan if math.isnan(value) else float(value))  # one NaN: rows compare
            if not math.isfinite(value) and name not in ("x0_p", "x0_q"):
                raise ValueError(
                    f"Stage: every coefficient is finite; got {name} = {value} at t = {self.t}."
                )
        for name in ("b", "r", "g", "s"):
            values = _floats(name, getattr(self, name))
            while values and values[-1] == 0.0:
                values = values[:-1]
            put(name, values)
            if not all(map(math.isfinite, values)):
                raise ValueError(
                    f"Stage: every coefficient is finite; got {name} = {values} at t = {self.t}."
                )
        put("noise", self._checked_noise())
        if self.clip is not None:
            clip = _floats("clip", self.clip)
            if len(clip) != 2 or not -math.inf < clip[0] < clip[1] < math.inf:
                raise ValueError(
                    f"Stage: clip is (lo, hi), finite, with lo < hi; got {self.clip!r}."
                )
            put("clip", clip)
        if self.threshold is not None:
            put("threshold", self._checked_threshold())
        if not isinstance(self.evaluate, bool):
            raise TypeError(f"Stage: evaluate is True or False; got {self.evaluate!r}.")
        if not self.evaluate and (self.b[:1] not in ((), (0.0,)) or self.g[:1] not in ((), (0.0,))):
            raise ValueError(
                f"Stage: without an evaluation there is no h; got b[0] or g[0] != 0 at "
                f"t = {self.t}. Set evaluate=True or weigh only earlier outputs (b[1], b[2], ...)."
            )
        if (self.c or self.c_e) and not self.noise:
            raise ValueError(
                f"Stage: c = {self.c}, c_e = {self.c_e} weigh a noise that is not drawn at "
                f"t = {self.t}. Give noise=((stream, 1.0),) with stream >= 1."
            )

    def _checked_threshold(self) -> tuple[float, float]:
        pair = _floats("threshold", self.threshold)
        if len(pair) != 2 or not (0.0 < pair[0] <= 1.0 and LEAST_FLOOR <= pair[1] < math.inf):
            raise ValueError(
                "Stage: threshold is (quantile, floor), with 0 < quantile <= 1 and a finite floor "
                f"of at least {LEAST_FLOOR:.3g}; got {self.threshold!r}."
            )
        if self.clip is not None:
            raise ValueError(
                f"Stage: h is clipped or thresholded, not both; got clip = {self.clip!r} and "
                f"threshold = {self.threshold!r}. Leave one out."
            )
        return pair[0], pair[1]

    def _checked_noise(self) -> tuple[tuple[int, float], ...]:
        draws = []
        for draw in self.noise:
            if (
                not isinstance(draw, list | tuple)
                or len(draw) != 2
                or not all(map(_is_number, draw))
            ):
                raise TypeError(f"Stage: a draw is (stream, weight); got {draw!r}.")
            stream, weight = draw
            if isinstance(stream, bool) or int(stream) != stream or not 1 <= stream < MAX_STREAM:
                raise ValueError(
                    f"Stage: noise streams are integers from 1 to {MAX_STREAM - 1} (stream 0 is "
                    f"the starting noise); got {stream!r}."
                )
            if not math.isfinite(weight):
                raise ValueError(f"Stage: noise weights are finite; got {weight!r}.")
            draws.append((int(stream), float(weight)))
        if len(draws) > 2:
            raise ValueError(f"Stage: at most two draws a stage; got {len(draws)}.")
        return tuple(draws)

    @property
    def writes_e(self) -> bool:
        """Whether the next evaluation is at e'."""
        return any((self.d_x, self.d_e, self.c_e, *self.g, *self.s))

    @property
    def writes_x(self) -> bool:
        """Whether x changes."""
        return self.a_x != 1.0 or any((self.a_e, self.c, *self.b, *self.r))


# Plans of this process by their handles, for those that can hold on to a string alone.
_living: weakref.WeakValueDictionary[str, Plan] = weakref.WeakValueDictionary()
_serial = itertools.count()


def plan_of(handle: str) -> Plan:
    """The living plan of that `Plan.handle`."""
    return _living[handle]


_SCALARS = tuple(f.name for f in dataclasses.fields(Stage) if f.type == "float")
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
        put("times", _floats("times", self.times))
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
        if not _is_number(self.prior_scale) or not 0 < self.prior_scale < math.inf:
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
        for i, stage in enumerate(self.stages):
            reach = max(len(stage.b), len(stage.g)) - 1
            if not stage.evaluate:
                reach -= 1
            if reach > evaluations:
                raise ValueError(
                    f"Plan: a row reads only outputs that exist; stage {i} reads one from {reach} "
                    f"evaluations before, and {evaluations} came before it."
                )
            if (stage.a_e or stage.d_e) and not has_e:
                raise ValueError(
                    f"Plan: stage {i} reads e (a_e = {stage.a_e}, d_e = {stage.d_e}), "
                    "but no stage before wrote one."
                )
            if stage.clip is not None and self.variable != "x0":
                raise ValueError(
                    f"Plan: clipping applies to x0 predictions; stage {i} clips {self.variable!r}. "
                    "Use a solver in x0 form (dpmpp-..., or ddim)."
                )
            if stage.threshold is not None and self.variable != "x0":
                raise ValueError(
                    f"Plan: thresholds apply to x0 predictions; stage {i} thresholds "
                    f"{self.variable!r}. Use a solver in x0 form (dpmpp-..., or ddim)."
                )
            evaluations += stage.evaluate
            has_e, at_e = has_e or stage.writes_e, stage.writes_e
        if at_e:
            raise ValueError(
                "Plan: the last stage must leave the result in x; its e row (d_x, d_e, g, c_e, s) "
                "is not zero."
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
        return any(stage.noise and (stage.c or stage.c_e) for stage in self.stages)

    @functools.cached_property
    def uses_e(self) -> bool:
        """Whether any stage evaluates away from x."""
        return any(stage.writes_e for stage in self.stages)

    @functools.cached_property
    def extras(self) -> int:
        """Read-only input registers that the rows weigh."""
        return max(max(len(s.r), len(s.s)) for s in self.stages)

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
            for j in range(1, max(len(stage.b), len(stage.g))):
                if (j < len(stage.b) and stage.b[j]) or (j < len(stage.g) and stage.g[j]):
                    source = done - j
                    row.append((j, source))
                    last_read[source] = i
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

    @property
    def layout(self) -> Layout:
        """Columns of `table`."""
        read = (
            sum(1 for r, s in itertools.zip_longest(stage.r, stage.s, fillvalue=0.0) if r or s)
            for stage in self.stages
        )
        return Layout(max(map(len, self._allocation[2])), 1, max(read))

    @functools.cached_property
    def table(self) -> NDArray[np.float64]:
        """The rows packed for the kernels, float64 [len(stages), layout.width], read-only."""
        table = self.pack()
        table.setflags(write=False)
        return table

    def pack(self, weights: Sequence[float] = (1.0,)) -> NDArray[np.float64]:
        """The packed table with the outputs of G guidance branches weighed by `weights`.

        Args:
            weights: w_g of each branch, length G.

        Returns:
            float64 [len(stages), width] in the columns of `Layout(layout.terms, G, extras)`.
        """
        layout = dataclasses.replace(self.layout, branches=len(weights))
        return encode(self.rows(weights), layout)

    def rows(self, weights: Sequence[float] = (1.0,)) -> list[PackedRow]:
        """The stages as packed rows, with the outputs of G branches weighed by `weights`."""
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
            row = PackedRow(
                flags=flags,
                push=pushes[i],
                draws=stage.noise if stage.c or stage.c_e else (),
                p=stage.p,
                a_x=stage.a_x,
                a_e=stage.a_e,
                b_0=_at(stage.b, 0),
                c=stage.c,
                d_x=stage.d_x,
                d_e=stage.d_e,
                g_0=_at(stage.g, 0),
                c_e=stage.c_e,
                c_in_next=later.c_in if later is not None and writes_m else 0.0,
                k=tuple(stage.q * w for w in weights),
                terms=tuple((slot, _at(stage.b, j), _at(stage.g, j)) for j, slot in reads[i]),
                extras=tuple(
                    (k, _at(stage.r, k), _at(stage.s, k))
                    for k in range(max(len(stage.r), len(stage.s)))
                    if _at(stage.r, k) or _at(stage.s, k)
                ),
            )
            if stage.clip is not None:
                row.lo, row.hi = stage.clip
            if stage.threshold is not None:
                row.quantile, row.floor = stage.threshold
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
                stages.append(Stage(**row))
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
