# SPDX-License-Identifier: Apache-2.0
"""Captured loops: what is recorded, when it is used again, and what is refused.

On a CPU a recorder stands in for the device (tests/support/recorder.py); the tests marked gpu say
the same of CUDA graphs, and what only a device can show.
"""

import copy
import gc
import pickle
import threading
from functools import partial

import pytest
import torch
from support.nets import Net
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff import capture

VP = fd.schedules.VPLinear()
MODES = pytest.mark.parametrize("mode", ["loop", "stage"])
BACKENDS = [n for n, state in fd.backends.status().items() if state == "available"]
needs_core = pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled core is not built")


def network(x, t, y=None):
    shift = 0.0 if y is None else y.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return torch.tanh(x + shift) * (1 + 1e-3 * t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype))


def plan_of(solver="deis-3", steps=6, **options):
    return fd.plan(VP, solver, steps, prediction="v", **{"t_max": 0.9, **options})


def entries_of(sampler):
    """The captures that a sampler keeps."""
    captures = sampler._captured._captures.values()
    return [entry for each in captures for entry in each._entries.values()]


def poisoned(sampler):
    """Fills what captures write with NaN, the table and the inputs excepted."""
    for entry in entries_of(sampler):
        for registers in [getattr(entry.run, "run", entry.run).registers]:
            for tensor in (registers.x, registers.e, registers.history, registers.m):
                if tensor is not None:
                    tensor.fill_(float("nan"))


# -- a replay is the eager run ---------------------------------------------------------------------


@needs_core
@MODES
@pytest.mark.parametrize("solver", fd.solvers.names())
def test_a_replay_equals_eager(solver, mode, recorder):
    plan = plan_of(solver)
    x = torch.randn(3, 5)
    expected = fd.sample(network, x, plan, seed=3)
    sampler = fd.Sampler(network, plan, graph=mode)
    assert torch.equal(sampler(x, seed=3), expected)
    for _ in range(2):
        poisoned(sampler)
        assert torch.equal(sampler(x, seed=3), expected)
    stats = sampler.stats()
    assert (stats.captures, stats.loops, stats.evictions) == (1, 1, 0)
    assert stats.replays == 3 * (1 if mode == "loop" else len(plan.stages))


@needs_core
@MODES
def test_stages_without_an_evaluation_call_no_network(mode, recorder):
    rows = [
        fd.Stage(t=0.9, p=0.1, q=1.0, a_x=0.5, b=(0.5,)),
        fd.Stage(t=0.5, evaluate=False, a_x=0.7, c=0.3, noise=((1, 1.0),)),
        fd.Stage(t=0.4, p=0.1, q=1.0, a_x=0.5, b=(0.5,)),
    ]
    plan = fd.Plan(rows, (0.9, 0.1))
    calls = []

    def counted(x, t):
        calls.append(1)
        return network(x, t)

    x = torch.randn(2, 4)
    expected = fd.sample(counted, x, plan, seed=1)
    sampler = fd.Sampler(counted, plan, graph=mode)
    assert torch.equal(sampler(x, seed=1), expected)
    calls.clear()
    assert torch.equal(sampler(x, seed=1), expected)
    assert len(calls) == 2


@needs_core
@MODES
@pytest.mark.parametrize("scale", [2.0, torch.tensor([1.0, 2.0, 3.0])])
def test_guidance_and_conditioning_are_copied_in(scale, mode, recorder):
    plan = plan_of("dpmpp-2m")
    x, y = torch.randn(3, 5), torch.randn(3)
    guidance = fd.CFG(scale, uncond={"y": 0.0})
    sampler = fd.Sampler(network, plan, guidance=guidance, graph=mode)
    for y in (torch.randn(3), torch.randn(3), torch.randn(3)):
        expected = fd.sample(network, x, plan, guidance=guidance, cond={"y": y})
        assert torch.equal(sampler(x, {"y": y}), expected)
    assert sampler.stats().captures == 1


@needs_core
def test_tensors_inside_tuples_are_inputs_too(recorder):
    def net(x, t, pair):
        return torch.tanh(x * pair[0] + pair[1])

    plan, x = plan_of(), torch.randn(3, 5)
    sampler = fd.Sampler(net, plan, graph="loop")
    for _ in range(3):
        pair = (torch.randn(5), 0.5)
        expected = fd.sample(net, x, plan, cond={"pair": pair})
        assert torch.equal(sampler(x, {"pair": pair}), expected)
    assert sampler.stats().captures == 1
    sampler(x, {"pair": (torch.randn(5), 0.25)})  # another number is another graph
    assert sampler.stats().captures == 2


@needs_core
@MODES
def test_a_captured_network_sees_the_same_buffers_in_every_run(mode, recorder):
    seen = []

    def net(x, t, y):
        seen.append((x.data_ptr(), t.data_ptr(), y.data_ptr()))
        return network(x, t, y)

    plan = plan_of("ddim", 3)
    sampler = fd.Sampler(net, plan, graph=mode)
    sampler(torch.randn(2, 4), {"y": torch.randn(2)})
    captured = seen[-3:]
    sampler(torch.randn(2, 4), {"y": torch.randn(2)})
    assert seen[-3:] == captured


