# SPDX-License-Identifier: Apache-2.0
"""What a forward run keeps for its backward pass."""

from __future__ import annotations

from typing import Protocol

import torch

from ..engine.run import Run
from ..plans import Plan, Stage
from .options import AdjointDEIS, Gradient


class Keeper(Protocol):
    """Looks at a run before each of its stages."""

    def before(self, i: int, run: Run, stage: Stage) -> None:
        """Looks at the run before stage i."""
        ...

    def kept(self, run: Run) -> list[torch.Tensor]:
        """What to keep of a run that has ended."""
        ...


def keeper_of(gradient: Gradient, plan: Plan) -> Keeper:
    """The keeper of what a gradient reads."""
    if isinstance(gradient, AdjointDEIS):
        return End() if gradient.states == "resolve" else States(plan)
    if gradient.undo:
        return End()
    return Inputs() if gradient.checkpoint is None else Checkpoints(gradient.checkpoint)


class Inputs:
    """What the network is given at each stage, and the evaluation point where h is limited.

    Attributes:
        found: The copies, in the order of the stages.
    """

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def before(self, i: int, run: Run, stage: Stage) -> None:
        if stage.evaluate:
            self.found.append(run.inputs[i].clone())
            if stage.clip is not None or stage.threshold is not None:
                self.found.append(run.point(i).clone())

    def kept(self, run: Run) -> list[torch.Tensor]:
        return self.found


class Checkpoints:
    """The registers at every k-th stage."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._found: list[torch.Tensor] = []

    def before(self, i: int, run: Run, stage: Stage) -> None:
        if i % self._every == 0:
            self._found += [tensor.clone() for tensor in run.live()]

    def kept(self, run: Run) -> list[torch.Tensor]:
        return self._found


class End:
    """The end of a run alone: x, and e where a plan has one."""

    def before(self, i: int, run: Run, stage: Stage) -> None:
        """Keeps nothing."""

    def kept(self, run: Run) -> list[torch.Tensor]:
        registers = run.registers
        ends = [registers.x] if registers.e is None else [registers.x, registers.e]
        return [tensor.clone() for tensor in ends]


class States:
    """States at the plan's times.

    Where several evaluations stand at one time, the last one has the state that the run went on
    from; the others are predictions of it.

    Attributes:
        times: Of the states, decreasing, each once; the end of the run is the last.
    """

    def __init__(self, plan: Plan) -> None:
        accepted = set(plan.times)
        recorded = {s.t for s in plan.stages if s.evaluate and s.t in accepted}
        self.times = sorted({*recorded, plan.times[-1]}, reverse=True)
        self._wanted = set(self.times)
        self._found: dict[float, torch.Tensor] = {}

    def before(self, i: int, run: Run, stage: Stage) -> None:
        if stage.evaluate and stage.t in self._wanted:
            self._found[stage.t] = run.point(i).clone()

    def kept(self, run: Run) -> list[torch.Tensor]:
        self._found[self.times[-1]] = run.registers.x.clone()
        return [self._found[t] for t in self.times]
