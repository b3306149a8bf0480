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
_users: dict[int, int] = {}  # by the identity of a tensor's hooks: threads that muted them


class _Muted:
    """A hook that does nothing in a thread where the product of a stage is under way.

    Hooks are muted a thread at a time: another thread may be delivering the gradient of a whole run
    to the same tensor.
    """

    def __init__(self, hook: Callable[[torch.Tensor], Any]) -> None:
        self.hook = hook

    def __call__(self, gradient: torch.Tensor) -> Any:
        return None if getattr(_here, "depth", 0) else self.hook(gradient)


@contextlib.contextmanager
def muted(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """A scope in which the hooks of these tensors do not fire in this thread."""
    each = [tensor._backward_hooks for tensor in tensors]
    hooks: list[MutableMapping[int, Any]] = [own for own in each if own]
    if not hooks:
        yield
        return
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