@needs_core
def test_inputs_are_left_as_they_are_and_results_are_the_callers(recorder):
    plan, x = plan_of(), torch.randn(3, 5)
    kept = x.clone()
    sampler = fd.Sampler(network, plan, graph="loop")
    first = sampler(x)
    copied = first.clone()
    second = sampler(torch.randn(3, 5))
    assert torch.equal(x, kept)
    assert torch.equal(first, copied)
    assert not torch.equal(first, second)
    out = torch.empty(3, 5)
    assert sampler(x, out=out) is out
    assert torch.equal(out, copied)


@needs_core
def test_seeds_are_inputs(recorder):
    plan, x = plan_of("ddpm"), torch.randn(3, 5)
    sampler = fd.Sampler(network, plan, graph="loop")
    for seed in (0, 5, [7, 7, 2**64 - 1]):
        assert torch.equal(sampler(x, seed=seed), fd.sample(network, x, plan, seed=seed))
    assert sampler.stats().captures == 1


@needs_core
def test_conditioning_with_one_value_a_stage_is_captured(recorder):
    plan = plan_of()
    sampler = fd.Sampler(network, plan, graph=fd.Graph("loop", buckets=(4,)))
    for _ in range(2):
        x, cond = torch.randn(3, 5), {"y": fd.PerStage(torch.randn(6, 3))}
        assert torch.equal(sampler(x, cond), fd.sample(network, x, plan, cond=cond))
    assert sampler.stats().captures == 1
    with pytest.raises(NotImplementedError, match=r'PerStage.*graph="loop"'):
        fd.Sampler(network, plan, graph="stage")(x, cond)


# -- one capture, many plans -----------------------------------------------------------------------


@needs_core
@MODES
def test_a_new_table_changes_the_result_without_another_capture(mode, recorder):
    x = torch.randn(3, 5)
    sampler = fd.Sampler(network, plan_of("dpmpp-2m", t_max=0.9), graph=mode)
    sampler(x)
    for plan in (
        plan_of("dpmpp-2m", t_max=0.7),
        plan_of("dpmpp-2m", grid="karras", t_max=0.9),
        plan_of("deis-2", t_max=0.9),
    ):
        sampler.set_plan(plan)
        assert sampler.plan is plan
        assert torch.equal(sampler(x), fd.sample(network, x, plan))
    assert sampler.stats().captures == 1


@needs_core
def test_guidance_is_a_number_in_the_table(recorder):
    plan, x, y = plan_of(), torch.randn(3, 5), torch.randn(3)
    sampler = fd.Sampler(network, plan, guidance=fd.CFG(2.0, uncond={"y": 0.0}), graph="loop")
    sampler(x, {"y": y})
    other = fd.CFG(5.0, uncond={"y": 0.0})
    sampler.set_plan(plan, other)
    assert sampler.guidance is other
    expected = fd.sample(network, x, plan, guidance=other, cond={"y": y})
    assert torch.equal(sampler(x, {"y": y}), expected)
    assert sampler.stats().captures == 1


@needs_core
def test_a_captured_stage_serves_plans_of_any_length_and_solver(recorder):
    x = torch.randn(3, 5)
    sampler = fd.Sampler(network, plan_of("ddim", 4), graph="stage")
    for solver, steps in (("ddim", 4), ("deis-3", 9), ("dpm-3", 6), ("heun", 5), ("ipndm-4", 30)):
        plan = plan_of(solver, steps)
        sampler.set_plan(plan)
        assert torch.equal(sampler(x), fd.sample(network, x, plan)), solver
    assert sampler.stats().captures == 1
    long = plan_of("ddim", 100)  # more rows than there is room for
    sampler.set_plan(long)
    assert torch.equal(sampler(x), fd.sample(network, x, long))
    assert (sampler.stats().captures, sampler.stats().loops) == (2, 1)


@needs_core
def test_another_structure_is_another_capture(recorder):
    x = torch.randn(3, 5)
    sampler = fd.Sampler(network, plan_of("ddim", 4), graph="loop")
    sampler(x)
    for plan in (plan_of("ddim", 5), plan_of("deis-3", 4), plan_of("heun", 2)):
        sampler.set_plan(plan)
        assert torch.equal(sampler(x), fd.sample(network, x, plan))
    assert sampler.stats().captures == 4


def test_plans_of_one_structure_differ_in_numbers_alone():
    assert plan_of("dpmpp-2m").structure == plan_of("deis-2", t_max=0.5).structure
    assert hash(plan_of("dpmpp-2m").structure) == hash(plan_of("deis-2").structure)
    assert plan_of("heun").structure == plan_of("dpm-2").structure
    different = ["ddim", "deis-3", "heun", "ddpm"]
    assert len({plan_of(name).structure for name in different}) == len(different)
    assert plan_of("dpmpp-2m", clip=(-1, 1)).structure != plan_of("dpmpp-2m").structure


