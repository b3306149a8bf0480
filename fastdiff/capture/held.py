# SPDX-License-Identifier: Apache-2.0
"""Conditioning in fixed memory: a run reads it there, and the caller writes it there."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from ..conditioning import Path, PerStage, leaves_of, rebuild, walk
from ..engine.loops import watch
from ..guidance import Guidance

Tensors = list[torch.Tensor]
Fixed = list[tuple[Any, str, Any]]


@dataclass(frozen=True)
class _Leaf:
    """A tensor of the conditioning.

    Attributes:
        held: What the network reads, that of all branches.
        parts: The part of each branch; empty where the branches are handed the whole tensor.
    """

    held: torch.Tensor
    parts: tuple[torch.Tensor, ...]


class HeldConditioning:
    """Conditioning in fixed memory.

    The branches' tensors are joined into one. The caller writes the part that holds the samples'
    own values. Parts that repeat it are copied from it when a run begins; parts that the guidance
    gives are filled from the guidance, again whenever that changes.

    Args:
        guidance: Joins the conditioning of its branches.
        cond: The conditioning of the samples, whose values stand here at first.
        batch: Samples B.

    Attributes:
        cond: What the network is given. Containers are copies: what their owner does to his own
            afterwards is not seen.
        given: What the caller writes to. Dicts are read-only and lists are tuples, so that a tensor
            cannot be put in another's place by mistake.
        tensors: The memory.

    Raises:
        NotImplementedError: The guidance makes another structure of a conditioning, or computes
            with it.
    """

    def __init__(self, guidance: Guidance, cond: Any, batch: int) -> None:
        self._batch, self._branches, self._guidance = batch, guidance.branches, guidance
        joined = guidance.conditions(cond, batch)
        places = [(path, whole) for _, path, whole in leaves_of(cond)]
        if places != [(path, whole) for _, path, whole in leaves_of(joined)]:
            raise _computed(guidance)
        with torch.inference_mode(False):
            self._leaves = [self._leaf(*found) for found in leaves_of(joined) if _holds(found[0])]
        self.tensors: Tensors = [leaf.held for leaf in self._leaves]
        self._follows = self._following(guidance, cond)
        self._owned = [max((i for i, own in enumerate(p) if own), default=0) for p in self._follows]
        self.views: Tensors = [
            leaf.parts[own] if leaf.parts else leaf.held
            for leaf, own in zip(self._leaves, self._owned, strict=True)
        ]
        self.cond = _copied(rebuild(joined, iter(self.tensors)), None)
        self._fixed: Fixed = []
        self.given = _copied(rebuild(cond, iter(self.views)), self._fixed)
        self._like = self._viewed(cond)
        self._marks = _marks(guidance)

    def _leaf(self, value: Any, path: Path, whole: bool) -> _Leaf:
        staged = isinstance(value, PerStage)
        tensor = value.values if isinstance(value, PerStage) else value
        held = tensor.detach().clone(memory_format=torch.contiguous_format)
        if whole:
            return _Leaf(held, ())
        if self._branches == 1:
            return _Leaf(held, (held,))
        if held.shape[int(staged)] != self._branches * self._batch:
            raise _computed(self._guidance)
        each = range(0, self._branches * self._batch, self._batch)
        return _Leaf(held, tuple(held.narrow(int(staged), at, self._batch) for at in each))

    # -- what each part holds --------------------------------------------------------------------

    @property
    def form(self) -> tuple[tuple[bool, ...], ...]:
        """Whether each part of each tensor repeats the samples' own values."""
        return self._follows

    def _following(self, guidance: Guidance, cond: Any) -> tuple[tuple[bool, ...], ...]:
        """See `form`; found by joining two conditionings, of zeros and of ones."""
        if self._branches == 1:
            return tuple((True,) * len(leaf.parts) for leaf in self._leaves)
        low, high = (self._parts_of(guidance, _filled(cond, value)) for value in (0, 1))
        follows = tuple(
            tuple(_follows(*pair, guidance) for pair in zip(*pairs, strict=True))
            for pairs in zip(low, high, strict=True)
        )
        if any(parts and not any(parts) for parts in follows):
            raise _computed(guidance)
        return follows

    def _parts_of(self, guidance: Guidance, cond: Any) -> list[tuple[torch.Tensor, ...]]:
        """The parts of each tensor, joined from a conditioning."""
        joined = guidance.conditions(cond, self._batch)
        found = [self._leaf(*found) for found in leaves_of(joined) if _holds(found[0])]
        shapes = [leaf.held.shape for leaf in self._leaves]
        if [leaf.held.shape for leaf in found] != shapes:
            raise _computed(guidance)
        return [leaf.parts for leaf in found]

    def _viewed(self, cond: Any) -> Any:
        """The conditioning of the samples as it stands here.

        What is handed whole stays the caller's tensor, by which a guidance may know it.
        """
        views = iter(self.views)

        def visit(value: Any, path: Path, whole: bool) -> Any:
            if not _holds(value):
                return value
            view = next(views)
            if whole:
                return value
            return PerStage(view) if isinstance(value, PerStage) else view

        return walk(cond, visit)

    # -- before a run ----------------------------------------------------------------------------

    def share(self) -> None:
        """Copies the samples' values to the branches that share them; a part of every run."""
        for leaf, follows, view in zip(self._leaves, self._follows, self.views, strict=True):
            for part, repeats in zip(leaf.parts, follows, strict=True):
                if repeats and part is not view:
                    part.copy_(view)

    def refresh(self, guidance: Guidance) -> None:
        """Fills what a guidance gives, where that changed since the last run.

        Raises:
            NotImplementedError: The guidance computes with the samples' conditioning.
            TypeError, ValueError: It cannot join it with its own.
        """
        if self._branches == 1:
            return
        marks = _marks(guidance)
        if guidance is self._guidance and _same(marks, self._marks):
            return
        follows = self._following(guidance, self._like)
        if any(p and not p[own] for p, own in zip(follows, self._owned, strict=True)):
            raise _computed(guidance)
        joined = self._parts_of(guidance, self._like)
        for leaf, values, own in zip(self._leaves, joined, follows, strict=True):
            for part, value, repeats in zip(leaf.parts, values, own, strict=True):
                if not repeats:
                    part.copy_(value)
        self._follows, self._guidance, self._marks = follows, guidance, marks

    def replaced(self) -> bool:
        """Whether something was put in another's place in an object that was handed out."""
        return any(getattr(owner, name, None) is not value for owner, name, value in self._fixed)


