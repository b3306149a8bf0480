# SPDX-License-Identifier: Apache-2.0
"""Graph capture: a whole sampling loop, or one stage of it, recorded once and launched as one."""

from ..engine.recordings import capturing
from .cache import Captures, Entry
from .cuda import CAPTURERS, Capturer
from .options import Graph, Stats, graph_of
from .refusals import CaptureRefused, CaptureTooLarge

__all__ = [
    "CAPTURERS",
    "CaptureRefused",
    "CaptureTooLarge",
    "Capturer",
    "Captures",
    "Entry",
    "Graph",
    "Stats",
    "capturing",
    "graph_of",
]
