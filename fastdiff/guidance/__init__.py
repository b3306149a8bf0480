# SPDX-License-Identifier: Apache-2.0
"""Guidance: how the outputs of several branches of a network become one."""

from .base import UNGUIDED, Guidance, combine, guided_rows
from .cfg import CFG

__all__ = ["CFG", "UNGUIDED", "Guidance", "combine", "guided_rows"]