def _holds(value: Any) -> bool:
    return isinstance(value, torch.Tensor | PerStage)


def _computed(guidance: Guidance) -> NotImplementedError:
    return NotImplementedError(
        "sample: buffers hold the conditioning of branches that repeat the samples' own, or have "
        f"one of the guidance's; got {type(guidance).__name__}, which computes with it. Call the "
        "sampler itself."
    )


def _filled(cond: Any, value: int) -> Any:
    """A conditioning with another value in every tensor that has one entry a sample."""

    def visit(leaf: Any, path: Path, whole: bool) -> Any:
        if whole or not _holds(leaf):
            return leaf
        if isinstance(leaf, PerStage):
            return PerStage(torch.full_like(leaf.values, value))
        return torch.full_like(leaf, value)

    return walk(cond, visit)


def _follows(low: torch.Tensor, high: torch.Tensor, guidance: Guidance) -> bool:
    """Whether a part holds the samples' values, from what it is for zeros and for ones."""
    if bool((low == 0).all()) and bool((high == 1).all()):
        return True
    if bool(((low == high) | ((low != low) & (high != high))).all()):  # NaN is the same as itself
        return False
    raise _computed(guidance)


Marks = list[tuple[Path, Any, tuple[int, int]]]


def _marks(guidance: Guidance) -> Marks:
    """What shows that the conditioning a guidance gives has changed."""
    return [
        (path, value, watch(tensor) if isinstance(tensor, torch.Tensor) else (0, 0))
        for value, path, _ in leaves_of(guidance.conditions_given())
        for tensor in [value.values if isinstance(value, PerStage) else value]
    ]


def _same(marks: Marks, others: Marks) -> bool:
    """Whether two lists tell of one state. A tensor without a version may always have changed."""
    return len(marks) == len(others) and all(
        a[1] is b[1] and a[0] == b[0] and a[2] == b[2] and not _unversioned(a[1])
        for a, b in zip(marks, others, strict=True)
    )


def _unversioned(value: Any) -> bool:
    tensor = value.values if isinstance(value, PerStage) else value
    return isinstance(tensor, torch.Tensor) and tensor.is_inference()


def _copied(value: Any, fixed: Fixed | None) -> Any:
    """A conditioning with containers of its own.

    Args:
        value: The conditioning.
        fixed: None keeps the kinds of containers. A list makes dicts read-only and lists tuples,
            and takes the attributes of objects, which can be neither.
    """
    inner: Callable[[Any], Any] = lambda held: _copied(held, fixed)  # noqa: E731
    if _holds(value):
        return value
    if isinstance(value, Mapping):
        own = {key: inner(held) for key, held in value.items()}
        return own if fixed is None else MappingProxyType(own)
    if isinstance(value, list | tuple):
        if hasattr(value, "_fields"):
            return type(value)(*map(inner, value))
        items = tuple(map(inner, value))
        return items if fixed is not None else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        named = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        for name in dict.fromkeys([*named, *getattr(value, "__dict__", ())]):
            held = inner(getattr(value, name))
            object.__setattr__(made, name, held)
            if fixed is not None:
                fixed.append((made, name, held))
        return made
    return value
