# SPDX-License-Identifier: Apache-2.0
"""`python -m fastdiff.cli` is the command `fastdiff`."""

from . import main

main()
