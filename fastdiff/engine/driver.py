# SPDX-License-Identifier: Apache-2.0
"""The one question to NVIDIA's driver that PyTorch does not pass on: which capture a stream is in.

The driver is a library of C functions that is there wherever a CUDA device is. It is asked through
ctypes, so that nothing has to be compiled.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Hashable

_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE

Info = Callable[..., int]


@functools.cache
def _info() -> Info | None:
    """The driver's cuStreamGetCaptureInfo_v2; None where there is no driver that has it."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        info = driver.cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
    # the stream, where its status and its id go, and three results that may be left out
    info.argtypes = [ctypes.c_void_p] * 6
    info.restype = ctypes.c_int
    return info


def capture_id(stream: int) -> Hashable:
    """What tells the capture of a stream that is capturing from every other of the process.

    Args:
        stream: The stream's address, as `torch.cuda.Stream.cuda_stream` says it.

    Returns:
        The driver's number; where it cannot be asked, an object that equals no other, so that
        nobody takes two captures for one.
    """
    info = _info()
    if info is None:
        return object()
    status, number = ctypes.c_int(0), ctypes.c_uint64(0)
    failed = info(stream, ctypes.addressof(status), ctypes.addressof(number), None, None, None)
    if failed or status.value != _ACTIVE:
        return object()
    return number.value
