# SPDX-License-Identifier: Apache-2.0
"""Adaptive steps: an embedded pair whose rows are written while it runs.

An attempt of a step is a few rows of the ordinary instruction, written when the length of the step
is known: each sample has rows, times and slots of its own. Its last row leaves the new state in x,
the difference of both orders in e, and the old state in a slot, from where a refused step is
undone. One number a sample goes to the host after each attempt, its error. Samples that have
arrived run rows that do nothing, and the network is not called for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..conditioning import arguments_of, walk
from ..plans import WRITES_M, WRITES_X, Measure, PackedRow, Reduction, Stage
from ..plans.allocate import Allocation
from ..plans.layout import layout_of
from ..plans.pack import pack
from ..schedules import Schedule
from ..schedules.base import scale_of_unit_data
from ..solvers.embedded import Embedded
from ..solvers.rows import Rows
from .call import Call
from .job import Job
from .loops import Written, output_problem, watch
from .pacing import Track
from .run import Run, features_of, spec_of


class ToleranceNotMet(ValueError, RuntimeError):
    """A run did not arrive within its evaluations; the message says where it stands."""


@dataclass(frozen=True)
class Tolerance:
    """What an adaptive run may err by in a step, and spend in all.

    Attributes:
        rtol, atol: Tolerances.
        max_nfe: Evaluations of a sample.
    """

    rtol: float
    atol: float
    max_nfe: int


class Adaptive:
    """One adaptive run.

    Args:
        job: Network, guidance, backend; its plan is the pair's over the whole range.
        pair: The embedded pair.
        call: x, and the conditioning of all branches.
        tolerance: See `Tolerance`.
        tracks: The samples, by how they share steps; each stands at the first time.
        end: The last time that steps reach, and the time that a jump reaches after it or None.
    """

    def __init__(
        self,
        job: Job,
        pair: Embedded,
        call: Call,
        tolerance: Tolerance,
        tracks: Sequence[Track],
        end: tuple[float, float | None],
    ) -> None:
        assert job.plan.schedule is not None
        self._schedule: Schedule = job.plan.schedule
        self._job, self._pair, self._tolerance, self._tracks = job, pair, tolerance, tracks
        self._end, self._jump = end
        self._batch, self._branches = call.batch, job.guidance.branches
        self._weights = self._weights_of_samples()
        alike = len(tracks) == 1 and not job.guidance.per_sample
        self._stride = 1 if alike else call.batch  # rows that a stage takes
        self._idle = PackedRow(k=(0.0,) * self._branches)
        measure = Stage(
            self._end, evaluate=False, measures=(Measure(0, Reduction("norm", ("e",))),)
        )
        (self._measured,) = pack([measure], Allocation(0, (-1,), ({},)), self._weights[0])
        self._stages = pair.evaluations
        self._saved = self._stages  # the slot of the old state
        self._run = self._run_of(call)
        self._cond, self._few_cond, self._few = call.cond, call.cond, tuple(range(call.batch))
        self._index: torch.Tensor | None = None
        self._scattered: torch.Tensor | None = None
        published = tracks[0].controller.published
        self._lower = call.x.to(self._run.spec.state, copy=True) if published else None
        self._difference: torch.Tensor | None = None  # of both orders, for a published loop
        self._root = max(call.x[0].numel(), 1) ** 0.5

    def _weights_of_samples(self) -> list[tuple[float, ...]]:
        each = self._job.guidance.weights(0)
        return [
            tuple(float(w[b] if isinstance(w, torch.Tensor) else w) for w in each)
            for b in range(self._batch)
        ]

    def _run_of(self, call: Call) -> Run:
        """A run with room for an attempt of every sample."""
        job, stride = self._job, self._stride
        rows = [*self._widest(self._tracks[0]), self._measured]
        spec = spec_of(job.plan, job.guidance, call.x.shape, job.kind(call.x))
        run = Run(
            replace(
                spec,
                layout=spec.layout.joined(layout_of(rows)),
                rows=(self._stages + 2) * stride,
                slots=self._stages + 1,
                has_e=True,
                has_m=True,
                stages=self._stages,
                scalars=1,
                features=features_of(rows),
                stride=stride,
                index="none" if stride == 1 else "sample",
            )
        )
        for register in run.live():
            register.zero_()
        assert run.registers.m is not None
        run.registers.m.zero_()
        run.registers.x.copy_(call.x)
        run.write(rows)  # kernels are made for what the first rows need
        run.write([self._measured] * stride, (self._stages + 1) * stride)
        return run

    # -- the loop --------------------------------------------------------------------------------

    def sample(self) -> torch.Tensor:
        """Runs until every sample has arrived; returns the state."""
        while active := [track for track in self._tracks if not track.done]:
            self._try(active)
        return self._run.registers.x

    def _try(self, active: list[Track]) -> None:
        """One attempt of a step by every track that is under way."""
        registers, batch, stride = self._run.registers, self._batch, self._stride
        table = [[self._idle] * stride for _ in range(self._stages + 1)]
        told = torch.zeros(self._stages, batch, dtype=torch.float64, device="cpu")
        callers: list[list[int]] = [[] for _ in range(self._stages)]
        written: dict[tuple[float, float, bool], list[Stage]] = {}  # samples may step alike
        for track in active:
            self._aim(track)
            step = (track.times[-1], track.goal, track.known)
            stages = written[step] if step in written else self._rows(track)
            written[step] = stages
            self._check_budget(track, sum(stage.evaluate for stage in stages))
            slots, prepared = self._slots(track, stages), self._prepared(track, stages[0])
            packed: dict[tuple[float, ...], list[PackedRow]] = {}  # by the weights of the branches
            for b in track.samples:
                weights = self._weights[b]
                if weights not in packed:
                    packed[weights] = self._packed(stages, slots, weights)
                table[0][b % stride] = prepared
                for j, row in enumerate(packed[weights]):
                    table[j + 1][b % stride] = row
                    told[j, b] = stages[j].model_time
                    if stages[j].evaluate:
                        callers[j].append(b)
        self._run.write([row for rows in table for row in rows])
        self._run.times.copy_(told.repeat(1, self._branches))
        self._run.row(0, None)
        for j, calling in enumerate(callers):
            output = self._evaluate(j, tuple(sorted(calling))) if calling else None
            self._run.row((j + 1) * stride, output)
        jumped = {id(track) for track in active if track.goal == self._jump}
        errors = self._errors(active)
        if jumped:  # a jump has no error, and its output is the last
            finite = registers.x.flatten(1).isfinite().all(1).tolist()
        for track in active:
            jumps = id(track) in jumped
            own = [(0.0 if finite[b] else math.nan) if jumps else errors[b] for b in track.samples]
            self._judge(track, own, jumps)
        if self._difference is not None and not active[0].restore:
            self._lower = registers.x - self._difference

    def _aim(self, track: Track) -> None:
        """Says where the next attempt of a track goes."""
        schedule, pair, s = self._schedule, self._pair, track.times[-1]
        if s == self._end and self._jump is not None:
            track.goal = self._jump
            return
        here, there = pair.progress(schedule, s), pair.progress(schedule, self._end)
        length = track.controller.length(there - here)
        track.goal = self._end
        if length < there - here:
            track.goal = max(pair.time_at(schedule, here + length), self._end)
        if not track.goal < s:
            raise self._unmet(track, "the step is shorter than its time's rounding")

    def _rows(self, track: Track) -> list[Stage]:
        """The stages of a track's attempt."""
        s, t, plan = track.times[-1], track.goal, self._job.plan
        rows = Rows(self._schedule, plan.prediction, plan.variable)
        rows.evaluations = int(track.known)  # evaluation 0 is made already
        known = 0 if track.known else None
        if t == self._jump:
            self._pair.jump(rows, s, t, known)
        else:
            self._pair.step(rows, s, t, known, "error")
        return rows.stages

    def _slots(self, track: Track, stages: Sequence[Stage]) -> Allocation:
        """The slots of an attempt. The pair's last output takes the one that its next step reads
        first, so that slots 0 and S - 1 change places at every step that is kept."""
        last = self._stages - 1
        slot = [track.first, *range(1, last), last - track.first]
        done, reads, pushes = int(track.known), [], []
        for stage in stages:
            reads.append({j: slot[done - j] for j in stage.history})
            pushes.append(slot[done] if stage.evaluate else -1)
            done += stage.evaluate
        return Allocation(self._stages + 1, tuple(pushes), tuple(reads))

    def _packed(
        self, stages: list[Stage], slots: Allocation, weights: tuple[float, ...]
    ) -> list[PackedRow]:
        """A sample's rows of an attempt; the last keeps the state that comes in."""
        rows = pack(stages, slots, weights)
        rows[-1].push_x = self._saved
        return rows

    def _widest(self, track: Track) -> list[PackedRow]:
        """The rows of a first attempt after a refusal: what all rows to come need."""
        track = replace(track, goal=self._end, restore=True)
        if self._jump is not None and self._end == track.times[0]:
            track.goal = self._jump
        stages = self._rows(track)
        rows = self._packed(stages, self._slots(track, stages), self._weights[0])
        return [self._prepared(track, stages[0]), *rows]

    def _prepared(self, track: Track, first: Stage) -> PackedRow:
        """The row before an attempt: it undoes a refused one, and writes the first input."""
        row = PackedRow(k=self._idle.k)
        if track.restore:
            row = replace(row, flags=WRITES_X, terms=((self._saved, 1.0, 0.0),))
        if first.evaluate:
            row = replace(row, flags=row.flags + WRITES_M, c_in_next=first.c_in)
        return row

    # -- the network -----------------------------------------------------------------------------

    def _evaluate(self, j: int, calling: tuple[int, ...]) -> torch.Tensor:
        """The network's outputs for all places, called for some."""
        run, whole = self._run, len(calling) == self._batch
        given, time = run.registers.m, run.times[j]
        assert given is not None
        if not whole:
            self._choose(calling)
            given, time = self._taken(given), self._taken(time)
        arguments, keywords = arguments_of(self._cond if whole else self._few_cond)
        before = watch(given), watch(time)
        output = self._job.network(given, time, *arguments, **keywords)
        if (watch(given), watch(time)) != before or given.grad is not None:
            raise Written(
                "adaptive: the network wrote to its input in place, or left a gradient in it, "
                "which is the run's own memory. Let it work on a copy (x = x.clone())."
            )
        problem = output_problem(output, given)
        if problem is not None:
            kind = ValueError if isinstance(output, torch.Tensor) else TypeError
            raise kind(f"adaptive: {problem}")
        if whole:
            return output
        return self._spread(output)

    def _choose(self, calling: tuple[int, ...]) -> None:
        """Makes some samples those that the network is called for."""
        if calling == self._few and self._index is not None:
            return
        self._few = calling
        self._index = torch.tensor(calling, device=self._run.spec.device)

        def visit(value: Any, path: Any, whole: bool) -> Any:
            if whole or not isinstance(value, torch.Tensor):
                return value
            return self._taken(value)

        self._few_cond = walk(self._cond, visit)

    def _taken(self, tensor: torch.Tensor) -> torch.Tensor:
        """The entries of the chosen samples in every branch, in memory of their own."""
        assert self._index is not None
        index = self._index.to(tensor.device)
        return tensor.unflatten(0, (self._branches, self._batch))[:, index].flatten(0, 1)

    def _spread(self, output: torch.Tensor) -> torch.Tensor:
        """Outputs of the chosen samples where all have their places."""
        m = self._run.registers.m
        assert m is not None
        assert self._index is not None
        spread = self._scattered
        if spread is None or spread.dtype != output.dtype:
            spread = self._scattered = torch.zeros_like(m, dtype=output.dtype)
        each = spread.unflatten(0, (self._branches, self._batch))
        each[:, self._index] = output.unflatten(0, (self._branches, len(self._few)))
        return spread

    # -- errors ----------------------------------------------------------------------------------

    def _errors(self, active: list[Track]) -> list[float]:
        """The error of every sample in units of the tolerance; those that stand still have none.

        E = rms(difference / scale), where scale = atol s_t + rtol max(|x| s_t/s_s, |x_t|) and s is
        the standard deviation that unit data have: the same number in every scaling of x. A
        published loop has max(atol, rtol max(|x_low|, |x_low of the step before|)) instead.
        """
        run, schedule = self._run, self._schedule
        x, e, history = run.registers.x, run.registers.e, run.registers.history
        assert e is not None
        assert history is not None
        assert run.registers.scalars is not None
        rtol, atol = self._tolerance.rtol, self._tolerance.atol
        if self._lower is not None:
            self._difference = e.clone()
            size = torch.maximum((x - e).abs_(), self._lower.abs()).mul_(rtol).clamp_(min=atol)
        else:
            scale = torch.ones(2, self._batch, dtype=torch.float64, device="cpu")
            for track in active:
                s, t = (scale_of_unit_data(schedule, u) for u in (track.times[-1], track.goal))
                scale[0, track.samples], scale[1, track.samples] = rtol * t / s, atol * t
            own = scale.to(e.device, e.dtype).reshape(2, -1, *[1] * (e.ndim - 1))
            size = torch.maximum(history[self._saved].abs() * own[0], x.abs().mul_(rtol)).add_(
                own[1]
            )
        e.div_(size.clamp_(min=torch.finfo(e.dtype).tiny))
        run.row((self._stages + 1) * self._stride, None, measured=True)
        norms: list[float] = run.registers.scalars[:, 0].double().tolist()
        return [norm / self._root for norm in norms]

    def _judge(self, track: Track, errors: list[float], jumped: bool) -> None:
        """Keeps a track's attempt or refuses it."""
        pair, controller = self._pair, track.controller
        track.restore = False
        self._check_finite(track, errors)
        if not jumped:
            track.error = controller.joined(errors)
            if not controller.keeps(track.error):
                track.restore, track.known = True, not controller.published
                track.refused += 1
                return
        track.times.append(track.goal)
        track.known = pair.hands_on
        if pair.hands_on:
            track.first = self._stages - 1 - track.first
        self._check_arrived(track)

    def _check_arrived(self, track: Track) -> None:
        last, pair, schedule = track.times[-1], self._pair, self._schedule
        if self._jump is not None:
            track.done = last == self._jump
            return
        left = pair.progress(schedule, self._end) - pair.progress(schedule, last)
        track.done = track.controller.arrived(left, last - self._end)

    def _check_finite(self, track: Track, errors: list[float]) -> None:
        bad = [b for b, error in zip(track.samples, errors, strict=True) if error != error]
        if bad:
            raise ValueError(
                f"adaptive: the network returns finite numbers; got NaN or infinity for sample "
                f"{bad[0]}, in the step from t = {track.times[-1]:.6g} to {track.goal:.6g}. Look "
                "at its input there: x and the conditioning have to be finite too."
            )

    def _check_budget(self, track: Track, cost: int) -> None:
        if track.nfe + cost > self._tolerance.max_nfe:
            raise self._unmet(track, f"max_nfe = {self._tolerance.max_nfe} leaves no other step")
        track.nfe += cost

    def _unmet(self, track: Track, why: str) -> ToleranceNotMet:
        taken = len(track.times) - 1
        reached = (
            "no step was tried"
            if track.error != track.error
            else (
                f"the error of the last step tried is {track.error:.3g} times what rtol = "
                f"{self._tolerance.rtol:g} and atol = {self._tolerance.atol:g} allow"
            )
        )
        return ToleranceNotMet(
            f"adaptive: {self._pair.name} reaches t = {self._end:g} within the tolerance; got "
            f"as far as t = {track.times[-1]:.6g} with sample {track.samples[0]} after {track.nfe} "
            f"evaluations, {taken} steps kept and {track.refused} refused: {why}, and {reached}. "
            "Take larger rtol and atol, or a larger max_nfe."
        )
