# SPDX-License-Identifier: Apache-2.0
"""Solvers: the base class, the families and the registry of names."""

from .base import Solver
from .entry import Info
from .ode.ddim import DDIM
from .ode.deis import DEIS, RhoAB
from .ode.dpm_multistep import DPMSolverMultistep, LogRhoDEIS
from .ode.dpm_singlestep import DPMSolverSinglestep
from .ode.ipndm import IPNDM
from .ode.reversible import Reversible
from .ode.runge_kutta import Euler, Heun, RhoRK
from .ode.tableaus import TABLEAUS
from .ode.unipc import UniPC
from .ode.velocity import AdamsBashforth, AdamsMoulton, VelocityRK
from .registry import get, info, names, plan
from .rows import Row, Rows
from .sde.ddpm import DDPM

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "IPNDM",
    "TABLEAUS",
    "AdamsBashforth",
    "AdamsMoulton",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "Euler",
    "Heun",
    "Info",
    "LogRhoDEIS",
    "Reversible",
    "RhoAB",
    "RhoRK",
    "Row",
    "Rows",
    "Solver",
    "UniPC",
    "VelocityRK",
    "get",
    "info",
    "names",
    "plan",
]