@needs_core
def test_neither_a_plan_nor_its_table_is_changed_by_a_run(recorder):
    plan, x = plan_of("ddpm"), torch.randn(3, 5)
    text, table = plan.to_json(), plan.table.copy()
    sampler = fd.Sampler(network, plan, graph="stage")
    sampler(x, seed=0)
    (entry,) = entries_of(sampler)
    own = entry.run.run.table.clone()
    sampler(x, seed=1)
    assert torch.equal(entry.run.run.table, own)
    assert plan.to_json() == text
    assert (plan.table == table).all()


# -- keys, bounds, buckets -------------------------------------------------------------------------


@needs_core
@pytest.mark.parametrize("change", ["shape", "dtype", "cond", "environment", "guidance"])
def test_what_a_graph_depends_on_is_part_of_its_key(change, recorder):
    plan, x, cond = plan_of(), torch.randn(3, 5), {"y": torch.randn(3)}
    sampler = fd.Sampler(network, plan, graph="loop")
    sampler(x, cond)
    if change == "shape":
        x = torch.randn(3, 6)
    if change == "dtype":
        x = x.double()
    if change == "cond":
        cond = {"y": cond["y"].double()}
    if change == "environment":
        recorder.facts = "autocast"
    if change == "guidance":
        sampler.set_plan(plan, fd.CFG(2.0, uncond={"y": 0.0}))
    result = sampler(x, cond)
    assert sampler.stats().captures == 2
    assert torch.equal(result, fd.sample(network, x, plan, cond=cond, guidance=sampler.guidance))


@needs_core
def test_the_least_recently_used_goes_first(recorder):
    plan = plan_of("ddim", 2)
    sampler = fd.Sampler(network, plan, graph=fd.Graph("loop", loops=2))
    small, middle, large = (torch.randn(n, 4) for n in (1, 2, 3))
    sampler(small)
    sampler(middle)
    sampler(small)  # middle is now the older one
    sampler(large)
    assert sampler.stats() == capture.Stats(3, 4, 1, 2, sampler.stats().bytes)
    sampler(small)
    assert sampler.stats().captures == 3
    sampler(middle)
    assert sampler.stats().captures == 4


@needs_core
def test_memory_is_bounded_and_reported(recorder):
    plan = plan_of("ddim", 2)
    recorder.bytes_each = 1000
    sampler = fd.Sampler(network, plan, graph=fd.Graph("loop", bytes=20_000))
    for n in (100, 200, 300, 400, 100):
        sampler(torch.randn(n, 4))
        assert 0 < sampler.stats().bytes <= 20_000
    assert sampler.stats().evictions > 0
    with pytest.raises(ValueError, match=r"may hold 20000 bytes .* needs \d+.*graph=None"):
        sampler(torch.randn(100_000, 4))
    sampler(torch.randn(100, 4))  # usable afterwards
    sampler.release()
    assert (sampler.stats().loops, sampler.stats().bytes) == (0, 0)


@needs_core
@pytest.mark.parametrize("solver", ["deis-3", "ddpm"])
@pytest.mark.parametrize("guided", [False, True])
def test_a_smaller_batch_is_served_by_the_next_bucket(guided, solver, recorder):
    plan = plan_of(solver)
    guidance = fd.CFG(torch.tensor([2.0, 0.5]), uncond={"y": 0.0}) if guided else None
    graph = fd.Graph("loop", buckets=(4, 8))
    sampler = fd.Sampler(network, plan, guidance=guidance, graph=graph)
    for _ in range(2):
        x, cond = torch.randn(2, 5), {"y": torch.randn(2)}
        expected = fd.sample(network, x, plan, guidance=guidance, cond=cond, seed=4)
        assert torch.equal(sampler(x, cond, seed=4), expected)
    if not guided:
        for batch in (1, 3, 4):
            x, cond = torch.randn(batch, 5), {"y": torch.randn(batch)}
            expected = fd.sample(network, x, plan, cond=cond, seed=4)
            assert torch.equal(sampler(x, cond, seed=4), expected)
    assert sampler.stats().captures == 1
    if not guided:
        sampler(torch.randn(9, 5), {"y": torch.randn(9)}, seed=0)  # above the last: its own
        assert sampler.stats().captures == 2


@needs_core
def test_auto_captures_at_the_second_call_of_a_kind(recorder):
    plan, x = plan_of(), torch.randn(3, 5)
    sampler = fd.Sampler(network, plan)
    counts = []
    for _ in range(3):
        sampler(x)
        counts.append((sampler.stats().captures, sampler.stats().replays))
    assert counts == [(0, 0), (1, 1), (1, 2)]
    sampler(torch.randn(4, 5))
    assert sampler.stats().captures == 1


@needs_core
def test_auto_runs_eagerly_what_cannot_be_captured(recorder):
    plan, x = plan_of(), torch.randn(3, 5)

    def net(x, t, token):
        return network(x, t)

    seen = []
    for options in (
        {"cond": object()},
        {"callback": lambda i, t, x, x0: seen.append(i)},
        {"progress": True},
        {"xi": [x] * len(plan.stages)},
    ):
        sampler = fd.Sampler(net if "cond" in options else network, plan)
        sampler(x, **options)
        sampler(x, **options)
        assert sampler.stats().captures == 0
    assert len(seen) == 2 * len(plan.stages)
    sampler = fd.Sampler(network, plan, backend="torch")
    sampler(x)
    sampler(x)
    assert sampler.stats().captures == 0


