# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled core, and the CUDA part where there is an nvcc; see docs/kernels.md."""

import os
import shutil
import sysconfig
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.errors import CompileError, ExecError, PlatformError

NVCC = shutil.which("nvcc")
FORCED = os.environ.get("FASTDIFF_CUDA", "")  # "1": a build without CUDA fails; "0": none is tried
ARCHS = os.environ.get("FASTDIFF_CUDA_ARCHS", "80,90,100")


def files(*patterns: str) -> list[str]:
    """The files of the tree, beside this one, that the patterns name."""
    here = Path(__file__).resolve().parent
    found = [p.relative_to(here).as_posix() for pattern in patterns for p in here.glob(pattern)]
    return sorted(found)


# No -march=native: the instruction set is chosen at run time. No contraction, no fast-math: every
# fused multiply-add is written out, so that all backends round alike.
core = Pybind11Extension(
    "fastdiff._native",
    ["csrc/bindings/native.cpp", *files("csrc/cpu/*.cpp")],
    depends=files("csrc/*.h", "csrc/bindings/*.h", "csrc/cpu/*.h"),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=[
        *("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"),
        *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"),
    ],
    extra_link_args=["-fopenmp"],
)
# Optional: its absence is said and costs nothing but the CUDA backend.
cuda = Extension(
    "fastdiff._cuda",
    [*files("csrc/cuda/*.cu", "csrc/cuda/*.cpp"), "csrc/bindings/cuda.cpp"],
    depends=files("csrc/*.h", "csrc/bindings/*.h", "csrc/cuda/*.h"),
    optional=FORCED != "1",
)


class Build(build_ext):
    """Says in one sentence what is missing where there is no compiler; runs nvcc."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except (CompileError, PlatformError) as error:
            raise SystemExit(
                "fastdiff: the compiled core needs a C++17 compiler (g++ 11 or newer) and Python's "
                f"headers; got: {error}. On Debian and Ubuntu: apt install g++ python3-dev"
            ) from None

    def build_extension(self, ext: Extension) -> None:
        if ext is not cuda:
            super().build_extension(ext)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.spawn(nvcc_command(target))
        except ExecError as error:
            advice = (
                f"fastdiff: the CUDA part was not built: {error}. nvcc's words stand above; a host "
                "compiler that it accepts can be named as NVCC_CCBIN=g++-13, architectures as "
                "FASTDIFF_CUDA_ARCHS=80,90; FASTDIFF_CUDA=0 leaves it out."
            )
            if FORCED == "1":
                raise SystemExit(advice) from None
            print(advice)


def nvcc_command(target: Path) -> list[str]:
    """One call compiles for every architecture, and links the CUDA runtime in.

    The last architecture comes as PTX too, which newer devices compile for themselves. Products and
    sums are never fused but where it is written.
    """
    archs = ARCHS.replace(",", " ").split()
    if not archs or not all(arch.rstrip("af").isdigit() for arch in archs):
        raise SystemExit(
            f'fastdiff: FASTDIFF_CUDA_ARCHS is a list like "80,90,100"; got {ARCHS!r}.'
        )
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return [
        *(str(NVCC), "-shared", "-o", str(target), *cuda.sources),
        f"-DFASTDIFF_CUDA_ARCHS={'_'.join(archs)}",  # nvcc takes a comma for two macros
        *("-Icsrc", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"),
        *("-std=c++17", "-O3", "--fmad=false", "-cudart", "static", "-t", "0", *code),
        *("-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off,-g0", "-Xlinker", "-s"),
    ]


def extensions() -> list[Extension]:
    if FORCED not in ("", "0", "1"):
        raise SystemExit(f'fastdiff: FASTDIFF_CUDA is "0", "1" or not set; got {FORCED!r}.')
    if FORCED == "1" and NVCC is None:
        raise SystemExit(
            "fastdiff: FASTDIFF_CUDA=1 needs nvcc, CUDA 12.8 or newer; none is on PATH. Install "
            "the CUDA toolkit, or add its bin folder: PATH=/usr/local/cuda/bin:$PATH"
        )
    return [core] if FORCED == "0" or NVCC is None else [core, cuda]


ParallelCompile("FASTDIFF_BUILD_JOBS").install()
setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
