# SPDX-License-Identifier: Apache-2.0
"""Conditioning: what a network is given beside x and t, nested as its caller likes.

One traversal (`walk`) serves everything that is done to a conditioning: it is checked, joined for
guidance, flattened for a capture, rebuilt, sliced by stage, and searched for tensors.

A tensor reached through dicts alone has one entry a sample in its first dimension. A tensor inside
a list, a tuple or a dataclass is handed to the network whole: it belongs to no sample. A `PerStage`
may stand wherever a tensor may. Other objects are passed as they are, and may not hold what would
have to be looked at: a `PerStage`, or a tensor that requires grad. A mapping of another type than
dict becomes a dict where something in it is replaced.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# A place in a conditioning: the type of each container on the way, and the key in it.
Path = tuple[tuple[type, Any], ...]
Visit = Callable[[Any, Path, bool], Any]

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass(frozen=True, eq=False)
class PerStage:
    """Conditioning that changes along the run: an entry of `cond` with one value a stage.

    Args:
        values: [S, B, ...]: the network is given `values[i]` at stage i of the plan. Inside a list,
            a tuple or a dataclass `values[i]` is handed over whole, and B is any dimension.
    """

    values: torch.Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.values, torch.Tensor) or self.values.ndim < 2:
            got = tuple(self.values.shape) if isinstance(self.values, torch.Tensor) else self.values
            raise ValueError(
                f"PerStage: values is a tensor [S, B, ...], one entry a stage; got {got!r}."
            )


# PyTorch's compiler reads what `isinstance` is asked for from tuples, and not from unions.
_LEAVES = (torch.Tensor, PerStage)


def arguments_of(cond: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Positional and keyword arguments of the network after x and t."""
    if cond is None:
        return (), {}
    return ((), cond) if isinstance(cond, Mapping) else ((cond,), {})


# -- the traversal ---------------------------------------------------------------------------------


def walk(value: Any, visit: Visit) -> Any:
    """The same structure with every leaf replaced by `visit(leaf, path, whole)`.

    Leaves are tensors, `PerStage`s, empty containers and everything that is no container; only the
    first two are replaced, of the others the visitor returns what it was given. `whole` says that a
    leaf stands in a list, a tuple or a dataclass, so that the network is given it whole. A
    container in which nothing was replaced is returned itself.
    """
    return _walk(value, visit, (), False)[0]


def _walk(value: Any, visit: Visit, path: Path, whole: bool) -> tuple[Any, bool]:
    """The new value, and whether it is another. PyTorch's compiler cannot always ask by `is`."""
    if isinstance(value, _LEAVES):
        new = visit(value, path, whole)
        return new, new is not value
    if isinstance(value, Mapping) and value:
        own = type(value)
        inner = {k: _walk(v, visit, (*path, (own, k)), whole) for k, v in value.items()}
        if not any(other for _, other in inner.values()):
            return value, False
        return {k: new for k, (new, _) in inner.items()}, True
    if isinstance(value, (list, tuple)) and value:
        kind = type(value)
        pairs = [_walk(v, visit, (*path, (kind, i)), True) for i, v in enumerate(value)]
        if not any(other for _, other in pairs):
            return value, False
        items = [new for new, _ in pairs]
        return (kind(*items) if hasattr(value, "_fields") else kind(items)), True
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _walk_fields(value, visit, path)
    return visit(value, path, whole), False


def _walk_fields(value: Any, visit: Visit, path: Path) -> tuple[Any, bool]:
    made = None
    own = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
    # attributes that are no fields: __post_init__ may have made them from tensors
    for name in dict.fromkeys([*own, *getattr(value, "__dict__", ())]):
        new, other = _walk(getattr(value, name), visit, (*path, (type(value), name)), True)
        if other:
            made = copy.copy(value) if made is None else made
            object.__setattr__(made, name, new)
    return (value, False) if made is None else (made, True)


