# SPDX-License-Identifier: Apache-2.0
"""The launchers of the CUDA part over made-up devices: who starts early, where, and who cannot.

The module under test is csrc/cuda/launch.cpp and the bindings, over the runtime of
tests/cuda_runtime/: its devices are set here, and its launches read.
"""

import ctypes

import numpy as np
import pytest
import torch
from support.gpu import NOISY, fields
from support.rows import raw

from fastdiff import _core, backends, noise
from fastdiff.backends import Registers
from fastdiff.backends import cuda as cuda_module
from fastdiff.plans import EVALUATE, THRESHOLD, WRITES_X, Layout
from fastdiff.plans.layout import PackedMeasure, PackedReduction, PackedRow, encode

on_host = pytest.mark.parametrize("device", ["host"], indirect=True)
OUT = torch.ones(2, 600)
TABLE = torch.tensor(NOISY.table)


class Machine:
    """What the module under test takes for the machine. What is asked of a device once is kept for
    its number, so that a test of another kind of device takes another number."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.library.launch_at.restype = ctypes.c_char_p

    def be(self, *capabilities: int, driver: int = 13000, least: int = 80, most: int = 100) -> None:
        """Devices of these compute capabilities times 10, kernels for `least` and newer, compiled
        for an architecture of at most `most`."""
        array = (ctypes.c_int * len(capabilities))(*capabilities)
        self.library.machine_of(array, len(capabilities), driver, least, most)

    def launches(self) -> list[str]:
        return [self.library.launch_at(i).decode() for i in range(self.library.launch_count())]


@pytest.fixture
def machine(host_core):
    made = Machine(host_core.__spec__.origin)
    made.be(90, 90)
    yield made
    made.be(90)


def bound_to(table, layout, *indices):
    registers = Registers(
        x=torch.ones(2, 600),
        history=torch.ones(3, 2, 600),
        scalars=torch.zeros(2, 1),
        seeds=torch.arange(2),
    )
    return backends.get("cuda").bind(registers, table, layout, *indices), registers


# -- who starts early ------------------------------------------------------------------------------


@on_host
def test_a_stage_with_a_table_of_its_own_resolves_its_row_early(device, machine):
    bound, _ = bound_to(TABLE.clone(), NOISY.layout)
    bound.run(0, OUT, None)
    assert machine.launches() == ["device 0, blocks 2 of 256, early"]


@on_host
@pytest.mark.parametrize("given", ["stage_index", "row_index"])
def test_an_index_on_the_device_is_read_when_what_stands_ahead_has_ended(device, machine, given):
    index = torch.zeros(2 if given == "stage_index" else 1, dtype=torch.int64)
    indices = (index,) if given == "stage_index" else (None, index)
    bound, _ = bound_to(TABLE.clone(), NOISY.layout, *indices)
    bound.run(0, OUT, None)
    assert len(machine.launches()) == 1
    assert not machine.launches()[0].endswith("early")


@on_host
def test_a_table_that_others_were_given_is_read_when_what_stands_ahead_has_ended(device, machine):
    bound, _ = bound_to(TABLE.clone(), NOISY.layout)
    bound.run(0, OUT, None)
    assert bound.table.shape == TABLE.shape  # from here on anyone may write there
    bound.run(0, OUT, None)
    bound.refresh(TABLE.clone())
    bound.run(1, OUT, None)
    assert [launch.endswith("early") for launch in machine.launches()] == [True, False, False]


@on_host
def test_a_refreshed_table_stays_the_stages_own(device, machine):
    table = TABLE.clone()
    bound, _ = bound_to(table, NOISY.layout)
    table.mul_(1.0)  # the next run copies it again
    bound.run(0, OUT, None)
    bound.refresh(table.clone())
    bound.run(0, OUT, None)
    assert [launch.endswith("early") for launch in machine.launches()] == [True, True]


@on_host
def test_thresholds_and_measures_start_early_as_their_stage_does(device, machine):
    row = PackedRow(
        flags=EVALUATE + WRITES_X + THRESHOLD,
        b_0=1.0,
        k=(1.0,),
        quantile=0.5,
        floor=1.0,
        ceiling=np.inf,
        measures=(PackedMeasure(into=0, num=PackedReduction("sum", ("x", 0))),),
    )
    layout = Layout(measures=1)
    bound, registers = bound_to(torch.from_numpy(encode([row], layout)), layout)
    bound.measure(0, OUT, None)
    bound.run(0, OUT, None)
    bound.check()
    assert machine.launches() == [
        "device 0, blocks 2 of 256, early",
        "device 0, blocks 2 of 1024, early",
        "device 0, blocks 2 of 256, early",
    ]
    assert registers.scalars.tolist() == [[600.0], [600.0]]


@on_host
def test_early_launches_can_be_switched_off_and_the_bits_are_the_same(device, machine, monkeypatch):
    results = []
    for early in (True, False):
        monkeypatch.setattr(cuda_module, "launches_early", lambda early=early: early)
        machine.be(90)
        bound, registers = bound_to(TABLE.clone(), NOISY.layout)
        for row in (0, 1):
            bound.run(row, OUT, None)
        assert [launch.endswith("early") for launch in machine.launches()] == [early] * 2
        results.append(raw(registers.x))
    assert results[0] == results[1]


@pytest.mark.parametrize(("value", "early"), [(None, True), ("", True), ("1", True), ("0", False)])
def test_the_environment_says_whether_launches_start_early(monkeypatch, value, early):
    monkeypatch.delenv("FASTDIFF_PDL", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTDIFF_PDL", value)
    assert cuda_module.launches_early.__wrapped__() is early


def test_an_unknown_word_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("FASTDIFF_PDL", "yes")
    with pytest.raises(ValueError, match=r"FASTDIFF_PDL is .*; got 'yes'\."):
        cuda_module.launches_early.__wrapped__()


# -- where -----------------------------------------------------------------------------------------


def run_on(host_core, number: int, **changes: int) -> torch.Tensor:
    """A stage's x after one row, launched for a device of the machine by the core alone."""
    x, out = torch.ones(2, 600), torch.full((2, 600), 2.0)
    row = PackedRow(flags=EVALUATE + WRITES_X, a_x=0.5, b_0=1.0, k=(1.0,))
    table, fault, scale = torch.from_numpy(encode([row], Layout())), torch.zeros(2).long(), x[:, 0]
    own = {"x": x, "table": table, "fault": fault, "scale": scale.clone()}
    addresses = {name: tensor.data_ptr() for name, tensor in own.items()}
    stage = host_core.Stage(fields(**addresses, size=600, device=number, **changes))
    stage.check_table(table.data_ptr())
    stage.run(0, out.data_ptr(), 0, 600, 0, 0)
    return x


