# SPDX-License-Identifier: Apache-2.0
"""Plans as JSON: the text of a plan's fields, the fields of a text, and the files that hold it.

Whatever a file holds, reading it takes time and memory in proportion to its size, ends, and gives
the fields of a plan or a ValueError of one short sentence.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections import Counter
from collections.abc import Mapping
from typing import Any

from .._files import replacing
from ..schedules import Schedule, from_dict
from .checks import index, shown
from .stage import Stage
from .terms import Measure, Product, Reduction

FORMAT = "fastdiff-plan"
FORMAT_VERSION = 2
MOST_BYTES = 64 << 20  # of a file that `read` takes unless told otherwise

# What stands as an object inside an object of each kind.
_INNER: dict[type, dict[str, type]] = {
    Stage: {"products": Product, "measures": Measure},
    Measure: {"num": Reduction, "den": Reduction},
    Product: {},
    Reduction: {},
}


def refusal(source: str, why: str) -> ValueError:
    """The error for a source that is no plan. It is short, whatever the source holds."""
    source = source if source.isprintable() else ascii(source)
    return ValueError(f"Plan.load: {source}: {why if len(why) <= 260 else why[:257] + '...'}")


def dump(fields: Mapping[str, Any]) -> str:
    """JSON text of a plan's fields; floats are written so that they read back bit for bit."""
    head = {"format": FORMAT, "version": FORMAT_VERSION}
    schedule = fields["schedule"]
    record = {
        **head,
        **fields,
        "schedule": None if schedule is None else schedule.to_dict(),
        "stages": [_record(stage) for stage in fields["stages"]],
    }
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def _record(thing: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    record = {}
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name)
        if value == field.default or (isinstance(value, float) and value != value):
            continue
        if field.name in _INNER[type(thing)]:
            value = [*map(_record, value)] if isinstance(value, tuple) else _record(value)
        record[field.name] = value
    return record


def parse(text: str, source: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The fields of the plan that `dump` wrote.

    Args:
        text: JSON text.
        source: Where it came from, named in errors.
        names: The fields of a plan.

    Raises:
        ValueError: The text is truncated, not a plan, of another version, or has a field that this
            version does not know.
    """
    for name, value in (("text", text), ("source", source)):
        if not isinstance(value, str):
            raise TypeError(f"Plan.from_json: {name} is a string; got {type(value).__name__}.")
    if text.startswith("\ufeff"):
        raise refusal(source, "it begins with a byte-order mark. Save it as UTF-8 without one.")
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise refusal(source, f"not complete JSON ({error}). Is the file truncated?") from None
    except (RecursionError, ValueError) as error:
        raise refusal(source, f"not a plan: {error}.") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise refusal(
            source, f'not a plan: a plan has "format": "{FORMAT}". Write one with Plan.save.'
        )
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise refusal(source, f"version is a positive integer; got {shown(version)}.")
    if version > FORMAT_VERSION:
        raise refusal(
            source,
            f"written by a newer fastdiff (plan version {shown(version)}); this one reads up to "
            f"{FORMAT_VERSION}. Upgrade fastdiff-engine.",
        )
    if version < FORMAT_VERSION:
        raise refusal(
            source,
            f"written as plan version {version}, and this fastdiff reads version {FORMAT_VERSION}. "
            "Make the plan again, with fastdiff.plan or fastdiff plan, and save it.",
        )
    fields = {k: v for k, v in data.items() if k not in ("format", "version")}
    for missing in names:
        if missing not in fields:
            raise refusal(source, f"field {missing!r} is missing.")
    for extra in fields:
        if extra not in names:
            raise refusal(
                source, f"unknown field {shown(extra)}; the fields are {', '.join(names)}."
            )
    return {
        **fields,
        "stages": _stages(fields["stages"], source),
        "schedule": _schedule(fields["schedule"], source),
    }


def _stages(rows: Any, source: str) -> tuple[Stage, ...]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise refusal(source, "stages is a list of objects.")
    stages = []
    for i, row in enumerate(rows):
        try:
            stages.append(_made(Stage, row, f"stage {i}"))
        except (TypeError, ValueError) as error:
            raise refusal(source, str(error)) from None
    return tuple(stages)


def _schedule(record: Any, source: str) -> Schedule | None:
    if record is None:
        return None
    if not isinstance(record, dict):
        raise refusal(source, f"schedule is an object or null; got {shown(record)}.")
    try:
        return from_dict(record)
    except (TypeError, ValueError, OverflowError) as error:
        raise refusal(source, f"schedule: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are unique."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return made


def _integer(digits: str) -> int | float:
    """An integer; in place of one beyond float64 an infinity, which its field refuses by name."""
    return int(digits) if len(digits) < 300 else float(digits)


def _made(kind: type, record: Any, where: str) -> Any:
    """A dataclass made of its record.

    Raises:
        ValueError: A field is unknown or missing, or the dataclass refuses its value.
        TypeError: The dataclass refuses the kind of a value.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where} is an object; got {shown(record)}.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in record:
        if name not in fields:
            raise ValueError(
                f"{where} has the unknown field {shown(name)}; those of fastdiff.{kind.__name__} "
                "are known."
            )
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in record:
            raise ValueError(f"{where} has no {name}.")
    values = dict(record)
    for name, inner in _INNER[kind].items():
        value = record.get(name)
        if isinstance(value, list):
            values[name] = [
                _made(inner, each, f"{where}, entry {i} of {name},") for i, each in enumerate(value)
            ]
        elif isinstance(value, dict):
            values[name] = _made(inner, value, f"{where}, {name},")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where}: {error}") from None


def read(path: str | os.PathLike[str], max_bytes: int = MOST_BYTES) -> str:
    """The text of a regular file of at most `max_bytes` bytes.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is a pipe, a device or a folder, is larger, or is not UTF-8.
    """
    source = os.fsdecode(path)
    most = index("Plan.load", "max_bytes", max_bytes, least=1, most=1 << 62)
    with open(source, "rb", buffering=0, opener=_without_waiting) as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise refusal(source, "not a plan: a plan is a regular file, and this is none.")
        content = _content(file, most + 1)
    if len(content) > most:
        raise refusal(
            source,
            f"a plan of at most {most} bytes is read; got a larger file. Pass max_bytes= if it is "
            "meant.",
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        marked = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        why = "not UTF-8 text" + ", but UTF-16 by its byte-order mark" * marked
        raise refusal(source, f"not a plan: {why}.") from None


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file; of a pipe that nobody writes to, an ordinary open would wait for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _content(file: Any, most: int) -> bytes:
    """Up to `most` bytes; an unbuffered read may give fewer than there are."""
    parts, left = [], most
    while left and (part := file.read(min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def write(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file in one step; see `fastdiff._files.replacing`."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))
