# SPDX-License-Identifier: Apache-2.0
"""Records to Markdown and pictures: one module a benchmark, none of which measures anything."""