def test_a_launch_takes_the_registers_device_and_leaves_the_current_one(host_core, machine):
    for number, blocks in ((0, 2), (1, 2), (0, 2)):
        assert torch.equal(run_on(host_core, number), torch.full((2, 600), 2.5))
        assert machine.launches()[-1] == f"device {number}, blocks {blocks} of 256"
        assert machine.library.current_device() == 0
    with pytest.raises(RuntimeError, match=r"got: invalid device ordinal\. "):
        run_on(host_core, 2)
    assert machine.library.current_device() == 0


def test_each_device_runs_as_many_blocks_as_it_holds(host_core, machine):
    z, seeds = torch.zeros(1, 1 << 14), torch.arange(1)
    for number, blocks in ((0, 3), (1, 2)):
        host_core.normal(z.data_ptr(), 0, seeds.data_ptr(), 1, 1 << 14, 7, 0, number, 0)
        assert machine.launches()[-1] == f"device {number}, blocks {blocks} of 256"


@pytest.mark.parametrize(
    ("number", "capability", "driver"), [(2, 80, 13000), (3, 89, 13000), (4, 90, 12020)]
)
def test_devices_and_drivers_without_early_launches_launch_plainly(
    host_core, machine, number, capability, driver
):
    machine.be(*[90] * number, capability, driver=driver)
    run_on(host_core, number, own_table=1)
    assert machine.launches() == [f"device {number}, blocks 1 of 256"]