def where_of(path: Path, root: str = "cond") -> str:
    """A place in the words of who wrote it: cond['a'][0].name."""
    parts = (
        f"[{key!r}]" if issubclass(kind, (Mapping, list, tuple)) else f".{key}"
        for kind, key in path
    )
    return root + "".join(parts)


def leaves_of(cond: Any) -> list[tuple[Any, Path, bool]]:
    found: list[tuple[Any, Path, bool]] = []

    def visit(value: Any, path: Path, whole: bool) -> Any:
        found.append((value, path, whole))
        return value

    walk(cond, visit)
    return found


# -- looking at a conditioning ---------------------------------------------------------------------


def tensors_in(cond: Any) -> list[torch.Tensor]:
    """The tensors of a conditioning, those of each `PerStage` too, in the order of `flatten`."""
    return [
        value.values if isinstance(value, PerStage) else value
        for value, _, _ in leaves_of(cond)
        if isinstance(value, _LEAVES)
    ]


def staged_in(cond: Any) -> list[PerStage]:
    """The `PerStage`s of a conditioning."""
    return [value for value, _, _ in leaves_of(cond) if isinstance(value, PerStage)]


def varies(cond: Any) -> bool:
    """Whether a conditioning changes from stage to stage."""
    if cond is None or isinstance(cond, torch.Tensor):
        return False
    return bool(staged_in(cond))


def requiring_grad(cond: Any, root: str = "cond") -> list[str]:
    """The places of tensors that require grad, those inside other objects too."""
    found: list[str] = []
    if cond is None:
        return found
    for value, path, _ in leaves_of(cond):
        held = [value.values if isinstance(value, PerStage) else value]
        if not isinstance(held[0], torch.Tensor):
            held = _hidden(value)
        if any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in held):
            found.append(where_of(path, root))
    return found


def _hidden(value: Any) -> list[Any]:
    """What a plain object holds in its attributes; modules are networks and hold their own."""
    if isinstance(value, (*_CONSTANTS, type, torch.nn.Module)):
        return []
    names = list(getattr(value, "__dict__", ()))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return [getattr(value, name, None) for name in names if isinstance(name, str)]


def check(
    cond: Any,
    batch: int,
    stages: int | None = None,
    root: str = "cond",
    device: torch.device | None = None,
) -> None:
    """Raises unless a conditioning fits a run.

    Args:
        cond: The conditioning.
        batch: Samples B.
        stages: Stages S of the plan; None: a `PerStage` may have any number.
        root: What the conditioning is called in errors.
        device: Where x lies. None: anywhere.

    Raises:
        ValueError: A tensor that has one entry a sample has another number of them, or lies on
            another device than x and the CPU; or a `PerStage` has another number of stages.
        TypeError: A `PerStage` stands where it would not be seen.
    """
    if cond is None:
        return
    for value, path, whole in leaves_of(cond):
        where = where_of(path, root)
        if isinstance(value, PerStage):
            if not whole:
                _check_samples(value.values[:1].flatten(0, 1), batch, f"one stage of {where}")
                _check_place(value.values, device, where)
            if stages is not None and len(value.values) != stages:
                raise ValueError(
                    f"sample: a PerStage has one entry a stage of the plan, {stages} here; got "
                    f"{where} of shape {tuple(value.values.shape)}."
                )
        elif isinstance(value, torch.Tensor):
            if not whole:
                _check_samples(value, batch, where)
                _check_place(value, device, where)
        elif any(isinstance(inner, PerStage) for inner in _hidden(value)):
            raise TypeError(
                "sample: a PerStage stands in dicts, lists, tuples and dataclasses, where it is "
                f"seen; got one inside {where}, a {type(value).__name__}. Move it out of there."
            )


