# SPDX-License-Identifier: Apache-2.0
"""What several test files share; pytest puts tests/ on the path, so `from support import rows`."""
