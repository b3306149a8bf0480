# SPDX-License-Identifier: Apache-2.0
"""Counter-based normals: a sample's noise depends on its seed and the stream, and on nothing else.

Not on the batch it stands in, its place there, the device, the number of threads or what ran
before. Philox4x32-10 with

    key     = (low 32, high 32 bits of the sample's seed)
    counter = (low 32 bits of i // 4, stream, high 32 bits of i // 4, 0)

where i is the row-major index within the sample, and Box-Muller in float32 with polynomials of our
own, so that every backend makes the same bits. Element i takes normal i % 4 of its counter. The
compiled core serves where it is built; the NumPy code below says the same thing readably, gives
the same bits, and takes some hundred times as long.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import _core
from ._text import shown
from .plans import Plan

Seeds = int | Sequence[int] | torch.Tensor


def normal(
    shape: Sequence[int],
    seeds: Seeds,
    stream: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    offset: int = 0,
) -> torch.Tensor:
    """Standard normals, one sample per seed.

    Args:
        shape: [B, ...]; the noise of sample b fills [...] in row-major order.
        seeds: One seed a sample, as `seeds_tensor` takes them; an integer s means s .. s + B - 1.
        stream: 0 to 2**32 - 1. Stream 0 is the starting noise; the stages of plans draw from 1 on.
        dtype: Any floating dtype; values are float32 normals, widened or rounded to it.
        device: Where the result lies. CUDA devices make it themselves where the CUDA part is built;
            else it is made on the CPU and copied.
        offset: Element i takes the normal of element i + offset: a part of a longer sample. A
            multiple of 4, >= 0.

    Returns:
        Contiguous tensor of `shape`, owned by the caller.

    Raises:
        ValueError: The shape has no batch dimension or a negative size, the seeds are not B, or the
            stream is out of range.
        TypeError: dtype is not floating, or seeds or stream are no integers.
    """
    if not isinstance(shape, Sequence) or isinstance(shape, str | bytes):
        raise TypeError(f"noise.normal: shape is (B, ...); got {shape!r}.")
    sizes = tuple(operator.index(s) for s in shape)
    if not sizes or min(sizes) < 0:
        raise ValueError(f"noise.normal: shape is (B, ...) with sizes >= 0; got {tuple(shape)}.")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"noise.normal: dtype is floating; got {dtype}.")
    try:
        stream = operator.index(stream)
    except TypeError:
        raise TypeError(f"noise.normal: stream is an integer; got {shown(stream)}.") from None
    if not 0 <= stream < 1 << 32:
        raise ValueError(f"noise.normal: stream lies in [0, 2**32); got {stream}.")
    offset = checked_offset("noise.normal", offset)
    batch, size = sizes[0], math.prod(sizes[1:])
    code = 1 if dtype == torch.float64 else 0
    if device is not None and torch.device(device).type == "cuda":
        core, _ = _core.cuda_core()
        if core is not None and core.problem(torch.device(device).index or 0) is None:
            z = torch.empty(sizes, dtype=torch.float64 if code else torch.float32, device=device)
            _fill_on_device(z, core, seeds, stream, offset)
            return z.to(dtype)
    bits = seeds_tensor(seeds, batch)
    if _core.native is None:
        z = torch.from_numpy(reference(bits.numpy(), size, stream, offset).reshape(sizes))
    else:
        z = torch.empty(sizes, dtype=torch.float64 if code else torch.float32, device="cpu")
        threads = torch.get_num_threads()
        at = (z.data_ptr(), code, bits.data_ptr(), batch, size)
        _core.native.normal(*at, stream, offset, threads)
    return z.to(device=device, dtype=dtype)


def checked_offset(who: str, offset: int) -> int:
    """The offset, a multiple of 4 that is not negative."""
    offset = operator.index(offset)
    if offset < 0 or offset % 4:
        raise ValueError(f"{who}: offset is a multiple of 4, >= 0; got {offset}.")
    return offset


def _fill_on_device(z: torch.Tensor, core: Any, seeds: Seeds, stream: int, offset: int) -> None:
    """Normals made by the CUDA device of z, on PyTorch's current stream there."""
    batch, size = z.shape[0], math.prod(z.shape[1:])
    if isinstance(seeds, torch.Tensor) and seeds.device == z.device:
        if seeds.dtype != torch.int64 or seeds.shape != (batch,):
            seeds_tensor(seeds, batch)  # says which rule is broken
        bits = seeds.contiguous()
    else:
        bits = seeds_tensor(seeds, batch).to(z.device)
    number, queue = z.device.index, torch.cuda.current_stream(z.device).cuda_stream
    at = (z.data_ptr(), int(z.dtype == torch.float64), bits.data_ptr(), batch, size)
    core.normal(*at, stream, offset, number, queue)


