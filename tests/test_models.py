# SPDX-License-Identifier: Apache-2.0
"""The exact models against autograd, brute force and golden numbers.

The golden numbers are the exact flow of a mixture, integrated elsewhere by another method: they pin
the mixture, its network and the schedule together.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.models import EmpiricalDenoiser, GaussianMixture
from fastdiff.schedules import EDM, PREDICTIONS, FlowMatching, VPCosine, VPDiscrete, VPLinear

ROOT = Path(__file__).parent.parent
# The mixture on which published samplers were recorded: 3 components in 8 dimensions.
GOLDEN = {
    "weights": [0.5, 0.3, 0.2],
    "means": [
        [1.0, -0.5, 0.3, 0.8, -1.2, 0.4, 0.9, -0.7],
        [-0.9, 0.6, -1.1, 0.2, 0.7, -0.3, -0.4, 1.3],
        [0.2, 1.4, 0.5, -1.0, 0.1, -1.3, 0.6, 0.0],
    ],
    "variances": [
        [0.04, 0.09, 0.05, 0.16, 0.07, 0.1, 0.06, 0.12],
        [0.1, 0.05, 0.08, 0.06, 0.2, 0.04, 0.11, 0.09],
        [0.07, 0.12, 0.25, 0.05, 0.06, 0.08, 0.04, 0.15],
    ],
}
GOLDEN_X = [
    [0.3, -1.1, 0.7, 0.2, -0.4, 1.6, -0.9, 0.5],
    [-1.2, 0.4, 0.1, -0.6, 1.9, 0.8, -0.3, -1.5],
    [2.1, 0.6, -1.4, 1.0, 0.0, -0.7, 0.25, 0.9],
    [-0.05, 1.7, -0.8, -2.0, 0.35, -1.1, 1.2, -0.45],
]
# The exact flow under VPLinear(0.1, 20) from GOLDEN_X at t = 1 to t = 1e-3 (DOP853, rtol 1e-12).
GOLDEN_END = [
    [
        1.0157352772905102,
        -0.7740136555612915,
        0.42828415141377224,
        0.8253211888544055,
        -1.241986395330714,
        0.8614476640205417,
        0.6441317580568213,
        -0.44904163620407456,
    ],
    [
        -1.0929110191005278,
        0.6908922989204339,
        -0.8979164472858105,
        0.0052520475953858345,
        1.3295674779623436,
        -0.16311657218878017,
        -0.3470955235425304,
        0.6518632336263074,
    ],
    [
        1.3264390425598456,
        -0.1895112831201974,
        -0.07603859037434005,
        1.0661881234971655,
        -1.059068528241005,
        0.07459211010130393,
        0.8874107922859275,
        -0.2211582035254444,
    ],
    [
        0.17529330368174562,
        1.888372034673049,
        0.0034365289830699483,
        -1.3769835558179666,
        0.17026452241035603,
        -1.5292279695367728,
        0.8237741394343174,
        -0.1453295452694802,
    ],
]
SCHEDULES = [
    VPLinear(),
    VPLinear(time_scale=1000.0),
    VPCosine(),
    VPDiscrete.linear(num_steps=100),
    EDM(),
    FlowMatching(),
]


@pytest.fixture
def mixture():
    return GaussianMixture(**GOLDEN)


@pytest.fixture
def x():
    return torch.tensor(GOLDEN_X, dtype=torch.float64)


def clustered_data(seed=0):
    """60 points in 4 loose clusters, [60, 2, 3], and the cluster of each."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(60) % 4
    centers = 2 * torch.randn((4, 2, 3), generator=random, dtype=torch.float64)
    noise = torch.randn((60, 2, 3), generator=random, dtype=torch.float64)
    return centers[labels] + 0.3 * noise, labels


def log_density(mixture, x, alpha, sigma):
    """log p(x) of x = alpha x0 + sigma eps by torch.distributions."""
    scale = (alpha**2 * mixture.variances + sigma**2).sqrt()
    components = torch.distributions.Independent(
        torch.distributions.Normal(alpha * mixture.means, scale), 1
    )
    categories = torch.distributions.Categorical(mixture.weights)
    return torch.distributions.MixtureSameFamily(categories, components).log_prob(x)


