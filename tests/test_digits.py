# SPDX-License-Identifier: Apache-2.0
"""The digits network, its classifier and data, and the example that trains them."""

import builtins
import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import fastdiff as fd
from fastdiff.models import digits, digits_classifier
from fastdiff.models import digits_data as load_data
from fastdiff.schedules import VPLinear

ROOT = Path(__file__).parent.parent


# The digits network


def test_digits_is_ready_to_sample_from():
    network = digits()
    assert network.schedule == VPLinear(beta_min=0.1, beta_max=20.0)
    assert (network.prediction, network.null_class, network.shape) == ("v", 10, (1, 8, 8))
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    x, t, y = torch.randn(5, 1, 8, 8), torch.rand(5), torch.arange(5)
    out = network(x, t, y)
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert torch.equal(out, digits()(x, t, y))
    assert network(x[:0], t[:0], y[:0]).shape == (0, 1, 8, 8)


def test_digits_without_a_class_is_the_null_class():
    network, x, t = digits(), torch.randn(5, 1, 8, 8), torch.rand(5)
    null = network(x, t, torch.full((5,), network.null_class))
    torch.testing.assert_close(network(x, t), null, rtol=0, atol=1e-6)
    assert not torch.allclose(null, network(x, t, torch.zeros(5, dtype=torch.int64)), atol=1e-2)


def test_digits_treats_samples_one_by_one():
    """Time and class belong to the sample; float64 leaves only rounding between batchings."""
    network = digits().double()
    x, t, y = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.rand(5), torch.arange(5)
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(network(x, t, y), alone, rtol=0, atol=1e-12)
    scalar = network(x, torch.tensor(0.5), torch.tensor(3))
    full = network(x, torch.full((5,), 0.5), torch.full((5,), 3))
    torch.testing.assert_close(scalar, full, rtol=0, atol=1e-12)


def test_digits_is_differentiable_in_its_input():
    network = digits().double()
    x = torch.randn((1, 1, 8, 8), dtype=torch.float64, requires_grad=True)
    t, y = torch.tensor([0.3]), torch.tensor([7])
    assert torch.autograd.gradcheck(lambda x: network(x, t, y), x, fast_mode=True)


def test_digits_rejects_another_shape():
    with pytest.raises(ValueError, match=r"shape \[B, 1, 8, 8\]; got \[8, 8\]"):
        digits()(torch.randn(8, 8), torch.rand(8))


def test_digits_predicts_v_better_than_the_best_constant():
    """On held-out digits, at every noise level: below the variance of v given only t."""
    pytest.importorskip("sklearn")
    network = digits()
    images, labels = load_data("held-out")
    random = torch.Generator().manual_seed(0)
    for t in (0.01, 0.1, 0.3, 0.5):
        alpha, sigma = (float(f(t)) for f in (network.schedule.alpha, network.schedule.sigma))
        epsilon = torch.randn(images.shape, generator=random)
        v = alpha * epsilon - sigma * images
        out = network(alpha * images + sigma * epsilon, torch.full((len(images),), t), labels)
        assert (out - v).square().mean() < 0.5 * (v - v.mean(0)).square().mean()


@pytest.mark.parametrize("load", [digits, digits_classifier])
def test_loading_draws_no_random_number(load):
    before = torch.get_rng_state()
    load()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("load", [digits, digits_classifier])
def test_weights_that_are_missing_or_wrong_are_named(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights is an existing file; got .*nowhere"):
        load(tmp_path / "nowhere.safetensors")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"a safetensors file; got .*torn"):
        load(torn)
    other = {digits: "classifier", digits_classifier: "digits"}[load]
    with pytest.raises(ValueError, match="holds the tensors of Digits"):
        load(Path(fd.models.__file__).with_name(f"{other}.safetensors"))


def test_missing_safetensors_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "fastdiff-engine\[models\]"'):
        digits()


def test_shipped_weights_stay_small():
    files = list(Path(fd.models.__file__).parent.glob("*.safetensors"))
    assert len(files) == 2
    assert sum(file.stat().st_size for file in files) <= 2_000_000


def test_splits_are_disjoint_and_whole():
    pytest.importorskip("sklearn")
    (train, train_labels), (held, held_labels) = load_data("train"), load_data("held-out")
    assert (len(train), len(held)) == (1437, 360)
    assert train.shape[1:] == (1, 8, 8)
    assert (train.min(), train.max()) == (-1.0, 1.0)
    assert torch.cdist(held.flatten(1), train.flatten(1)).min() > 0
    assert torch.cat([train_labels, held_labels]).bincount().tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'train' or 'held-out'; got 'test'"):
        load_data("test")


def test_classifier_recognises_held_out_digits():
    pytest.importorskip("sklearn")
    images, labels = load_data("held-out")
    assert (digits_classifier()(images).argmax(1) == labels).float().mean() >= 0.98


@functools.cache
def sampled(scale):
    network = digits()
    y = torch.arange(10).repeat(20)
    plan = fd.plan(network.schedule, "dpmpp-2m", 10, prediction=network.prediction)
    noise = fd.noise.prior(plan, (len(y), *network.shape), seeds=0)
    none = torch.full_like(y, network.null_class)
    guidance = None if scale == 1 else fd.CFG(scale, uncond={"y": none})
    return fd.sample(network, noise, plan, cond={"y": y}, guidance=guidance), y


@pytest.mark.parametrize("scale", [1, 2])
def test_digits_samples_are_recognised(scale):
    """Ten evaluations suffice for nine of ten samples; 20 of each class, fixed seeds."""
    images, y = sampled(scale)
    assert (digits_classifier()(images).argmax(1) == y).float().mean() >= 0.9


def test_digits_samples_are_not_copies_of_training_images():
    """Their distance to the nearest training image is that of held-out images, within a fifth."""
    pytest.importorskip("sklearn")
    train, held = load_data("train")[0].flatten(1), load_data("held-out")[0].flatten(1)
    images, _ = sampled(1)
    nearest, usual = (torch.cdist(z, train).amin(1).mean() for z in (images.flatten(1), held))
    assert 0.8 * usual < nearest < 1.25 * usual


# The example that trains it


@pytest.fixture(scope="module")
def train_digits():
    for package in ("click", "matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(package)
    path = ROOT / "examples" / "train_digits.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # where it finds what the examples share
    spec = importlib.util.spec_from_file_location("train_digits", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_interrupted_training_resumes_to_the_same_weights(train_digits, tmp_path):
    from click.testing import CliRunner

    def run(out, *more):
        arguments = ["--out", str(tmp_path / out), "--steps", "20", "--batch", "32", *more]
        result = CliRunner().invoke(train_digits.main, arguments)
        assert result.exit_code == 0, result.output
        return (tmp_path / out / "digits.safetensors").read_bytes()

    threads = torch.get_num_threads()
    try:
        whole = run("whole")
        assert run("parts", "--no-classifier", "--minutes", "0") != whole
        assert run("parts", "--resume") == whole
    finally:
        torch.set_num_threads(threads)
    assert digits(tmp_path / "whole" / "digits.safetensors").prediction == "v"
    digits_classifier(tmp_path / "whole" / "classifier.safetensors")
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {
        "checkpoint.pt",
        "classifier.safetensors",
        "digits.safetensors",
        "loss.png",
    }
