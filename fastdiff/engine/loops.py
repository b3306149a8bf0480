# SPDX-License-Identifier: Apache-2.0
"""The loops: a network called and a run advanced, stage after stage.

Everything is decided before a loop starts. Inside it, a step on a CPU is one network call and one
call of the compiled stage: no tensor is allocated, no coefficient is looked up, nothing is copied.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..backends.torch import threshold
from ..conditioning import arguments_of, at_stage, varies
from ..guidance import combine
from .call import Call
from .job import Job
from .ranges import span
from .run import Run

# What a stage raises for what it cannot read.
BAD_OUTPUT = (TypeError, ValueError, AttributeError, RuntimeError)


class Written(ValueError, RuntimeError):
    """A network or a callback wrote to what the run stands on; the run cannot be used again."""


def run_stages(job: Job, run: Run, call: Call) -> None:
    """Runs all stages of a run that is filled and stands at its beginning.

    Raises:
        TypeError, ValueError: The network returns what no stage can read.
        Written: The network or the callback wrote to its arguments.
    """
    steps: Iterable[int] = range(len(job.plan.stages))
    if call.progress:
        steps = _bar(steps)
    special = call.watched or job.fresh_inputs or run.counts_writes or any(run.measures)
    special = special or call.profiled
    alone = job.plain and not special
    if not alone or varies(call.cond):
        _observed(job, run, call, steps)
    else:
        _plain(job, run, call)


def _plain(job: Job, run: Run, call: Call) -> None:
    """The loop where every stage evaluates and nobody looks on."""
    network, stage, stride = _conditioned(job.network, call.cond), run.stage, run.spec.stride
    places = [given.data_ptr() for given in run.inputs]
    versions = run.versions()
    rows = range(0, len(places) * stride, stride)
    # a run has room for the times of more stages than its plan has
    for row, given, time, place in zip(rows, run.inputs, run.model_times, places, strict=False):
        output = network(given, time)
        if given.data_ptr() != place:  # what the stage would write to may be freed
            raise written(job, "network", row // stride)
        try:
            stage(row, output, None)
        except BAD_OUTPUT as error:
            raise bad_output(job, row // stride, output, given, error) from None
    if run.versions() != versions:
        raise written(job, "network", None)
    handed = (*dict.fromkeys(run.inputs), *run.model_times)
    if any(tensor.grad is not None for tensor in handed):
        raise left_gradient()


def _conditioned(network: Any, cond: Any) -> Any:
    """The network with its conditioning, called as f(x, t): unpacking it at each call is slow."""
    arguments, keywords = arguments_of(cond)
    if keywords:
        return functools.partial(network, **keywords)
    return (lambda x, t: network(x, t, *arguments)) if arguments else network


def _observed(job: Job, run: Run, call: Call, steps: Iterable[int]) -> None:
    """The loop with all that a run may be asked for beside speed."""
    arguments, keywords = arguments_of(call.cond)
    changes = varies(call.cond)
    for i in steps:
        stage, output = job.plan.stages[i], None
        if changes:
            arguments, keywords = arguments_of(at_stage(call.cond, i))
        if stage.evaluate:
            with span(call.profiled, "network", i):
                output = evaluate(job, run, i, arguments, keywords)
            if call.check:
                _check_values(job, i, output, run.inputs[i])
            if call.callback is not None:
                _call_back(job, run, call, i, output)
        xi = call.xi[i] if call.xi is not None and stage.noise else None
        try:
            with span(call.profiled, "stage", i):
                run.advance(i, output, xi)
        except BAD_OUTPUT as error:
            raise bad_output(job, i, output, run.inputs[i], error) from None


def evaluate(job: Job, run: Run, i: int, arguments: Any, keywords: Any) -> Any:
    """The network's output at stage i.

    Raises:
        Written: The network wrote to its arguments.
    """
    given, time = run.inputs[i], run.model_times[i]
    if job.fresh_inputs:
        return job.network(given.clone(), time.clone(), *arguments, **keywords)
    before = watch(given), watch(time)
    output = job.network(given, time, *arguments, **keywords)
    if (watch(given), watch(time)) != before:
        raise written(job, "network", i)
    if given.grad is not None or time.grad is not None:
        raise left_gradient()
    return output


def left_gradient() -> Written:
    """The error for a network that called backward() on its own input."""
    return Written(
        "sample: the network left a gradient in its input, which is the sampler's own memory: the "
        "next stage would add to it. Use torch.autograd.grad(...), or let it work on a copy "
        "(x = x.detach().requires_grad_()); a network is given memory of its own with "
        "Sampler(..., fresh_inputs=True)."
    )


def watch(tensor: torch.Tensor) -> tuple[int, int]:
    """What changes when a tensor is written to in place, or moved: its version and its place."""
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()


def written(job: Job, who: str, i: int | None) -> Written:
    """The error for an argument that was written to, at stage i or, None, at one of them."""
    at = "" if i is None else f"stage {i} (t = {job.plan.stages[i].t:.6g}): "
    which = " check=True says at which stage." if i is None else ""
    return Written(
        f"sample: {at}the {who} wrote to its input in place, which is the sampler's own memory."
        f"{which} Let it work on a copy (x = x.clone()); a network is given memory of its own with "
        "Sampler(..., fresh_inputs=True)."
    )


def _call_back(job: Job, run: Run, call: Call, i: int, output: Any) -> None:
    assert call.callback is not None
    point, stage = run.point(i), job.plan.stages[i]
    problem = output_problem(output, run.inputs[i])
    if problem is not None:
        raise bad_output(job, i, output, run.inputs[i], problem)
    before = [watch(tensor) for tensor in run.live()]
    call.callback(i, stage.t, point, _x0(job, i, point, output))
    if [watch(tensor) for tensor in run.live()] != before:
        raise written(job, "callback", i)


def _x0(job: Job, i: int, point: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The data that the network sees at stage i, as the plan limits it."""
    stage, guidance = job.plan.stages[i], job.guidance
    outputs = output.to(point.dtype).view(guidance.branches, *point.shape)
    weights = guidance.combined_weights(i, point)
    x0 = stage.x0_p * point + stage.x0_q * combine(weights, outputs.unbind())
    if stage.clip is not None:
        return x0.clamp(*stage.clip)
    return x0 if stage.threshold is None else threshold(x0, *stage.threshold)


