# SPDX-License-Identifier: Apache-2.0
"""Entries of the families' lists of solvers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .base import Solver


@dataclass(frozen=True)
class Info:
    """What is known about a named solver.

    Attributes:
        name: The solver's name.
        make: The solver's class.
        measured_order: Slope of log error on log steps, measured with warmup="runge-kutta" where
            the solver has one. The `order` of a name or an option is the field's instead: the
            number of outputs that a step combines. None: the solver is made for a distilled
            network, and more steps of it converge to nothing.
        nfe_per_step: Network evaluations a step.
        summary: What the solver does, in one line.
        source: The paper that it comes from.
        fixed: Options that the name fixes, and options that change nothing under it.
        least_steps: Fewest steps that a plan can have.
        stochastic: Whether the solver draws noise by default.
        aliases: Names that other libraries give to this solver, each with the options that make
            it the same sampler. diffusers' end with "Scheduler", k-diffusion's begin with
            "sample_", the others are ComfyUI's.
        nfe_extra: Network evaluations of a plan beside those of its steps.
        same: Name of the solver whose samples these are on the same grid, with the defaults of
            both; empty: none.
        quirks: What published code of this solver gets wrong, and where.
    """

    name: str
    make: type[Solver]
    measured_order: int | None
    nfe_per_step: int
    summary: str
    source: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    least_steps: int = 1
    stochastic: bool = False
    aliases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    nfe_extra: int = 0
    same: str = ""
    quirks: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Keywords that `fastdiff.plan` takes for the solver, with their defaults."""
        fields = dataclasses.fields(self.make)
        return {f.name: f.default for f in fields if f.name not in self.fixed}
