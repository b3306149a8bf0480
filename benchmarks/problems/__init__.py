# SPDX-License-Identifier: Apache-2.0
"""Networks, plans and registers that the benchmarks measure, free of rivals."""
