# SPDX-License-Identifier: Apache-2.0
"""`fastdiff doctor`: what runs on this machine."""

from __future__ import annotations

import os
import platform

import click
import torch

import fastdiff as fd

from .errors import say
from .shared import columns


@click.command()
def doctor() -> None:
    """Say which backends run here, what the others need, and the versions that matter."""
    rows = [["backend", "here"], *map(list, fd.backends.status().items())]
    say(columns(rows))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = [
        ["fastdiff", fd.__version__],
        ["torch", torch.__version__],
        ["python", platform.python_version()],
        ["platform", platform.platform()],
        ["cuda devices", ", ".join(devices) or "none"],
        ["threads", str(torch.get_num_threads())],
    ]
    versions += [
        [name, value] for name, value in sorted(os.environ.items()) if name.startswith("FASTDIFF_")
    ]
    say("\n" + columns(versions))
