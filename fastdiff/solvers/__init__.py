# SPDX-License-Identifier: Apache-2.0
"""Solvers: the base class, the families and the registry of names."""

from .base import Solver
from .entry import Info
from .ode.ddim import DDIM
from .ode.deis import DEIS, RhoAB
from .ode.dpm_multistep import DPMSolverMultistep, LogRhoDEIS
from .ode.dpm_singlestep import DPMSolverSinglestep
from .ode.dpm_v3 import DPMSolverV3
from .ode.ipndm import IPNDM
from .ode.reversible import Reversible
from .ode.runge_kutta import TABLEAUS, Euler, Heun, RhoRK
from .registry import get, info, names, plan
from .rows import Row, Rows
from .sde.ddpm import DDPM
from .statistics import ModelStatistics

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "IPNDM",
    "TABLEAUS",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "DPMSolverV3",
    "Euler",
    "Heun",
    "Info",
    "LogRhoDEIS",
    "ModelStatistics",
    "Reversible",
    "RhoAB",
    "RhoRK",
    "Row",
    "Rows",
    "Solver",
    "get",
    "info",
    "names",
    "plan",
]
