# SPDX-License-Identifier: Apache-2.0
"""Statistics of a network are those of its definition, resumable, and known by their network."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.statistics import MIXTURE, VP

import fastdiff as fd

ONE = fd.models.GaussianMixture([1.0], [[0.3, -0.2, 0.0]], [[0.04, 0.5, 1.0]])
SPAN = {"t_max": 0.9, "t_min": 0.01}


class Differentiable(torch.nn.Module):
    """The epsilon of the Gaussian `ONE` under VP, differentiable in x and in time, with a class."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, x, t, y=None):
        log_alpha = (-0.25 * (20.0 - 0.1) * t**2 - 0.05 * t).reshape(-1, 1)
        alpha, variance = log_alpha.exp(), -torch.expm1(2.0 * log_alpha)
        spread = alpha**2 * ONE.variances[0] + variance
        out = variance.sqrt() * (x - alpha * ONE.means[0]) / spread
        return self.gain * out + (0.0 if y is None else 0.1 * y.reshape(-1, 1))


class OnTheHost(Differentiable):
    """Reads its time without its derivative, as a look-up of an embedding does."""

    def forward(self, x, t, y=None):
        return super().forward(x, t.detach(), y)


DATA = ONE.sample(256, torch.Generator().manual_seed(0))
COMMON = {"data": DATA, "intervals": 24, "samples": 256, "batch": 100, **SPAN}


def expected(lam):
    """l, s and b of the Gaussian in closed form: sigma eps - l x is a constant of the sample."""
    t = VP.t_of_lambda(lam)
    alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
    spread = ONE.variances[0].numpy()
    slope = sigma**2 / (alpha**2 * spread + sigma**2)
    rate = -2.0 * slope * (1.0 - slope)
    return slope, -ONE.means[0].numpy() * rate


