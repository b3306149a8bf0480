# SPDX-License-Identifier: Apache-2.0
"""Microbenchmarks of stages, loops, noise and gradients, and the harness that they share.

`fastdiff bench` is the command. Rivals take turns, nothing is timed before they agree, and every
number is a line of JSON with its machine, versions and commit. `benchmarks/` in the source tree
holds other people's samplers over this same harness. Importing `fastdiff` imports none of it.
"""
