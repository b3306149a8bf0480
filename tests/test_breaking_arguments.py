# SPDX-License-Identifier: Apache-2.0
"""Arguments that nothing can be made of: a sentence that names them, before anything is changed."""

import pytest
import torch
from click.testing import CliRunner
from support.core import FAST
from support.refusals import REFUSALS, refused

import fastdiff as fd

VP = fd.schedules.VPLinear()
EACH = pytest.mark.parametrize("backend", FAST)


def network(x, t, y=None):
    return torch.tanh(x)


def plan_of(solver="deis-3", steps=4, **options):
    return fd.plan(VP, solver, steps, prediction="v", **{"t_max": 0.9, **options})


# -- of a run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_an_uncond_that_the_conditionings_dtype_cannot_hold_is_refused(dtype):
    cond = {"y": torch.ones(2, dtype=dtype)}
    value = {torch.uint8: -1, torch.int8: 300}[dtype]
    with refused("uncond"):
        fd.sample(
            *(network, torch.randn(2, 3), plan_of()),
            cond=cond,
            guidance=fd.CFG(2.0, {"y": value}),
        )


@pytest.mark.parametrize("seed", [{1, 2}, {1: 0, 2: 0}, frozenset({1, 2}), "12", b"12"])
def test_seeds_without_an_order_are_refused(seed):
    with refused("seed"):
        fd.sample(network, torch.randn(2, 3), plan_of("ddpm"), seed=seed)
    with refused("seed"):
        fd.noise.normal((2, 3), seed)


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(1, 3).expand(2, 3),
        torch.zeros(4).as_strided((2, 3), (1, 1)),
        torch.zeros(1).expand(2, 3),
    ],
)
def test_an_out_that_overlaps_itself_is_refused(out):
    with refused("out"):
        fd.sample(network, torch.randn(2, 3), plan_of(), out=out)


@pytest.mark.parametrize("plan", [None, 5, "deis-3", VP])
def test_the_prior_of_no_plan_is_refused(plan):
    with refused("plan"):
        fd.noise.prior(plan, (2, 3))


@EACH
@pytest.mark.parametrize("kind", ["sparse", "nested"])
@pytest.mark.filterwarnings("ignore")  # torch's, of its prototypes
def test_an_output_of_another_layout_is_refused_with_its_stage(kind, backend):
    def net(x, t):
        if kind == "sparse":
            return x.to_sparse()
        return torch.nested.nested_tensor(list(x))

    with refused("stage 0"):
        fd.sample(net, torch.randn(2, 3), plan_of(), backend=backend)


@EACH
def test_a_floor_that_the_state_cannot_hold_is_refused(backend):
    with refused("floor"):
        fd.Stage(t=1.0, b=(1.0,), threshold=(0.9, 1e300))
    stage = fd.Stage(t=1.0, b=(1.0,), threshold=(0.9, 1e38))  # float32 holds it
    plan = fd.Plan((stage,), (1.0, 0.0), variable="x0")
    assert fd.sample(network, torch.randn(2, 3), plan, backend=backend).isfinite().all()


@pytest.mark.parametrize("extras", [5, None, torch.ones(2, 3)[0, 0], "ab"])
def test_extras_that_are_no_sequence_are_refused(extras):
    plan = fd.Plan((fd.Stage(t=1.0, b=(1.0,), r=(0.5,)),), (1.0, 0.0))
    with refused("extras"):
        fd.sample(network, torch.randn(2, 3), plan, extras=extras)


# -- of conditioning -------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", [lambda v: [v], lambda v: (v,), lambda v: {"a": [v]}])
def test_one_value_a_stage_means_the_same_wherever_it_stands(hold):
    plan, seen = plan_of(), []
    values = torch.arange(8.0).reshape(4, 2)

    def net(x, t, y):
        while not isinstance(y, torch.Tensor):
            assert isinstance(y, list | tuple | dict), "a PerStage reached the network"
            y = next(iter(y.values())) if isinstance(y, dict) else y[0]
        seen.append(y.clone())
        return torch.tanh(x)

    try:
        fd.sample(net, torch.randn(2, 3), plan, cond={"y": hold(fd.PerStage(values))})
    except REFUSALS as error:
        assert "PerStage" in str(error)
        return
    assert torch.equal(torch.stack(seen), values)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("hold", [list, tuple])
def test_tensors_in_lists_are_each_branchs_own(hold, batch):
    def net(x, t, y):
        return torch.tanh(x + y[0][:, None])

    x, plan = torch.randn(batch, 3), plan_of("ddim", 2)
    cond, uncond = torch.full((batch,), 1.0), torch.full((batch,), -1.0)
    guidance = fd.CFG(3.0, {"y": hold([uncond])})
    wanted = fd.sample(
        lambda x, t, y: torch.tanh(x + y[:, None]),
        *(x, plan),
        cond={"y": cond},
        guidance=fd.CFG(3.0, {"y": uncond}),
    )
    try:
        got = fd.sample(net, x, plan, cond={"y": hold([cond])}, guidance=guidance)
    except REFUSALS as error:
        assert "cond" in str(error)
        return
    torch.testing.assert_close(got, wanted)


# -- of plans --------------------------------------------------------------------------------------

HUGE = 10**400


