# SPDX-License-Identifier: Apache-2.0
"""The tensors that a network reads, which are looked at before each replay."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_DEPTH = 4  # objects that are followed from a network to its tensors
_OPAQUE = (str, bytes, bool, int, float, complex, type, types.ModuleType, np.ndarray)


class Weights:
    """Where a network's tensors lie, to see before a replay that they still lie there.

    Tensors are found in modules, closures, bound methods, partial applications, the globals that a
    function names, attributes of plain objects, lists, tuples and dicts. Changed Python values,
    such as a scale or an added hook, are not seen.
    """

    def __init__(self, network: Any) -> None:
        self._held: list[tuple[Mapping[Any, Any], Any, Any]] = []
        self._cells: list[tuple[Any, Any]] = []
        self._places: list[tuple[torch.Tensor, int]] = []
        self._training: list[tuple[torch.nn.Module, bool]] = []
        self._seen: set[int] = set()
        self._follow(network, _DEPTH)

    def _follow(self, value: Any, depth: int) -> None:
        if isinstance(value, _OPAQUE) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, torch.Tensor):
            self._places.append((value, _address(value)))
        elif isinstance(value, torch.nn.Module):
            for module in value.modules():
                self._add_module(module)
        elif depth == 0:
            return
        elif isinstance(value, dict):
            self._add_dict(value, depth)
        elif isinstance(value, list | tuple):
            for item in value:
                self._follow(item, depth - 1)
        else:
            self._add_object(value, depth)

    def _add_module(self, module: torch.nn.Module) -> None:
        self._seen.add(id(module))
        self._training.append((module, module.training))
        for holder in (module._parameters, module._buffers, module._modules):
            self._held += [(holder, name, value) for name, value in holder.items()]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                self._places.append((tensor, _address(tensor)))

    def _add_dict(self, holder: dict[Any, Any], depth: int) -> None:
        for name, value in holder.items():
            if isinstance(value, torch.Tensor | torch.nn.Module):
                self._held.append((holder, name, value))
            self._follow(value, depth - 1)

    def _add_object(self, value: Any, depth: int) -> None:
        for name in ("__self__", "__wrapped__"):
            self._follow(getattr(value, name, None), depth - 1)
        if isinstance(value, functools.partial):
            for item in (value.func, *value.args, *value.keywords.values()):
                self._follow(item, depth - 1)
        for cell in getattr(value, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # not filled yet
                content = cell.cell_contents
                if isinstance(content, torch.Tensor | torch.nn.Module):
                    self._cells.append((cell, content))
                self._follow(content, depth - 1)
        named = getattr(getattr(value, "__code__", None), "co_names", ())
        globals_of = getattr(value, "__globals__", {})
        for name in named:
            content = globals_of.get(name)
            if isinstance(content, torch.Tensor | torch.nn.Module):
                self._held.append((globals_of, name, content))
                self._follow(content, depth - 1)
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            self._add_dict(own, depth)

    def moved(self) -> bool:
        """Whether a tensor or a submodule was replaced, or train() or eval() called."""
        return (
            any(_address(tensor) != place for tensor, place in self._places)
            or any(module.training != mode for module, mode in self._training)
            or any(holder.get(name) is not value for holder, name, value in self._held)
            or any(cell.cell_contents is not value for cell, value in self._cells)
        )


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a lazy or fake tensor has none
        return 0
