# SPDX-License-Identifier: Apache-2.0
"""Noise schedules: alpha(t), sigma(t) and everything that follows from them, in float64."""

from .base import PREDICTIONS, Schedule, Traits, prediction_name
from .base import Array as Array
from .custom import Custom
from .discrete import VPDiscrete
from .edm import EDM, VE
from .files import from_dict
from .flow import FlowMatching
from .vp import VPCosine, VPLinear

__all__ = [
    "EDM",
    "PREDICTIONS",
    "VE",
    "Custom",
    "FlowMatching",
    "Schedule",
    "Traits",
    "VPCosine",
    "VPDiscrete",
    "VPLinear",
    "from_dict",
    "prediction_name",
]