@pytest.mark.parametrize(
    ("alpha", "sigma"), [(1.0, 0.0), (1.0, 1e-6), (0.8, 0.6), (0.05, 0.99), (0.0, 1.0), (1.0, 80.0)]
)
def test_mixture_epsilon_is_minus_sigma_times_autograd_score(mixture, x, alpha, sigma):
    x.requires_grad_()
    (score,) = torch.autograd.grad(log_density(mixture, x, alpha, sigma).sum(), x)
    torch.testing.assert_close(mixture.score(x, alpha, sigma), score, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        mixture.epsilon(x, alpha, sigma), -sigma * score, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("t", [1e-3, 0.1, 0.5, 1.0])
def test_mixture_agrees_with_its_formula_in_plain_numpy(mixture, x, t):
    alpha, sigma = (float(f(t)) for f in (VPLinear().alpha, VPLinear().sigma))
    weights, means, variances = (np.array(GOLDEN[k]) for k in ("weights", "means", "variances"))
    for row, epsilon, x0 in zip(
        np.array(GOLDEN_X),
        mixture.epsilon(x, alpha, sigma).numpy(),
        mixture.x0(x, alpha, sigma).numpy(),
        strict=True,
    ):
        spread = alpha**2 * variances + sigma**2
        away = row - alpha * means
        log_p = np.log(weights) - 0.5 * (away**2 / spread + np.log(spread)).sum(1)
        p = np.exp(log_p - log_p.max())
        r = (p / p.sum())[:, None]
        np.testing.assert_allclose(epsilon, sigma * (r * away / spread).sum(0), rtol=1e-12)
        want = (r * (means + alpha * variances / spread * away)).sum(0)
        np.testing.assert_allclose(x0, want, rtol=1e-12, atol=1e-14)


def test_mixture_velocity_carries_the_golden_starts_to_the_golden_ends(mixture):
    """RK4 in s = sqrt(t): 400 steps leave an error of 1.5e-10, a sixteenth of what 200 leave."""
    network = mixture.network(VPLinear(), "velocity")
    x = torch.tensor(GOLDEN_X, dtype=torch.float64)
    nodes = np.linspace(1.0, math.sqrt(1e-3), 401)
    for cur, nxt in itertools.pairwise(nodes):
        h, mid = nxt - cur, 0.5 * (cur + nxt)

        def slope(x, s):
            return 2 * s * network(x, torch.full((4,), s * s, dtype=torch.float64))

        k1 = slope(x, cur)
        k2 = slope(x + 0.5 * h * k1, mid)
        k3 = slope(x + 0.5 * h * k2, mid)
        k4 = slope(x + h * k3, nxt)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    np.testing.assert_allclose(x.numpy(), GOLDEN_END, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", ["mixture", "empirical"])
def test_predictions_agree(mixture, x, kind, prediction, schedule):
    """Each network's output, turned back by the schedule's own conversion, is the x0 prediction."""
    if prediction == "edm" and not isinstance(schedule, EDM):
        with pytest.raises(ValueError, match="belongs to the EDM schedule"):
            schedule.components(prediction, 0.5)
        return
    model = (
        mixture if kind == "mixture" else EmpiricalDenoiser(mixture.sample(50, torch.Generator()))
    )
    t = np.array([0.2, 0.4, 0.6, 0.8])
    model_time = torch.from_numpy(schedule.model_time(t, prediction))
    c_in = torch.from_numpy(schedule.c_in(t, prediction))[:, None]
    out = model.network(schedule, prediction)(c_in * x, model_time)
    p, q = np.transpose([schedule.conversion(prediction, "x0", float(each)) for each in t])
    x0 = torch.from_numpy(p)[:, None] * x + torch.from_numpy(q)[:, None] * out
    # p and q reach 1/alpha, 1/sigma: rounding grows with them
    tolerance = 1e-13 * (1 + max(np.abs(p).max(), np.abs(q).max()) * 10)
    want = model.x0(x, schedule.alpha(t), schedule.sigma(t))
    torch.testing.assert_close(x0, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "velocity"])
@pytest.mark.parametrize("schedule", [VPLinear(), FlowMatching(), EDM()], ids=str)
def test_networks_are_finite_at_both_ends(mixture, x, schedule, prediction):
    network = mixture.network(schedule, prediction)
    for t in (schedule.domain[0], schedule.t_max):
        told = torch.from_numpy(schedule.model_time(np.full(4, t), prediction))
        ends = network(x, told)
        assert ends.isfinite().all()
        near = t + 1e-12 * (1 if t == schedule.domain[0] else -1)  # sigma <= 1e-6 at the data
        told = torch.from_numpy(schedule.model_time(np.full(4, near), prediction))
        torch.testing.assert_close(network(x, told), ends, rtol=1e-4, atol=1e-4)


def test_edm_network_at_no_noise_is_minus_its_input_over_sigma_data():
    """F at sigma = 0 is -epsilon, whose limit is 0 on a smooth density."""
    mixture = GaussianMixture(1.0, [[0.0]], 0.25)
    out = mixture.network(EDM(), "edm")(torch.ones(1, 1), torch.tensor([-math.inf]))
    assert out.item() == 0.0


def test_mixture_keeps_dtype_shape_and_gradients(mixture):
    x = torch.randn((5, 2, 2, 2), dtype=torch.float32)
    assert mixture.v(x, 0.6, 0.8).shape == x.shape
    assert mixture.v(x, 0.6, 0.8).dtype == torch.float32
    assert mixture.v(x[:0], 0.6, 0.8).shape == (0, 2, 2, 2)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mixture.v(x, 0.6, 0.8), x)
    means = torch.tensor(GOLDEN["means"], dtype=torch.float64, requires_grad=True)

    def by_means(means):
        return GaussianMixture(GOLDEN["weights"], means, 0.1).x0(x.detach(), 0.6, 0.8)

    assert torch.autograd.gradcheck(by_means, means)