@pytest.mark.parametrize("derivative", ["forward", "finite"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_statistics_of_a_gaussian_are_those_of_its_formula(derivative, prediction):
    network = Differentiable()
    if prediction == "v":
        epsilon = network

        def network(x, t):
            alpha = torch.exp(-0.25 * (20.0 - 0.1) * t**2 - 0.05 * t).reshape(-1, 1)
            sigma = (1.0 - alpha**2).sqrt()
            return (epsilon(x, t) - sigma * x) / alpha

    given = COMMON | {"intervals": 120, "samples": 40}
    found = fd.tune.ems(network, VP, prediction=prediction, derivative=derivative, **given)
    slope, rate = expected(found.lambda_grid)
    np.testing.assert_allclose(found.l, slope, rtol=0, atol=1e-6)  # the Jacobian is diagonal
    # f is a constant of the sample; dl/dlambda is a difference on the grid
    f = -slope * ONE.means[0].numpy()
    np.testing.assert_allclose((found.s * f + found.b)[1:-1], rate[1:-1], rtol=0, atol=1e-3)
    assert found.shape == (3,)
    assert found.prediction == prediction


def test_statistics_of_the_mixture_are_those_of_its_expectations():
    # s and b by regression of f' on f, over states of the data that the exact flow moves on
    data = MIXTURE.sample(1500, torch.Generator().manual_seed(1))
    network = MIXTURE.network(VP)
    found = fd.tune.ems(
        network, VP, data=data, derivative="finite", probes="exact", intervals=30, samples=1500,
        batch=1500, t_max=0.5, t_min=0.2,
    )  # fmt: skip
    i, width = 15, 1e-3
    lam = found.lambda_grid[i]
    t, later = (float(VP.t_of_lambda(v)) for v in (lam, lam + width))
    noise = torch.randn(data.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = (float(VP.alpha(t)) * data + float(VP.sigma(t)) * noise).requires_grad_()
    eps = MIXTURE.epsilon(x, float(VP.alpha(t)), float(VP.sigma(t)))
    slope = torch.stack(
        [torch.autograd.grad(eps[:, d].sum(), x, retain_graph=True)[0][:, d] for d in range(8)], 1
    )
    l_now = torch.from_numpy(found.l[i].copy())
    torch.testing.assert_close(l_now, float(VP.sigma(t)) * slope.mean(0), rtol=0.05, atol=0.02)

    def f(x, time, slopes):
        a, s = float(VP.alpha(time)), float(VP.sigma(time))
        return (s * MIXTURE.epsilon(x, a, s) - slopes * x) / a

    x = x.detach()
    moved = fd.sample(network, x, fd.plan(VP, "deis-rk4", 1, grid=[t, later]))
    part = width / float(found.lambda_grid[i + 1] - lam)
    l_later = torch.from_numpy((1.0 - part) * found.l[i] + part * found.l[i + 1])
    now = f(x, t, l_now)
    rate = (f(moved, later, l_later) - now) / width
    mean, mean_rate = now.mean(0), rate.mean(0)
    s = ((now - mean) * (rate - mean_rate)).mean(0) / (now - mean).square().mean(0)
    torch.testing.assert_close(torch.from_numpy(found.s[i].copy()), s, rtol=0, atol=0.12)
    b = torch.from_numpy(found.b[i].copy())
    torch.testing.assert_close(b, mean_rate - s * mean, rtol=0, atol=0.06)


@pytest.mark.parametrize(
    ("schedule", "prediction", "span"),
    [
        (fd.schedules.EDM(), "edm", {}),
        (fd.schedules.FlowMatching(), "velocity", {"t_max": 0.99, "t_min": 0.01}),
        (fd.schedules.VPDiscrete.scaled_linear(), "epsilon", {}),
    ],
    ids=str,
)
def test_statistics_pay_on_every_schedule(schedule, prediction, span):
    network = MIXTURE.network(schedule, prediction)
    data = MIXTURE.sample(200, torch.Generator().manual_seed(0))
    found = fd.tune.ems(
        network, schedule, data=data, prediction=prediction, derivative="finite", probes=2,
        intervals=40, samples=200, batch=200, **span,
    )  # fmt: skip
    # at the noisy end x0 = mean + c e^lambda eps: it grows like e^lambda, and s is 1, even where
    # that end is the schedule's own and a difference can look to one side alone
    np.testing.assert_allclose(found.s[0], 1.0, atol=0.15)
    ends = schedule.t_of_lambda(found.lambda_grid[[0, -1]])
    common = {"grid": "logsnr", "prediction": prediction}
    common |= {"t_max": float(ends[0]), "t_min": float(ends[1])}
    exact = fd.plan(schedule, "deis-rk4", 100, **common)
    x = fd.noise.prior(exact, (32, 8), seeds=0, dtype=torch.float64)
    wanted = fd.sample(network, x, exact)

    def error(name, **options):
        plan = fd.plan(schedule, name, 6, **common, **options)
        extras = found.extras(plan, x) if options else ()
        return float((fd.sample(network, x, plan, extras=extras) - wanted).norm())

    assert error("dpm-v3-2", statistics=found) < 0.85 * error("dpmpp-3m")


def test_a_grid_may_end_at_the_data():
    edm = fd.schedules.EDM()
    network = MIXTURE.network(edm, "x0")
    data = MIXTURE.sample(100, torch.Generator().manual_seed(0))
    given = {"prediction": "x0", "derivative": "finite", "intervals": 40, "samples": 100}
    found = fd.tune.ems(network, edm, data=data, **given)
    plan = fd.plan(edm, "dpm-v3-3", 12, statistics=found, prediction="x0")
    assert plan.times[-1] == 0.0
    x = fd.noise.prior(plan, (16, 8), seeds=0, dtype=torch.float64)
    exact = fd.sample(network, x, fd.plan(edm, "heun", 200, prediction="x0"))
    got = fd.sample(network, x, plan, extras=found.extras(plan, x))
    assert float((got - exact).abs().max()) < 0.25


def test_probes_estimate_the_diagonal():
    network = MIXTURE.network(VP)
    data = MIXTURE.sample(512, torch.Generator().manual_seed(1))
    common = {"data": data, "derivative": "finite", "intervals": 4, "samples": 512, **SPAN}
    exact = fd.tune.ems(network, VP, probes="exact", **common)
    rough = fd.tune.ems(network, VP, probes=4, **common)
    # a probe's own variance is the row's other elements'; 2048 probes
    np.testing.assert_allclose(rough.l, exact.l, rtol=0, atol=0.03)
    assert not np.array_equal(rough.l, exact.l)


def test_states_come_from_runs_where_there_are_no_data():
    common = {"intervals": 24, "samples": 64, "batch": 64, **SPAN}
    network = Differentiable().float()
    found = fd.tune.ems(network, VP, shape=(3,), **common)
    slope, _ = expected(found.lambda_grid)
    np.testing.assert_allclose(found.l, slope, rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", [{"data": DATA[:50]}, {"shape": (3,)}])
def test_an_estimate_that_was_stopped_goes_on_bit_for_bit(tmp_path, source):
    common = {**source, "intervals": 6, "samples": 50, "batch": 20, **SPAN}
    whole = fd.tune.ems(Differentiable(), VP, **common)
    path, part = tmp_path / "s.npz", tmp_path / "s.npz.part"

    class Stop(Exception):
        pass

    def stop(done, total):
        seen.append((done, total))
        if len(seen) in (1, 2):
            raise Stop

    seen = []
    for _ in range(2):
        with pytest.raises(Stop):
            fd.tune.ems(Differentiable(), VP, save=path, progress=stop, **common)
        assert part.exists()
        assert not path.exists()
    with pytest.raises(ValueError, match=r"s\.npz\.part' holds .* other arguments: its seed"):
        fd.tune.ems(Differentiable(), VP, save=path, **common | {"seed": 1})
    with pytest.raises(ValueError, match="holds an estimate of another network"):
        fd.tune.ems(Differentiable(0.5), VP, save=path, **common)
    found = fd.tune.ems(Differentiable(), VP, save=path, progress=stop, **common)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert found == whole
    assert not part.exists()
    assert fd.tune.Statistics.load(path) == whole
    # a complete file is read
    assert fd.tune.ems(Differentiable(), VP, save=path, progress=stop, **common) == whole
    assert len(seen) == 3
    with pytest.raises(ValueError, match="another schedule, prediction, grid or shape"):
        fd.tune.ems(Differentiable(), VP, save=path, **common | {"intervals": 7})
    with pytest.raises(ValueError, match=r"s\.npz' holds .* other arguments: its samples"):
        fd.tune.ems(Differentiable(), VP, save=path, **common | {"samples": 60})
    whole.save(path)  # without what it was estimated with
    assert fd.tune.ems(Differentiable(), VP, save=path, **common | {"samples": 60}) == whole


def changed(path, **changes):
    """A file of statistics with other entries in its head, or other arrays."""
    with np.load(path) as archive:
        arrays = dict(archive)
    head = json.loads(str(arrays.pop("head")))
    for name, value in changes.items():
        (arrays if isinstance(value, np.ndarray) else head)[name] = value
    with path.open("wb") as file:
        np.savez(file, head=np.array(json.dumps(head)), **arrays)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"done": 99}, "got sums .* and 99 batches. It is damaged: delete it"),
        ({"done": 0}, "and 0 batches"),
        ({"done": None}, "and None batches"),
        ({"sums": np.zeros((3, 5, 3))}, r"holds sums \[9, 5, 3\] .* got sums \[3, 5, 3\]"),
        ({"sums": np.zeros((9, 5, 3), np.float32)}, "of float32"),
        ({"more": np.zeros(2)}, "its arrays are real, and sums, fingerprint"),
    ],
)
def test_damaged_sums_are_refused(tmp_path, changes, says):
    common = {"data": DATA, "intervals": 4, "samples": 20, "batch": 10, **SPAN}
    with pytest.raises(ZeroDivisionError):
        fd.tune.ems(Differentiable(), VP, save=tmp_path / "s", progress=lambda *_: 1 / 0, **common)
    changed(tmp_path / "s.part", **changes)
    with pytest.raises(ValueError, match=says):
        fd.tune.ems(Differentiable(), VP, save=tmp_path / "s", **common)


