# SPDX-License-Identifier: Apache-2.0
"""Solvers: the base class, the families and the registry of names."""

from .base import Solver
from .distilled import LCM, TCD, Consistency, NStepStochastic, Progressive
from .embedded import Embedded, EmbeddedRK
from .embedded_dpm import EmbeddedDPM
from .entry import Info
from .ode.ddim import DDIM
from .ode.deis import DEIS, RhoAB
from .ode.dpm_multistep import DPMSolverMultistep, LogRhoDEIS
from .ode.dpm_singlestep import DPMSolverSinglestep
from .ode.dpm_v3 import DPMSolverV3
from .ode.gradient_estimation import GradientEstimation
from .ode.ipndm import IPNDM
from .ode.lms import IPNDMV, LMS
from .ode.pndm import PNDM
from .ode.res import ExponentialHeun, RESMultistep, RESSinglestep
from .ode.reversible import Reversible
from .ode.runge_kutta import Euler, Heun, RhoRK
from .ode.tableaus import TABLEAUS
from .ode.unipc import UniPC
from .ode.velocity import AdamsBashforth, AdamsMoulton, VelocityRK
from .registry import adaptive_info, adaptive_names, get, info, names, plan
from .rows import Row, Rows
from .sde.ddpm import DDPM
from .sde.restart import Recurrence, Restart
from .statistics import ModelStatistics

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "IPNDM",
    "IPNDMV",
    "LCM",
    "LMS",
    "PNDM",
    "TABLEAUS",
    "TCD",
    "AdamsBashforth",
    "AdamsMoulton",
    "Consistency",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "DPMSolverV3",
    "Embedded",
    "EmbeddedDPM",
    "EmbeddedRK",
    "Euler",
    "ExponentialHeun",
    "GradientEstimation",
    "Heun",
    "Info",
    "LogRhoDEIS",
    "ModelStatistics",
    "NStepStochastic",
    "Progressive",
    "RESMultistep",
    "RESSinglestep",
    "Recurrence",
    "Restart",
    "Reversible",
    "RhoAB",
    "RhoRK",
    "Row",
    "Rows",
    "Solver",
    "UniPC",
    "VelocityRK",
    "adaptive_info",
    "adaptive_names",
    "get",
    "info",
    "names",
    "plan",
]
