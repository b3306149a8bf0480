# SPDX-License-Identifier: Apache-2.0
"""Solvers of the probability-flow ODE, one family a file, each with its list `SOLVERS`."""