# -- what a network may get wrong ------------------------------------------------------------------


def bad_output(
    job: Job, i: int | None, output: Any, given: torch.Tensor, why: Exception | str
) -> Exception:
    """The error for an output that a stage could not read; `why` itself where the output is right.

    Args:
        job: The job whose network returned the output.
        i: The stage; None where it is not known.
        output: What the network returned.
        given: What the network was given.
        why: The error that the stage raised, or a sentence that says what is wrong.
    """
    problem = output_problem(output, given)
    if problem is None:
        if isinstance(why, Exception):
            return why
        problem = why
    kind = TypeError if not isinstance(output, torch.Tensor) else ValueError
    at = "" if i is None else f"stage {i} (t = {job.plan.stages[i].t:.6g}): "
    return kind(f"sample: {at}{problem}")


def _check_values(job: Job, i: int, output: Any, given: torch.Tensor) -> None:
    problem = output_problem(output, given)
    if problem is None and not bool(torch.isfinite(output).all()):
        kind = "NaN" if bool(output.isnan().any()) else "infinity"
        problem = f"the network returned {kind}."
    if problem is not None:
        raise bad_output(job, i, output, given, problem)


def output_problem(output: Any, given: torch.Tensor) -> str | None:
    """What is wrong with a network's output, or None."""
    if not isinstance(output, torch.Tensor):
        hint = ""
        if isinstance(output, tuple | list):
            hint = " Take the tensor out of it: network=lambda *a, **k: net(*a, **k)[0]."
        elif isinstance(output, Mapping) and output:
            key = next(iter(output))
            hint = f" Take the tensor out of it: network=lambda *a, **k: net(*a, **k)[{key!r}]."
        elif hasattr(output, "sample"):
            hint = " Wrap it: network=lambda *a, **k: net(*a, **k).sample."
        return f"the network returns a tensor; got {type(output).__name__}.{hint}"
    if output.layout is not torch.strided or output.is_nested:
        return f"the network returns a dense tensor; got {output.layout}. Use .to_dense()."
    if output.shape != given.shape:
        return (
            f"the network returns its input's shape, {tuple(given.shape)}; got "
            f"{tuple(output.shape)}. (Networks that also predict a variance: keep the first half "
            "of the channels.)"
        )
    if not output.dtype.is_floating_point:
        return f"the network returns a real floating dtype; got {output.dtype}."
    if output.device != given.device:
        return f"the network returns a tensor on {given.device}; got {output.device}."
    return None


def _bar(steps: Iterable[int]) -> Iterable[int]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise RuntimeError(
            'sample: progress=True needs tqdm. Install it: pip install "fastdiff-engine[cli]".'
        ) from None
    return tqdm(steps, desc="sampling", unit="stage")