@needs_core
def test_auto_runs_eagerly_and_says_so_where_a_capture_fails(recorder):
    plan, x = plan_of(), torch.randn(3, 5)
    recorder.failure = RuntimeError(MESSAGES["host"][0])
    sampler = fd.Sampler(network, plan)
    expected = sampler(x)
    with pytest.warns(RuntimeWarning, match=r"neither waits for the device.*runs eagerly"):
        assert torch.equal(sampler(x), expected)
    assert torch.equal(sampler(x), expected)  # said once
    assert sampler.stats().captures == 0
    small = fd.Sampler(network, plan, graph=fd.Graph("auto", bytes=10))
    recorder.failure = None
    small(x)
    with pytest.warns(RuntimeWarning, match=r"Graph\.bytes"):
        assert torch.equal(small(x), expected)


@needs_core
def test_a_sampler_inside_a_captured_network_is_part_of_its_graph(recorder):
    inner = fd.Sampler(network, plan_of("ddim", 2), graph="loop")

    def outer(x, t):
        return inner(x) * 0.5

    x, plan = torch.randn(3, 5), plan_of()
    sampler = fd.Sampler(outer, plan, graph="loop")
    got = sampler(x)
    assert inner.stats().captures == 0
    own = fd.Sampler(network, plan_of("ddim", 2))
    assert torch.equal(got, fd.sample(lambda x, t: own(x) * 0.5, x, plan))


# -- weights ---------------------------------------------------------------------------------------


def _in_place(net):
    with torch.no_grad():
        net.linear.weight.mul_(2)


def _assign(net):
    net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}, assign=True)


def _data(net):
    net.linear.weight.data = net.linear.weight.data.clone()


def _submodule(net):
    net.linear = nn.Linear(5, 5)


def _train(net):
    net.train()


class Policy:
    """A plain object that holds its network."""

    def __init__(self, net):
        self.nets = {"all": [net]}

    def predict(self, x, t):
        return self.nets["all"][0](x, t)


WRAPPERS = {
    "method of an object": lambda net: Policy(net).predict,
    "closure over an object": lambda net: (lambda policy: lambda x, t: policy.predict(x, t))(
        Policy(net)
    ),
    "module": lambda net: net,
    "bound": lambda net: net.forward,
    "partial": lambda net: partial(net),
    "closure": lambda net: lambda x, t: net(x, t),
}


@needs_core
@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("change", [_in_place, _assign, _data, _submodule, _train])
def test_weights_that_move_are_captured_again(change, wrap, recorder):
    plan, x, net = plan_of(), torch.randn(3, 5), Net(dropout=0.5).eval()
    sampler = fd.Sampler(WRAPPERS[wrap](net), plan, graph="loop")
    sampler(x)
    change(net)
    sampler(x)
    assert sampler.stats().captures == (1 if change is _in_place else 2)
    assert sampler.stats().evictions == (0 if change is _in_place else 1)
    assert sampler.stats().loops == 1


@needs_core
def test_a_tensor_that_an_object_replaces_is_seen(recorder):
    class Scaled:
        def __init__(self):
            self.scale = torch.tensor(2.0)

        def __call__(self, x, t):
            return network(x, t) * self.scale

    plan, x, net = plan_of(), torch.randn(3, 5), Scaled()
    sampler = fd.Sampler(net, plan, graph="loop")
    sampler(x)
    net.scale = torch.tensor(0.5)
    sampler(x)
    assert sampler.stats().captures == 2


@needs_core
def test_a_network_that_makes_its_buffers_anew_is_refused(recorder):
    class Anew(Net):
        def forward(self, x, t):
            self.register_buffer("seen", x.mean().clone())
            return super().forward(x, t)

    with pytest.raises(RuntimeError, match="replaced tensors that it keeps"):
        fd.Sampler(Anew(), plan_of(), graph="loop")(torch.randn(3, 5))


@needs_core
def test_release_is_for_changes_that_cannot_be_seen(recorder):
    plan, x = plan_of(), torch.randn(3, 5)
    sampler = fd.Sampler(network, plan, graph="loop")
    sampler(x)
    sampler.release()
    assert sampler.stats().loops == 0
    sampler(x)
    assert sampler.stats().captures == 2


# -- random numbers and streams --------------------------------------------------------------------


@needs_core
def test_the_callers_random_numbers_are_left_as_an_eager_run_leaves_them(recorder):
    plan, x, net = plan_of(), torch.randn(3, 5), Net(dropout=0.5)
    torch.manual_seed(1)
    expected = fd.sample(net, x, plan)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(fd.Sampler(net, plan, graph="loop")(x), expected)
    assert torch.equal(torch.get_rng_state(), after)


