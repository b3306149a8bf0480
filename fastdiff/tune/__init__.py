# SPDX-License-Identifier: Apache-2.0
"""What is learned about a network to sample it better: statistics for DPM-Solver-v3."""

from .ems import ems
from .statistics import Statistics

__all__ = ["Statistics", "ems"]
