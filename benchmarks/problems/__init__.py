# SPDX-License-Identifier: Apache-2.0
"""Networks and flows that the benchmarks measure beside the library's own, free of rivals."""
