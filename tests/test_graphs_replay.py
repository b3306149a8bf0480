# SPDX-License-Identifier: Apache-2.0
"""A replay is the eager run, for as many plans as have one structure, in any thread and stream.

On a CPU a recorder stands in for the device (tests/support/recorder.py); tests/test_graphs_gpu.py
says the same of CUDA graphs, and what only a device can show.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.captures import MODES, entries_of, network, plan_of
from support.core import needs_core
from support.nets import Net

import fastdiff as fd

# -- a replay is the eager run ---------------------------------------------------------------------


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
    assert plan_of("heun").structure == plan_of("exp-heun-2").structure
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
def test_threads_may_share_a_captured_sampler_whose_plan_changes(mode, recorder):
    plans, xs = [plan_of("dpmpp-2m"), plan_of("deis-2", t_max=0.6)], torch.randn(4, 3, 5)
    wanted = [[fd.sample(network, x, plan, graph=None) for plan in plans] for x in xs]
    sampler, begin = fd.Sampler(network, plans[0], graph=mode), threading.Barrier(4)

    def work(i):
        begin.wait()
        found = []
        for k in range(20):
            if i == 0:
                sampler.set_plan(plans[k % 2])
            found.append(sampler(xs[i]))
        return found

    with ThreadPoolExecutor(4) as pool:
        for i, results in enumerate(pool.map(work, range(4))):
            assert all(any(torch.equal(got, w) for w in wanted[i]) for got in results)
    assert sampler.stats().captures == 1


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
