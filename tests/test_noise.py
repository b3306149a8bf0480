# SPDX-License-Identifier: Apache-2.0
"""The counter-based normals: known answers, one definition on every path, and independence."""

import math

import numpy as np
import pytest
import torch
from support.core import native, needs_core

from fastdiff import _core, noise
from fastdiff.plans import Plan, Stage

# Random123, kat_vectors, philox4x32 with 10 rounds: counter, key, words.
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]

SEEDS = [0, 1, 2**31, 2**32 - 1, 2**63 - 2, 2**63, 2**64 - 2, -5, 0x0123456789ABCDEF]
SHAPES = [(1, 1), (3, 5), (2, 3, 4), (64, 16), (5, 63), (3, 64), (2, 255), (2, 257), (1, 4099)]


@pytest.fixture
def without_core(monkeypatch):
    monkeypatch.setattr(_core, "native", None)


def integers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    def arrays(text):
        return tuple(np.array([word], dtype=np.uint64) for word in integers(text))

    assert [int(w[0]) for w in noise.philox(arrays(counter), arrays(key))] == integers(words)
    if native is not None:
        assert native.philox(integers(counter), integers(key)) == integers(words)


@needs_core
@pytest.mark.parametrize("seed", [s % 2**64 for s in SEEDS])
def test_vector_code_makes_the_words_of_the_scalar_definition(instruction_set, seed):
    quads, stream = 37, 2**32 - 3
    key = [seed & 0xFFFFFFFF, seed >> 32]
    wanted = [word for q in range(quads) for word in native.philox([q, stream, 0, 0], key)]
    assert native.words(seed, stream, quads) == wanted


@needs_core
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_normals_equal_the_reference_bit_for_bit(instruction_set, shape):
    size = math.prod(shape[1:])
    for seed in SEEDS:
        for stream in (0, 1, 2**32 - 1):
            wanted = noise.reference(noise.seeds_tensor(seed, shape[0]).numpy(), size, stream)
            assert bits(noise.normal(shape, seed, stream)) == wanted.tobytes()


@needs_core
def test_compiled_normals_equal_the_reference_over_a_million_draws(instruction_set):
    wanted = noise.reference(np.array([7]), 1 << 20, 3)
    assert bits(noise.normal((1, 1 << 20), 7, 3)) == wanted.tobytes()


def test_without_the_core_numbers_and_dtypes_are_the_same(without_core):
    got = noise.normal((3, 7), -2, 5, dtype=torch.float64)
    assert got.dtype == torch.float64
    wanted = noise.reference(np.array([-2, -1, 0]), 7, 5).astype(np.float64)
    assert bits(got) == wanted.tobytes()


def test_normals_are_box_muller_of_their_words_to_a_few_ulp():
    size = 1 << 18
    z = noise.normal((1, size), 11, 2).double().numpy().reshape(-1, 4)
    quad = np.arange(size // 4, dtype=np.uint64)
    zero = np.zeros_like(quad)
    words = noise.philox((quad, zero + np.uint64(2), zero, zero), (zero + np.uint64(11), zero))
    u = [((w >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23 for w in words]
    for k in (0, 2):
        r, angle = np.sqrt(-2 * np.log(u[k])), 2 * np.pi * u[k + 1]
        for j, wanted in ((k, r * np.cos(angle)), (k + 1, r * np.sin(angle))):
            assert np.max(np.abs(z[:, j] / wanted - 1)) < 3 * 2.0**-23


def test_extreme_words_give_finite_normals():
    ends = np.array([0, 0x1FF, 0xFFFFFFFF], dtype=np.uint64)
    a, b = np.meshgrid(ends, np.arange(0, 1 << 32, 1 << 27, dtype=np.uint64) + np.uint64(0))
    first, second = noise.normal_pair(a, b)
    assert np.isfinite(first).all()
    assert np.isfinite(second).all()
    assert max(np.abs(first).max(), np.abs(second).max()) < 6  # sqrt(-2 log 2^-24) = 5.77


def test_normals_are_standard_normal():
    size = 1 << 20
    z = np.sort(noise.normal((1, size), 3).double().numpy().ravel())
    error = 1 / math.sqrt(size)
    assert abs(z.mean()) < 4 * error
    assert abs((z**2).mean() - 1) < 4 * math.sqrt(2) * error
    assert abs((z**3).mean()) < 4 * math.sqrt(15) * error
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96) * error
    cdf = 0.5 * (1 + torch.erf(torch.from_numpy(z) / math.sqrt(2)).numpy())
    steps = np.arange(size + 1) / size
    distance = max(np.max(steps[1:] - cdf), np.max(cdf - steps[:-1]))
    assert distance < 1.95 * error  # Kolmogorov-Smirnov at the 0.1 % level


@pytest.mark.parametrize(("seeds", "stream"), [((4, 5), 0), ((4, 2**32 + 4), 0), ((4, 4), 1)])
def test_seeds_and_streams_are_uncorrelated(seeds, stream):
    size = 1 << 18
    a = noise.normal((1, size), seeds[0], 0).double()
    b = noise.normal((1, size), seeds[1], stream).double()
    for shift in range(4):
        assert abs((a * b.roll(shift, 1)).mean()) < 4 / math.sqrt(size)


@pytest.mark.parametrize("size", [1, 6, 16, 63, 64, 300, 2000])
def test_a_sample_does_not_depend_on_its_batch(size):
    seeds = [9, -1, 2**63, 9, 0, 77, 5]
    together = noise.normal((7, size), seeds, 4)
    for b, seed in enumerate(seeds):
        assert bits(together[b : b + 1]) == bits(noise.normal((1, size), seed, 4))


def test_a_sample_is_a_prefix_of_a_longer_one():
    long = noise.normal((2, 5000), 1)
    for size in (1, 3, 4, 17, 63, 65, 255, 1023, 4999):
        assert bits(noise.normal((2, size), 1)) == bits(long[:, :size].contiguous())


@pytest.mark.parametrize("shape", [(1, 300_001), (30_001, 7), (3, 100_000)])
def test_threads_do_not_change_the_numbers(shape):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((noise.normal(shape, 1), noise.normal(shape, 1, dtype=torch.float64)))
    finally:
        torch.set_num_threads(before)
    for single, double in results:
        assert torch.equal(single, results[0][0])
        assert torch.equal(double, single.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_hold_the_float32_normals(dtype):
    single = noise.normal((2, 33), 5, 1)
    other = noise.normal((2, 33), 5, 1, dtype=dtype)
    assert other.dtype == dtype
    assert torch.equal(other, single.to(dtype))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 5), (4,)])