def _check_samples(tensor: torch.Tensor, batch: int, where: str) -> None:
    if tensor.ndim == 0 or tensor.shape[0] != batch:
        raise ValueError(
            f"sample: a tensor in the conditioning has one entry a sample in its first dimension, "
            f"{batch} here; got {where} of shape {tuple(tensor.shape)}. Expand it, or put a tensor "
            "without a batch dimension inside a tuple, which is handed to the network as it is."
        )


def _check_place(tensor: torch.Tensor, device: torch.device | None, where: str) -> None:
    """Raises where a tensor lies on one GPU and x on another: few networks are meant to join them.

    A network may well move what lies on the CPU, or run on a GPU for an x on the CPU. A tensor on
    the meta device has no values; PyTorch's embeddings read it all the same.
    """
    if device is None or tensor.device == device:
        return
    if tensor.device.type != "meta" and "cpu" in (tensor.device.type, device.type):
        return
    raise ValueError(
        f"sample: conditioning lies where x lies; got {where} on {tensor.device} and x on {device}."
        " Move it; or, for a network that takes it there, put it inside a tuple, which is handed to"
        " the network as it is."
    )


# -- making another from it ------------------------------------------------------------------------


def at_stage(
    cond: Any, i: int, take: Callable[[PerStage, int], Any] = lambda staged, i: staged.values[i]
) -> Any:
    """The conditioning at stage i."""
    if cond is None or isinstance(cond, torch.Tensor):
        return cond

    def visit(value: Any, path: Path, whole: bool) -> Any:
        return take(value, i) if isinstance(value, PerStage) else value

    return walk(cond, visit)


def flatten(
    cond: Any, device: torch.device | None = None
) -> tuple[Hashable, list[tuple[torch.Tensor, bool]]]:
    """A hashable description of the conditioning, and its tensors in order.

    Args:
        cond: The conditioning.
        device: Where a captured graph is to read it. None: anywhere.

    Returns:
        The description, and each tensor with whether it has one entry a sample.

    Raises:
        TypeError: The conditioning holds an object whose changes a captured graph would not see.
        ValueError: A tensor lies on another device. What a graph does with it is done outside of
            the graph, or its value is a constant there.
    """
    tensors: list[tuple[torch.Tensor, bool]] = []
    described: list[Hashable] = [type(cond).__qualname__]
    for value, path, whole in leaves_of(cond):
        if isinstance(value, _LEAVES):
            # a PerStage is kept as it is: a graph reads one stage of it after another
            staged = isinstance(value, PerStage)
            tensor = value.values if isinstance(value, PerStage) else value
            per_sample = not whole and not staged
            if device is not None and tensor.device != device:
                raise ValueError(
                    f"sample: a captured graph reads its conditioning on x's device, {device}; got "
                    f"{where_of(path)} on {tensor.device}. Move it, or use graph=None."
                )
            tensors.append((tensor, per_sample))
            shape = tuple(tensor.shape[1:] if per_sample else tensor.shape)
            described.append((path, staged, per_sample, shape, tensor.dtype, tensor.device))
        elif isinstance(value, (*_CONSTANTS, Mapping, list, tuple)):
            # 0.0 is another number than -0.0, and NaN is the same as itself
            constant = repr(value) if isinstance(value, (float, complex)) else value
            empty = not isinstance(value, _CONSTANTS)
            described.append((path, type(value), None if empty else constant))
        else:
            raise TypeError(
                "sample: a captured graph sees tensors, numbers and strings in dicts, lists, tuples"
                f" and dataclasses; got {type(value).__name__} as {where_of(path)}, whose changes "
                "it would miss. Pass its tensors in a dict, or use graph=None."
            )
    return tuple(described), tensors


def rebuild(cond: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The conditioning with its tensors replaced, in the order of `flatten`."""

    def visit(value: Any, path: Path, whole: bool) -> Any:
        if isinstance(value, PerStage):
            return PerStage(next(tensors))
        return next(tensors) if isinstance(value, torch.Tensor) else value

    return walk(cond, visit)
