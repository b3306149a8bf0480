# SPDX-License-Identifier: Apache-2.0
"""Running a plan: a network, a table and a loop that calls one and launches the other.

Everything is decided before the loop starts. Inside it, a step on a CPU is one network call and one
call of the compiled stage: no tensor is allocated, no coefficient is looked up, nothing is copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import backends, noise
from .backends.base import Registers, RunStage
from .backends.torch import threshold
from .guidance import CFG, batched, check_batch
from .plan import AT_E, Plan
from .schedules import prediction_name

Network = Callable[..., torch.Tensor]
Callback = Callable[[int, float, torch.Tensor, torch.Tensor], Any]
Seeds = int | Sequence[int] | torch.Tensor

_STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class _Run:
    """Buffers and bound kernels for one shape; reused by every call that has it."""

    key: tuple[Any, ...]
    registers: Registers
    inputs: list[torch.Tensor]  # what the network is given at each stage
    times: list[torch.Tensor]
    stage: RunStage
    stride: int  # rows of the table a stage takes


class Sampler:
    """A network and a plan, ready to run again and again.

    Args:
        network: `network(x, t, **cond)`: x [B, ...], t [B] in the units of the schedule's
            `model_time`; returns what `plan.prediction` says, in x's shape, in any floating dtype.
            (A `cond` that is not a dict is passed as a third argument.) It must not write to x.
        plan: See `fastdiff.plan`.
        guidance: `fastdiff.CFG`, or None.
        backend: A name in `fastdiff.backends.names()`; None: the fastest that can serve.
        dtype: Of the network's input. None: that of the network's first floating parameter, or x's.
        graph: "auto" or None. Graph capture exists on CUDA only.
        check: True looks for NaN and infinity in every network output and names the stage; it
            synchronises a GPU.

    The state and the history are float32 (float64 for a float64 x), whatever the network's dtype.
    A sampler is not for two threads at once; make one each.
    """

    def __init__(
        self,
        network: Network,
        plan: Plan,
        *,
        guidance: CFG | None = None,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        graph: str | None = "auto",
        gradient: Any = None,
        check: bool = False,
    ) -> None:
        if not callable(network):
            raise TypeError(f"sample: network is callable as network(x, t); got {network!r}.")
        if not isinstance(plan, Plan):
            raise TypeError(
                f"sample: plan is a fastdiff.Plan; got {type(plan).__name__}. Make one with "
                "fastdiff.plan(schedule, solver, steps)."
            )
        if guidance is not None and not isinstance(guidance, CFG):
            raise TypeError(f"sample: guidance is a fastdiff.CFG or None; got {guidance!r}.")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"sample: dtype is a floating torch.dtype; got {dtype!r}.")
        if graph not in ("auto", None):
            raise NotImplementedError(
                f"sample: graph={graph!r} is not available; graph=None and 'auto' run eagerly."
            )
        if gradient is not None:
            raise NotImplementedError(
                f"sample: gradient={gradient!r} is not available; gradient=None samples without "
                "tracking."
            )
        if backend is not None:
            backends.get(backend)
        predicts = getattr(network, "prediction", None)
        if isinstance(predicts, str) and prediction_name(predicts) != plan.prediction:
            raise ValueError(
                f"sample: the network says that it predicts {predicts!r}, and the plan was made "
                f"for {plan.prediction!r}. Make it with prediction={predicts!r}."
            )
        self._network = network
        self._plan = plan
        self._guidance = guidance
        self._backend = backend
        self._dtype = dtype
        self._check = check
        self._run: _Run | None = None
        self._plain = all(stage.evaluate for stage in plan.stages)

    @property
    def network(self) -> Network:
        """The network."""
        return self._network

    @property
    def plan(self) -> Plan:
        """The plan. Another plan takes another sampler."""
        return self._plan

    @property
    def guidance(self) -> CFG | None:
        """The guidance. Its weights stand in the sampler's copy of the table."""
        return self._guidance

    def __call__(
        self,
        x: torch.Tensor,
        cond: Any = None,
        *,
        seed: Seeds | None = None,
        xi: torch.Tensor | Sequence[torch.Tensor] | None = None,
        extras: Sequence[torch.Tensor] = (),
        callback: Callback | None = None,
        progress: bool = False,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Samples.

        Args:
            x: State at `plan.times[0]`, [B, ...], floating, any strides (`fastdiff.noise.prior`
                makes one). It is left as it is. B = 0 is legal and calls no network.
            cond: Conditioning: a (nested) dict of tensors with B entries each, passed to the
                network by keyword, or anything else it takes as a third argument. Tensors inside
                tuples and other objects are passed as they are.
            seed: For plans with noise: an integer s (samples use s, s + 1, ..) or one a sample.
            xi: Noise given instead of drawn: one tensor like x for each stage.
            extras: The plan's read-only input registers, each broadcastable to x.
            callback: Called as `callback(stage, t, x, x0)` after every network evaluation, before
                its update: t the time, x the point of evaluation (live memory: read it, clone what
                you keep), x0 the network's prediction of the data there.
            progress: Shows a bar (tqdm).
            out: Where to write the result, like x; returned.

        Returns:
            The sample at `plan.times[-1]`, x's shape and dtype, the caller's own.

        Raises:
            TypeError, ValueError: Before the first network call, for the arguments; at a stage,
                named, for what the network returns. x is untouched.
        """
        plan = self._plan
        self._check_arguments(x, cond, out)
        with torch.no_grad():
            if x.shape[0] == 0:
                return x.detach().clone() if out is None else out.copy_(x)
            run = self._prepare(x, len(extras))
            self._fill(run, x, seed, xi, extras)
            arguments, keywords = self._conditioning(cond, x.shape[0])
            steps: Iterable[int] = range(len(plan.stages))
            if progress:
                steps = _bar(steps)
            if self._check or callback is not None or xi is not None or not self._plain:
                self._observed(run, steps, arguments, keywords, xi, callback)
            else:
                network, stage, stride = self._network, run.stage, run.stride
                inputs, times = run.inputs, run.times
                for i in steps:
                    output = network(inputs[i], times[i], *arguments, **keywords)
                    try:
                        stage(i * stride, output, None)
                    except (TypeError, ValueError, AttributeError) as error:
                        raise self._bad_output(i, output, inputs[i], error) from None
            if out is None:
                out = torch.empty_like(x, memory_format=torch.contiguous_format)
            return out.copy_(run.registers.x)

    def _observed(
        self,
        run: _Run,
        steps: Iterable[int],
        arguments: tuple[Any, ...],
        keywords: Mapping[str, Any],
        xi: Any,
        callback: Callback | None,
    ) -> None:
        """The loop with all that a run may be asked for beside speed."""
        for i in steps:
            stage = self._plan.stages[i]
            output = None
            if stage.evaluate:
                given = run.inputs[i]
                version = given._version if not given.is_inference() else 0
                output = self._network(given, run.times[i], *arguments, **keywords)
                if self._check:
                    self._check_values(i, output, given, version)
                if callback is not None:
                    problem = _output_problem(output, given)
                    if problem:
                        raise self._bad_output(i, output, given, problem)
                    callback(i, stage.t, *self._seen(run, i, output))
            drawn = xi[i].contiguous() if xi is not None and (stage.c or stage.c_e) else None
            try:
                run.stage(i * run.stride, output, drawn)
            except (TypeError, ValueError, AttributeError) as error:
                raise self._bad_output(i, output, run.inputs[i], error) from None

    def _seen(self, run: _Run, i: int, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(point, x0 prediction) at stage i."""
        stage, registers = self._plan.stages[i], run.registers
        point = registers.e if _at_e(self._plan, i) and registers.e is not None else registers.x
        branches = output.reshape(-1, *point.shape).to(point.dtype)
        if len(branches) == 2 and self._guidance is not None:
            w_uncond, w_cond = self._guidance.weights(i, point)
            combined = w_uncond * branches[0] + w_cond * branches[1]
        else:
            combined = branches[0]
        x0 = stage.x0_p * point + stage.x0_q * combined
        if stage.clip is not None:
            x0 = x0.clamp(*stage.clip)
        if stage.threshold is not None:
            x0 = threshold(x0, *stage.threshold)
        return point, x0

    # -- before the loop -------------------------------------------------------------------------

    def _check_arguments(self, x: torch.Tensor, cond: Any, out: torch.Tensor | None) -> None:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"sample: x is a tensor; got {type(x).__name__}.")
        if x.dtype not in _STATE_DTYPES:
            raise TypeError(
                f"sample: x is real and floating ({', '.join(map(str, _STATE_DTYPES))}); got "
                f"{x.dtype}. Convert it, e.g. x.float()."
            )
        if x.ndim == 0:
            raise ValueError("sample: x has a batch dimension, [B, ...]; got a scalar tensor.")
        if x.layout is not torch.strided or x.is_nested:
            raise TypeError(f"sample: x is a dense tensor; got {x.layout}. Use x.to_dense().")
        if out is not None:
            _check_out(out, x)
        if self._check and not bool(torch.isfinite(x).all()):
            raise ValueError("sample: x is finite; got NaN or infinity in it.")
        check_batch(cond, x.shape[0])
        if torch.is_grad_enabled():
            tracked = ["x"] if x.requires_grad else []
            tracked += _requiring_grad(cond)
            if tracked:
                raise ValueError(
                    f"sample: gradient=None does not track, and {', '.join(tracked)} requires grad."
                    " Detach it or sample under torch.no_grad()."
                )

    def _prepare(self, x: torch.Tensor, extras: int) -> _Run:
        """Buffers and kernels for this shape, made once."""
        plan = self._plan
        if extras != plan.extras:
            raise ValueError(
                f"sample: the plan reads {plan.extras} extra input registers; got {extras}. Give "
                "them as extras=(...)."
            )
        state = torch.float64 if x.dtype == torch.float64 else torch.float32
        network = self._dtype or _parameter_dtype(self._network) or x.dtype
        key = (x.shape, state, network, x.device)
        if self._run is not None and self._run.key == key:
            return self._run
        name = self._backend
        if name is None and x.device.type != "cpu" and any(s.threshold for s in plan.stages):
            name = "torch"  # the one that thresholds there
        backend = backends.choose(name, state, network, x.device)
        batch = x.shape[0]
        like = functools.partial(torch.empty, dtype=state, device=x.device)
        guidance = self._guidance or CFG()
        table = torch.from_numpy(guidance.table(plan, batch))
        layout = replace(plan.layout, branches=guidance.branches)
        with torch.inference_mode(False):  # buffers outlive the caller's mode
            state_x = like(x.shape)
            e = like(x.shape) if plan.uses_e else None
            scaled = any(stage.c_in != 1.0 for stage in plan.stages)
            m = None
            if scaled or network != state or guidance.branches > 1:
                shape = (guidance.branches * batch, *x.shape[1:])
                m = torch.empty(shape, dtype=network, device=x.device)
            registers = Registers(
                x=state_x,
                e=e,
                history=like((plan.slots, *x.shape)),
                m=m,
                extras=tuple(like(x.shape) for _ in range(extras)),
                seeds=torch.empty(batch, dtype=torch.int64, device=x.device),
            )
            index = None
            if guidance.per_sample:
                index = torch.arange(batch, dtype=torch.int64, device=x.device)
            told = torch.float64 if network == torch.float64 else torch.float32
            values = torch.tensor([stage.model_time for stage in plan.stages], dtype=told)
            rows = values.to(x.device)[:, None].expand(-1, guidance.branches * batch).contiguous()
            inputs = [
                m if m is not None else e if _at_e(plan, i) and e is not None else state_x
                for i in range(len(plan.stages))
            ]
            stage = backend.bind(registers, table, layout, index)
        stride = batch if guidance.per_sample else 1
        self._run = _Run(key, registers, inputs, list(rows), stage, stride)
        return self._run

    def _fill(
        self,
        run: _Run,
        x: torch.Tensor,
        seed: Seeds | None,
        xi: Any,
        extras: Sequence[torch.Tensor],
    ) -> None:
        """Copies what this call brings into the buffers."""
        plan, registers = self._plan, run.registers
        if xi is not None:
            _check_xi(xi, plan, registers.x)
        elif plan.stochastic:
            if seed is None:
                raise ValueError(
                    f"sample: {plan.solver} draws noise. Give seed= (an integer, or one a sample), "
                    "or the noise itself as xi=."
                )
            registers.seeds.copy_(noise.seeds_tensor(seed, x.shape[0]))  # type: ignore[union-attr]
        for i, (register, given) in enumerate(zip(registers.extras, extras, strict=True)):
            try:
                register.copy_(torch.as_tensor(given).expand(x.shape))
            except (RuntimeError, TypeError):
                got = tuple(given.shape) if isinstance(given, torch.Tensor) else given
                raise ValueError(
                    f"sample: extra registers are broadcastable to x, {tuple(x.shape)}; got "
                    f"extras[{i}] = {got}."
                ) from None
        registers.x.copy_(x)
        if registers.m is not None:
            copies = registers.m.reshape(-1, *x.shape)
            copies.copy_(registers.x * plan.stages[0].c_in)

    def _conditioning(self, cond: Any, batch: int) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Positional and keyword arguments of the network after x and t."""
        guidance = self._guidance
        if guidance is not None and guidance.branches > 1:
            for name, value in (("cond", cond), ("uncond", guidance.uncond)):
                if value is None or (isinstance(value, Mapping) and not value):
                    raise ValueError(
                        "sample: guidance compares a conditional and an unconditional output; got "
                        f"{name}={value}. Give cond={{...}} and CFG(scale, uncond={{...}})."
                    )
            cond = batched(cond, guidance.uncond, batch)
        if cond is None:
            return (), {}
        return ((), cond) if isinstance(cond, Mapping) else ((cond,), {})

    # -- what a network may get wrong ------------------------------------------------------------

    def _bad_output(
        self, i: int, output: Any, given: torch.Tensor, why: Exception | str
    ) -> Exception:
        stage = self._plan.stages[i]
        problem = _output_problem(output, given)
        if problem is None:
            if isinstance(why, Exception):
                return why
            problem = why
        kind = TypeError if not isinstance(output, torch.Tensor) else ValueError
        return kind(f"sample: stage {i} (t = {stage.t:.6g}): {problem}")

    def _check_values(self, i: int, output: Any, given: torch.Tensor, version: int) -> None:
        problem = _output_problem(output, given)
        if problem is None and not bool(torch.isfinite(output).all()):
            kind = "NaN" if bool(output.isnan().any()) else "infinity"
            problem = f"the network returned {kind}."
        if problem is None and not given.is_inference() and given._version != version:
            problem = "the network wrote to its input in place. Let it work on a copy."
        if problem is not None:
            raise self._bad_output(i, output, given, problem)


def sample(
    network: Network,
    x: torch.Tensor,
    plan: Plan,
    *,
    cond: Any = None,
    guidance: CFG | None = None,
    seed: Seeds | None = None,
    xi: torch.Tensor | Sequence[torch.Tensor] | None = None,
    extras: Sequence[torch.Tensor] = (),
    callback: Callback | None = None,
    progress: bool = False,
    out: torch.Tensor | None = None,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    graph: str | None = "auto",
    gradient: Any = None,
    check: bool = False,
) -> torch.Tensor:
    """Samples once: `Sampler(network, plan, ...)(x, ...)`; arguments as there.

    Example:
        >>> schedule = fd.schedules.VPLinear()
        >>> plan = fd.plan(schedule, "deis-3", steps=10)
        >>> x = fd.noise.prior(plan, (64, 1, 8, 8), seeds=0)
        >>> images = fd.sample(network, x, plan)
    """
    sampler = Sampler(
        network,
        plan,
        guidance=guidance,
        backend=backend,
        dtype=dtype,
        graph=graph,
        gradient=gradient,
        check=check,
    )
    return sampler(
        x,
        cond,
        seed=seed,
        xi=xi,
        extras=extras,
        callback=callback,
        progress=progress,
        out=out,
    )


def _at_e(plan: Plan, i: int) -> bool:
    return bool(int(plan.table[i, 0]) & AT_E)


def _parameter_dtype(network: Any) -> torch.dtype | None:
    parameters = network.parameters() if isinstance(network, torch.nn.Module) else ()
    return next((p.dtype for p in parameters if p.dtype.is_floating_point), None)


def _requiring_grad(cond: Any, where: str = "cond") -> list[str]:
    if isinstance(cond, Mapping):
        return [w for k, v in cond.items() for w in _requiring_grad(v, f"{where}[{k!r}]")]
    return [where] if isinstance(cond, torch.Tensor) and cond.requires_grad else []


def _output_problem(output: Any, given: torch.Tensor) -> str | None:
    """What is wrong with a network's output, or None."""
    if not isinstance(output, torch.Tensor):
        hint = ""
        if isinstance(output, tuple | list):
            hint = " Take the tensor out of it: network=lambda *a, **k: net(*a, **k)[0]."
        elif hasattr(output, "sample"):
            hint = " Wrap it: network=lambda *a, **k: net(*a, **k).sample."
        return f"the network returns a tensor; got {type(output).__name__}.{hint}"
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


