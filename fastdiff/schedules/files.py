# SPDX-License-Identifier: Apache-2.0
"""Reading schedules back from the data that `Schedule.to_dict` makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .._text import unknown
from .base import Schedule
from .custom import Custom
from .discrete import VPDiscrete
from .edm import EDM
from .flow import FlowMatching
from .vp import VPCosine, VPLinear

_RECIPES = {"linear": VPDiscrete.linear, "scaled_linear": VPDiscrete.scaled_linear}
_RECIPE = ("recipe", "beta_start", "beta_end", "num_steps")


def _discrete(**values: Any) -> VPDiscrete:
    if "log_alpha" in values:
        return VPDiscrete.of_log_alpha(values["log_alpha"])
    recipe = values.pop("recipe")
    if not isinstance(recipe, str) or recipe not in _RECIPES:
        raise unknown("schedules.from_dict: recipe", "recipe of VPDiscrete", recipe, _RECIPES)
    return _RECIPES[recipe](**values)


class _Kind(NamedTuple):
    make: Callable[..., Schedule]
    fields: tuple[tuple[str, ...], ...]  # the sets of fields it may have


_KINDS = {
    "VPLinear": _Kind(VPLinear, (("beta_min", "beta_max", "time_scale"),)),
    "VPCosine": _Kind(VPCosine, (("s", "time_scale"),)),
    "VPDiscrete": _Kind(_discrete, (_RECIPE, ("log_alpha",))),
    "EDM": _Kind(EDM, (("sigma_min", "sigma_max", "sigma_data", "scale_input"),)),
    "FlowMatching": _Kind(FlowMatching, (("time_scale",),)),
    "Custom": _Kind(Custom.by_name, (("name", "t_range", "grid_range", "time_scale"),)),
}


def from_dict(record: dict[str, Any]) -> Schedule:
    """The schedule that `Schedule.to_dict` wrote; it equals the original, bit for bit.

    A `Custom` is read by its name alone and refuses whatever needs its functions. Nothing of the
    record is executed.

    Args:
        record: {"kind": name, field: value, ..}, with all the fields of the kind and no other.

    Raises:
        ValueError: The kind is unknown, a field is missing or unknown, or a value is out of range.
        TypeError: A value has the wrong kind.
    """
    who = "schedules.from_dict"
    if not isinstance(record, dict) or not all(isinstance(key, str) for key in record):
        raise TypeError(
            f"{who}: a dictionary with the keys of Schedule.to_dict is needed; got "
            f"{type(record).__name__}."
        )
    values = dict(record)
    name = values.pop("kind", None)
    if not isinstance(name, str) or name not in _KINDS:
        raise unknown(f"{who}: kind", "kind of schedule", name, _KINDS)
    kind = _KINDS[name]
    wanted = next((f for f in kind.fields if f[0] in values), kind.fields[0])
    for key in values:
        if key not in wanted:
            raise unknown(f"{who}: {name}", "field", key, wanted)
    missing = [key for key in wanted if key not in values]
    if missing:
        raise ValueError(
            f"{who}: {name} needs the fields {', '.join(wanted)}; got none for "
            f"{', '.join(missing)}."
        )
    return kind.make(**values)
