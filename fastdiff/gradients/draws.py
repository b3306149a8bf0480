# SPDX-License-Identifier: Apache-2.0
"""Random numbers that a network draws (dropout): the backward pass draws the same ones again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..engine.streams import capture_of

States = tuple[torch.Tensor, ...]


class _Drawless(TorchDispatchMode):
    """A scope in which no operation may draw.

    Args:
        i: The stage.
    """

    def __init__(self, i: int) -> None:
        super().__init__()
        self._i = i

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags:
            arguments = func._schema.arguments
            given = {each.name: each.default_value for each in arguments}
            given |= {each.name: value for each, value in zip(arguments, args, strict=False)}
            if (given | named).get("dropout_p") != 0.0:  # attention draws for its dropout alone
                raise NotImplementedError(
                    "sample: a gradient inside a graph that you record cannot draw a network's "
                    f"random numbers again; got {func} at stage {self._i}. Use eval(), or record "
                    "the run without its backward pass."
                )
        return func(*args, **named)


class Draws:
    """States of the generators around each stage whose network drew from them.

    Args:
        device: Where the network runs.
        watches: Whether stages are looked at while they run.

    Attributes:
        stages: Of each stage that drew, the states before and after.
    """

    def __init__(self, device: torch.device, watches: bool) -> None:
        self._device, self._watches = device, watches
        self.stages: dict[int, tuple[States, States]] = {}

    def close(self) -> None:
        """Looks at no further stage."""
        self._watches = False

    @contextlib.contextmanager
    def noted(self, i: int) -> Iterator[None]:
        """A scope in which stage i runs for the first time."""
        if not self._watches:
            yield
            return
        if capture_of(self._device) is not None:  # where the generator may not be looked at
            with _Drawless(i):
                yield
            return
        before = self._states()
        yield
        after = self._states()
        if not _same(before, after):
            self.stages[i] = before, after

    @contextlib.contextmanager
    def repeated(self, i: int) -> Iterator[None]:
        """A scope in which stage i draws again what it drew; others draw as they like.

        Raises:
            RuntimeError: It drew another number of them: the numbers are not the same ones then.
        """
        noted = self.stages.get(i)
        if noted is None:
            yield
            return
        before = self._states()
        try:
            self._set(noted[0])
            yield
            now = self._states()
        finally:
            self._set(before)
        if not (_same(now, noted[1]) or _same(now, noted[0])):
            raise RuntimeError(
                f"sample: the network drew other random numbers at stage {i} in the backward pass "
                "than in the run; another thread that draws from the same generator at the same "
                "time does that. Differentiate networks that draw (dropout) one at a time, or use "
                "eval()."
            )

    def _states(self) -> States:
        """The generators that a network on this device may draw from."""
        states = (torch.get_rng_state(),)
        if self._device.type == "cuda":
            return (*states, torch.cuda.get_rng_state(self._device))
        return states

    def _set(self, states: Sequence[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)


def _same(a: States, b: States) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
