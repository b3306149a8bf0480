# SPDX-License-Identifier: Apache-2.0
"""Estimating the statistics of DPM-Solver-v3 on a network and its schedule."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import conditioning, grids, noise
from ..guidance import UNGUIDED, Guidance
from ..sampler import sample
from ..schedules import Array, Schedule, prediction_name
from ..solvers import plan
from ..solvers.base import choice
from ..solvers.statistics import default_ends
from .checks import (
    check_counts,
    check_derivative,
    check_folder,
    check_kinds,
    check_network,
    check_partial,
    check_prediction,
    check_same,
    check_source,
)
from .denoiser import DERIVATIVES, Denoiser, parameters_of
from .statistics import Statistics, estimate_of, fingerprint, read, write

_PARTIAL = "fastdiff-statistics-partial"
# Sums over samples, each [M + 1, *shape]; with w = x / alpha, D the x0 prediction, D' its rate.
_SUMS = ("slope", "D", "w", "DD", "Dw", "ww", "D'", "DD'", "wD'")
# Up to this variance, relative to the squares of x0 and x / alpha, f is a constant. Differences in
# float32 leave 2e-10 of rounding, and s would be the quotient of two of them.
_CONSTANT = 1e-9


def ems(
    network: Any,
    schedule: Schedule,
    *,
    data: torch.Tensor | None = None,
    shape: Sequence[int] | None = None,
    prediction: str = "epsilon",
    cond: Any = None,
    guidance: Guidance | None = None,
    intervals: int = 120,
    samples: int = 1024,
    batch: int = 64,
    probes: int | str = 1,
    derivative: str = "forward",
    t_max: float | None = None,
    t_min: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    save: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Statistics:
    """Empirical model statistics of a network: l, s and b of DPM-Solver-v3.

    With f = (sigma eps - l x) / alpha, element by element and at each lambda of an even grid,

        l     minimises  E || sigma d eps/dx - diag(l) ||_F^2:   l = E[sigma diag(d eps/dx)]
        s, b  minimise   E (f' - s f - b)^2:   s = cov(f, f') / var(f),   b = E f' - s E f

    where f' = df/dlambda along the flow. The two criteria are the paper's. Ours are: the normal
    equations above (the derivative of each criterion set to 0; the authors published no program for
    them); the expectation over x = alpha x0 + sigma noise of the data, or over the states of runs
    from the prior where no data are given; the diagonal by Rademacher probes v, E[v * (J v)]; and
    f' as one derivative along (dx/dlambda, dt/dlambda), with dl/dlambda by differences of l. All is
    formed with x0 in place of eps, which keeps its digits where alpha is small: sigma d eps/dx is
    1 - alpha d x0/dx, and -f is x0 + (l - 1) x / alpha. Where f does not vary (by
    more than 3e-5 of x0 or x / alpha), s = 0.

    Args:
        network: `network(x, t, **cond)`, as samplers take it.
        schedule: Its schedule.
        data: Data [N, *shape]; sample j is noised data[j % N]. None: states of runs by dpmpp-2m on
            the grid from prior noise, for which `shape` is needed.
        shape: Shape of one sample, where no data are given.
        prediction: What the network returns.
        cond: Conditioning; tensors with N entries where data are given, else with `samples`.
        guidance: A `fastdiff.CFG` with one scale, under which the statistics are to be used; None:
            none.
        intervals: Intervals of the grid, even in lambda from t_max to t_min.
        samples: States at each lambda. s is a regression over them, element by element: of fewer
            than 64 it is noise that a run may amplify without bound. A sample costs 2 + `probes`
            network evaluations at each of the intervals + 1 values (forward mode counted as two).
        batch: Samples evaluated at once.
        probes: Probes of a state; "exact": one for each element, for states of few elements.
        derivative: "forward" (forward-mode differentiation) or "finite" (central differences), for
            networks that refuse forward mode or read their time on the host.
        t_max, t_min: Ends of the grid; None: the schedule's own, or its least sigma > 0.
        seed: Seed of all noise.
        device: Where the network runs; None: where its first parameter is, or the data.
        save: A file. Partial sums stand in `<save>.part` after every batch; a call with the same
            arguments goes on from there, and ends with the same numbers bit for bit. The file is
            read where it is complete, and refused where it is of other arguments.
        progress: Called as `progress(done, total)` after every batch.

    Returns:
        The statistics.

    Raises:
        ValueError: An argument is out of range, the files belong to other arguments or to another
            network, the network says that it predicts something else, or the two derivatives
            disagree (the network's time is not differentiated).
        TypeError: An argument has the wrong kind.
        FileNotFoundError: The folder of `save` does not exist.
        NotImplementedError: The network refuses forward mode.

    Source: Zheng et al., "DPM-Solver-v3", arXiv:2310.13268, section 3: the definitions of l, s, b.
    """
    counts: dict[str, Any] = {"intervals": intervals, "samples": samples, "batch": batch}
    check_counts(counts if probes == "exact" else counts | {"probes": probes}, seed)
    choice("ems", "derivative", derivative, DERIVATIVES)
    check_kinds(network, schedule, guidance, cond)
    check_source(data, shape)
    check_prediction(network, prediction)
    path = None if save is None else Path(os.fsdecode(save))
    check_folder(path)
    guidance = guidance or UNGUIDED
    _check_guidance(guidance, intervals)
    usual = default_ends(schedule)
    ends = (usual[0] if t_max is None else t_max, usual[1] if t_min is None else t_min)
    grids.build(schedule, 1, "uniform", t_max=ends[0], t_min=ends[1])  # refuses other ends
    first, last = (float(schedule.lambda_t(t)) for t in ends)
    if not -math.inf < first < last < math.inf:
        raise ValueError(
            f"ems: lambda is finite and increases from t_max to t_min; got {first:g} at t_max = "
            f"{ends[0]:g} and {last:g} at t_min = {ends[1]:g}. Set the ends inside."
        )
    if device is None:
        held = parameters_of(network)
        device = held[0].device if held else "cpu" if data is None else data.device
    estimate = _Estimate(
        Denoiser(network, schedule, prediction_name(prediction), guidance, derivative),
        np.linspace(first, last, intervals + 1),
        ends,
        data,
        tuple(data.shape[1:] if data is not None else shape or ()),
        cond,
        samples,
        batch,
        probes,
        seed,
        torch.device(device),
    )
    return estimate.run(path, progress)


def _check_guidance(guidance: Guidance, intervals: int) -> None:
    """Raises unless the weights are one number a branch at every stage."""
    try:
        same = guidance.weights(0) == guidance.weights(intervals)
    except IndexError:
        same = False
    if guidance.per_sample or not same:
        raise ValueError(
            "ems: statistics belong to one guidance at all times and for all samples; got weights "
            "that change. Give a CFG whose scale is a number."
        )


@dataclass
class _Estimate:
    """The sums of one estimate."""

    denoiser: Denoiser
    grid: Array
    ends: tuple[float, float]
    data: torch.Tensor | None
    shape: tuple[int, ...]
    cond: Any
    samples: int
    batch: int
    probes: int | str
    seed: int
    device: torch.device

    def run(self, path: Path | None, progress: Callable[[int, int], Any] | None) -> Statistics:
        head = self.settings()
        own = fingerprint(self._of(0, 2), self.grid, self.shape, self.device)
        if path is not None and path.exists():
            return self._finished(path, head, own)
        part = None if path is None else path.with_name(path.name + ".part")
        sums = np.zeros((len(_SUMS), len(self.grid), *self.shape))
        done, total = 0, math.ceil(self.samples / self.batch)
        if part is not None and part.exists():
            known, arrays = read(part, _PARTIAL, ("sums", "fingerprint"))
            check_same(part, known, head)
            check_network(part, arrays["fingerprint"], own)
            done = check_partial(part, known.get("done"), total, arrays["sums"], sums)
            sums = arrays["sums"]
        while done < total:
            with torch.no_grad():
                self._add(sums, done * self.batch, min((done + 1) * self.batch, self.samples))
            done += 1
            if part is not None:
                write(part, _PARTIAL, {**head, "done": done}, {"sums": sums, "fingerprint": own})
            if progress is not None:
                progress(done, total)
        found = self._solved(sums / self.samples, own)
        if path is not None and part is not None:
            found.save(path, estimate=head)
            part.unlink()
        return found

    def settings(self) -> dict[str, Any]:
        """What the sums depend on beside the network, as data that JSON can hold."""
        digest = hashlib.sha256()
        given = [] if self.data is None else [self.data]
        for tensor in (*given, *conditioning.tensors_in(self.cond)):
            digest.update(repr((tensor.shape, tensor.dtype)).encode())
            digest.update(tensor.detach().cpu().double().numpy().tobytes())
        denoiser = self.denoiser
        return {
            "schedule": denoiser.schedule.to_dict(),
            "prediction": denoiser.prediction,
            "guidance": [float(w) for w in denoiser.guidance.weights(0)],
            "derivative": denoiser.derivative,
            "lambda": [float(self.grid[0]), float(self.grid[-1]), len(self.grid)],
            "shape": list(self.shape),
            "source": digest.hexdigest() if given else "prior " + digest.hexdigest(),
            "samples": self.samples,
            "batch": self.batch,
            "probes": self.probes,
            "seed": self.seed,
        }

    def _finished(self, path: Path, head: dict[str, Any], own: Any) -> Statistics:
        """The statistics of a complete file."""
        found, known = Statistics.load(path), estimate_of(path)
        wanted = (self.denoiser.schedule, self.denoiser.prediction, self.shape)
        same = (found.schedule, found.prediction, found.shape) == wanted
        if not same or not np.array_equal(found.lambda_grid, self.grid):
            raise ValueError(
                f"ems: {str(path)!r} holds the statistics of another schedule, prediction, grid "
                "or shape. Give another path, or delete it."
            )
        if known:
            check_same(path, known, head)
        check_network(path, found.fingerprint, own)
        return found

    def _of(self, start: int, stop: int) -> Denoiser:
        """The network on samples start .. stop - 1."""
        count = self.samples if self.data is None else len(self.data)
        index = torch.arange(start, stop) % count

        def pick(value: Any, path: Any, whole: bool) -> Any:
            if whole or not isinstance(value, torch.Tensor):
                return value
            if value.ndim == 0 or len(value) != count:
                size = len(value) if value.ndim else "one number"
                raise ValueError(
                    f"ems: cond has one entry a sample, {count}; got a tensor of {size}."
                )
            return value[index.to(value.device)].to(self.device)

        return self.denoiser.of(conditioning.walk(self.cond, pick))

    def _add(self, sums: Array, start: int, stop: int) -> None:
        """Adds samples start .. stop - 1 at every lambda."""
        denoiser, seeds = self._of(start, stop), range(self.seed + start, self.seed + stop)
        schedule = denoiser.schedule
        times = schedule.t_of_lambda(self.grid)
        times[0], times[-1] = self.ends
        if self.data is None:
            steps = plan(
                schedule,
                "dpmpp-2m" if len(times) > 2 else "ddim",
                len(times) - 1,
                grid=times,
                prediction=denoiser.prediction,
            )
            x = noise.prior(steps, (stop - start, *self.shape), seeds, device=self.device)

            def state(i: int, t: float, x: torch.Tensor, x0: torch.Tensor) -> None:
                self._add_state(sums, i, x.clone(), denoiser, seeds)

            end = sample(
                denoiser.network,
                x,
                steps,
                cond=denoiser.cond,
                guidance=None if denoiser.guidance is UNGUIDED else denoiser.guidance,
                callback=state,
                graph=None,
            )
            self._add_state(sums, len(self.grid) - 1, end, denoiser, seeds)
            return
        index = torch.arange(start, stop, device=self.data.device) % len(self.data)
        double = self.data.dtype == torch.float64
        dtype = torch.float64 if double else torch.float32
        x0 = self.data[index].to(self.device, dtype)
        for i, t in enumerate(times):
            eps = noise.normal(x0.shape, seeds, self._stream(i), dtype=dtype, device=self.device)
            x = float(schedule.alpha(t)) * x0 + float(schedule.sigma(t)) * eps
            self._add_state(sums, i, x, denoiser, seeds)

    def _stream(self, i: int, probe: int = 0) -> int:
        """Stream of noise of grid point i, or of its probe 1, 2, ..; stream 0 is the prior's."""
        most = 1 if self.probes == "exact" else int(self.probes) + 1
        return 1 + i * most + probe

    def _add_state(
        self, sums: Array, i: int, x: torch.Tensor, denoiser: Denoiser, seeds: range
    ) -> None:
        lam, schedule = float(self.grid[i]), denoiser.schedule
        first, last = float(self.grid[0]), float(self.grid[-1])
        alpha = float(schedule.alpha(schedule.t_of_lambda(lam)))
        low, high = max(lam - 1e-4, first), min(lam + 1e-4, last)
        ends = [float(np.log(schedule.alpha(schedule.t_of_lambda(end)))) for end in (low, high)]
        w = x / alpha
        found = denoiser.x0(x, lam)
        # along the flow d(x / alpha)/dlambda = x0 - x / alpha
        rate = (ends[1] - ends[0]) / (high - low)
        direction = rate * x + alpha * (found - w)
        rates = denoiser.rates(lam, first, last)
        _, change = denoiser.change(x, lam, direction, rates)
        if i == len(self.grid) // 2 and seeds[0] == self.seed:
            _, other = denoiser.change(x, lam, direction, rates, "coarse")
            check_derivative(denoiser.derivative, change, other)
        slope = self._slope(x, lam, denoiser, i, seeds)
        x0, w, change = found.double(), w.double(), change.double()
        terms = (slope, x0, w, x0 * x0, x0 * w, w * w, change, x0 * change, w * change)
        for k, term in enumerate(terms):
            sums[k, i] += term.sum(0).cpu().numpy()

    def _slope(
        self, x: torch.Tensor, lam: float, denoiser: Denoiser, i: int, seeds: range
    ) -> torch.Tensor:
        """diag(d x0/dx) of each sample, float64 [B, *shape]."""
        total = torch.zeros_like(x, dtype=torch.float64)
        if self.probes == "exact":
            for j in range(x[0].numel()):
                probe = torch.zeros_like(x).flatten(1)
                probe[:, j] = 1.0
                probe = probe.reshape(x.shape)
                total += probe * denoiser.change(x, lam, probe)[1]
            return total
        for k in range(1, int(self.probes) + 1):
            z = noise.normal(x.shape, seeds, self._stream(i, k), dtype=x.dtype, device=x.device)
            probe = torch.where(z < 0.0, -1.0, 1.0).to(x)
            total += probe * denoiser.change(x, lam, probe)[1]
        return total / int(self.probes)

    def _solved(self, means: Array, own: Any) -> Statistics:
        """l, s and b of the means over samples."""
        alpha = self.denoiser.schedule.alpha(self.denoiser.schedule.t_of_lambda(self.grid))
        slope, x0, w, xx, xw, ww, dx, xdx, wdx = means
        less = -alpha.reshape(-1, *[1] * len(self.shape)) * slope  # l - 1
        d_l = _rate(less, self.grid)
        # h = -f = x0 + (l - 1) w and h' = x0' + (l - 1) (x0 - w) + l' w
        mean = x0 + less * w
        mean_d = dx + less * (x0 - w) + d_l * w
        square = xx + 2.0 * less * xw + less**2 * ww
        cross = xdx + less * (xx - xw) + d_l * xw + less * (wdx + less * (xw - ww) + d_l * ww)
        variance = square - mean**2
        # relative to what h is a difference of, whose rounding errors and d_l's it has
        varies = variance > _CONSTANT * (xx + ww)
        s = np.where(varies, (cross - mean * mean_d) / np.where(varies, variance, 1.0), 0.0)
        return Statistics(
            self.denoiser.schedule,
            1.0 + less,
            s,
            s * mean - mean_d,
            self.grid,
            prediction=self.denoiser.prediction,
            fingerprint=own,
        )


def _rate(values: Array, grid: Array) -> Array:
    """d/dlambda of values on the grid, by central differences."""
    if len(grid) == 2:
        return np.broadcast_to((values[1] - values[0]) / (grid[1] - grid[0]), values.shape)
    found: Array = np.gradient(values, grid, axis=0, edge_order=2)
    return found
