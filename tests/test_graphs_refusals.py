# SPDX-License-Identifier: Apache-2.0
"""What cannot be captured is refused by the rule that it broke, and leaves a usable sampler."""

import gc
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.captures import MESSAGES, MODES, entries_of, network, plan_of
from support.core import needs_core
from support.nets import Net
from torch._dynamo.testing import CompileCounter
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff import capture


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
def test_a_pool_in_which_a_recording_broke_is_not_used_again(recorder):
    broken, record = set(), recorder.record

    def refusing(device, body, pool):
        if pool in broken:
            raise RuntimeError("beginAllocateToPool: already recording to pool_id")
        try:
            return record(device, body, pool)
        except RuntimeError:
            broken.add(pool)
            raise

    recorder.record, recorder.bytes_each = refusing, 1000
    sampler, xs = fd.Sampler(network, plan_of(), graph="loop"), torch.randn(4, 3, 5)
    sampler(xs[0])
    recorder.failure = RuntimeError(MESSAGES["sync"][0])
    with pytest.raises(RuntimeError, match="neither waits"):
        sampler(xs[0, :2])
    recorder.failure = None
    results = [sampler(x) for x in (xs[0, :2], xs[1], xs[2, :1])]
    wanted = [fd.sample(network, x, plan_of()) for x in (xs[0, :2], xs[1], xs[2, :1])]
    assert all(map(torch.equal, results, wanted))
    assert (recorder.pools, broken) == (2, {1})
    stats = sampler.stats()
    assert (stats.captures, stats.loops) == (3, 3)
    own = sum(entry.bytes for entry in entries_of(sampler))
    assert stats.bytes - own == 3 * 1000  # one graph in the first pool, two in the second
    sampler.release()
    assert sampler.stats().bytes == 0


@needs_core
def test_a_pools_memory_goes_with_its_last_capture(recorder):
    recorder.bytes_each = 1000
    sampler, x = fd.Sampler(network, plan_of(), graph=fd.Graph("loop", loops=1)), torch.randn(3, 5)
    sampler(x)
    recorder.failure = RuntimeError(MESSAGES["sync"][0])
    with pytest.raises(RuntimeError, match="neither waits"):
        sampler(x[:2])
    recorder.failure = None
    sampler(x[:2])  # the first pool has no capture left
    (entry,) = entries_of(sampler)
    assert sampler.stats().bytes - entry.bytes == 1000


@needs_core
def test_the_line_that_waits_is_named_while_other_threads_live(recorder):
    def net(x, t):
        return network(x, t) * float(x.abs().mean())

    recorder.watched = "cpu"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(time.sleep, (0.01, 0.01)))
        with pytest.raises(
            capture.CaptureRefused,
            match=r"neither waits.*test_graphs_refusals\.py:\d+, in net: ret",
        ):
            fd.Sampler(net, plan_of(), graph="loop")(torch.randn(3, 5))
    assert recorder.recorded == 0  # found before a recording broke


@needs_core
@pytest.mark.parametrize("case", ["plain", "guided", "discrete", "adjoint"])
@pytest.mark.parametrize("solver", ["deis-3", "ddpm", "dpmpp-2m"])
def test_what_the_library_itself_records_does_not_wait(solver, case, recorder):
    gradient = {"discrete": "discrete", "adjoint": fd.AdjointDEIS(2)}.get(case)
    guidance = fd.CFG(2.0, uncond={"y": 0.0}) if case == "guided" else None
    cond = {"y": torch.randn(3)} if guidance else None
    net = Net().requires_grad_(gradient is not None)
    options = {"gradient": gradient, "guidance": guidance, "graph": "loop"}
    recorder.watched = "cpu"
    sampler = fd.Sampler(net, plan_of(solver), **options)
    x = torch.randn(3, 5, requires_grad=gradient is not None)
    assert sampler(x, cond, seed=1).isfinite().all()
    assert sampler.stats().captures == 1


@needs_core
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the compiler imports
def test_a_compiled_network_is_looked_at_without_compiling_it_again(recorder):
    counted, net = CompileCounter(), Net()
    compiled = torch.compile(net, backend=counted)
    recorder.watched = "cpu"
    sampler, x = fd.Sampler(compiled, plan_of(), graph="loop"), torch.randn(3, 5)
    net.requires_grad_(False)
    expected = fd.sample(compiled, x, plan_of(), graph=None)
    frames = counted.frame_count
    assert torch.equal(sampler(x), expected)
    assert torch.equal(sampler(x), expected)
    assert (sampler.stats().captures, counted.frame_count) == (1, frames)


@needs_core
def test_the_line_that_synchronises_is_named(recorder):
    calls = []

    def net(x, t):
        calls.append(1)
        if len(calls) > 6:  # where waiting is an error
            raise RuntimeError("called a synchronizing CUDA operation")
        return network(x, t)

    with pytest.raises(
        RuntimeError, match=r"test_graphs_refusals\.py:\d+, in net: raise RuntimeError"
    ):
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