def test_kernels_from_the_ptx_of_an_older_architecture_do_not_start_early(host_core, machine):
    """They have no instruction that waits for the kernel ahead."""
    machine.be(*[90] * 8, most=86)
    run_on(host_core, 7, own_table=1)
    assert machine.launches() == ["device 7, blocks 1 of 256"]


def test_the_kernels_of_a_device_are_told_or_none(host_core, machine):
    kernels = host_core.kernels(1)
    assert len(kernels) == len({name for name, *_ in kernels}) == 32 + 16 + 8 + 2
    assert kernels[0] == ("stage_shared float32 float32", 61, 0, 1248, 256, 1)
    assert ("thresholds grown float64 bfloat16", 61, 0, 1248, 512, 1) in kernels
    assert host_core.kernels(2) is None
    machine.be(75)
    assert host_core.kernels() is None


# -- who cannot ------------------------------------------------------------------------------------


@pytest.fixture
def cards(machine, host_core, monkeypatch):
    """Makes PyTorch and the CUDA part see devices by their compute capabilities times 10."""

    def be(*capabilities: int, **options: int) -> None:
        machine.be(*capabilities, **options)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda number: divmod(capabilities[number], 10)
        )

    monkeypatch.setattr(cuda_module, "cuda_core", lambda: (host_core, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"Card {number}")
    monkeypatch.setattr(backends, "_warned", False)
    return be


F32 = torch.float32


def choose(name: str | None, number: int = 0) -> str:
    return backends.choose(name, F32, F32, torch.device("cuda", number)).name


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 103, 120])
def test_devices_of_the_built_capabilities_and_newer_are_served(cards, capability):
    cards(capability)
    assert backends.get("cuda").missing() is None
    assert choose(None) == choose("cuda") == "cuda"


def test_a_device_too_old_is_named_with_what_is_built_and_what_serves(cards, monkeypatch):
    cards(75)
    missing = backends.get("cuda").missing()
    for part in (
        "no kernels for cuda:0, Card 0, of compute capability 7.5",
        "built for compute capability 8.0, 9.0, 10.0 and newer than 10.0",
        "FASTDIFF_CUDA_ARCHS=75",
        'backend="triton" or backend="torch"',
    ):
        assert part in missing
    with pytest.raises(RuntimeError, match=r"does not run here; the CUDA part has no kernels for"):
        choose("cuda")
    triton = type(backends.get("triton"))
    monkeypatch.setattr(triton, "supports", lambda self, *asked: None)
    monkeypatch.setattr(triton, "missing", lambda self: None)
    assert choose(None) == "triton"
    monkeypatch.setattr(triton, "missing", lambda self: "no triton")
    with pytest.warns(RuntimeWarning, match=r"no kernels for cuda:0.*torch serve"):
        assert choose(None) == "torch"
    assert choose(None) == "torch"  # said once


def test_one_device_of_several_may_be_too_old(cards, monkeypatch):
    cards(90, 75)
    triton = type(backends.get("triton"))
    monkeypatch.setattr(triton, "supports", lambda self, *asked: None)
    monkeypatch.setattr(triton, "missing", lambda self: None)
    assert backends.get("cuda").missing() is None
    assert choose(None) == choose("cuda") == "cuda"
    assert choose(None, 1) == "triton"
    with pytest.raises(NotImplementedError, match=r"cuda:1, Card 1.*one of: .*triton, torch"):
        choose("cuda", 1)


