# SPDX-License-Identifier: Apache-2.0
"""The tensors that a network reads: whether they still lie where a capture found them.

A captured graph reads the addresses that stood when it was recorded. `Weights` holds the memory at
those addresses, so that a replay never reads memory that belongs to somebody else, and tells by
`moved` whether the network still reads there. Because the memory is held, the question may be asked
after a launch, while the device works; what a replay of moved weights gave is then thrown away.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

_DEPTH = 4  # objects that are followed from a network, or from one of its modules, to its tensors
_OPAQUE = (str, bytes, bool, int, float, complex, type, types.ModuleType, np.ndarray)
_HELD = (torch.Tensor, torch.nn.Module)  # what is looked for
_LEADS = ("__self__", "__wrapped__", "__defaults__", "__kwdefaults__")
_REGISTERED = ("_parameters", "_buffers", "_modules")


class Weights:
    """Where a network's tensors lie, to see whether they still lie there.

    Tensors and modules are found in modules (parameters, buffers, submodules, and plain attributes,
    hooks among them), closures, defaults of arguments, bound methods, partial applications, the
    globals that a function names, attributes of plain objects, lists, tuples, sets, deques and
    dicts. `_DEPTH` objects are followed from the network, and as many from each of its modules.
    Changed Python values, such as a scale or an added hook, are not seen.

    Args:
        network: What is captured.
        device: Where. Kernels there take the number of a 0-dim tensor on the host as an argument,
            which a graph keeps: such a tensor has moved where its number has changed.
    """

    def __init__(self, network: Any, device: torch.device) -> None:
        self._device = device
        self._numbers: list[tuple[torch.Tensor, Any]] = []  # of 0-dim tensors elsewhere
        # what leads to a tensor, or a module's mode, and how to look up what stands in its place
        self._looks: list[Callable[[Any], Any]] = []
        self._names: list[Any] = []
        self._values: list[Any] = []
        self._puts: dict[int, Callable[[Any], None]] = {}  # of those that a network may make anew
        self._tensors: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self._memory: list[torch.UntypedStorage] = []
        self._followed: dict[int, int] = {}  # how far, by id
        self._leads: dict[int, bool] = {}  # whether to a tensor
        self._follow(network, _DEPTH)
        self._followed.clear()  # an id says something only while its object lives
        self._leads.clear()
        self._versions = self._now()

    # -- how tensors are found -------------------------------------------------------------------

    def _follow(self, value: Any, depth: int) -> bool:
        """Finds what a value leads to, and says whether that is anything."""
        if isinstance(value, _OPAQUE):
            return False
        key = id(value)
        known = key in self._followed
        if known and self._followed[key] >= depth:
            return self._leads.get(key, False)
        self._followed[key] = depth
        if isinstance(value, _HELD):
            self._leads[key] = True
            if not known and isinstance(value, torch.nn.Module):
                self._add_module(value)
            elif not known and isinstance(value, torch.Tensor):
                self._add_tensor(value)
            return True
        found = depth > 0 and self._look_inside(value, depth)
        self._leads[key] = found or self._leads.get(key, False)
        return self._leads[key]

    def _look_inside(self, value: Any, depth: int) -> bool:
        if isinstance(value, dict):
            return self._add_items(value.get, value.__setitem__, value.items(), depth)
        if isinstance(value, list | deque):
            return self._add_items(value.__getitem__, value.__setitem__, enumerate(value), depth)
        if isinstance(value, tuple | set | frozenset):
            found = [self._follow(item, depth - 1) for item in value]
            return any(found)
        return self._add_object(value, depth)

    def _add_items(
        self,
        look: Callable[[Any], Any],
        put: Callable[[Any, Any], None],
        items: Iterable[tuple[Any, Any]],
        depth: int,
    ) -> bool:
        """Watches the places of one holder, as far as they lead to tensors."""
        found = False
        for name, value in items:
            if self._follow(value, depth - 1):
                self._puts[len(self._values)] = functools.partial(put, name)
                self._watch(look, name, value)
                found = True
        return found

    def _watch(self, look: Callable[[Any], Any], name: Any, value: Any) -> None:
        self._looks.append(look)
        self._names.append(name)
        self._values.append(value)

    def _add_tensor(self, tensor: torch.Tensor) -> None:
        address = _address(tensor)
        if address:
            self._tensors.append(tensor)
            self._addresses.append(address)
            self._memory.append(tensor.untyped_storage())
            if tensor.ndim == 0 and tensor.device != self._device and tensor.device.type == "cpu":
                self._numbers.append((tensor, _number(tensor)))
        if hasattr(tensor, "__tensor_flatten__"):  # a tensor made of others
            self._follow(tensor.__dict__, _DEPTH)

    def _add_module(self, module: torch.nn.Module) -> None:
        own = module.__dict__
        self._watch(own.get, "training", own.get("training"))
        for registered in _REGISTERED:
            holder = getattr(module, registered)
            look = holder.get if isinstance(holder, dict) else holder.__getitem__  # of a script
            for name, value in holder.items():
                self._watch(look, name, value)
                self._follow(value, _DEPTH)
        plain = [(name, value) for name, value in own.items() if name not in _REGISTERED]
        self._add_items(own.get, own.__setitem__, plain, _DEPTH)

    def _add_object(self, value: Any, depth: int) -> bool:
        within = [getattr(value, name, None) for name in _LEADS]
        if isinstance(value, functools.partial):
            within += [value.func, *value.args, *value.keywords.values()]
        found = [self._follow(item, depth - 1) for item in within]
        for cell in getattr(value, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # not filled yet
                items = [("cell_contents", cell.cell_contents)]
                put = functools.partial(setattr, cell)
                found.append(self._add_items(cell.__getattribute__, put, items, depth))
        named = getattr(getattr(value, "__code__", None), "co_names", ())
        world = getattr(value, "__globals__", {})
        items = [(name, world[name]) for name in named if isinstance(world.get(name), _HELD)]
        if items:
            found.append(self._add_items(world.get, world.__setitem__, items, depth))
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            found.append(self._add_items(own.get, own.__setitem__, own.items(), depth))
        return any(found)

    # -- whether they lie there still ------------------------------------------------------------

    def moved(self) -> bool:
        """Whether a tensor or a submodule was replaced, train() or eval() called, or the number of
        a 0-dim tensor on the host changed."""
        try:
            looks, names = self._looks, self._names
            found = map(operator.call, looks, names)
            if not all(map(operator.is_, found, self._values)):
                return True
            if list(map(torch.Tensor.data_ptr, self._tensors)) != self._addresses:
                return True
            return any(_number(tensor) != number for tensor, number in self._numbers)
        except (LookupError, RuntimeError, ValueError):  # a list, a storage or a cell is empty
            return True

    def written(self) -> bool:
        """Whether the network writes to the tensors that it keeps: asked after it was called.

        Where that cannot be known (inference tensors count no writes) it does.
        """
        return self._now() != self._versions or None in self._versions

    def remade(self) -> list[int]:
        """Places outside the registered ones where something else stands by now.

        Empty too where one of them holds what `poisoned` cannot make, so that the network counts as
        one that has moved its tensors.
        """
        found = [i for i in self._puts if self._standing(i) is not self._values[i]]
        return found if all(_can_poison(self._standing(i)) for i in found) else []

    @contextlib.contextmanager
    def poisoned(self, places: list[int]) -> Iterator[None]:
        """A scope that begins with NaN for the tensors in places: who reads them shows it.

        What stood there is left untouched, and stands there again afterwards.
        """
        standing = [self._standing(i) for i in places]
        try:
            for i, value in zip(places, standing, strict=True):
                self._puts[i](_poisoned(value))
            yield
        finally:
            for i, value in zip(places, standing, strict=True):
                self._puts[i](value)

    def forget(self, places: list[int]) -> None:
        """No longer looks at places whose tensors the network makes anew in each call."""
        gone = {id(self._values[i]) for i in places}
        keep = [i for i in range(len(self._values)) if i not in places]
        self._looks = [self._looks[i] for i in keep]
        self._names = [self._names[i] for i in keep]
        self._values = [self._values[i] for i in keep]
        self._puts = {new: self._puts[i] for new, i in enumerate(keep) if i in self._puts}
        gone -= set(map(id, self._values))
        still = [i for i, tensor in enumerate(self._tensors) if id(tensor) not in gone]
        self._tensors = [self._tensors[i] for i in still]
        self._addresses = [self._addresses[i] for i in still]
        self._memory = [self._memory[i] for i in still]
        self._versions = [self._versions[i] for i in still]
        self._numbers = [pair for pair in self._numbers if id(pair[0]) not in gone]

    def _standing(self, i: int) -> Any:
        with contextlib.suppress(LookupError, ValueError):
            return self._looks[i](self._names[i])
        return None

    def _now(self) -> list[int | None]:
        return [None if tensor.is_inference() else tensor._version for tensor in self._tensors]


def _can_poison(value: Any) -> bool:
    leaves = tree_leaves(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    others = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
    return (
        bool(tensors)
        and all(tensor.dtype.is_floating_point for tensor in tensors)
        and all(leaf is None or isinstance(leaf, _OPAQUE) for leaf in others)
    )


def _poisoned(value: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda t: torch.full_like(t.detach(), float("nan")), value)


def _number(tensor: torch.Tensor) -> bytes:
    """The bits of a 0-dim tensor on the host, by which NaN equals itself."""
    return tensor.detach().reshape(1).view(torch.uint8).numpy().tobytes()


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a lazy or fake tensor has none
        return 0
