# SPDX-License-Identifier: Apache-2.0
"""The conditioning of several branches as that of one call, on as many samples for each branch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..conditioning import Path, PerStage, leaves_of, walk, where_of


def joined(conds: tuple[Any, ...], batch: int) -> Any:
    """Conditioning of one call for several branches, leaf by leaf in the order of the branches.

    Args:
        conds: Of each branch. The last says the structure; the others have it too, may leave keys
            out, which are shared, and may have a number or one sample where it has a tensor.
        batch: Samples B.

    Raises:
        TypeError, ValueError: The structures or shapes differ, or what cannot be joined differs.
    """
    *others, main = conds
    named = [_by_keys(other, main) for other in others]

    def visit(value: Any, path: Path, whole: bool) -> Any:
        keys = tuple(key for _, key in path)
        given = [_given(leaves, keys, value, where_of(path)) for leaves in named]
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
    """The leaves of a branch by the keys that lead to them; refused where `main` has none."""
    leaves = {tuple(key for _, key in path): value for value, path, _ in leaves_of(other)}
    known = [tuple(key for _, key in path) for _, path, _ in leaves_of(main)]
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
        if not any(k[: len(keys)] == keys or keys[: len(k)] == k for k in known):
            raise TypeError(
                f"CFG: uncond has the structure of cond; {where} is {type(here).__name__} and "
                f"uncond has {list(keys)!r}, which leads to nothing there."
            )
    return leaves


def _given(leaves: dict[tuple[Any, ...], Any], keys: tuple[Any, ...], own: Any, where: str) -> Any:
    """What a branch has at a place of the last one."""
    if keys in leaves:
        return leaves[keys]
    below = [k for k in leaves if len(k) > len(keys) and k[: len(keys)] == keys]
    above = [k for k in leaves if len(k) < len(keys) and keys[: len(k)] == k]
    if below or any(not isinstance(leaves[k], Mapping) for k in above):
        raise TypeError(
            f"CFG: uncond has the structure of cond; {where} is {type(own).__name__} and uncond "
            "has another structure there."
        )
    return _SHARED


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
        if all(other is _SHARED or other is staged for other in given):
            return staged
        raise _whole_differs(where)
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
    if value.ndim and value.shape[0] == batch and any(other is _SHARED for other in given):
        raise ValueError(
            "CFG: a tensor inside a list, a tuple or a dataclass is handed whole to all branches; "
            f"got {where} of shape {tuple(value.shape)}, which looks like one entry a sample "
            f"({batch}). Put it into a dict, with its unconditional value in uncond; or name the "
            "same tensor there in uncond to share it."
        )
    return value


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
        signed = other.dtype.is_signed and not kind.is_signed and kind != torch.bool
        if signed or not torch.can_cast(other.dtype, kind):
            raise ValueError(
                f"CFG: uncond holds numbers of cond's kind; {where} is {kind} and uncond has "
                f"{other.dtype} there. Convert one of them."
            )
        return
    legal = True
    if not (kind.is_floating_point or kind.is_complex):
        info = (0, 1) if kind == torch.bool else (torch.iinfo(kind).min, torch.iinfo(kind).max)
        legal = float(other).is_integer() and info[0] <= other <= info[1]
    elif kind.is_floating_point:
        legal = other != other or abs(other) <= torch.finfo(kind).max
    if not legal:
        raise ValueError(f"CFG: {where} holds {kind}; got the unconditional value {other}.")


def _check_same(value: Any, other: Any, where: str) -> None:
    """Raises where a branch has another value than the last one for what cannot be joined."""
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
