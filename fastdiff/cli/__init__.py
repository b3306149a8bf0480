# SPDX-License-Identifier: Apache-2.0
"""The command line: draw samples, compare solvers, print plans, list what there is, time it.

Importing this package needs nothing that the library does not need. The commands need click and
the other packages of the extra `cli`; where one is missing, `main` says so in a sentence.
"""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    """Runs the command that the process was started with; the entry point `fastdiff`."""
    try:
        app = importlib.import_module("fastdiff.cli.app")
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        sys.exit(
            "error: fastdiff: the command line needs click; it is not installed. "
            'Run: pip install "fastdiff-engine[cli]"'
        )
    app.commands()