@needs_core
def test_a_run_on_another_stream_waits_for_the_one_before(recorder):
    plan, x = plan_of(), torch.randn(3, 5)
    sampler = fd.Sampler(network, plan, graph="loop")
    sampler(x)
    sampler(x)
    assert recorder.followed == 0
    recorder.here = "stream 1"
    sampler(x)
    sampler(x)
    assert recorder.followed == 1
    eager = fd.Sampler(network, plan, graph=None)
    eager(x)
    recorder.here = "stream 0"
    eager(x)
    assert recorder.followed == 2


@needs_core
@MODES
def test_a_replay_packs_no_row(mode, recorder, monkeypatch):
    sampler, x = fd.Sampler(network, plan_of(), graph=mode), torch.randn(3, 5)
    expected = sampler(x)

    def packed(*arguments):
        raise AssertionError("a row was packed")

    monkeypatch.setattr(fd.Plan, "rows", packed)
    assert torch.equal(sampler(x), expected)


@needs_core
def test_a_replay_waits_for_another_of_the_same_pool(recorder):
    sampler = fd.Sampler(network, plan_of(), graph="loop")
    large, small = torch.randn(3, 5), torch.randn(2, 5)
    sampler(large)
    sampler(small)
    recorder.here = "stream 1"
    sampler(large)  # of the run of its own and of the small one's on stream 0
    assert recorder.followed == 1
    recorder.here = "stream 0"
    sampler(small)  # its own run was on stream 0; the other's on stream 1
    assert recorder.followed == 2


@needs_core
def test_two_threads_with_a_sampler_each_share_a_network(recorder):
    net = Net(dropout=0.5).eval()
    plans = [plan_of("deis-3"), plan_of("dpmpp-2m")]
    x = torch.randn(4, 5)
    expected = [fd.sample(net, x, plan) for plan in plans]
    wrong, errors = [], []

    def work(i):
        try:
            sampler = fd.Sampler(net, plans[i], graph="loop")
            for _ in range(20):
                if not torch.equal(sampler(x), expected[i]):
                    wrong.append(i)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, errors) == ([], [])


# -- refusals --------------------------------------------------------------------------------------


@needs_core
def test_a_graph_asked_for_on_a_cpu_is_refused():
    x = torch.randn(3, 5)
    for mode in ("loop", "stage"):
        with pytest.raises(ValueError, match=r"captured on cuda; got x on cpu.*graph=None"):
            fd.sample(network, x, plan_of(), graph=mode)
    assert torch.equal(
        fd.sample(network, x, plan_of(), graph="auto"), fd.sample(network, x, plan_of(), graph=None)
    )


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: fd.Graph("loops"), ValueError, "'auto', 'loop', 'stage'"),
        (lambda: fd.Graph(loops=0), ValueError, "loops is at least 1; got 0"),
        (lambda: fd.Graph(loops=None), TypeError, "loops is an integer; got None"),
        (lambda: fd.Graph(bytes=1.5), TypeError, "bytes is an integer; got 1.5"),
        (lambda: fd.Graph(buckets=(8, 4)), ValueError, "increase"),
        (lambda: fd.Graph(buckets=()), ValueError, "increase"),
        (lambda: fd.Graph(buckets=(0, 4)), ValueError, "at least 1"),
        (lambda: fd.Graph(buckets=(1.0,)), TypeError, "integers"),
        (lambda: fd.Graph(buckets=4), TypeError, "a sequence of integers; got 4"),
        (lambda: fd.Sampler(network, plan_of(), graph=3), TypeError, "got 3"),
        (lambda: fd.Sampler(network, plan_of(), graph="lop"), ValueError, "got 'lop'"),
    ],
)
def test_bad_settings_are_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


@needs_core
@MODES
@pytest.mark.parametrize(
    "options",
    [
        {"callback": lambda *a: None},
        {"progress": True},
        {"xi": torch.randn(6, 3, 5)},
    ],
)
def test_a_capture_cannot_be_looked_into(options, mode, recorder):
    sampler = fd.Sampler(network, plan_of(), graph=mode)
    with pytest.raises(ValueError, match=r"no stages to look into.*graph=None"):
        sampler(torch.randn(3, 5), **options)


@needs_core
def test_conditioning_a_graph_cannot_follow_is_refused(recorder):
    sampler = fd.Sampler(lambda x, t, c: x, plan_of(), graph="loop")
    with pytest.raises(TypeError, match=r"got object as cond\['c'\].*graph=None"):
        sampler(torch.randn(3, 5), {"c": object()})


@needs_core
def test_the_torch_backend_cannot_be_captured(recorder):
    sampler = fd.Sampler(network, plan_of(), backend="torch", graph="loop")
    with pytest.raises(ValueError, match=r"torch backend.*on the host.*graph=None"):
        sampler(torch.randn(3, 5))


MESSAGES = {
    "sync": ("called a synchronizing CUDA operation", "neither waits for the device nor copies"),
    "copy": (
        "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor "
        "is pinned.",
        "neither waits for the device nor copies",
    ),
    "legacy": (
        "CUDA error: operation would make the legacy stream depend on a capturing blocking stream",
        "launches on the current stream alone",
    ),
    "host": (
        "CUDA error: operation not permitted when stream is capturing",
        "nor allocates with the driver",
    ),
}