def test_empty_and_scalar_samples_have_their_shape(shape):
    assert noise.normal(shape, 0).shape == shape
    wanted = noise.reference(np.zeros(shape[0], np.int64), math.prod(shape[1:]), 0)
    assert wanted.size == math.prod(shape)


def test_seeds_are_taken_in_every_form():
    wanted = torch.tensor([3, 4, 5])
    arrays = (np.array([3, 4, 5]), np.array([3, 4, 5], np.uint64), np.arange(3, 6, dtype=np.int32))
    for seeds in (3, np.int64(3), [3, 4, 5], (3, 4, 5), range(3, 6), wanted, *arrays):
        got = noise.seeds_tensor(seeds, 3)
        assert got.dtype == torch.int64
        assert torch.equal(got, wanted)


def test_seeds_count_modulo_two_to_the_64():
    assert noise.seeds_tensor(2**64 - 1, 3).tolist() == [-1, 0, 1]
    assert noise.seeds_tensor(-1, 3).tolist() == [-1, 0, 1]
    assert noise.seeds_tensor(2**63 - 1, 2).tolist() == [2**63 - 1, -(2**63)]
    assert noise.seeds_tensor([2**64 + 5, np.uint64(2**63)], 2).tolist() == [5, -(2**63)]


def test_a_strided_tensor_of_seeds_is_read_by_value():
    seeds = torch.arange(10)[::3]
    assert torch.equal(noise.normal((4, 9), seeds), noise.normal((4, 9), [0, 3, 6, 9]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((3, 2), [1, 2]), ValueError, "3 in all; got 2"),
        (((3, 2), torch.arange(2)), ValueError, r"shape \(3,\); got \(2,\)"),
        (((3, 2), torch.zeros(3)), TypeError, "int64"),
        (((2, 2), [1, 2.5]), TypeError, "integers; got 2.5"),
        (((2, 2), 1.0), TypeError, "integers; got 1.0"),
        (((), 1), ValueError, r"\(B, \.\.\.\)"),
        (((2, -1), 1), ValueError, ">= 0"),
        (((2, 2), 1, -1), ValueError, "stream"),
        (((2, 2), 1, 2**32), ValueError, "stream"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        noise.normal(*arguments)


def test_an_integer_dtype_is_refused():
    with pytest.raises(TypeError, match="got torch"):
        noise.normal((2, 2), 1, dtype=torch.int32)


def test_prior_is_stream_zero_times_the_plans_scale():
    plan = Plan(stages=(Stage(t=1.0, b=(1.0,)),), times=(1.0, 0.5), prior_scale=80.0)
    got = noise.prior(plan, (2, 3, 4), seeds=6, dtype=torch.float64)
    assert torch.equal(got, 80.0 * noise.normal((2, 3, 4), 6, dtype=torch.float64))