def test_kernels_that_do_not_load_are_refused_with_the_runtimes_words(cards, host_core):
    """PTX of the last architecture can be too new for a driver: only the runtime knows."""
    cards(90, 90, 90, 90, 90, 120, least=80)
    assert backends.get("cuda").supports(F32, F32, torch.device("cuda", 5)) is None
    cards(*[90] * 6, 120, least=130)
    assert "no kernel image" in host_core.problem(6)
    reason = backends.get("cuda").supports(F32, F32, torch.device("cuda", 6))
    assert "cuda:6, Card 6, of compute capability 12.0 (no kernel image is available" in reason


def test_noise_for_a_device_without_kernels_is_made_by_the_host(cards, host_core, monkeypatch):
    cards(*[90] * 7, 120, least=130)
    monkeypatch.setattr(_core, "cuda_core", lambda: (host_core, None))
    wanted = noise.normal((2, 8), 5, 7)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, **where: self)
    assert torch.equal(noise.normal((2, 8), 5, 7, device="cuda:7"), wanted)


def test_a_driver_too_old_is_named_with_the_kernels_and_what_serves(cards):
    cards(90, driver=11080)
    missing = backends.get("cuda").missing()
    for part in (
        "cannot launch (CUDA driver version is insufficient for CUDA runtime version)",
        "for compute capability 8.0, 9.0, 10.0 and newer than 10.0",
        "update NVIDIA's driver",
        'backend="triton" or backend="torch"',
    ):
        assert part in missing
    with pytest.raises(RuntimeError, match=r"does not run here; .*update NVIDIA's driver"):
        choose("cuda")


@pytest.mark.parametrize(
    ("archs", "runs", "not_here"),
    [
        (["80", "90", "100"], [(8, 0), (8, 9), (9, 0), (10, 3), (12, 0)], [(7, 5), (7, 0)]),
        (["86"], [(8, 6), (8, 9), (9, 0)], [(8, 0), (7, 5)]),
        (["80", "90a"], [(8, 0), (8, 6), (9, 0)], [(10, 0), (7, 5)]),
        (["100f", "120"], [(10, 0), (12, 0), (12, 1)], [(9, 0), (8, 0)]),
    ],
)
def test_which_devices_an_architecture_serves(machine, host_core, cards, archs, runs, not_here):
    class Core:
        pass

    core = Core()
    core.archs = "_".join(archs)
    for capability, served in [*((c, True) for c in runs), *((c, False) for c in not_here)]:
        cards(10 * capability[0] + capability[1])
        assert (cuda_module.lacking(core, 0) is None) == served, capability


# -- mixed devices ---------------------------------------------------------------------------------


def test_registers_tables_and_indices_of_two_devices_are_refused_by_name(cards):
    from torch._subclasses.fake_tensor import FakeTensorMode

    cards(90, 90)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    with FakeTensorMode():
        x, e = torch.empty(2, 8, device=first), torch.empty(2, 8, device=second)
        host = torch.empty(TABLE.shape, dtype=torch.float64)
        bind = backends.get("cuda").bind
        with pytest.raises(ValueError, match=r"e lies on cuda:0; got cuda:1\. Pass e\.to"):
            bind(Registers(x=x, e=e), host, NOISY.layout)
        with pytest.raises(ValueError, match=r"the CPU or on cuda:0; got cuda:1\."):
            bind(Registers(x=x), host.to(second), NOISY.layout)
        index, one = (torch.empty(n, dtype=torch.int64, device=first) for n in (2, 1))
        with pytest.raises(ValueError, match=r"stage_index lies on cuda:1; got cuda:0\."):
            bind(Registers(x=e), host, NOISY.layout, index)
        with pytest.raises(ValueError, match=r"row_index lies on cuda:1; got cuda:0\."):
            bind(Registers(x=e), host, NOISY.layout, None, one)
        wanted = torch.Size((2, 8))
        error = cuda_module.wrong_output(e, wanted, first)
        assert str(error) == "network output: it lies on cuda:0; got cuda:1."
