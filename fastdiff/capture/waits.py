# SPDX-License-Identifier: Apache-2.0
"""Operations that wait for the device, found in one thread while others do as they like.

PyTorch's own search (`torch.cuda.set_sync_debug_mode`) is the process's. `waits` sees what its own
thread dispatches, autograd's threads on its behalf included. It does not see what a compiled kernel
or a library does by itself: that breaks the recording instead.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves

# A mode that cannot let operators of higher order (torch.cond, flex_attention) through breaks them.
AVAILABLE = hasattr(TorchDispatchMode, "supports_higher_order_operators")

_COPIES = ("copy_", "copy", "_to_copy", "_foreach_copy_")
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
# These wait without PyTorch's tags for results and shapes that depend on data.
_UNTAGGED = ("equal", "allclose", "_linalg_check_errors")
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_MASKS = (torch.bool, torch.uint8)


def waits(device: str) -> Waits:
    """A scope of this thread; see `Waits`."""
    # where a compiled function leaves its graph, the compiler would take up the scope's own code
    kind = _uncompiled() if "torch._dynamo" in sys.modules else Waits
    return kind(device)


class Waits(TorchDispatchMode):
    """A scope in which an operation of this thread that waits for a kind of device raises.

    Args:
        device: The type of device. On "cpu", where tests stand in for a device, nothing is copied
            from or to it.
    """

    supports_higher_order_operators = True

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would import all of the compiler

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    # PyTorch's own scope sets flags of the process besides, by which other threads stop compiling

    def __enter__(self) -> Waits:
        _push_mode(self)
        return self

    def __exit__(self, *_: object) -> None:
        _pop_mode()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        if isinstance(function, torch._ops.OpOverload):
            if torch.is_inference_mode_enabled():  # there it arrives before what it is made of
                with self:
                    result = function.decompose(*arguments, **keywords)
                if result is not NotImplemented:
                    return result
            self._check(function, arguments, keywords)
        return function(*arguments, **keywords)

    def _check(self, function: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> None:
        name = function.overloadpacket.__name__
        leaves = tree_leaves((arguments, keywords))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        here = [tensor for tensor in tensors if tensor.device.type == self._device]
        if name in _COPIES:
            problem = self._copies(name, tensors, arguments, keywords)
        elif not here:
            return
        elif name in _INDEXED:
            problem = self._looks_up(name, arguments)
        elif name == "repeat_interleave":
            problem = keywords.get("output_size") is None
        else:
            problem = name in _UNTAGGED or not _TAGS.isdisjoint(function.tags)
        if problem:
            raise RuntimeError(f"a synchronizing operation, {function}, on {self._device} tensors")

    def _copies(
        self,
        name: str,
        tensors: Sequence[torch.Tensor],
        arguments: Sequence[Any],
        keywords: dict[str, Any],
    ) -> bool:
        """Whether data go between the host and the device by other than an asynchronous copy."""
        kinds = {tensor.device.type for tensor in tensors}
        target = keywords.get("device")
        if target is not None:
            kinds.add(torch.device(target).type)
        if self._device == "cpu" or kinds != {"cpu", self._device}:
            return False
        asynchronous = keywords.get("non_blocking", False)
        if name != "_to_copy" and len(arguments) > 2:
            asynchronous = arguments[2]
        hosts = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        pinned = all(tensor.is_pinned() for tensor in hosts)
        return not (asynchronous and hosts and pinned)

    def _looks_up(self, name: str, arguments: Sequence[Any]) -> bool:
        """Whether an index is counted on the device, or copied there."""
        indices = [i for i in arguments[1] if i is not None]
        if self._device != "cpu" and any(i.device.type == "cpu" and i.ndim > 0 for i in indices):
            return True
        masks = [i for i in indices if i.dtype in _MASKS]
        if len(masks) == len(indices) == 1 and "put" in name:
            accumulates = len(arguments) > 3 and arguments[3]
            return arguments[2].numel() != 1 or accumulates  # one number is filled in by the mask
        return bool(masks)


@functools.cache
def _uncompiled() -> type[Waits]:
    disable: Callable[[Any], Any] = torch._dynamo.disable
    members = {"__torch_dispatch__": disable(Waits.__torch_dispatch__)}
    return type("Waits", (Waits,), members)
