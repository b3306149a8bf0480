# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled core; everything else stands in pyproject.toml."""

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError, PlatformError


class BuildCore(build_ext):
    """Says in one sentence what is missing where there is no compiler."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except (CompileError, PlatformError) as error:
            raise SystemExit(
                "fastdiff: the compiled core needs a C++17 compiler (g++ 11 or newer) and Python's "
                f"headers; got: {error}. On Debian and Ubuntu: apt install g++ python3-dev"
            ) from None


# No -march=native: the instruction set is chosen at run time. No contraction, no fast-math: every
# fused multiply-add is written out, so that all backends round alike.
core = Pybind11Extension(
    "fastdiff._native",
    [f"csrc/{name}.cpp" for name in ("bindings", "cpu", "cpu_avx2", "cpu_avx512")],
    depends=[f"csrc/{name}.h" for name in ("cpu", "cpu_kernels", "philox", "stage")],
    cxx_std=17,
    extra_compile_args=[
        *("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"),
        *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"),
    ],
    extra_link_args=["-fopenmp"],
)

ParallelCompile("FASTDIFF_BUILD_JOBS").install()
setup(ext_modules=[core], cmdclass={"build_ext": BuildCore})
