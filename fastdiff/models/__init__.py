# SPDX-License-Identifier: Apache-2.0
"""Models to sample from: exact ones in closed form, and a small trained one with its weights."""

from .digits import (
    DigitsClassifier,
    DigitsDiT,
    digits,
    digits_classifier,
    digits_data,
)
from .empirical import EmpiricalDenoiser
from .mixture import ExactModel, GaussianMixture

__all__ = [
    "DigitsClassifier",
    "DigitsDiT",
    "EmpiricalDenoiser",
    "ExactModel",
    "GaussianMixture",
    "digits",
    "digits_classifier",
    "digits_data",
]
