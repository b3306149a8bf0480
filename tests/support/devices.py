# SPDX-License-Identifier: Apache-2.0
"""Two devices that are not there: tensors that say that they lie on them, and compute on the CPU.

What mixes them raises, as it does on GPUs; copies from one to another are made. PyTorch knows the
type "xla" without having it, so that nothing of a real device is touched.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

KIND = "xla"
FIRST, SECOND = torch.device(KIND, 0), torch.device(KIND, 1)
# What PyTorch does by the type of device, or not at all for tensors that are only made believe.
_INSIDE = (torch.Tensor.data_ptr, torch.Tensor.tolist, torch.Tensor.norm)
_COPIES = ("aten::copy_", "aten::_to_copy")


class Pretended(torch.Tensor):
    """A tensor on a device that is not there, around one on the CPU."""

    @staticmethod
    def __new__(cls, inner, device):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cpu",  # PyTorch guards a device that it believes in
        )

    def __init__(self, inner, device):
        self.inner, self.place = inner, device

    @property
    def device(self):
        return self.place

    @property
    def is_cpu(self):
        return False

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        if function is torch.Tensor.cpu:
            return arguments[0].inner.clone()
        if function in _INSIDE:
            return function(arguments[0].inner)
        return super().__torch_function__(function, types, arguments, keywords or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        return _computed(function, arguments, keywords or {})


class _Data(TorchFunctionMode):
    """Tensors of data, which PyTorch does not make through its dispatcher."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function is not torch.tensor or keywords.get("device") is None:
            return function(*arguments, **keywords)
        made = torch.tensor(*arguments, **{**keywords, "device": "cpu"})
        return made.to(keywords["device"])


class Devices(TorchDispatchMode):
    """A scope in which tensors can be made on the devices.

    Attributes:
        copies: How often a copy went from one kind of device to another, by (from, to).
    """

    def __init__(self):
        super().__init__()
        self.copies, self.data = Counter(), _Data()

    def __enter__(self):
        self.data.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.data.__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function._schema.name in _COPIES:
            target = keywords.get("device") or arguments[0].device
            source = arguments[min(1, len(arguments) - 1)].device
            if target != source:
                self.copies[str(source), str(target)] += 1
        return _computed(function, arguments, keywords)


def _computed(function, arguments, keywords):
    tensors = [t for t in tree_leaves((arguments, keywords)) if isinstance(t, torch.Tensor)]
    where = {t.device for t in tensors if t.ndim or isinstance(t, Pretended)}
    name = function._schema.name
    if len(where) > 1 and name not in _COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device; got {where}.")
    asked = keywords.get("device")
    device = next(iter(where), None) if asked is None else torch.device(asked)
    if device == torch.device(KIND):
        device = FIRST  # the current one
    if name == "aten::copy_":
        device = arguments[0].device
    plain = tree_map(lambda t: t.inner if isinstance(t, Pretended) else t, (arguments, keywords))
    if asked is not None:
        plain[1].update(device=torch.device("cpu"), pin_memory=False)
        if name == "aten::_to_copy":
            plain[1].pop("pin_memory")
    result = function(*plain[0], **plain[1])
    if name.endswith("_") or "out" in keywords:
        return keywords.get("out", arguments[0])
    if device is None or device.type != KIND:
        return result
    return tree_map(lambda t: Pretended(t, device) if isinstance(t, torch.Tensor) else t, result)


def here(tensor):
    """The values of a tensor, on the CPU."""
    return tensor.inner if isinstance(tensor, Pretended) else tensor
