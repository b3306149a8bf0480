# SPDX-License-Identifier: Apache-2.0
"""Pieces of torch.cuda that keep its books without a device: graphs, pools, modes, generators."""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """Counts operations, which stand for launches."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += 1
        return function(*arguments, **(keywords or {}))


class Stream:
    def __init__(self, device=None):
        self.waited = 0

    def wait_stream(self, other):
        pass

    def synchronize(self):
        self.waited += 1


class Generator:
    """A device's generator: it stands at an offset."""

    def __init__(self):
        self.offset = 0

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset


class FakeCuda:
    """What PyTorch's allocators and graphs hold, and what was said to them.

    Args:
        ends_pools: Whether the end of a broken capture ends both allocators' pools, as from 2.12
            on.
    """

    def __init__(self, monkeypatch, ends_pools):
        self.ends_pools = ends_pools
        self.device_pools, self.host_pools = set(), set()  # in which allocators record
        self.users = {}  # of pools
        self.broken = False
        self.mode, self.modes = 0, []
        self.current = Stream()
        self.generators = [Generator()]
        self.pools = 0
        fake = self

        class Graph:
            def __init__(self):
                self.ended = False

            def capture_begin(self, pool=(0, 0), capture_error_mode="", **_):
                fake.users[pool] = fake.users.get(pool, 0) + 1
                if pool in fake.device_pools or pool in fake.host_pools:
                    raise RuntimeError("beginAllocateToPool: already recording to pool_id")
                fake.device_pools.add(pool)
                fake.host_pools.add(pool)
                self.pool, self.spy = pool, Launches()
                self.spy.__enter__()

            def capture_end(self):
                self.spy.__exit__(None, None, None)
                broken, fake.broken = fake.broken, False
                if fake.ends_pools or not broken:
                    fake.device_pools.discard(self.pool)
                    fake.host_pools.discard(self.pool)
                if broken:
                    raise RuntimeError("operation failed due to a previous error during capture")
                self.ended = True
                if self.spy.count == 0:
                    warnings.warn("The CUDA Graph is empty. This usually means", stacklevel=2)

            def replay(self):
                pass

            def reset(self):
                if self.ended:
                    fake.users[self.pool] -= 1
                self.ended = False

            __del__ = reset

        def end_allocate(device, pool):
            if pool not in self.device_pools:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            self.device_pools.remove(pool)

        def release(device, pool):
            self.users[pool] -= 1

        def set_mode(mode):
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)
            self.mode = {"default": 0, "error": 2}.get(mode, mode)
            self.modes.append(self.mode)

        pieces = {
            "CUDAGraph": Graph,
            "Stream": Stream,
            "current_stream": lambda device=None: self.current,
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "device": lambda device: contextlib.nullcontext(),
            "stream": lambda stream: contextlib.nullcontext(),
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": set_mode,
            "default_generators": self.generators,
        }
        for name, piece in pieces.items():
            monkeypatch.setattr(torch.cuda, name, piece)
        own = {
            "_cuda_clearCublasWorkspaces": lambda: None,
            "_cuda_endAllocateToPool": end_allocate,
            "_cuda_releasePool": release,
            "_host_emptyCache": lambda: None,
        }
        for name, piece in own.items():
            monkeypatch.setattr(torch._C, name, piece, raising=False)

    def launch(self):
        """What a body does where it launches something."""
        torch.ones(()).mul_(2)

    def new_pool(self):
        self.pools += 1
        return (0, self.pools)
