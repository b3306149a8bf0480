# SPDX-License-Identifier: Apache-2.0
"""What the options of the commands accept; a wrong value is answered with what is allowed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import torch

import fastdiff as fd

Parameter = click.Parameter | None
Context = click.Context | None

_PYTHON = {"True": True, "False": False, "None": None}
MOST = 10_000  # samples, steps and evaluations: more would not fit in memory or in a day


class Whole(click.ParamType):
    """A whole number within bounds."""

    name = "N"

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: Parameter, ctx: Context) -> int:
        if isinstance(value, int):
            return value
        digits = value.strip().removeprefix("-").removeprefix("+")
        if not (digits.isascii() and digits.isdecimal()):
            self.fail(f"{value!r} is not a whole number.", param, ctx)
        number = int(value) if len(digits) < 100 else None  # int() refuses thousands of digits
        if number is None or not self.least <= number <= self.most:
            shown = value if len(digits) < 30 else f"a number of {len(digits)} digits"
            self.fail(f"{self.least} to {self.most} is allowed; got {shown}.", param, ctx)
        return number


class Real(click.ParamType):
    """A number between two bounds."""

    name = "NUMBER"

    def __init__(self, least: float = -math.inf, most: float = math.inf) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: Parameter, ctx: Context) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number.", param, ctx)
        if not math.isfinite(number):
            self.fail(f"a finite number is needed; got {value}.", param, ctx)
        if not self.least <= number <= self.most:
            self.fail(f"{self.least:g} to {self.most:g} is allowed; got {value}.", param, ctx)
        return number


class SolverName(click.ParamType):
    """A solver's name; a wrong one is answered with the nearest."""

    name = "NAME"

    def convert(self, value: Any, param: Parameter, ctx: Context) -> Any:
        try:
            fd.solvers.info(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return value


class SolverNames(SolverName):
    """Names of solvers, separated by commas."""

    name = "NAME,..."

    def convert(self, value: Any, param: Parameter, ctx: Context) -> Any:
        return tuple(
            super(SolverNames, self).convert(n.strip(), param, ctx) for n in value.split(",")
        )


class Numbers(click.ParamType):
    """Whole numbers and ranges, separated by commas: "0-9", "3,5", "0-3,7"."""

    name = "N,N-N,..."

    def __init__(self, least: int, most: int = MOST) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: Parameter, ctx: Context) -> tuple[int, ...]:
        numbers: list[int] = []
        for part in value.split(","):
            first, _, last = part.strip().partition("-")
            ends = (first, last or first)
            if not all(end.isascii() and end.isdecimal() for end in ends):
                self.fail(f"{value!r} is not a list of numbers such as 0-9 or 3,5.", param, ctx)
            start, stop = (int(end) if len(end) < 100 else self.most + 1 for end in ends)
            if stop < start or start < self.least:
                self.fail(
                    f"{part.strip()!r} in {value!r}: ranges grow, from {self.least} on.", param, ctx
                )
            if stop > self.most or len(numbers) > MOST:
                self.fail(f"the list ends at {self.most}, in number and in length.", param, ctx)
            numbers += range(start, stop + 1)
        return tuple(numbers)


class Picture(click.ParamType):
    """A path that ends in .png."""

    name = "FILE.png"

    def convert(self, value: Any, param: Parameter, ctx: Context) -> Path:
        path = Path(value)
        if path.suffix.lower() != ".png":
            self.fail(
                f"{value!r} does not end in .png, the one format that is written.", param, ctx
            )
        return path


class SolverOption(click.ParamType):
    """NAME=VALUE with a value in JSON or as Python writes it; anything else is taken as text."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: Parameter, ctx: Context) -> tuple[str, Any]:
        name, equals, text = value.partition("=")
        if not equals or not name.isidentifier():
            self.fail(f"{value!r} is not NAME=VALUE, such as eta=0.5.", param, ctx)
        if text in _PYTHON:
            return name, _PYTHON[text]
        try:
            return name, json.loads(text)
        except (ValueError, RecursionError):  # ValueError: not JSON, or a number of too many digits
            return name, text


class Sizes(click.ParamType):
    """Shapes such as 64x4x64x64, or bytes such as 256MiB, separated by commas."""

    name = "SIZE,..."

    _UNITS = MappingProxyType({"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30})

    def convert(self, value: Any, param: Parameter, ctx: Context) -> tuple[Any, ...]:
        if not isinstance(value, str):
            return tuple(value)
        return tuple(self._size(part.strip(), param, ctx) for part in value.split(","))

    def _size(self, text: str, param: Parameter, ctx: Context) -> tuple[int, ...] | int:
        unit = next((u for u in ("KiB", "MiB", "GiB", "B") if text.endswith(u)), None)
        parts = [text.removesuffix(unit)] if unit else text.split("x")
        if not all(p.isascii() and p.isdecimal() and len(p) < 16 and int(p) for p in parts):
            self.fail(
                f"{text!r} is no size such as 64x4x64x64 or 256MiB (B, KiB, MiB, GiB).", param, ctx
            )
        if unit is not None:
            return int(parts[0]) * self._UNITS[unit]
        if len(parts) < 2:
            self.fail(
                f"{text!r}: a shape is BxN.., such as 1x{text}; bytes have a unit, such as "
                f"{text}B.",
                param,
                ctx,
            )
        return tuple(map(int, parts))


class Dtypes(click.ParamType):
    """Dtypes of the network, or STATE/NETWORK, separated by commas.

    Args:
        allowed: Names of dtypes.
        pairs: Whether the state's dtype may be given too. It is float32 else, float64 for float64.
    """

    name = "DTYPE,..."

    def __init__(self, allowed: Sequence[str], pairs: bool = False) -> None:
        self.allowed, self.pairs = tuple(allowed), pairs

    def convert(self, value: Any, param: Parameter, ctx: Context) -> tuple[Any, ...]:
        if not isinstance(value, str):
            return tuple(value)
        return tuple(self._dtypes(part.strip(), param, ctx) for part in value.split(","))

    def _dtypes(self, text: str, param: Parameter, ctx: Context) -> tuple[torch.dtype, torch.dtype]:
        state, slash, network = text.rpartition("/")
        given = (state, network) if slash else (network,)
        if not all(name in self.allowed for name in given) or (slash and not self.pairs):
            also = ", or STATE/NETWORK such as float32/bfloat16" if self.pairs else ""
            self.fail(f"{text!r} is not one of {', '.join(self.allowed)}{also}.", param, ctx)
        second = getattr(torch, network)
        first = torch.float64 if second == torch.float64 else torch.float32
        return (getattr(torch, state) if slash else first), second


class Names(click.ParamType):
    """Names separated by commas."""

    name = "NAME,..."

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self.allowed = tuple(allowed)

    def convert(self, value: Any, param: Parameter, ctx: Context) -> tuple[str, ...]:
        if not isinstance(value, str):
            return tuple(value)
        names = tuple(name.strip() for name in value.split(","))
        wrong = [name for name in names if self.allowed and name not in self.allowed]
        if wrong:
            self.fail(f"{wrong[0]!r} is not one of {', '.join(self.allowed)}.", param, ctx)
        return names