def prior(
    plan: Plan,
    shape: Sequence[int],
    seeds: Seeds = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    offset: int = 0,
) -> torch.Tensor:
    """The state at the plan's first time: `plan.prior_scale * normal(shape, seeds, stream=0)`.

    Arguments and errors are those of `normal`.

    Raises:
        TypeError: plan is no plan.
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"noise.prior: plan is a fastdiff.Plan; got {type(plan).__name__}. Make one with "
            "fastdiff.plan(schedule, solver, steps)."
        )
    z = normal(shape, seeds, 0, dtype=dtype, device=device, offset=offset)
    return z.mul_(plan.prior_scale)


def seeds_tensor(seeds: Seeds, batch: int) -> torch.Tensor:
    """One 64-bit seed a sample as bit patterns.

    Args:
        seeds: An integer s, meaning s, s + 1, ..., s + batch - 1; a sequence, range or array of
            `batch` integers; or an int64 tensor [batch] of bit patterns, which is returned as it is
            where it is a contiguous CPU tensor. Integers count modulo 2**64: -1 is 2**64 - 1.
        batch: B.

    Returns:
        int64 [batch], contiguous, CPU.

    Raises:
        ValueError: The number of seeds is not `batch`.
        TypeError: A seed is no integer.
    """
    if isinstance(seeds, torch.Tensor):
        if seeds.dtype != torch.int64:
            raise TypeError(f"seeds: a tensor of seeds is int64 bit patterns; got {seeds.dtype}.")
        if seeds.shape != (batch,):
            raise ValueError(
                f"seeds: one seed a sample, shape ({batch},); got {tuple(seeds.shape)}. "
                "An integer s means s, s + 1, ..."
            )
        return seeds.cpu().contiguous()
    if isinstance(seeds, Set | Mapping | bytes | str):
        raise TypeError(
            "seeds: seeds are an integer, or a sequence of one a sample in order; got "
            f"{type(seeds).__name__}. Give a list."
        )
    values: Iterable[Any]
    if isinstance(seeds, Iterable):
        values = list(seeds)
        if len(values) != batch:
            raise ValueError(
                f"seeds: one seed a sample, {batch} in all; got {len(values)}. "
                "An integer s means s, s + 1, ..."
            )
    else:
        first = _integer(seeds)
        if -(1 << 63) <= first <= (1 << 63) - 1 - batch:
            return torch.arange(first, first + batch, dtype=torch.int64, device="cpu")
        values = range(first, first + batch)
    patterns = [_integer(value) & 0xFFFFFFFFFFFFFFFF for value in values]
    return torch.from_numpy(np.array(patterns, dtype=np.uint64).view(np.int64))


def _integer(seed: Any) -> int:
    try:
        return operator.index(seed)
    except TypeError:
        raise TypeError(f"seeds: seeds are integers; got {seed!r}.") from None


# -- the readable reference ------------------------------------------------------------------------


def reference(
    seeds: NDArray[np.int64], size: int, stream: int, offset: int = 0
) -> NDArray[np.float32]:
    """The normals of `csrc/philox.h` in NumPy, bit for bit.

    Args:
        seeds: Bit patterns, [B].
        size: Elements of each sample.
        stream: 0 to 2**32 - 1.
        offset: As in `normal`.

    Returns:
        [B, size].
    """
    key = seeds.view(np.uint64)[:, None]
    quad = np.arange((size + 3) // 4, dtype=np.uint64)[None, :] + np.uint64(offset // 4)
    counter = (quad & _LOW, np.full_like(quad, stream), quad >> _32, np.zeros_like(quad))
    words = philox(counter, (key & _LOW, key >> _32))
    z = np.stack([*normal_pair(words[0], words[1]), *normal_pair(words[2], words[3])], axis=-1)
    return np.ascontiguousarray(z.reshape(len(seeds), 4 * quad.size)[:, :size])


_Words = NDArray[np.uint64]  # 32-bit words, in 64 bits so that products are whole
_Floats = NDArray[np.float32]
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox(counter: tuple[_Words, ...], key: tuple[_Words, ...]) -> tuple[_Words, ...]:
    """Philox4x32-10 over arrays of 32-bit words held as uint64.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    return c0, c1, c2, c3


