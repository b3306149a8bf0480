# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for a run that may be killed at any time, on a device that a test may break.

    PYTHONPATH=tests python -m pytest -p support.at_once --test-seconds 45 -n 8 -m gpu

- A failure is printed with its traceback when it happens, and not again at the end.
- An error that stays in a CUDA context (an illegal address, say) fails whatever its process does
  next. A worker of pytest-xdist that finds its context broken after a test ends itself, and xdist
  starts another for the tests that are left; without xdist the run ends there. xdist reports the
  test once more as one whose worker crashed.
- A test that takes longer than `--test-seconds` ends its process, after the tracebacks of all
  threads; 0 lets it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Iterator

import pytest

BROKEN, _STDERR = 70, pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--test-seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="a test that takes longer ends its process, after all tracebacks; 0: none does",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STDERR] = os.dup(2)  # that of the process: fd 2 is a file while a test runs


def broken() -> str | None:
    """Why the CUDA context of this process can serve no further test; None where it can."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    config = item.config
    seconds = getattr(config.option, "test_seconds", 0.0)
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True, file=config.stash[_STDERR])
    try:
        result = yield
    finally:
        if seconds:
            faulthandler.cancel_dump_traceback_later()
    why = broken()
    if why is not None:
        said = f"{item.nodeid} left a CUDA context that serves no further test: {why}"
        if hasattr(config, "workerinput"):
            os.write(config.stash[_STDERR], f"{said}\n".encode())
            os._exit(BROKEN)  # the reports of the test are with the controller by now
        pytest.exit(said, BROKEN)
    return result


class Printer:
    """Prints every failure when it is reported, in the process that shows the results."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._print(f"FAILED {report.nodeid} ({report.when})", report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._print(f"FAILED {report.nodeid} (collect)", report)

    def pytest_sessionfinish(self) -> None:
        self.config.option.tbstyle = "no"  # what was printed is not printed again

    def _print(self, head: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        shown = self.config.pluginmanager.get_plugin("terminalreporter")
        shown.ensure_newline()
        for line in (head, *report.longreprtext.splitlines()):
            shown.write_line(line)
        shown.flush()


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.pluginmanager.has_plugin("terminalreporter"):  # a worker of xdist has none
        session.config.pluginmanager.register(Printer(session.config))
