# SPDX-License-Identifier: Apache-2.0
"""Solvers of the reverse SDE, one family a file, each with its list `SOLVERS`."""