@needs_core
@pytest.mark.parametrize("where", ["rehearsal", "recording"])
@pytest.mark.parametrize("message", MESSAGES)
def test_the_rule_that_a_network_broke_is_named(message, where, recorder):
    text, rule = MESSAGES[message]
    sampler = fd.Sampler(network, plan_of(), graph="loop")
    x = torch.randn(3, 5)
    if where == "rehearsal":
        recorder.synchronises = RuntimeError(text)
    else:
        recorder.failure = RuntimeError(text)
    with pytest.raises(RuntimeError, match=f"{rule}.*graph=None"):
        sampler(x)
    assert sampler.stats() == capture.Stats()
    recorder.synchronises = recorder.failure = None
    assert torch.equal(sampler(x), fd.sample(network, x, plan_of()))  # usable
    assert recorder.pools == (1 if where == "rehearsal" else 2)  # a broken pool is not used again


@needs_core
def test_the_line_that_synchronises_is_named(recorder):
    calls = []

    def net(x, t):
        calls.append(1)
        if len(calls) > 6:  # where waiting is an error
            raise RuntimeError("called a synchronizing CUDA operation")
        return network(x, t)

    with pytest.raises(RuntimeError, match=r"test_graphs\.py:\d+, in net: raise RuntimeError"):
        fd.Sampler(net, plan_of(), graph="loop")(torch.randn(3, 5))


@needs_core
def test_errors_of_an_ordinary_run_are_the_networks_own(recorder):
    def net(x, t):
        raise RuntimeError("failed to capture image: camera isolated")

    with pytest.raises(RuntimeError, match=r"^failed to capture image: camera isolated$"):
        fd.Sampler(net, plan_of(), graph="loop")(torch.randn(3, 5))


@needs_core
def test_the_error_that_broke_a_capture_is_named_and_not_that_of_ending_it(recorder):
    first = RuntimeError(MESSAGES["legacy"][0])
    recorder.failure = RuntimeError("operation failed due to a previous error during capture")
    recorder.failure.__context__ = first
    with pytest.raises(RuntimeError, match=r"launches on the current stream alone.*legacy"):
        fd.Sampler(network, plan_of(), graph="loop")(torch.randn(3, 5))


