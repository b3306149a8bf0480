# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: timing in turns, gates, records, machines, tables and the runner."""
