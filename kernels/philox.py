# SPDX-License-Identifier: Apache-2.0
"""Counter-based normals inside a Triton kernel: the bits of `csrc/philox.h`.

Every product and sum below is one rounding, as there: the kernels are launched without fp fusion
and fuse with `tl.fma` where the definition does. Cost: about 190 instructions a counter, which
makes four normals, what a root takes out of its range included; no memory.
"""

import triton
import triton.language as tl


@triton.jit
def words(seed, stream, quad):
    """The four words of each counter (low, stream, high, 0) under the key (low, high of the seed).

    Args:
        seed: int64 bit patterns, broadcastable to `quad`.
        stream: uint32, likewise.
        quad: int64, index within the sample // 4.

    Returns:
        Four uint32 blocks.
    """
    # the masks keep the conversions to 32 bits free of overflow
    key0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0 = (quad & 0xFFFFFFFF).to(tl.uint32)
    w2 = ((quad >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, key0 = tl.broadcast(w0, key0)
    w2, key1 = tl.broadcast(w2, key1)
    w1 = tl.zeros_like(w0) + stream
    w3 = tl.zeros_like(w0)
    for _ in tl.static_range(10):
        # one widening multiplication gives both halves
        p0 = w0.to(tl.uint64) * 0xD2511F53
        p1 = w2.to(tl.uint64) * 0xCD9E8D57
        w0 = (p1 >> 32).to(tl.uint32) ^ w1 ^ key0
        w1 = (p1 & 0xFFFFFFFF).to(tl.uint32)
        w2 = (p0 >> 32).to(tl.uint32) ^ w3 ^ key1
        w3 = (p0 & 0xFFFFFFFF).to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return w0, w1, w2, w3


@triton.jit
def _horner(p, x, c: tl.constexpr):
    return tl.fma(p, x, tl.full(x.shape, c, tl.float32))


@triton.jit
def normal_pair(word_a, word_b):
    """Box-Muller: r cos(2 pi u_b), r sin(2 pi u_b) with r = sqrt(-2 log u_a), float32."""
    # u_a = m 2^k with m in [2/3, 4/3); log u = k log 2 + log1p(m - 1); all times -2. u is set
    # together as bits, which is exact, and k is kept times 2^23
    u = ((word_a >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375
    bits = u.to(tl.uint32, bitcast=True)
    k = (bits - 0x3F2AAAAB) & 0xFF800000
    f = (bits - k).to(tl.float32, bitcast=True) - 1.0
    p = tl.full(f.shape, 0.2577131390571594, tl.float32)
    p = _horner(p, f, -0.2797379493713379)
    p = _horner(p, f, 0.24371427297592163)
    p = _horner(p, f, -0.2801061272621155)
    p = _horner(p, f, 0.3336075246334076)
    p = _horner(p, f, -0.4002089202404022)
    p = _horner(p, f, 0.49999600648880005)
    p = _horner(p, f, -0.6666643023490906)
    ff = f * f
    tail = tl.fma(ff * f, p, ff)
    mantissa = tl.fma(f, tl.full(f.shape, -2.0, tl.float32), tail)
    minus_2_log_2 = tl.full(f.shape, -1.6525916635146131739e-07, tl.float32)  # times 2^-23
    k = k.to(tl.int32, bitcast=True).to(tl.float32)
    r = tl.sqrt_rn(tl.fma(k, minus_2_log_2, mantissa))

    # angle in turns: quadrant q and the rest t in [-1/8, 1/8], both exact
    turn = (word_b >> 9).to(tl.int32)
    q = (turn + 1048576) >> 21
    t = ((turn - (q << 21)).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    z = t * t
    s = tl.full(z.shape, -75.46574401855469, tl.float32)
    s = _horner(s, z, 81.59423065185547)
    s = _horner(s, z, -41.3416748046875)
    s = t * _horner(s, z, 6.2831854820251465)
    c = tl.full(z.shape, 58.5575065612793, tl.float32)
    c = _horner(c, z, -85.4230728149414)
    c = _horner(c, z, 64.93914031982422)
    c = _horner(c, z, -19.739208221435547)
    c = _horner(c, z, 1.0)
    odd = (q & 1) != 0
    first = tl.where(odd, s, c)
    second = tl.where(odd, c, s)
    first = tl.where(((q + 1) & 2) != 0, -first, first)
    second = tl.where((q & 2) != 0, -second, second)
    return r * first, r * second


@triton.jit
def normals(seed, stream, quad, SAMPLES: tl.constexpr, COLS: tl.constexpr):
    """Normals of SAMPLES samples, elements 4 quad .. 4 quad + 3 each.

    Args:
        seed: int64 [SAMPLES, 1].
        stream: uint32, a scalar or [SAMPLES, 1].
        quad: int64 [1, COLS // 4].

    Returns:
        float32 [SAMPLES, COLS] in the samples' order. A thread that makes a counter keeps its four
        normals: nothing crosses threads.
    """
    w0, w1, w2, w3 = words(seed, stream, quad)
    z0, z1 = normal_pair(w0, w1)
    z2, z3 = normal_pair(w2, w3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [SAMPLES, COLS])