# Polynomials, highest power first: log1p(f) = f - f^2 / 2 + f^3 LOG(f) for f in [-1/3, 1/3];
# sin(2 pi t) = t SIN(t^2), cos(2 pi t) = COS(t^2) for t in [-1/8, 1/8].
_LOG = (
    *(-0.1288565695285797, 0.13986897468566895, -0.12185713648796082, 0.14005306363105774),
    *(-0.1668037623167038, 0.2001044601202011, -0.24999800324440002, 0.3333321511745453),
)
_SIN = (-75.46574401855469, 81.59423065185547, -41.3416748046875, 6.2831854820251465)
_COS = (58.5575065612793, -85.4230728149414, 64.93914031982422, -19.739208221435547, 1.0)
_MINUS_2_LOG_2 = -1.3862943649291992


def normal_pair(word_a: _Words, word_b: _Words) -> tuple[_Floats, _Floats]:
    """Box-Muller: r cos(2 pi u_b) and r sin(2 pi u_b) with r = sqrt(-2 log u_a)."""
    half, unit, two = np.float32(0.5), np.float32(2.0**-23), np.float32(2.0)
    nine = np.uint64(9)

    u = ((word_a >> nine).astype(np.float32) + half) * unit
    bits = u.view(np.int32)
    k = (bits - np.int32(0x3F2AAAAB)) >> np.int32(23)  # u = m 2^k, m in [2/3, 4/3)
    f = (bits - (k << np.int32(23))).view(np.float32) - np.float32(1.0)
    ff = f * f
    tail = _fma(ff * f, _polynomial(_LOG, f) * -two, ff)
    log = _fma(k.astype(np.float32), np.float32(_MINUS_2_LOG_2), _fma(f, -two, tail))
    r = np.sqrt(log)

    turn = (word_b >> nine).astype(np.int32)
    q = (turn + np.int32(1 << 20)) >> np.int32(21)  # quadrant 0 .. 4
    t = ((turn - (q << np.int32(21))).astype(np.float32) + half) * unit
    sin, cos = t * _polynomial(_SIN, t * t), _polynomial(_COS, t * t)
    swap = q & 1 == 1
    first, second = np.where(swap, sin, cos), np.where(swap, cos, sin)
    return r * np.where((q + 1) & 2, -first, first), r * np.where(q & 2, -second, second)


def _polynomial(coefficients: tuple[float, ...], x: _Floats) -> _Floats:
    value = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        value = _fma(value, x, np.float32(c))
    return value


def _fma(a: _Floats, b: _Floats | np.float32, c: _Floats | np.float32) -> _Floats:
    """a * b + c rounded once to float32.

    The product is exact in float64. The sum is rounded to odd there (its last bit is set where it
    is not exact), after which rounding to float32 is the only rounding that counts.
    """
    product = a.astype(np.float64) * b
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)  # TwoSum: product + c = total + error
    bits = total.view(np.int64)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((error != 0) & (bits & 1 == 0), bits + towards, bits)
    return odd.view(np.float64).astype(np.float32)
