# SPDX-License-Identifier: Apache-2.0
"""The conditioning of several branches joined into that of one network call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .._text import shown
from ..conditioning import Path, PerStage, leaves_of, walk, where_of


def joined(conds: tuple[Any, ...], batch: int) -> Any:
    """Conditioning of one call for several branches, leaf by leaf in the order of the branches.

    Args:
        conds: The conditioning of each branch. The last one says the structure. The others may
            leave keys out, which are shared, and may have a number or one sample where the last
            one has a tensor.
        batch: Samples B.

    Raises:
        TypeError, ValueError: The structures or shapes differ, or values differ that cannot be
            joined.
    """
    *others, main = conds
    named = [_by_keys(other, main) for other in others]
    places = [path for _, path, _ in leaves_of(main)]
    for leaves in named:
        _check_places(leaves, places)

    def visit(value: Any, path: Path, whole: bool) -> Any:
        given = [_given(leaves, path, value) for leaves in named]
        if isinstance(value, PerStage):
            return _joined_stages(value, given, batch, (where_of(path), whole))
        if isinstance(value, torch.Tensor):
            return _joined_tensor(value, given, batch, (where_of(path), whole))
        for other in given:
            _check_same(value, other, where_of(path))
        return value

    return walk(main, visit)


_SHARED = object()  # stands for what a branch leaves out


def _by_keys(other: Any, main: Any) -> dict[tuple[Any, ...], Any]:
    """The leaves of a branch by the keys that lead to them; a leaf that `main` lacks is refused."""
    leaves = {tuple(key for _, key in path): value for value, path, _ in leaves_of(other)}
    for keys, value in leaves.items():
        here, where = main, "cond"
        for key in keys:
            if isinstance(here, Mapping) and key not in here:
                raise ValueError(
                    f"CFG: uncond has the structure of cond; {where} has no {key!r} "
                    f"(it has {', '.join(map(repr, here)) or 'nothing'})."
                )
            if not isinstance(here, Mapping):
                break
            here, where = here[key], f"{where}[{key!r}]"
        if isinstance(here, Mapping) and here and not isinstance(value, Mapping):
            raise TypeError(
                f"CFG: uncond has the structure of cond; {where} is a dict and uncond has "
                f"{type(value).__name__} there."
            )
    return leaves


def _check_places(leaves: dict[tuple[Any, ...], Any], places: list[Path]) -> None:
    """Raises where a branch has something in a list or an object that the last one has not."""
    own = {tuple(key for _, key in path) for path in places}
    known = {keys[:n] for keys in own for n in range(len(keys) + 1)}
    for keys, value in leaves.items():
        if keys in known or (isinstance(value, Mapping) and not value):
            continue
        above = max((keys[:n] for n in range(len(keys)) if keys[:n] in known), key=len)
        if above not in own:  # else what stands there is no container: see `_given`
            where = "".join(f"[{key!r}]" for key in above)
            raise TypeError(
                f"CFG: uncond has the structure of cond; cond{where} has nothing at "
                f"{keys[len(above)]!r}, and uncond has."
            )


def _given(leaves: dict[tuple[Any, ...], Any], path: Path, own: Any) -> Any:
    """What a branch has at a place of the last one."""
    keys = tuple(key for _, key in path)
    if keys in leaves:
        return leaves[keys]
    above = [k for k in leaves if len(k) < len(keys) and keys[: len(k)] == k]
    if (
        _leads(leaves, keys)
        or any(not isinstance(leaves[k], Mapping) for k in above)
        or not _may_lack(leaves, path)
    ):
        raise TypeError(
            f"CFG: uncond has the structure of cond; {where_of(path)} is {type(own).__name__} and "
            "uncond has another structure there."
        )
    return _SHARED


def _may_lack(leaves: dict[tuple[Any, ...], Any], path: Path) -> bool:
    """Whether what a branch lacks on the way to a place is the key of a mapping."""
    keys = tuple(key for _, key in path)
    lacking = next(n for n in range(len(keys)) if not _leads(leaves, keys[: n + 1]))
    return issubclass(path[lacking][0], Mapping)


def _leads(leaves: dict[tuple[Any, ...], Any], keys: tuple[Any, ...]) -> bool:
    """Whether a branch has something at a place or below it."""
    return any(k[: len(keys)] == keys for k in leaves)


def _joined_stages(
    staged: PerStage, given: list[Any], batch: int, place: tuple[str, bool]
) -> PerStage:
    where, whole = place
    stages = len(staged.values)
    each: list[list[Any]] = []
    for other in given:
        if isinstance(other, PerStage):
            if len(other.values) != stages:
                raise ValueError(
                    f"CFG: where cond has a PerStage of {stages} stages uncond has one of as many, "
                    f"a tensor or a number; got {len(other.values)} for {where}."
                )
            each.append(list(other.values) if other is not staged else [_SHARED] * stages)
        else:
            each.append([other] * stages)
    if whole:
        if any(other is not _SHARED and other is not staged for other in given):
            raise _whole_differs(where)
        _check_shared(staged.values[0], given, batch, where)
        return staged
    values = [
        _joined_tensor(value, list(others), batch, place)
        for value, *others in zip(staged.values, *each, strict=True)
    ]
    return PerStage(torch.stack(values))


def _joined_tensor(
    value: torch.Tensor, given: list[Any], batch: int, place: tuple[str, bool]
) -> torch.Tensor:
    where, whole = place
    if whole:
        return _shared_whole(value, given, batch, where)
    return torch.cat([*(_like(other, value, batch, where) for other in given), value])


def _shared_whole(value: torch.Tensor, given: list[Any], batch: int, where: str) -> torch.Tensor:
    if any(other is not _SHARED and other is not value for other in given):
        raise _whole_differs(where)
    _check_shared(value, given, batch, where)
    return value


def _check_shared(value: torch.Tensor, given: list[Any], batch: int, where: str) -> None:
    """Raises where what is handed whole looks like one entry a sample, and is not named."""
    if value.ndim and value.shape[0] == batch and any(other is _SHARED for other in given):
        raise ValueError(
            "CFG: a tensor inside a list, a tuple or a dataclass is handed whole to all branches; "
            f"got {where} of shape {tuple(value.shape)}, which looks like one entry a sample "
            f"({batch}). Put it into a dict, with its unconditional value in uncond; or name the "
            "same tensor there in uncond to share it."
        )


def _whole_differs(where: str) -> TypeError:
    return TypeError(
        "CFG: only tensors reached through dicts can differ between the branches, which share one "
        f"network call; {where} stands in a list, a tuple or a dataclass. Put it into a dict."
    )


def _like(other: Any, value: torch.Tensor, batch: int, where: str) -> torch.Tensor:
    """What a branch gives in place of a tensor, made like it."""
    if other is _SHARED or other is value:
        return value
    if not isinstance(other, (torch.Tensor, int, float)) or isinstance(other, bool):
        raise TypeError(
            f"CFG: where cond has a tensor uncond has a tensor or a number; got "
            f"{type(other).__name__} for {where}."
        )
    _check_range(other, value, where)
    if isinstance(other, torch.Tensor):
        made = other.to(value.device, value.dtype)
    else:
        made = value.new_full((), other)  # no copy from the host
    if made.ndim == 0 or (made.ndim == value.ndim and made.shape[0] == 1):
        made = made.expand(batch, *(made.shape[1:] or value.shape[1:]))
    if made.shape != value.shape:
        raise ValueError(
            f"CFG: uncond has cond's shape, or one sample of it; {where} is "
            f"{tuple(value.shape)} and uncond has {tuple(made.shape)}."
        )
    return made


def _check_range(other: Any, value: torch.Tensor, where: str) -> None:
    """Raises where an unconditional value cannot be held in cond's dtype."""
    kind = value.dtype
    if isinstance(other, torch.Tensor):
        if not torch.can_cast(other.dtype, kind) or not _holds(kind, other.dtype):
            raise ValueError(
                f"CFG: uncond holds numbers of cond's kind; {where} is {kind} and uncond has "
                f"{other.dtype} there. Convert one of them."
            )
        return
    legal = True
    if not (kind.is_floating_point or kind.is_complex):
        info = (0, 1) if kind == torch.bool else (torch.iinfo(kind).min, torch.iinfo(kind).max)
        legal = info[0] <= other <= info[1] and float(other).is_integer()
    elif isinstance(other, int) or math.isfinite(other):
        legal = abs(other) <= torch.finfo(kind).max
    if not legal:
        raise ValueError(f"CFG: {where} holds {kind}; got the unconditional value {shown(other)}.")


def _holds(kind: torch.dtype, other: torch.dtype) -> bool:
    """Whether a dtype of integers holds all of another; those of floats round, and hold theirs."""
    kinds = (kind, other)
    if any(k.is_floating_point or k.is_complex or k == torch.bool for k in kinds):
        return True
    own, its = torch.iinfo(kind), torch.iinfo(other)
    return own.min <= its.min and its.max <= own.max


def _check_same(value: Any, other: Any, where: str) -> None:
    """Raises where a branch has another value than the last one, and the two cannot be joined."""
    if other is _SHARED or other is value:
        return
    if isinstance(value, (Mapping, list, tuple)) and not value and type(other) is type(value):
        return
    same = type(other) is type(value) and isinstance(value, (str, int, float)) and other == value
    if not same:
        raise TypeError(
            f"CFG: only tensors can differ between the branches, which share one network call; "
            f"{where} is {type(value).__name__}. Leave it out of uncond, or give tensors."
        )
