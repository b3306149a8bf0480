# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, imported as `fastdiff.kernels`.

One job a file; each kernel has a reference in `fastdiff.backends` that it is tested against.
Importing this package imports no kernel, needs no triton and never raises: Hugging Face has a
package of the same top-level name, `kernels`, and with the repository root on `sys.path` its
users find this folder instead.
"""

from typing import NoReturn

__all__: list[str] = []


def __getattr__(name: str) -> NoReturn:
    if __name__ == "fastdiff.kernels" or name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}: this is fastdiff's kernels folder "
        f"({__file__}), found on sys.path in place of the package `kernels`. Remove fastdiff's "
        "repository root from sys.path, or run from another folder."
    )