def test_mixture_class_is_its_component(mixture, x):
    """y = k leaves one Gaussian, whose x0 prediction is linear; y = -1 leaves the mixture."""
    mean, variance = mixture.means[1], mixture.variances[1]
    want = mean + 0.6 * variance / (0.36 * variance + 0.64) * (x - 0.6 * mean)
    y = torch.tensor([1, 1, -1, 1])
    got = mixture.x0(x, 0.6, 0.8, y)
    want[2] = mixture.x0(x, 0.6, 0.8)[2]
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


def test_mixture_samples_have_its_moments(mixture):
    samples = mixture.sample(100_000, torch.Generator().manual_seed(0))
    mean = mixture.weights @ mixture.means
    variance = mixture.weights @ (mixture.variances + mixture.means**2) - mean**2
    # five standard errors: deviations are below 1.3, fourth moments below 4
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=5 * 1.3 / 100_000**0.5)
    torch.testing.assert_close(samples.var(0), variance, rtol=0, atol=5 * 2 / 100_000**0.5)
    again = mixture.sample(100_000, torch.Generator().manual_seed(0))
    assert torch.equal(samples, again)
    assert mixture.sample(0).shape == (0, 8)


def brute_force_x0(data, x, alpha, sigma, allowed):
    out = torch.empty_like(x)
    for b in range(len(x)):
        logits = torch.stack(
            [
                -(x[b] - alpha[b] * point).square().sum() / (2 * sigma[b] ** 2)
                if allowed[b, i]
                else torch.tensor(-math.inf, dtype=torch.float64)
                for i, point in enumerate(data)
            ]
        )
        out[b] = (logits.softmax(0)[:, None, None] * data).sum(0)
    return out


@pytest.mark.parametrize("conditional", [False, True])
def test_empirical_denoiser_equals_brute_force(conditional):
    data, labels = clustered_data()
    model = EmpiricalDenoiser(data, labels)
    x = torch.randn((6, 2, 3), dtype=torch.float64)
    alpha = torch.tensor([1.0, 0.9, 0.5, 0.1, 1e-3, 1.0], dtype=torch.float64)
    sigma = torch.tensor([0.05, 0.2, 0.8, 0.99, 1.0, 10.0], dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, -1, 0]) if conditional else None
    allowed = torch.ones(6, 60, dtype=torch.bool)
    if conditional:
        allowed = (y[:, None] == labels) | (y[:, None] < 0)
    want = brute_force_x0(data, x, alpha, sigma, allowed)
    torch.testing.assert_close(model.x0(x, alpha, sigma, y), want, rtol=1e-11, atol=1e-12)
    wide = (-1, 1, 1)
    epsilon = (x - alpha.view(wide) * want) / sigma.view(wide)
    torch.testing.assert_close(model.epsilon(x, alpha, sigma, y), epsilon, rtol=1e-9, atol=1e-10)


def test_empirical_denoiser_is_the_limit_of_narrow_gaussians():
    data, _ = clustered_data()
    narrow = GaussianMixture(1.0, data.flatten(1), 1e-14)
    x = torch.randn((6, 2, 3), dtype=torch.float64)
    for name in ("x0", "epsilon", "score", "v"):
        got, want = (getattr(m, name)(x, 0.8, 0.6) for m in (EmpiricalDenoiser(data), narrow))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sigma", [0.0, 1e-300, 1e-160, 1e-12, 1e-6])
