# SPDX-License-Identifier: Apache-2.0
"""A job: a network and the plan that it is sampled by, as they stand when a call begins."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .. import backends
from ..guidance import UNGUIDED, Guidance
from ..plans import Plan
from ..schedules import prediction_name
from .run import Kind, Spec, spec_of

_SPECS = 64  # shapes whose specs are remembered


@dataclass(frozen=True, eq=False)
class Job:
    """What is sampled, without what a call brings. A job never changes.

    Attributes:
        network: `network(x, t, **cond)`.
        plan: The plan.
        guidance: How the outputs of the branches become one.
        backend: A backend's name; None: the fastest that can serve.
        dtype: Dtype of the network's input; None: that of its first parameter, or x's.
        fresh_inputs: Whether the network is given memory of its own at every evaluation.
    """

    network: Any
    plan: Plan
    guidance: Guidance
    backend: str | None = None
    dtype: torch.dtype | None = None
    fresh_inputs: bool = False
    _kinds: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    _specs: dict[Any, Spec] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        predicts = getattr(self.network, "prediction", None)
        if isinstance(predicts, str) and prediction_name(predicts) != self.plan.prediction:
            raise ValueError(
                f"sample: the network says that it predicts {predicts!r}, and the plan was made "
                f"for {self.plan.prediction!r}. Make it with prediction={predicts!r}."
            )

    @property
    def plain(self) -> bool:
        """Whether every stage evaluates."""
        return self.plan.nfe == len(self.plan.stages)

    def input_dtype(self, x: torch.Tensor) -> torch.dtype:
        """Dtype of the network's input for a state like x."""
        return self.dtype or network_dtype(self.network) or x.dtype

    def kind(self, x: torch.Tensor) -> Kind:
        """Dtypes of the state and the input, the device, and the backend that serves x."""
        large = x.numel() >= backends.LARGE
        key = (x.dtype, x.device, self.input_dtype(x), large)
        found = self._kinds.get(key)
        if found is None:
            state, network = state_dtype(x), key[2]
            layout = replace(self.plan.layout, branches=self.guidance.branches)
            serving = backends.choose(
                *(self.backend, state, network, x.device, layout),
                noisy=any(stage.noise for stage in self.plan.stages),
                elements=x.numel(),
            )
            found = self._kinds[key] = (state, network, x.device, serving.name)
        return found

    def spec(
        self,
        x: torch.Tensor,
        offset: int = 0,
        one_bank: bool = False,
        batch: int | None = None,
    ) -> Spec:
        """The spec of a run from x.

        Args:
            x: The state.
            offset: See `Spec.offset`.
            one_bank: Whether the bank holds one sample, which all read.
            batch: Samples of the run, where they are not as many as those of x.
        """
        shape = x.shape if batch is None else torch.Size((batch, *x.shape[1:]))
        key = (shape, x.dtype, x.device, self.input_dtype(x), offset, one_bank)
        found = self._specs.get(key)
        if found is None:
            spec = spec_of(self.plan, self.guidance, shape, self.kind(x))
            if len(self._specs) >= _SPECS:
                self._specs.clear()
            in_bank = 1 if one_bank else spec.bank_batch
            found = self._specs[key] = replace(spec, offset=offset, bank_batch=in_bank)
        return found


def job_of(
    network: Any,
    plan: Any,
    guidance: Any,
    backend: str | None,
    dtype: torch.dtype | None,
    fresh_inputs: bool,
) -> Job:
    """A job of checked parts.

    Raises:
        TypeError: The plan is no plan, or the guidance no guidance.
        ValueError: The network says that it predicts something else than the plan was made for.
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"sample: plan is a fastdiff.Plan; got {type(plan).__name__}. Make one with "
            "fastdiff.plan(schedule, solver, steps)."
        )
    if guidance is not None and not isinstance(guidance, Guidance):
        raise TypeError(f"sample: guidance is a fastdiff.CFG or None; got {guidance!r}.")
    return Job(network, plan, guidance or UNGUIDED, backend, dtype, fresh_inputs)


def state_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype of the registers for a state like x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def network_dtype(network: Any) -> torch.dtype | None:
    """Dtype of a module's first floating parameter; None where it has none."""
    parameters = network.parameters() if isinstance(network, torch.nn.Module) else ()
    return next((p.dtype for p in parameters if p.dtype.is_floating_point), None)
