# SPDX-License-Identifier: Apache-2.0
"""The library's solvers with 50 digits: their own code, over numbers of mpmath.

`precise()` puts into every module of `fastdiff.solvers` and `fastdiff.schedules` a numpy, a math
and a float that keep the digits of mpmath. What rounds to float64 on the way raises. Quadrature
rules get twice the nodes, so that a rule with too few differs from them. Formulas are checked
elsewhere, by orders and against published samples; here the arithmetic is.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import types
from unittest import mock

import mpmath
import numpy as np

DIGITS = 50
context = mpmath.MPContext()
context.dps = DIGITS
Number = context.mpf


def _refuse(self):
    raise TypeError("a number of 50 digits is rounded to float64 here")


def _called(self, function):
    return function(self)


Number.__float__ = _refuse
for _name in ("exp", "expm1", "log", "log1p", "sqrt", "sin", "cos", "tan"):  # as numpy calls them
    setattr(Number, _name, functools.partialmethod(_called, getattr(context, _name)))
Number.hypot = lambda self, other: context.hypot(self, other)


def number(value):
    """A number, or an array of numbers, with 50 digits; what is no number stays."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "f" and value.dtype != object:
            return value
        return np.array([number(v) for v in value.ravel()], dtype=object).reshape(value.shape)
    if isinstance(value, (list, tuple)):
        return number(np.array([number(v) for v in value], dtype=object))
    if isinstance(value, float | str):
        return Number(float(value)) if value in ("inf", "-inf", "nan") else Number(value)
    return value


def _scalar(value):
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


class Shim(types.SimpleNamespace):
    """A module whose functions are replaced by name; the others are its own."""

    def __init__(self, module, **replaced):
        super().__init__(**replaced)
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


def _each(function):
    """A function of numbers, over arrays as well."""
    return np.frompyfunc(function, 1, 1)


def _made(maker):
    """A function that makes arrays, which hold numbers of 50 digits."""

    def make(*arguments, dtype=None, **options):
        if dtype in (int, bool, np.intp, np.int64):
            return maker(*arguments, dtype=dtype, **options)
        return number(np.asarray(maker(*arguments, **options)))

    return make


def _truth(function):
    return lambda x: np.frompyfunc(lambda v: bool(function(v)), 1, 1)(x) + np.False_


def _linspace(start, stop, num=50, endpoint=True):
    steps = num - 1 if endpoint else num
    start, stop = number(start), number(stop)
    return np.array([start + (stop - start) * k / steps for k in range(num)], dtype=object)


def _where(condition, *choices):
    found = np.where(condition, *choices)
    return number(found) if choices else found


def _leggauss(n):
    """Gauss-Legendre of twice the nodes."""
    n = 2 * n
    if n not in _RULES:
        guesses, _ = np.polynomial.legendre.leggauss(n)
        nodes, weights = [], []
        for guess in guesses.tolist():
            x = Number(guess)
            for _ in range(5):
                p, q = Number(1), x
                for k in range(1, n):
                    p, q = q, ((2 * k + 1) * x * q - k * p) / (k + 1)
                slope = n * (x * q - p) / (x * x - 1)
                x -= q / slope
            nodes.append(x)
            weights.append(2 / ((1 - x * x) * slope**2))
        _RULES[n] = np.array(nodes, dtype=object), np.array(weights, dtype=object)
    return _RULES[n]


_RULES: dict = {}


def _solve(matrix, right):
    solved = context.lu_solve(context.matrix(matrix.tolist()), context.matrix(right.tolist()))
    return np.array(list(solved), dtype=object).reshape(np.shape(right))


def _logaddexp(a, b):
    a, b = np.maximum(a, b), np.minimum(a, b)
    return a + np.log1p(np.exp(b - a))


NUMPY = Shim(
    np,
    array=_made(np.array),
    asarray=_made(np.asarray),
    zeros=_made(np.zeros),
    ones=_made(np.ones),
    empty=_made(np.zeros),
    full=_made(np.full),
    eye=_made(np.eye),
    zeros_like=_made(np.zeros_like),
    ones_like=_made(np.ones_like),
    linspace=_linspace,
    where=_where,
    isfinite=_truth(context.isfinite),
    isinf=_truth(context.isinf),
    isnan=_truth(context.isnan),
    logaddexp=_logaddexp,
    pi=+context.pi,
    inf=Number("inf"),
    linalg=Shim(np.linalg, solve=_solve),
    polynomial=Shim(np.polynomial, legendre=Shim(np.polynomial.legendre, leggauss=_leggauss)),
)


def _math(function):
    return lambda x: function(_scalar(x))


MATH = Shim(
    math,
    **{name: _math(getattr(context, name)) for name in ("exp", "expm1", "log", "log1p", "sqrt")},
    **{name: _math(getattr(context, name)) for name in ("sin", "cos", "tan", "isfinite", "isinf")},
    isnan=_math(context.isnan),
    ceil=lambda x: int(context.ceil(_scalar(x))),
    floor=lambda x: int(context.floor(_scalar(x))),
    fsum=lambda values: sum(values, Number(0)),
    pi=+context.pi,
    inf=Number("inf"),
)


def _float(value):
    return number(_scalar(value)) if not isinstance(value, int) else Number(value)


@contextlib.contextmanager
def precise():
    """A scope in which solvers and schedules calculate with 50 digits."""
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith(("fastdiff.solvers", "fastdiff.schedules")):
                for word, value in (("np", NUMPY), ("math", MATH), ("float", _float)):
                    if word == "float" or hasattr(module, word):
                        stack.enter_context(mock.patch.object(module, word, value, create=True))
        yield