def test_empirical_denoiser_finds_the_nearest_point_at_little_noise(sigma):
    data, _ = clustered_data()
    model = EmpiricalDenoiser(data)
    x = 0.7 * data[:5] + 1e-3
    torch.testing.assert_close(model.x0(x, 0.7, sigma), data[:5], rtol=0, atol=1e-15)
    on_data = model.epsilon(0.7 * data[:5], 0.7, sigma)
    torch.testing.assert_close(on_data, torch.zeros_like(on_data), rtol=0, atol=1e-9)


def test_empirical_denoiser_without_signal_returns_the_mean():
    data, labels = clustered_data()
    x = torch.randn((4, 2, 3), dtype=torch.float64)
    got = EmpiricalDenoiser(data, labels).x0(x, 0.0, 1.0, torch.tensor([0, 1, 2, -1]))
    means = [data[labels == k].mean(0) for k in range(3)] + [data.mean(0)]
    torch.testing.assert_close(got, torch.stack(means), rtol=0, atol=1e-13)


def test_empirical_denoiser_is_twice_differentiable_in_x():
    data, labels = clustered_data()
    model = EmpiricalDenoiser(data, labels)
    x = (0.8 * data[:3] + 0.3 * torch.randn((3, 2, 3), dtype=torch.float64)).requires_grad_()
    y = torch.tensor([-1, 1, -1])
    assert torch.autograd.gradcheck(lambda x: model.v(x, 0.8, 0.6, y), x)
    assert torch.autograd.gradgradcheck(lambda x: model.v(x, 0.8, 0.6, y), x)


def test_empirical_denoiser_does_not_depend_on_its_blocks(monkeypatch):
    data, labels = clustered_data()
    x = torch.randn((7, 2, 3), dtype=torch.float64)
    y = torch.arange(7) % 4
    want = EmpiricalDenoiser(data, labels).x0(x, 0.6, 0.8, y)
    monkeypatch.setattr("fastdiff.models.empirical._BLOCK", 120)  # two rows at a time
    torch.testing.assert_close(
        EmpiricalDenoiser(data, labels).x0(x, 0.6, 0.8, y), want, rtol=0, atol=1e-14
    )
    assert EmpiricalDenoiser(data, labels).x0(x[:0], 0.6, 0.8).shape == (0, 2, 3)


def test_exact_models_name_what_is_wrong(mixture, x):
    data, labels = clustered_data()
    with pytest.raises(ValueError, match=r"means has shape \[K, D\]; got \[3\]"):
        GaussianMixture(1.0, [1.0, 2.0, 3.0], 1.0)
    with pytest.raises(ValueError, match=r"weights broadcasts to \[3\]"):
        GaussianMixture([0.5, 0.5], GOLDEN["means"], 1.0)
    with pytest.raises(ValueError, match="weights are non-negative"):
        GaussianMixture([-1.0, 1.0, 1.0], GOLDEN["means"], 1.0)
    with pytest.raises(ValueError, match="variances are positive"):
        GaussianMixture(1.0, GOLDEN["means"], 0.0)
    with pytest.raises(ValueError, match="8 elements per sample; got"):
        mixture.x0(x[:, :7], 1.0, 1.0)
    with pytest.raises(TypeError, match="x is a floating tensor"):
        mixture.x0(x.long(), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"of shape \[B\] = \[4\]; got 3 values"):
        mixture.x0(x, torch.ones(3), 1.0)
    with pytest.raises(ValueError, match=r"ids found in labels, or -1 .* got 3"):
        mixture.x0(x, 1.0, 1.0, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="Did you mean 'epsilon'"):
        mixture.network(VPLinear(), "epsilom")
    with pytest.raises(ValueError, match="y without labels"):
        EmpiricalDenoiser(data).x0(data, 1.0, 1.0, torch.zeros(60))
    with pytest.raises(TypeError, match="integer class ids"):
        EmpiricalDenoiser(data, labels).x0(data, 1.0, 1.0, torch.zeros(60))
    with pytest.raises(ValueError, match=r"labels are ids >= 0 of shape \[N\] = \[60\]"):
        EmpiricalDenoiser(data, labels[:5])
    with pytest.raises(TypeError, match="labels are integers"):
        EmpiricalDenoiser(data, labels.double())
    with pytest.raises(ValueError, match="data has shape"):
        EmpiricalDenoiser(torch.empty(0, 3))
    with pytest.raises(ValueError, match="1 values that are not"):
        EmpiricalDenoiser([[1.0], [math.nan]])
