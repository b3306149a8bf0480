# SPDX-License-Identifier: Apache-2.0
"""What every registered solver does: a new one joins by being registered.

Runs are short and states small: Triton's interpreter takes 10 ms for a stage, the compiler traces
each of them.
"""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.captures import MODES, network, poisoned
from support.core import BACKENDS, needs_core
from support.gradients import apart
from support.nets import Net
from support.problems import two_blobs
from support.runs import literal

import fastdiff as fd
from fastdiff.cli.app import commands

ROOT = Path(__file__).resolve().parent.parent
VP = fd.schedules.VPLinear()
EVERY = pytest.mark.parametrize("name", fd.solvers.names())
F64 = torch.float64


def plan_of(name, more=1):
    """The shortest plan that goes beyond the warm-up of a multistep method."""
    steps = fd.solvers.info(name).least_steps + more
    return fd.plan(VP, name, steps, prediction="v", t_max=0.9)


def reach(plan):
    """How many evaluations back the rows of a plan read."""
    return max(max(stage.history, default=0) for stage in plan.stages)


def plan_for(name, backend):
    """A plan for a backend: Triton's interpreter gets the shortest that reads as far back."""
    plan, shorter = plan_of(name), plan_of(name, 0)
    return shorter if backend == "triton" and reach(shorter) == reach(plan) else plan


@pytest.fixture(scope="module")
def net():
    """A network with a parameter that its output does not depend on."""
    torch.manual_seed(0)
    return Net(idle=True).double()


SCALE = 2.5
# Triton's interpreter is slow; how evaluations are kept is the same code for every backend
GRADIENTS = {
    "triton": ("discrete",),
    "torch": ("discrete", fd.Discrete(checkpoint=1), fd.Discrete(checkpoint=4)),
    "cpu": ("discrete",),
    "cuda": ("discrete",),
}


@pytest.mark.parametrize("backend", BACKENDS)
@EVERY
def test_a_guided_run_and_its_gradient_are_the_plans_formulas(name, backend, net):
    plan = plan_for(name, backend)
    x, y, weights = (torch.randn(*shape, dtype=F64) for shape in ((2, 5), (2,), (2, 5)))
    seeds = [11, 2**63 + 1]
    leaves = [x.requires_grad_(), y.requires_grad_(), net.linear.weight, net.linear.bias]

    def guided(x, t):
        bare = net(x, t, torch.zeros_like(y))
        return bare + SCALE * (net(x, t, y) - bare)

    def draw(i):
        noise = plan.stages[i].noise
        return sum(w * fd.noise.normal(x.shape, seeds, s, dtype=F64) for s, w in noise)

    expected = literal(plan, guided, x, draw)
    gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    for gradient in GRADIENTS[backend]:
        got = fd.sample(
            net, x, plan, cond={"y": y}, guidance=fd.CFG(SCALE, uncond={"y": 0.0}), seed=seeds,
            backend=backend, gradient=gradient,
        )  # fmt: skip
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert apart(torch.autograd.grad((got * weights).sum(), leaves), gradients) < 1e-10


@EVERY
def test_a_compiled_run_is_the_eager_run(name, net):
    torch._dynamo.reset()
    plan, x = plan_of(name, 0), torch.randn(3, 5, dtype=F64)
    function = torch.compile(
        lambda x: 2 * fd.sample(net, x, plan, seed=3), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(function(x), 2 * fd.sample(net, x, plan, seed=3))


@needs_core
@MODES
@EVERY
def test_a_replay_equals_eager(name, mode, recorder):
    plan, x = plan_of(name), torch.randn(3, 5)
    expected = fd.sample(network, x, plan, seed=3)
    sampler = fd.Sampler(network, plan, graph=mode)
    assert torch.equal(sampler(x, seed=3), expected)
    for _ in range(2):
        poisoned(sampler)
        assert torch.equal(sampler(x, seed=3), expected)
    stats = sampler.stats()
    assert (stats.captures, stats.loops, stats.evictions) == (1, 1, 0)
    assert stats.replays == 3 * (1 if mode == "loop" else len(plan.stages))


# -- what the registry says ------------------------------------------------------------------------


def test_same_names_the_solvers_with_equal_samples():
    """On VPLinear, whose straight variable is epsilon, and on a grid that lowers last steps."""
    network, found = two_blobs(VP, "v"), {}
    x = torch.randn(4, 2, dtype=F64)
    for name in fd.solvers.names():
        if fd.solvers.info(name).stochastic:
            continue
        plans = [fd.plan(VP, name, 6, grid=grid, prediction="v") for grid in ("uniform", "logsnr")]
        samples = torch.stack([fd.sample(network, x, plan) for plan in plans])
        equal = [k for k, known in found.items() if torch.allclose(known, samples, atol=1e-10)]
        assert [fd.solvers.info(name).same] == (equal or [""]), name
        if not equal:
            found[name] = samples


@EVERY
def test_an_entry_is_fit_to_print(name):
    info = fd.solvers.info(name)
    assert not info.same or fd.solvers.info(info.same).same == ""
    for text in (info.summary, info.source, info.quirks, info.same):
        assert "|" not in text
        assert "\n" not in text
        assert text == text.strip()


def test_the_page_of_solvers_is_that_of_the_registry():
    done = CliRunner().invoke(commands, ["solvers", "--markdown"])
    assert done.exit_code == 0, done.output
    written = (ROOT / "docs" / "solvers.md").read_text(encoding="utf-8")
    assert written == done.output, "run: fastdiff solvers --markdown > docs/solvers.md"
    assert all(f"| `{name}` |" in written for name in fd.solvers.names())
    for name in fd.solvers.names():
        assert all(f"`{alias}`" in written for alias in fd.solvers.info(name).aliases)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dpmpp_2m_sde", "draw noise at every step are 'ddpm', and 'ddim' with eta"),
        ("sample_euler_ancestral", "draw noise at every step"),
        ("DPMPP_2S", "Did you mean 'dpmpp-2s'\\? `fastdiff solvers`"),
        ("nothing-like-it", f"list all {len(fd.solvers.names())}\\.$"),
    ],
)
def test_an_unknown_name_is_refused_in_a_few_words(name, says):
    with pytest.raises(ValueError, match=says) as refusal:
        fd.solvers.info(name)
    assert len(str(refusal.value)) < 250