@pytest.mark.parametrize("name", ["t", "model_time", "c_in", "p", "a_x", "x0_p", "c"])
def test_a_number_past_every_float_is_refused_by_name(name):
    with refused(rf"\b{name}\b"):
        fd.Stage(**{"t": 1.0, "noise": ((1, 1.0),), name: HUGE})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("b", (HUGE,)),
        ("r", (0.0, HUGE)),
        ("clip", (0.0, HUGE)),
        ("threshold", (0.9, HUGE)),
        ("noise", ((1, HUGE),)),
        ("noise", ((HUGE, 1.0),)),
        ("noise", ((float("nan"), 1.0),)),
        ("noise", ((float("inf"), 1.0),)),
        ("noise", 5),
    ],
)
def test_a_sequence_that_holds_no_float_is_refused_by_name(name, value):
    with refused(f"Stage: .*({name}|stream|draw)"):
        fd.Stage(t=1.0, **{name: value})


def test_times_past_every_float_are_refused_by_name():
    with refused("times"):
        fd.Plan((fd.Stage(t=1.0),), (HUGE, 0.0))
    with refused("prior_scale"):
        fd.Plan((fd.Stage(t=1.0),), (1.0, 0.0), prior_scale=HUGE)
    with refused("scale"):
        fd.CFG(HUGE)


@pytest.mark.parametrize("stages", [5, None, fd.Stage(t=1.0), "ab"])
def test_stages_that_are_no_sequence_are_refused(stages):
    with refused("stages"):
        fd.Plan(stages, (1.0, 0.0))


# -- of a batcher ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [5, None, "ab", (2, 3.5)])
def test_a_shape_that_is_none_is_refused(shape):
    with refused("shape"):
        fd.Batcher(network, [plan_of()], shape)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_a_batcher_refuses_a_state_that_is_not_real_and_floating(dtype):
    batcher = fd.Batcher(network, [plan_of()], (2, 3))
    with refused("x is"):
        batcher.add(torch.ones(3, dtype=dtype))
    assert batcher.free == 2


def test_a_sample_of_nan_is_refused_or_its_own_affair():
    batcher, x = fd.Batcher(network, [plan_of()], (2, 3)), torch.randn(3)
    place = batcher.add(x)
    try:
        batcher.add(torch.full((3,), torch.nan))
    except REFUSALS as error:
        message = str(error)
        assert "finite" in message or "NaN" in message
    done = {}
    while place not in done:
        done.update(batcher.step())
    torch.testing.assert_close(done[place], fd.sample(network, x[None], plan_of())[0])


# -- of the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "99999999999"],
        ["--steps", "ten"],
        ["--guidance", "1e300"],
        ["--guidance", "nan"],
    ],
)
def test_the_command_line_refuses_in_one_line(options, tmp_path, monkeypatch):
    from fastdiff.cli.app import commands

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(commands, ["sample", "--count", "2", "--no-progress", *options])
    assert done.exit_code != 0
    assert isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    assert "integer range" not in done.output
    assert options[0].strip("-") in done.output or options[1] in done.output
    assert list(tmp_path.iterdir()) == []


# -- of what a stranger gets wrong first -----------------------------------------------------------


@pytest.mark.parametrize(
    ("cond", "uncond"),
    [
        ([1], {"y": 1}),
        ({"y": [1, 2]}, {"y": {"z": 5}}),
        ({"y": [1, 2]}, {"y": [1, 2, 3]}),
        ({"y": [torch.ones(5)]}, {"y": {"z": torch.ones(5)}}),
    ],
)
def test_an_uncond_that_leads_to_nothing_in_cond_is_refused(cond, uncond):
    with refused("uncond has the structure of cond"):
        fd.sample(
            *(network, torch.randn(2, 3), plan_of()),
            cond=cond,
            guidance=fd.CFG(2.0, uncond=uncond),
        )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"callback": 5}, "callback is callable"),
        ({"xi": torch.tensor(1.0)}, "xi has one entry a stage"),
        ({"offset": 4 * 10**400}, "offset is the place"),
        ({"backend": ["cpu"]}, "unknown backend"),
    ],
)
def test_what_a_call_cannot_use_is_refused_before_the_network(options, match):
    def net(x, t):
        raise AssertionError("the network was called")

    with refused(match):
        fd.sample(net, torch.randn(2, 3), plan_of(), **options)


def test_a_dict_from_the_network_is_refused_with_the_key_to_take():
    with refused(r"\['sample'\]"):
        fd.sample(lambda x, t: {"sample": x}, torch.randn(2, 3), plan_of())


@pytest.mark.parametrize("name", ["text", "source"])
def test_a_plan_of_no_text_is_refused(name):
    with refused(f"{name} is a string"):
        fd.Plan.from_json(**{"text": plan_of().to_json(), "source": "a file", name: 5})


@pytest.mark.parametrize("stream", [None, 1.5, "1"])
def test_a_stream_that_is_no_integer_is_refused(stream):
    with refused("stream is an integer"):
        fd.noise.normal((2, 3), 0, stream)


@pytest.mark.parametrize("grid", [5, [1.0, "a"], ["1", ".5"], [1.0, ".5"], object()])
def test_the_times_of_an_adjoint_are_numbers(grid):
    with refused("grid: a name or a sequence of times"):
        fd.AdjointDEIS(grid=grid)


@pytest.mark.parametrize("clip", ["1", ("-1", "1"), (-1.0, "1")])
def test_a_limit_is_a_number(clip):
    with refused(r"clip is a bound or a pair \(lo, hi\)"):
        fd.plan(VP, "dpmpp-2m", 4, clip=clip)


@pytest.mark.parametrize("name", ["x", "e"])
def test_a_row_of_a_solver_is_a_row(name):
    rows = fd.solvers.Rows(VP, "v", "x0")
    with refused(f"Rows.add: {name} is a fastdiff.solvers.Row"):
        rows.add(1.0, **{name: 1.0})
