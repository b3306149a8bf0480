# SPDX-License-Identifier: Apache-2.0
"""Places: one run whose samples stand at different stages of different plans."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from ..plans import Layout, PackedRow
from .run import Spec, features_of


def places_spec(specs: Sequence[Spec], rows: Sequence[PackedRow]) -> Spec:
    """A spec that holds every plan of these specs, with all their rows in one table."""
    layout = functools.reduce(Layout.joined, (spec.layout for spec in specs))
    return replace(
        specs[0],
        layout=layout,
        rows=len(rows),
        stages=len(rows),
        slots=max(spec.slots for spec in specs),
        scalars=max(spec.scalars for spec in specs),
        has_e=any(spec.has_e for spec in specs),
        has_m=True,
        features=features_of(rows),
        stride=1,
        index="place",
    )