def _check_out(out: Any, x: torch.Tensor) -> None:
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"sample: out is a tensor like x; got {type(out).__name__}.")
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"sample: out is like x, {tuple(x.shape)} {x.dtype} on {x.device}; got "
            f"{tuple(out.shape)} {out.dtype} on {out.device}."
        )
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError("sample: out has memory for every element; got an expanded tensor.")


def _check_xi(xi: Any, plan: Plan, x: torch.Tensor) -> None:
    if not isinstance(xi, torch.Tensor | list | tuple):
        raise TypeError(f"sample: xi is a tensor, or a list of one a stage; got {xi!r}.")
    if len(xi) != len(plan.stages):
        raise ValueError(f"sample: xi has one entry a stage, {len(plan.stages)}; got {len(xi)}.")
    for i, z in enumerate(xi):
        if not isinstance(z, torch.Tensor):
            raise TypeError(f"sample: xi holds tensors; got {type(z).__name__} as xi[{i}].")
        if z.shape != x.shape or z.dtype != x.dtype or z.device != x.device:
            raise ValueError(
                f"sample: xi is like the state, {tuple(x.shape)} {x.dtype} on {x.device}; got "
                f"xi[{i}] of {tuple(z.shape)} {z.dtype} on {z.device}."
            )


def _bar(steps: Iterable[int]) -> Iterable[int]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise RuntimeError(
            'sample: progress=True needs tqdm. Install it: pip install "fastdiff-engine[cli]".'
        ) from None
    return tqdm(steps, desc="sampling", unit="stage")
