# SPDX-License-Identifier: Apache-2.0
"""Hooks on tensors: they see the gradient of a whole run once, and not the part of each stage."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch

_here = threading.local()  # .depth: products of stages under way in this thread
_lock = threading.Lock()
_users: dict[int, int] = {}  # by the identity of a tensor's hooks: products that mute them
_passes: set[int] = set()  # autograd's numbers of the backward passes that take those products


class _Muted:
    """A hook that does nothing in the product of a stage.

    Other backward passes may be delivering the gradient of a whole run to the same tensor, in other
    threads. A pass is told by its number, since autograd's own threads run it where a tensor lies
    on a device, and by its thread where it is one that a pass of ours has called.
    """

    def __init__(self, hook: Callable[[torch.Tensor], Any]) -> None:
        self.hook = hook

    def __call__(self, gradient: torch.Tensor) -> Any:
        ours = getattr(_here, "depth", 0) or torch._C._current_graph_task_id() in _passes
        return None if ours else self.hook(gradient)


def _grad(out: torch.Tensor, inputs: Sequence[torch.Tensor], vector: torch.Tensor) -> Any:
    return torch.autograd.grad(out, inputs, vector, allow_unused=True)


def product(
    out: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    vector: torch.Tensor,
    tensors: Sequence[torch.Tensor],
) -> Sequence[torch.Tensor | None]:
    """A vector-Jacobian product in which the hooks of some tensors do not fire.

    Args:
        out: What is differentiated.
        inputs: What it is differentiated with respect to.
        vector: Like `out`.
        tensors: Those whose hooks are muted.

    Returns:
        The products, None where `out` does not depend on an input.
    """
    hooks: list[MutableMapping[int, Any]]
    hooks = [own for tensor in tensors if (own := tensor._backward_hooks)]
    if not hooks:
        found: Sequence[torch.Tensor | None] = _grad(out, inputs, vector)
        return found
    with torch.enable_grad():
        root = out.view_as(out)  # a node of this pass alone, which autograd runs first
    number: list[int] = []

    def begin(gradient: torch.Tensor) -> None:
        number.append(torch._C._current_graph_task_id())
        _passes.add(number[0])

    root.register_hook(begin)
    with _mute(hooks):
        try:
            found = _grad(root, inputs, vector)
        finally:
            _passes.difference_update(number)
    return found


@contextlib.contextmanager
def _mute(hooks: Sequence[MutableMapping[int, Any]]) -> Iterator[None]:
    """A scope in which hooks are wrapped, and silent in this thread."""
    with _lock:
        for own in hooks:
            _users[id(own)] = _users.get(id(own), 0) + 1
            for key, hook in list(own.items()):
                if not isinstance(hook, _Muted):
                    own[key] = _Muted(hook)
    _here.depth = getattr(_here, "depth", 0) + 1
    try:
        yield
    finally:
        _here.depth -= 1
        with _lock:
            for own in hooks:
                _users[id(own)] -= 1
                if _users[id(own)]:
                    continue
                del _users[id(own)]
                for key, hook in list(own.items()):
                    if isinstance(hook, _Muted):
                        own[key] = hook.hook
