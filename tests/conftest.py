# SPDX-License-Identifier: Apache-2.0
"""What every test stands on: Triton's interpreter without a GPU, fixed seeds, one thread."""

import os
import random

import numpy as np
import pytest
import torch

HAS_CUDA = torch.cuda.is_available()

# Read by triton when it is imported, which no test has done yet and `import torch` does not do.
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

# Tensors here are small, and threads that wait for each other are slow on a busy machine. Tests
# about threads set their own number.
torch.set_num_threads(1)

from support.core import INSTRUCTION_SETS, native  # noqa: E402  (after triton's environment)
from support.gpu import PYTORCHS_OWN, device, host_core, usable  # noqa: E402, F401
from support.recorder import Recorder  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--many",
        type=int,
        default=1,
        metavar="N",
        help="N times as many random plans in the differential tests, for a night",
    )


@pytest.fixture
def many(request: pytest.FixtureRequest) -> int:
    """The factor by which differential tests take more cases."""
    return request.config.getoption("--many")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        for item in items:
            if item.get_closest_marker("gpu"):
                for allowed in PYTORCHS_OWN:
                    item.add_marker(pytest.mark.filterwarnings(allowed))
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Random numbers that a test did not seed are the same in every run and in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    """Each instruction set that the compiled core has on this machine, in use."""
    before = native.instruction_set()
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set(before)


@pytest.fixture
def recorder(monkeypatch):
    """A capturer for CPU tensors that does again what it records; see support/recorder.py."""
    from fastdiff import capture
    from fastdiff.engine import streams

    made = Recorder()
    monkeypatch.setitem(capture.CAPTURERS, "cpu", made)
    monkeypatch.setitem(streams.STREAMS, "cpu", made)
    return made
