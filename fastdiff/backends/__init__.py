# SPDX-License-Identifier: Apache-2.0
"""The backends by name: which there are, which run here, and which one serves a run.

`torch` is the reference and runs everywhere; `cpu` is the compiled core and `cuda` its CUDA part;
`triton` runs on GPUs too. Where several can serve, a table of measured times decides if there is
one, and the order of the names if there is none: see `choice`.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch as _torch

from .._text import unknown
from ..plans import Layout
from . import choice
from .base import Backend, BoundStage, Registers
from .choice import LARGE, Table
from .cpu import CpuBackend
from .cuda import CudaBackend
from .torch import TorchBackend
from .triton import TritonBackend

__all__ = [
    "LARGE",
    "Backend",
    "BoundStage",
    "Registers",
    "Table",
    "choose",
    "get",
    "measure",
    "names",
    "rivals",
    "status",
    "table",
]

_REFERENCE = TorchBackend()
# For each device first the one that serves where nothing was measured.
_BACKENDS: dict[str, Backend] = {
    b.name: b for b in (CpuBackend(), CudaBackend(), TritonBackend(), _REFERENCE)
}
_warned = False


def names() -> tuple[str, ...]:
    """The names that `get` and `backend=` take."""
    return tuple(_BACKENDS)


def get(name: str) -> Backend:
    """The backend of that name, whether or not it runs here.

    Raises:
        ValueError: There is none of that name.
    """
    if not isinstance(name, str) or name not in _BACKENDS:
        raise unknown("backends.get", "backend", name, _BACKENDS)
    return _BACKENDS[name]


def status() -> dict[str, str]:
    """For every backend "available", or what is missing and how to get it."""
    return {name: backend.missing() or "available" for name, backend in _BACKENDS.items()}


def choose(
    name: str | None,
    state: _torch.dtype,
    network: _torch.dtype,
    device: _torch.device,
    layout: Layout | None = None,
    *,
    noisy: bool = False,
    elements: int | None = None,
) -> Backend:
    """The backend for a run.

    Args:
        name: A backend's name, or None for the fastest that can serve.
        state: Dtype of the registers.
        network: Dtype of the network's inputs and outputs.
        device: Where the registers lie.
        layout: Columns of the table; None asks for the dtypes and the device alone.
        noisy: Whether rows draw noise.
        elements: Of the state; None asks for no measured choice.

    Returns:
        The named backend. For None the fastest of `cpu`, `cuda` and `triton` that can serve: by the
        table for the device where there is one (`table`), else the first of them. None of them:
        `torch`. Where only something missing is in the way of them all, that is said once, as a
        warning.

    Raises:
        ValueError: There is no backend of that name, or FASTDIFF_CHOOSE is none of its values.
        RuntimeError: The named backend does not run here.
        NotImplementedError: It does not serve these dtypes, this device or the layout; the error
            names those that do.
    """
    if name is not None:
        return _named(name, state, network, device, layout)
    lacking: tuple[str, str] | None = None
    found: list[str] = []
    for backend in _BACKENDS.values():
        if _serves(backend, state, network, device, layout):
            missing = backend.missing()
            if missing is None:
                found.append(backend.name)
            else:
                lacking = lacking or (backend.name, missing)
    if not found:
        raise AssertionError("the torch backend serves everything")
    if found[0] == _REFERENCE.name and lacking is not None:
        _warn(*lacking)
    compiled = [each for each in found if each != _REFERENCE.name]
    if elements is not None and len(compiled) > 1:
        known = _table(device)
        cell = choice.cell_of(state, noisy, elements)
        fastest = None if known is None else known.fastest(cell, compiled)
        if fastest is not None:
            return _BACKENDS[fastest]
    return _BACKENDS[found[0]]


def _named(
    name: str,
    state: _torch.dtype,
    network: _torch.dtype,
    device: _torch.device,
    layout: Layout | None,
) -> Backend:
    backend = get(name)
    missing = backend.missing()
    if missing is not None:
        raise RuntimeError(f'backend="{name}": it does not run here; {missing}.')
    reason = backend.supports(state, network, device, layout)
    if reason is not None:
        serving = [
            n
            for n, b in _BACKENDS.items()
            if b.missing() is None and _serves(b, state, network, device, layout)
        ]
        raise NotImplementedError(f'backend="{name}": {reason}. Use one of: {", ".join(serving)}.')
    return backend


# -- by measurement --------------------------------------------------------------------------------


def rivals(device: _torch.device) -> list[str]:
    """The backends between which there is a choice on a device, in the order of their names."""
    return [
        backend.name
        for backend in _BACKENDS.values()
        if backend is not _REFERENCE
        and _serves(backend, _torch.float32, _torch.float32, device, None)
        and backend.missing() is None
    ]


def table(device: _torch.device) -> Table | None:
    """The measured times that decide on a device; None where the order of the names does.

    The user's file is read once a process, and then what comes with the package. A file that
    cannot be read is said once, as a warning, and not used. `FASTDIFF_CHOOSE=name` is not asked.
    """
    return choice.TABLES.of(_numbered(device))


def measure(
    device: _torch.device,
    path: str | os.PathLike[str] | None = None,
    timer: choice.Timer | None = None,
) -> Table | None:
    """Measures which backend serves fastest on a device, and keeps the times for `choose`.

    It compiles kernels and takes seconds. Runs that have chosen a backend keep theirs; backends
    give the same bits, so a later choice changes nothing but the time.

    Args:
        device: Where. Something else should not be running there.
        path: The file that keeps the times. None: the user's, in FASTDIFF_CACHE or where the
            system keeps caches.
        timer: `timer(call, device)` gives the seconds of a call. None: replays of a graph of it.

    Returns:
        The times; None where there are no two backends to choose from, and nothing was measured.

    Raises:
        OSError: The file cannot be written. The times serve this process all the same.
    """
    device = _numbered(device)
    names = rivals(device)
    if len(names) < 2:
        return None
    found = choice.measured(device, [_BACKENDS[name] for name in names], timer)
    choice.TABLES.keep(device, found, None if path is None else Path(path))
    return found


def _table(device: _torch.device) -> Table | None:
    """The table for a device, measured where that is asked for, can be done and was not done."""
    if choice.asked() == "name":
        return None
    with choice.TABLES.lock:  # of several threads the first measures
        known = table(device)
        if known is None and choice.asked() == "measure" and choice.can_measure(device):
            try:
                known = measure(device)
            except OSError as error:
                choice.TABLES.warn(
                    f"fastdiff: the times of the backends cannot be kept ({error}), and are "
                    "measured in every process. FASTDIFF_CACHE names another folder."
                )
                known = table(device)
    return known


def _numbered(device: _torch.device) -> _torch.device:
    device = _torch.device(device)
    if str(device) == "cuda":
        return _torch.device("cuda", _torch.cuda.current_device())
    return device


def _serves(
    backend: Backend,
    state: _torch.dtype,
    network: _torch.dtype,
    device: _torch.device,
    layout: Layout | None,
) -> bool:
    """Whether a backend is one to choose or to recommend."""
    if isinstance(backend, TritonBackend) and device.type == "cpu":
        return False  # its interpreter is for tests
    return backend.supports(state, network, device, layout) is None


def _warn(name: str, missing: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f'fastdiff: backend="{name}" would be faster and does not run here; {missing}. '
            'Until then torch serves; backend="torch" silences this.',
            RuntimeWarning,
            stacklevel=3,
        )
