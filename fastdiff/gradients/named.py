# SPDX-License-Identifier: Apache-2.0
"""The tensors that a gradient is for: those that nobody named are refused, never a silent zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..conditioning import PerStage, leaves_of, requiring_grad, where_of


def check_hidden(cond: Any, root: str = "cond") -> None:
    """Raises where a tensor that requires grad stands in a conditioning where no gradient reaches.

    Tensors are found in dicts, lists, tuples and dataclasses, and not inside other objects.
    """
    if cond is None or isinstance(cond, torch.Tensor):
        return
    reached = set()
    for value, path, _ in leaves_of(cond):
        if isinstance(value, torch.Tensor | PerStage):
            reached.add(where_of(path, root))
    hidden = [where for where in requiring_grad(cond, root) if where not in reached]
    if hidden:
        raise ValueError(
            "sample: a gradient reaches tensors in dicts, lists, tuples and dataclasses; got one "
            f"that requires grad inside {', '.join(hidden)}. Move it out of that object, or detach "
            "it."
        )


def check_named(out: torch.Tensor, named: Sequence[torch.Tensor]) -> None:
    """Raises where an output requires grad through a tensor that is not named."""
    leaves = {id(tensor) for tensor in named}
    inner = {(tensor.grad_fn, tensor.output_nr) for tensor in named if tensor.grad_fn is not None}
    waiting, met = [(out.grad_fn, out.output_nr)], set()
    while waiting:
        edge = waiting.pop()
        node = edge[0]
        if node is None or edge in inner or node in met:
            continue
        met.add(node)
        tensor = getattr(node, "variable", None)
        if tensor is not None and id(tensor) not in leaves:
            raise ValueError(
                "sample: the network's output requires grad through a tensor that nobody named, of "
                f"shape {tuple(tensor.shape)}, {tensor.dtype}; its gradient would be lost. Name it "
                "in params= (params=net.parameters()), pass an nn.Module as the network, or detach "
                "it (net.requires_grad_(False))."
            )
        waiting += node.next_functions


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place."""
    return 0 if tensor.is_inference() else tensor._version


def check_versions(named: Sequence[torch.Tensor], versions: Sequence[int]) -> None:
    """Raises where a tensor was written to since its version was noted."""
    for tensor, version in zip(named, versions, strict=True):
        if version_of(tensor) != version:
            raise RuntimeError(
                "sample: a tensor that the gradient needs was changed in place between the run "
                f"and backward(): one of shape {tuple(tensor.shape)} is at version "
                f"{tensor._version}; expected {version}. Call backward() before the step."
            )