class Storages(TorchDispatchMode):
    """Storages that operations read and that none of them made."""

    def __init__(self):
        super().__init__()
        self.read, self.made = {}, set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        for tensor in torch.utils._pytree.tree_leaves((arguments, keywords)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.made:
                    self.read[storage._cdata] = (StorageWeakRef(storage), str(function))
        result = function(*arguments, **(keywords or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                key = tensor.untyped_storage()._cdata
                if key not in self.read:
                    self.made.add(key)
        return result


@needs_core
@pytest.mark.parametrize("case", ["loop", "stage", "guided", "gradient", "adjoint"])
def test_what_a_graph_reads_outlives_the_call_that_made_it(case, recorder, monkeypatch):
    spies = []

    def record(device, body, pool):
        with Storages() as spy:
            body()
        spies.append(spy)
        return lambda: None  # like a graph's own replay it holds nothing

    recorder.record = record
    monkeypatch.setattr("fastdiff.capture.refusals.difference", lambda *_: None)
    plan, x, net = plan_of("deis-3"), torch.randn(3, 5), Net(dropout=0.5).eval()
    guidance = fd.CFG(2.0, uncond={"y": 0.0}) if case == "guided" else None
    cond = {"y": torch.randn(3)} if guidance else None
    gradient = {"gradient": "discrete", "adjoint": fd.AdjointDEIS(2)}.get(case)
    sampler = fd.Sampler(
        *(network if guidance else net, plan),
        guidance=guidance, gradient=gradient, graph="stage" if case == "stage" else "loop",
    )  # fmt: skip
    if gradient is None:
        net.requires_grad_(False)
    sampler(x.requires_grad_(gradient is not None), cond)
    gc.collect()
    assert sum(len(spy.read) for spy in spies) >= 2
    dead = [name for spy in spies for ref, name in spy.read.values() if ref.expired()]
    assert dead == []


@needs_core
def test_the_networks_own_errors_come_through_in_mid_capture(recorder):
    calls = []

    def net(x, t):
        calls.append(1)
        if len(calls) == 2 * 6 + 3:
            raise KeyError("mine")
        return network(x, t)

    sampler = fd.Sampler(net, plan_of(), graph="loop")
    x = torch.randn(3, 5)
    with pytest.raises(KeyError, match="mine"):
        sampler(x)
    assert sampler.stats().captures == 0
    assert torch.equal(sampler(x), fd.sample(network, x, plan_of()))


@needs_core
@MODES
def test_a_network_that_depends_on_python_state_is_refused(mode, recorder):
    calls = []

    def net(x, t):
        calls.append(1)
        return network(x, t) * len(calls)

    sampler = fd.Sampler(net, plan_of(), graph=mode)
    with pytest.raises(RuntimeError, match=r"depends on its tensors alone.*cond=.*graph=None"):
        sampler(torch.randn(3, 5))
    assert sampler.stats().loops == 0


@needs_core
@MODES
def test_bad_outputs_are_named_in_a_capture(mode, recorder):
    sampler = fd.Sampler(lambda x, t: x[:, :1], plan_of(), graph=mode)
    with pytest.raises(ValueError, match="returns its input's shape"):
        sampler(torch.randn(3, 5))


@needs_core
def test_cancellation_between_replays_leaves_a_usable_sampler(recorder):
    plan, x = plan_of(), torch.randn(3, 5)
    sampler = fd.Sampler(network, plan, graph="stage")
    expected = sampler(x)
    (captures,) = sampler._captured._captures.values()
    launch, count = captures.launch, []

    def interrupted(*arguments):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        launch(*arguments)

    captures.launch = interrupted
    with pytest.raises(KeyboardInterrupt):
        sampler(x)
    captures.launch = launch
    assert torch.equal(sampler(x), expected)


# -- between processes -----------------------------------------------------------------------------


@needs_core
def test_a_copy_is_a_sampler_of_its_own(recorder):
    net, plan, x = Net(dropout=0.5).eval(), plan_of(), torch.randn(3, 5)
    sampler = fd.Sampler(net, plan, graph=fd.Graph("loop", loops=3))
    expected = sampler(x)
    copied = copy.deepcopy(sampler)
    assert copied.stats() == capture.Stats()
    assert copied.network is not net
    assert copied.plan is plan
    with torch.no_grad():
        net.linear.weight.zero_()
    assert torch.equal(copied(x), expected)


def test_a_sampler_is_not_pickled():
    with pytest.raises(TypeError, match=r"plan\.to_json\(\)"):
        pickle.dumps(fd.Sampler(network, plan_of()))


def test_a_plan_crosses_processes_as_text():
    plan = plan_of("dpmpp-2m", threshold=(0.995, 1.0))
    again = fd.Plan.from_json(plan.to_json())
    assert again == plan
    assert again.structure == plan.structure


# -- on a GPU --------------------------------------------------------------------------------------


def on_gpu(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.gpu
@MODES
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("solver", fd.solvers.names())
def test_gpu_a_replay_equals_eager(solver, backend, mode):
    plan, x = plan_of(solver), on_gpu((3, 4, 8, 8))
    expected = fd.sample(network, x, plan, seed=3, backend=backend, graph=None)
    sampler = fd.Sampler(network, plan, graph=mode, backend=backend)
    for _ in range(3):
        assert torch.equal(sampler(x, seed=3), expected)
        poisoned(sampler)
    assert sampler.stats().captures == 1


@pytest.mark.gpu
@MODES
def test_gpu_a_new_table_needs_no_capture(mode):
    x = on_gpu((3, 16))
    sampler = fd.Sampler(network, plan_of("dpmpp-2m"), graph=mode)
    sampler(x)
    for plan in (plan_of("dpmpp-2m", t_max=0.7), plan_of("deis-2")):
        sampler.set_plan(plan)
        assert torch.equal(sampler(x), fd.sample(network, x, plan, graph=None))
    assert sampler.stats().captures == 1


@pytest.mark.gpu
@MODES
def test_gpu_a_replay_neither_allocates_nor_waits(mode):
    plan, x = plan_of("ddpm"), on_gpu((3, 16))
    sampler, out = fd.Sampler(network, plan, graph=mode), torch.empty_like(x)
    sampler(x, seed=1, out=out)
    sampler(x, seed=1, out=out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in range(5):
            sampler(x, seed=seed, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_gpu_two_samplers_on_two_streams():
    x, net = on_gpu((64, 5)), Net(dropout=0.5).eval().cuda()
    plans = [plan_of("deis-3"), plan_of("ddim")]
    expected = [fd.sample(net, x, plan, graph=None) for plan in plans]
    samplers = [fd.Sampler(net, plan, graph="loop") for plan in plans]
    streams = [torch.cuda.Stream() for _ in plans]
    results = [[], []]
    for sampler in samplers:
        sampler(x)
    torch.cuda.synchronize()
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(samplers[i](x))
    torch.cuda.synchronize()
    for i in range(2):
        # the same kernels on the same inputs: to the bit but for a library's choice of algorithm
        for result in results[i]:
            torch.testing.assert_close(result, expected[i], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_gpu_a_sampler_goes_from_stream_to_stream():
    x, plan = on_gpu((1 << 20, 4)), plan_of("deis-3")
    expected = fd.sample(network, x, plan, graph=None)
    sampler = fd.Sampler(network, plan, graph="loop")
    sampler(x)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for i in range(6):
        with torch.cuda.stream(streams[i % 2]):
            results.append(sampler(x))
    torch.cuda.synchronize()
    for result in results:
        assert torch.equal(result, expected)


def _item(x, t):
    return x * float(x.sum())


def _host(x, t):
    return x * torch.tensor(0.5).to(x.device)


def _branch(x, t):
    return x if x.mean() > 0 else -x


@pytest.mark.gpu
@MODES
@pytest.mark.parametrize("net", [_item, _host, _branch])
def test_gpu_networks_that_synchronise_are_refused_and_leave_the_process_usable(net, mode):
    x = on_gpu((3, 16))
    sampler = fd.Sampler(net, plan_of(), graph=mode)
    with pytest.raises(RuntimeError, match=f"in {net.__name__}.*graph=None"):
        sampler(x)
    assert torch.cuda.get_sync_debug_mode() == 0
    assert not torch.cuda.is_current_stream_capturing()
    assert fd.Sampler(net, plan_of(), graph=None)(x).isfinite().all()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert fd.Sampler(network, plan_of(), graph=mode)(x).isfinite().all()


@pytest.mark.gpu
def test_gpu_an_error_in_mid_capture_leaves_the_process_usable():
    x = on_gpu((3, 16))

    def net(x, t):
        if torch.cuda.is_current_stream_capturing():
            raise KeyError("mine")
        return network(x, t)

    with pytest.raises(KeyError, match="mine"):
        fd.Sampler(net, plan_of(), graph="loop")(x)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert fd.Sampler(network, plan_of(), graph="loop")(x).isfinite().all()


@pytest.mark.gpu
def test_gpu_ten_thousand_replays_without_growth():
    x, out = on_gpu((2, 16)), on_gpu((2, 16))
    sampler = fd.Sampler(network, plan_of("ddim", 4), graph="loop")
    for _ in range(10):
        sampler(x, out=out)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(10_000):
        sampler(x, out=out)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert out.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_autocast_is_part_of_the_key_and_leaves_no_trace(dtype):
    x, net, plan = on_gpu((3, 5)), Net(dropout=0.5).eval().cuda(), plan_of()
    sampler = fd.Sampler(net, plan, graph="loop")
    plain = sampler(x)
    with torch.autocast("cuda", dtype=dtype):
        expected = fd.sample(net, x, plan, graph=None)
        for _ in range(2):
            torch.testing.assert_close(sampler(x), expected)
            torch.cuda.empty_cache()
        with torch.no_grad():
            net.linear.weight.mul_(0.5)  # the graph casts it anew
        torch.testing.assert_close(sampler(x), fd.sample(net, x, plan, graph=None))
        with torch.no_grad():
            net.linear.weight.mul_(2.0)
    assert torch.equal(sampler(x), plain)
    assert sampler.stats().captures == 2


def _synchronize(x, t):
    torch.cuda.synchronize()
    return network(x, t)


def _own_stream(x, t):
    with torch.cuda.stream(torch.cuda.Stream()):
        return x * 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("net", [_synchronize, _own_stream])
def test_gpu_a_capture_that_breaks_leaves_the_process_usable(net):
    x, stream = on_gpu((3, 16)), torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="graph=None"):
        fd.Sampler(net, plan_of(), graph="loop")(x)
    assert torch.cuda.current_stream() == stream
    assert torch.randn(4, device="cuda").isfinite().all()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    sampler = fd.Sampler(network, plan_of(), graph="loop")
    for _ in range(2):
        assert torch.equal(sampler(x), fd.sample(network, x, plan_of(), graph=None))


@pytest.mark.gpu
def test_gpu_the_newer_precision_settings_are_read():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert fd.Sampler(network, plan_of(), graph="loop")(on_gpu((3, 16))).isfinite().all()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.gpu
def test_gpu_random_networks_draw_as_an_eager_run_does():
    x, net, plan = on_gpu((64, 5)), Net(dropout=0.5).cuda(), plan_of()
    torch.cuda.manual_seed(1)
    expected = fd.sample(net, x, plan, graph=None)
    after = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(1)
    sampler = fd.Sampler(net, plan, graph="loop")
    torch.testing.assert_close(sampler(x), expected)
    assert torch.equal(torch.cuda.get_rng_state(), after)
    assert not torch.equal(sampler(x), sampler(x))


@pytest.mark.gpu
def test_gpu_a_compiled_network_is_captured():
    x, net, plan = on_gpu((3, 5)), Net(dropout=0.5).eval().cuda(), plan_of()
    compiled = torch.compile(net)
    expected = fd.sample(net, x, plan, graph=None)
    sampler = fd.Sampler(compiled, plan, graph="loop")
    for _ in range(2):
        torch.testing.assert_close(sampler(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_gpu_buckets_guidance_and_conditioning():
    plan = plan_of("dpmpp-2m")
    guidance = fd.CFG(2.0, uncond={"y": 0.0})
    graph = fd.Graph("loop", buckets=(4,))
    sampler = fd.Sampler(network, plan, guidance=guidance, graph=graph)
    for batch in (1, 3, 4, 2):
        x, cond = on_gpu((batch, 16), batch), {"y": on_gpu((batch,), batch)}
        expected = fd.sample(network, x, plan, guidance=guidance, cond=cond, graph=None)
        assert torch.equal(sampler(x, cond), expected)
    assert sampler.stats().captures == 1
    assert sampler.stats().bytes > 0


@pytest.mark.gpu
def test_gpu_eviction_gives_memory_back():
    plan = plan_of("ddim", 4)
    sampler = fd.Sampler(network, plan, graph=fd.Graph("loop", loops=1))
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for n in (1, 2, 3):
        sampler(on_gpu((n << 20, 4)))
    sampler.release()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
