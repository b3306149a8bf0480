# SPDX-License-Identifier: Apache-2.0
"""Where a number comes from: the commit, the versions, the processor and the device."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastdiff as fd

VERSION = "version"  # what stands before a version where no commit is known
KIB, MIB, GIB = 2**10, 2**20, 2**30


@functools.cache
def commit() -> tuple[str, bool]:
    """The hash of HEAD, and whether the tree differs from it.

    Where this file is under no version control, as in an installed package, no commit is known:
    the version stands in its place, as ("version 0.1", False).
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(here.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # an environment may lie inside a tree of somebody else's, whose commit says nothing here
    tracked = git("ls-files", "--error-unmatch", here.name) is not None
    head = git("rev-parse", "--short=12", "HEAD") if tracked else None
    if head is None:
        return f"{VERSION} {fd.__version__}", False
    # results are what a run writes: they do not make the measured code another one
    left_out = (f":(top,exclude){name}" for name in ("benchmarks/results", "docs"))
    changes = git("status", "--porcelain", "--", ":/", *left_out)
    return head, changes != ""


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Python, torch, NumPy, fastdiff and, where it is installed, diffusers."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "fastdiff": fd.__version__,
    }
    try:
        found["diffusers"] = importlib.metadata.version("diffusers")
    except importlib.metadata.PackageNotFoundError:
        found["diffusers"] = "none"
    return found


@functools.cache
def processor() -> str:
    """The name of the CPU, with its family and model number where the system says them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^([a-z ]+?)\s*: (.*)$", text, re.MULTILINE))
    name = found.get("model name", platform.machine()).strip()
    if "cpu family" in found:
        name += f" (family {found['cpu family']}, model {found.get('model', '?')})"
    return name


@functools.cache
def driver() -> str:
    """The version of NVIDIA's driver, as nvidia-smi says it; "unknown" without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = done.stdout.split() if done.returncode == 0 else []
    return lines[0] if lines else "unknown"


def cores() -> int:
    """The number of logical processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def machine(device: torch.device) -> dict[str, Any]:
    """What a record says of the device beside what all records say."""
    found: dict[str, Any] = {"device": device.type}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["driver"] = driver()
        found["cuda"] = torch.version.cuda
        try:
            found["triton"] = __import__("triton").__version__
        except ImportError:
            found["triton"] = "none"
    return found


def cache_bytes(device: torch.device) -> int:
    """The size of the last cache; a guess where the system does not say it."""
    if device.type == "cuda":
        known = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        return int(known) or 64 * MIB
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii")
        return int(text.strip().removesuffix("K")) * KIB
    except (OSError, ValueError):
        return 32 * MIB


def free_bytes(device: torch.device) -> int:
    """About how much memory can be had."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.partition("MemAvailable:")[2].split()[0]) * KIB
    except (OSError, ValueError, IndexError):
        return 4 * GIB