def test_a_damaged_file_of_statistics_is_refused(tmp_path):
    path = tmp_path / "s.npz"
    found = fd.tune.ems(Differentiable(), VP, data=DATA, intervals=2, samples=20, **SPAN)
    found.save(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(len(content), size=300):
        bits = bytearray(content)
        bits[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bits)
        try:
            assert fd.tune.Statistics.load(path) == found  # a bit that says nothing
        except ValueError as error:
            assert "holds no statistics" in str(error)  # noqa: PT017  some are read
    for changes in ({"version": None}, {"l": found.l * 1j}, {"l": found.l.astype(str)}):
        path.write_bytes(content)
        changed(path, **changes)
        with pytest.raises(ValueError, match="holds no statistics"):
            fd.tune.Statistics.load(path)


def test_elements_in_which_nothing_varies_have_no_slope():
    # D is linear in the last two elements: their f is 0 but for rounding errors
    mixture = fd.models.GaussianMixture([0.5, 0.5], [[2.0, 0, 0], [-2.0, 0, 0]], [[0.1] * 3] * 2)
    network, x = mixture.network(VP), torch.randn(4, 3, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        data = mixture.sample(256, torch.Generator().manual_seed(0)).to(dtype)
        found = fd.tune.ems(network, VP, data=data, derivative="finite", samples=256, intervals=20)
        assert not found.s[:, 1:].any()
        assert found.s[:, 0].any()
        plan = fd.plan(VP, "dpm-v3-2", 8, statistics=found)
        assert fd.sample(network, x, plan, extras=found.extras(plan, x)).isfinite().all()


def test_differences_are_as_long_as_the_network_is_precise():
    common = {"intervals": 4, "samples": 20, "derivative": "finite", **SPAN}
    network = Differentiable().float()
    single = fd.tune.ems(network, VP, data=DATA.float(), **common)
    double = fd.tune.ems(network, VP, data=DATA, **common)  # the network has float32 still
    slope, _ = expected(double.lambda_grid)
    np.testing.assert_allclose(single.l, slope, rtol=0, atol=1e-4)
    np.testing.assert_allclose(double.l, slope, rtol=0, atol=1e-4)


def test_a_folder_that_is_missing_is_named_before_anything_is_evaluated(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ems: save stands in a folder .*Make .*/none'"):
        fd.tune.ems(lambda x, t: 1 / 0, VP, data=DATA, save=tmp_path / "none" / "s.npz", **SPAN)


def test_statistics_of_too_few_samples_are_refused():
    network = fd.models.digits()
    images, classes = fd.models.digits_data("train")
    given = {"data": images, "cond": {"y": classes}, "prediction": "v", "intervals": 8}
    few = fd.tune.ems(network, network.schedule, samples=4, **given)
    plan = fd.plan(network.schedule, "dpm-v3-2", 8, prediction="v", statistics=few)
    with pytest.raises(ValueError, match=r"below 1000 .*; got .*e\+.* more samples"):
        few.extras(plan)


def test_a_file_of_something_else_is_refused_without_bad_advice(tmp_path):
    path = tmp_path / "s.npz"
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match="no archive that fastdiff wrote") as refusal:
        fd.tune.Statistics.load(path)
    assert "pickle" not in str(refusal.value)


def test_the_network_is_known_by_what_it_says():
    common = {"data": DATA, "intervals": 4, "samples": 20, **SPAN}
    y = torch.linspace(0.0, 1.0, len(DATA), dtype=torch.float64)
    found = fd.tune.ems(Differentiable(), VP, cond={"y": y}, **common)
    found.check(Differentiable(), cond={"y": y[:2]})
    found.check(Differentiable().float(), cond={"y": y[:2].float()})
    with pytest.raises(ValueError, match=r"x0 predictions differ by \d"):
        found.check(Differentiable(0.5), cond={"y": y[:2]})


def test_guidance_is_part_of_the_network():
    y = torch.ones(len(DATA), dtype=torch.float64)
    common = {"data": DATA, "intervals": 4, "samples": 40, **SPAN}
    guided = fd.tune.ems(
        Differentiable(), VP, cond={"y": y}, guidance=fd.CFG(3.0, uncond={"y": 0.0}), **common
    )
    same = fd.tune.ems(Differentiable(), VP, cond={"y": 3.0 * y}, **common)
    for name in ("l", "s", "b"):
        np.testing.assert_allclose(getattr(guided, name), getattr(same, name), atol=1e-9)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: fd.tune.ems(OnTheHost(), VP, **COMMON), ValueError,
         "differs by .* % from central differences"),
        (lambda: fd.tune.ems(MIXTURE.network(VP), VP, data=torch.zeros(4, 8), samples=4),
         NotImplementedError, "Give derivative='finite'"),
        (lambda: fd.tune.ems(fd.models.digits(), VP, shape=(1, 8, 8)), ValueError,
         "the network says that it predicts 'v'; got prediction='epsilon'"),
        (lambda: fd.tune.ems(Differentiable(), VP), ValueError, "got neither"),
        (lambda: fd.tune.ems(Differentiable(), VP, data=DATA, shape=(3,)), ValueError, "got both"),
        (lambda: fd.tune.ems(Differentiable(), VP, data=[1.0]), TypeError, "got list"),
        (lambda: fd.tune.ems(Differentiable(), VP, data=DATA, samples=0), ValueError, "samples is"),
        (lambda: fd.tune.ems(Differentiable(), VP, data=DATA, t_min=0.0), ValueError,
         "lambda is finite and increases from t_max to t_min; got .* inf at t_min = 0"),
        (lambda: fd.tune.ems(Differentiable(), VP, data=DATA, derivative="reverse"), ValueError,
         "derivative is one of 'forward', 'finite'"),
        (lambda: fd.tune.ems(Differentiable(), VP, data=DATA, cond={"y": torch.zeros(3)}),
         ValueError, "cond has one entry a sample, 256; got a tensor of 3"),
        (lambda: fd.tune.ems(Differentiable(), VP, data=DATA, cond={"y": torch.zeros(256)},
                             guidance=fd.CFG([2.0, 3.0], uncond={"y": 0.0})),
         ValueError, "a CFG whose scale is a number"),
        (lambda: fd.tune.ems(lambda x, t: x[:, :1], VP, data=DATA, intervals=2), ValueError,
         "returns its input's shape"),
        (lambda: fd.tune.ems(lambda x, t: (x,), VP, data=DATA), TypeError, "got tuple. Take the"),
        (lambda: fd.tune.ems(lambda x, t: x.int(), VP, data=DATA), ValueError, "got torch.int32"),
        (lambda: fd.tune.ems(lambda x, t: x.bfloat16(), VP, data=DATA), ValueError,
         r"got outputs of torch.bfloat16. Give network.float\(\)"),
        (lambda: fd.tune.ems(lambda x, t: x.bfloat16().double(), VP, derivative="finite", **COMMON),
         ValueError, "differ by .* % from those over a longer step"),
        (lambda: fd.tune.ems(lambda x, t: x / 0.0, VP, **COMMON), ValueError, "finite numbers"),
        (lambda: fd.tune.ems(3, VP, data=DATA), TypeError, "callable as network"),
        (lambda: fd.tune.ems(Differentiable(), "vp", data=DATA), TypeError, "got 'vp'"),
        (lambda: fd.tune.ems(Differentiable(), VP, data=DATA, guidance=3.0), TypeError, "CFG or"),
        (lambda: fd.tune.ems(Differentiable(), VP, data=DATA / 0.0), ValueError, "data is finite"),
        (lambda: fd.tune.ems(Differentiable(), VP, shape=3), ValueError, "shape is that of one"),
        (lambda: fd.tune.ems(Differentiable(), VP, shape=(3, 0)), ValueError, "sizes at least 1"),
        (lambda: fd.tune.ems(Differentiable(), VP, data=DATA, seed=0.5), TypeError, "seed is an"),
        (lambda: fd.tune.ems(Differentiable(), VP, data=DATA, t_max=2.0), ValueError,
         r"t_max lies in \[0, 1\]"),
        (lambda: fd.tune.ems(Differentiable(), VP, data=DATA, cond={"y": torch.tensor(1.0)}),
         ValueError, "one entry a sample, 256; got a tensor of one number"),
        (lambda: fd.tune.ems(Differentiable(), VP, data=DATA,
                             cond={"y": fd.PerStage(torch.zeros(3, 256))}),
         ValueError, "got a PerStage in cond"),
    ],
)  # fmt: skip
def test_what_cannot_be_estimated_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_the_benchmark_prints_a_table(tmp_path):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    path = Path(__file__).parents[1] / "benchmarks" / "tune_digits.py"
    spec = importlib.util.spec_from_file_location("tune_digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = {
        "statistics": tmp_path / "s.npz", "samples": 64, "intervals": 8, "count": 2,
        "reference": 10, "nfe": "5", "grids": "logsnr", "solvers": "ddim",
    }  # fmt: skip
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    done = CliRunner().invoke(module.main, options, catch_exceptions=False)
    rows = [line.split(" | ") for line in done.output.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows][:2] == ["| `ddim`", "| `dpm-v3-2` S"]
    assert len(rows) == 1 + len(module.V3)
    assert all(np.isfinite(float(row[1].rstrip(" |"))) for row in rows)
