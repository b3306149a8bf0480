# SPDX-License-Identifier: Apache-2.0
"""The backends by name: which there are, which run here, and which one serves a run.

`torch` is the reference and runs everywhere; `cpu` is the compiled core and `cuda` its CUDA part;
`triton` runs on GPUs too.
"""

from __future__ import annotations

import warnings

import torch as _torch

from .._text import unknown
from ..plans import Layout
from .base import Backend, BoundStage, Registers
from .cpu import CpuBackend
from .cuda import CudaBackend
from .torch import TorchBackend
from .triton import TritonBackend

__all__ = ["Backend", "BoundStage", "Registers", "choose", "get", "names", "status"]

_REFERENCE = TorchBackend()
# For each device the fastest first.
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
) -> Backend:
    """The backend for a run.

    Args:
        name: A backend's name, or None for the fastest that can serve.
        state: Dtype of the registers.
        network: Dtype of the network's inputs and outputs.
        device: Where the registers lie.
        layout: Columns of the table; None asks for the dtypes and the device alone.

    Returns:
        The named backend; for None the first of `cpu`, `cuda` and `triton` that can serve, else
        `torch`. Where only something missing is in the way of them all, that is said once, as a
        warning.

    Raises:
        ValueError: There is no backend of that name.
        RuntimeError: The named backend does not run here.
        NotImplementedError: It does not serve these dtypes, this device or the layout; the error
            names those that do.
    """
    if name is not None:
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
            raise NotImplementedError(
                f'backend="{name}": {reason}. Use one of: {", ".join(serving)}.'
            )
        return backend
    lacking: tuple[str, str] | None = None
    for backend in _BACKENDS.values():
        if _serves(backend, state, network, device, layout):
            missing = backend.missing()
            if missing is None:
                if lacking is not None and backend is _REFERENCE:
                    _warn(*lacking)
                return backend
            lacking = lacking or (backend.name, missing)
    raise AssertionError("the torch backend serves everything")


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
