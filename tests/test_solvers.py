# SPDX-License-Identifier: Apache-2.0
"""Solvers one by one: last steps, names, options, and what is refused."""

import dataclasses
import itertools

import pytest
import torch
from support.solvers import VP, redefined

import fastdiff as fd

SOLVERS = fd.solvers.names()
RESTARTED = ("restart", "s_noise")  # there is no noise without restarts
# statistics that all elements share, of times as early and as late as any grid here
SHARED = fd.solvers.ModelStatistics(VP, [0.9, 0.1], [0.5, -0.5], [0.0, 0.0], [-5.1, 4.6])


def test_a_plan_says_how_strong_its_starting_noise_is():
    assert fd.plan(fd.schedules.EDM(), "heun", 5).prior_scale == 80.0
    assert fd.plan(VP, "ddim", 5).prior_scale == pytest.approx(1.0)
    flow = fd.plan(fd.schedules.FlowMatching(), "ddim", 5, prediction="v", t_max=0.9)
    assert flow.prior_scale == 0.9


@pytest.mark.parametrize("solver", ["deis-3", "deis-rhoab-3", "ipndm-3"])
def test_epsilon_multistep_is_lowered_when_asked(solver):
    lengths = [len(s.b) for s in fd.plan(VP, solver, 6, lower_order_final=True).stages]
    assert lengths == [1, 2, 3, 3, 2, 1]
    assert [len(s.b) for s in fd.plan(VP, solver, 6).stages] == [1, 2, 3, 3, 3, 3]


def test_published_lowering_is_that_of_few_steps():
    few = fd.plan(VP, "dpmpp-3m", 9, grid="logsnr", published=True)
    many = fd.plan(VP, "dpmpp-3m", 10, grid="logsnr", published=True)
    assert [len(s.b) for s in few.stages[-2:]] == [2, 1]
    assert [len(s.b) for s in many.stages[-2:]] == [3, 3]


def test_default_last_steps_never_blow_up():
    # On a grid uniform in t the last step is a third of the whole in lambda: third order without
    # lowering ends with errors of order one (math of the x0 form: weights of 20 and more).
    weights = [[0.5, 0.5], [[1.0, -0.5, 0.3], [-0.9, 0.6, -1.1]], [[0.04] * 3, [0.1] * 3]]
    network = fd.models.GaussianMixture(*weights).network(VP)
    x = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = fd.sample(network, x, fd.plan(VP, "deis-rk4", 800, grid="logsnr"))
    for solver in (
        "dpmpp-3m",
        "dpm-3m",
        "dpmpp-2m",
        "deis-logrho-3",
        "deis-3",
        "deis-4",
        "ipndm-4",
        "lms-4",
        "plms",
        "res-3m",
    ):
        for steps in (5, 8, 12, 20):
            plan = fd.plan(VP, solver, steps, grid="uniform")
            error = float((fd.sample(network, x, plan) - exact).square().mean().sqrt())
            assert error < 0.5, (solver, steps, error)
    wild = fd.plan(VP, "dpmpp-3m", 8, grid="uniform", lower_order_final=False)
    assert float((fd.sample(network, x, wild) - exact).square().mean().sqrt()) > 1.0


def test_an_even_grid_is_not_lowered_by_default():
    plan = fd.plan(VP, "dpmpp-3m", 20, grid="logsnr")
    assert len(plan.stages[-1].b) == 3
    assert len(fd.plan(VP, "dpmpp-3m", 20, grid="uniform").stages[-1].b) == 1
    lowered = fd.plan(VP, "dpmpp-3m", 20, grid="logsnr", lower_order_final=True)
    assert [len(s.b) for s in lowered.stages[-3:]] == [3, 2, 1]


def test_euler_on_a_flow_is_euler():
    plan = fd.plan(fd.schedules.FlowMatching(), "euler", 4, prediction="velocity")
    for stage, s, t in zip(plan.stages, plan.times[:-1], plan.times[1:], strict=True):
        assert (stage.a_x, stage.p, stage.q) == (1.0, 0.0, 1.0)
        assert stage.b == pytest.approx((t - s,))


def test_registry_names_are_the_field_names():
    assert set(SOLVERS) == {
        "ddim", "ddpm", "euler", "heun",
        "deis-1", "deis-2", "deis-3", "deis-4",
        "deis-rhoab-1", "deis-rhoab-2", "deis-rhoab-3", "deis-rhoab-4",
        "deis-logrho-1", "deis-logrho-2", "deis-logrho-3",
        "deis-euler", "deis-heun", "deis-kutta3", "deis-heun3", "deis-ralston3", "deis-vdh3",
        "deis-ssprk3", "deis-rk4",
        "ipndm-1", "ipndm-2", "ipndm-3", "ipndm-4", "ipndm-v-2", "ipndm-v-3", "ipndm-v-4",
        "lms-1", "lms-2", "lms-3", "lms-4", "pndm", "plms",
        "dpm-1", "dpm-2", "dpm-3", "dpm-2m", "dpm-3m",
        "dpmpp-1", "dpmpp-2s", "dpmpp-3s", "dpmpp-2m", "dpmpp-3m",
        "res-2m", "res-3m", "res-2s", "res-3s", "exp-heun-2", "gradient-estimation",
        "unipc-1", "unipc-2", "unipc-3", "unipc-4",
        "midpoint", "heun3", "bosh3", "rk4", "rk4-38", "dopri5",
        "ab-1", "ab-2", "ab-3", "ab-4", "abm-2", "abm-3", "abm-4", "abm-5",
        "dpm-v3-1", "dpm-v3-2", "dpm-v3-3",
        "rex-1",
        "lcm", "tcd", "nstep-stochastic", "consistency", "progressive", "restart", "recurrence",
    }  # fmt: skip


@pytest.mark.parametrize("name", SOLVERS)
def test_a_registry_entry_says_what_its_plans_do(name):
    info = fd.solvers.info(name)
    assert info.name == name
    assert "arXiv" in info.source
    assert fd.solvers.get(name).name == name
    plan = fd.plan(VP, name, 6)
    assert plan.solver == name
    assert plan.stochastic == info.stochastic
    assert plan.nfe == 6 * info.nfe_per_step + info.nfe_extra
    assert fd.plan(VP, name, info.least_steps).steps == info.least_steps
    if info.least_steps > 1:
        with pytest.raises(ValueError, match=rf"^{name}: .* needs at least as many steps"):
            fd.plan(VP, name, info.least_steps - 1)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_option_of_a_name_changes_something(name):
    others = {
        "eta": [0.5], "form": ["x0", "epsilon"], "clip": [0.1], "threshold": [0.5],
        "variance": ["fixed_large"], "published": [True], "zeta": [0.9], "warmup": ["runge-kutta"],
        "lower_order_final": [True, False], "solver_type": ["taylor"],
        "method": ["diffusers", "singlestep_fixed"], "skip_prk_steps": [True], "gamma": [0.7],
        "c2": [0.4], "c3": [0.9], "timestep_scaling": [1.0], "sigma_data": [2.0], "eps": [0.3],
        "variant": ["bh1", "vary_coeff"], "corrector": [False], "disable_corrector": [(0,)],
        "mode": ["pece"],
        "inner": ["dpmpp-1"], "s_noise": [1.1], "length": [2], "repeats": [3],
        "restarts": [[(0.1, 0.5, 1, 2)]],
        "statistics": [SHARED], "degenerated": [True], "use_corrector": [False],
        "p_pseudo": [True], "c_pseudo": [True], "half": [True],
    }  # fmt: skip
    # where the last step is long, where it is short, and to sigma = 0
    sd = fd.schedules.VPDiscrete.linear()
    runs = [(VP, "uniform", 6), (VP, "logsnr", 6), (VP, "logsnr", 11), (sd, "trailing", 6)]
    info = fd.solvers.info(name)
    assert all(option in others for option in info.options)
    if "statistics" in info.options:  # they belong to one schedule, and end at sigma > 0
        runs = runs[:3]

    def changes(name, option):
        with_it = {"published": True} if option == "method" else {}
        unipc = {"variant": "vary_coeff", "lower_order_final": True}
        with_it |= unipc if ("variant" in info.options and option == "published") else {}
        with_it |= {"variance": "fixed_large"} if (name, option) == ("ddpm", "published") else {}
        with_it |= {"restarts": [(0.1, 0.5, 1, 2)]} if (name, option) == RESTARTED else {}
        with_it |= {"statistics": SHARED} if option == "degenerated" else {}
        return any(
            fd.plan(schedule, name, steps, grid=grid, **with_it)
            != fd.plan(schedule, name, steps, grid=grid, **with_it | {option: value})
            for schedule, grid, steps in runs
            for value in others[option]
        )

    for option in info.options:
        # what has nothing to change at a low order changes a higher one of the family
        higher = [n for n in SOLVERS if is_above(fd.solvers.info(n), info)]
        heard = [n for n in higher if option in fd.solvers.info(n).options]
        assert any(changes(each, option) for each in (name, *heard)), option


def is_above(info, other):
    """Whether two names are of one class, and the first of the higher order."""
    return info.make is other.make and info.fixed.get("order", 0) > other.fixed.get("order", 0)


def combinations(make, choices):
    """Solvers of this class, with every combination of the choices that it takes."""
    fields = {f.name for f in dataclasses.fields(make)}
    taken = {name: values for name, values in choices.items() if name in fields}
    for values in itertools.product(*taken.values()):
        try:
            yield make(**dict(zip(taken, values, strict=True)))
        except ValueError:  # the class refuses the combination
            continue


CLASSES = sorted({fd.solvers.info(name).make for name in SOLVERS}, key=lambda c: c.__name__)


@pytest.mark.parametrize("make", CLASSES, ids=lambda make: make.__name__)
def test_every_combination_of_options_has_a_name_that_exists(make):
    choices = {
        "order": (1, 2, 3, 4, 5), "form": ("auto", "epsilon", "x0"), "tableau": fd.solvers.TABLEAUS,
        "eta": (0.0, 1.0), "published": (False, True), "warmup": ("lower", "runge-kutta"),
        "solver_type": ("dpmsolver", "taylor"), "lower_order_final": (False, True, "auto"),
        "skip_prk_steps": (False, True), "gamma": (1.0, 2.0), "c2": (0.5, 1.0), "c3": (0.5, 1.0),
    }  # fmt: skip
    made = list(combinations(make, choices))
    assert made
    assert {solver.name for solver in made} <= set(SOLVERS)


@pytest.mark.parametrize("make", CLASSES, ids=lambda make: make.__name__)
def test_what_a_class_defines_is_not_defined_again_below_it(make):
    assert redefined(make) - {"intervals", "default_grid", "write_jump"} == set()


@pytest.mark.parametrize(
    ("alias", "name", "options"),
    [
        ("dpmpp_2m", "dpmpp-2m", {"lower_order_final": False}),
        ("sample_dpmpp_2m", "dpmpp-2m", {"lower_order_final": False}),
        ("DPMSolverMultistepScheduler", "dpmpp-2m", {"lower_order_final": True}),
        ("dpm_2", "dpm-2", {}),
        ("sample_dpm_2", "dpm-2", {}),
        ("KDPM2DiscreteScheduler", "dpm-2", {}),
        ("sample_heun", "heun", {}),
        ("HeunDiscreteScheduler", "heun", {}),
        ("sample_euler", "euler", {}),
        ("EulerDiscreteScheduler", "euler", {}),
        ("FlowMatchEulerDiscreteScheduler", "euler", {}),
        ("dpm_fast", "dpm-3", {"published": True}),
        ("sample_dpm_fast", "dpm-3", {"published": True}),
        ("sample_lms", "lms-4", {}),
        ("LMSDiscreteScheduler", "lms-4", {}),
        ("lms", "lms-4", {"lower_order_final": "zero"}),
        ("ipndm", "ipndm-4", {"lower_order_final": "zero"}),
        ("IPNDMScheduler", "ipndm-4", {}),
        ("ipndm_v", "ipndm-v-4", {"lower_order_final": "zero"}),
        ("PNDMScheduler", "pndm", {}),
        ("res_multistep", "res-2m", {"lower_order_final": False}),
        ("exp_heun_2_x0", "exp-heun-2", {}),
        ("gradient_estimation", "gradient-estimation", {"lower_order_final": "zero"}),
        ("UniPCMultistepScheduler", "unipc-2", {"lower_order_final": True}),
        ("uni_pc", "unipc-3", {"variant": "bh1", "lower_order_final": True}),
        ("uni_pc_bh2", "unipc-3", {"lower_order_final": True}),
    ],
)
def test_names_of_other_libraries_are_accepted(alias, name, options):
    assert fd.plan(VP, alias, 20) == fd.plan(VP, name, 20, **options)
    assert fd.solvers.info(alias) is fd.solvers.info(name)
    assert alias not in SOLVERS
    for option, value in options.items():
        other = {"variant": "vary_coeff", "lower_order_final": value is False}.get(
            option, not value
        )
        assert fd.solvers.get(alias, **{option: other}) != fd.solvers.get(alias)


def test_no_two_solvers_share_a_name_or_an_alias():
    known = [*SOLVERS, *(a for name in SOLVERS for a in fd.solvers.info(name).aliases)]
    assert len(known) == len(set(known))


@pytest.mark.parametrize("name", [n for n in SOLVERS if "clip" in fd.solvers.info(n).options])
def test_what_clips_can_threshold_and_nothing_else_changes(name):
    with_clip = fd.plan(VP, name, 4, clip=1.0)
    plan = fd.plan(VP, name, 4, threshold=0.995)
    assert {stage.threshold for stage in plan.stages} == {(0.995, 1.0)}
    bare = [dataclasses.replace(stage, threshold=None) for stage in plan.stages]
    assert bare == [dataclasses.replace(stage, clip=None) for stage in with_clip.stages]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: fd.plan(VP, "dies-3", 6), ValueError, "'deis-3'"),
        (lambda: fd.plan(VP, "dpmpp-3m", 2), ValueError, "needs at least as many steps"),
        (lambda: fd.plan(VP, "deis-4", 3), ValueError, "needs at least as many steps"),
        (lambda: fd.plan(VP, "deis-3", 0), ValueError, "steps is at least 1"),
        (lambda: fd.plan(VP, "deis-3", 6, prediction="eps_pred"), ValueError, "unknown prediction"),
        (lambda: fd.plan(VP, "deis-3", 6, eta=1.0), TypeError, "no option 'eta'.*warmup"),
        (lambda: fd.plan(VP, "ddim", 6, eta=1.5), ValueError, r"eta lies in \[0, 1\]"),
        (lambda: fd.plan(VP, "dpm-2m", 6, clip=1.0), TypeError, "no option 'clip'"),
        (lambda: fd.plan(VP, "dpmpp-2m", 6, solver_type="heun"), ValueError, "is one of"),
        (lambda: fd.plan(VP, "dpmpp-2m", 6, clip=(1, 1)), ValueError, "lo < hi"),
        (lambda: fd.plan(VP, "ddim", 6, form="epsilon", clip=1.0), ValueError, "clip applies"),
        (lambda: fd.plan(VP, "dpm-2m", 6, threshold=0.9), TypeError, "no option 'threshold'"),
        (lambda: fd.plan(VP, "deis-logrho-2", 6, threshold=0.9), TypeError, "no option"),
        (lambda: fd.plan(VP, "ddim", 6, form="epsilon", threshold=0.9), ValueError,
         "threshold applies to x0"),
        (lambda: fd.solvers.DPMSolverMultistep(form="epsilon", threshold=0.9), ValueError,
         "threshold applies to x0"),
        (lambda: fd.solvers.DPMSolverSinglestep(form="epsilon", clip=1), ValueError,
         "clip applies to x0"),
        (lambda: fd.plan(VP, "dpmpp-2m", 6, threshold=0.9, clip=1), ValueError, "not both"),
        (lambda: fd.plan(VP, "dpmpp-2m", 6, threshold=99.5), ValueError, "quantile <= 1"),
        (lambda: fd.plan(VP, "dpmpp-2m", 6, threshold=(0.9, 0)), ValueError, "floor > 0"),
        (lambda: fd.plan(VP, "dpmpp-2m", 6, threshold=True), TypeError, "such as 0.995; got True"),
        (lambda: fd.plan(VP, "dpmpp-2m", 6, threshold=(0.9, 1, 2)), TypeError, "a pair"),
        (lambda: fd.plan(VP, "deis-3", 6, warmup="rk"), ValueError, "warmup is one of"),
        (lambda: fd.plan(VP, "dpm-3", 6, method="singlestep_fixed"), ValueError, "published=True"),
        (lambda: fd.solvers.get("dpm-3", method="singlestep_fixed", published=True).plan(VP, 2),
         ValueError, "budget"),
        (lambda: fd.plan(VP, "deis-3", 6, published="False"), ValueError, "published is one of"),
        (lambda: fd.plan(VP, "deis-rhoab-3", 6, published=1), ValueError, "published is one of"),
        (lambda: fd.plan(VP, "ddpm", 6, published="no"), ValueError, "published is one of"),
        (lambda: fd.plan(VP, "ddim", 6, eta="1"), TypeError, "eta is a number"),
        (lambda: fd.plan(VP, "ddim", 6, eta=10**5000), ValueError, "eta .* 5000 digits"),
        (lambda: fd.plan(VP, "ddim", 6, clip=10**400), ValueError, "clip is finite; got an"),
        (lambda: fd.plan(VP, "ddim", 6, clip=(0, 10**400)), ValueError, "clip is finite"),
        (lambda: fd.plan(VP, "ddim", 6, clip=(0, 10**5000)), ValueError, "got a tuple with an int"),
        (lambda: fd.plan(VP, "ddim", 6, threshold=10**400), ValueError, "threshold is finite"),
        (lambda: fd.plan(VP, "rex-1", 6, zeta=10**400), ValueError, "zeta .* 400 digits"),
        (lambda: fd.plan(VP, "rex-1", 6, zeta="0.9"), TypeError, "zeta is a number"),
        (lambda: fd.plan(VP, "deis-3", 6, warmup=10**5000), ValueError, "warmup .* 5000 digits"),
        (lambda: fd.plan(VP, "ddim", 99999999999), ValueError, "steps is at most 1000000"),
        (lambda: fd.plan(VP, "dpm-3", 10**400, published=True), ValueError, "at most 1000000"),
        (lambda: fd.plan(VP, "deis-1", 6, warmup="runge-kutta"), TypeError, "no option 'warmup'"),
        (lambda: fd.plan(VP, "dpm-1", 6, solver_type="taylor"), TypeError, "no option"),
        (lambda: fd.plan(VP, "ddim", 6, prediction=["v"]), ValueError, "unknown prediction"),
        (lambda: fd.plan(VP, "ddim", 6, prediction="edm"), ValueError, "belongs to the EDM"),
        (lambda: fd.plan(VP, "dpmpp-2s", 6, published=True, grid=5.0), TypeError, "sequence"),
        (lambda: fd.solvers.info([]), ValueError, "unknown solver"),
        (lambda: fd.solvers.info(10**5000), ValueError, "unknown solver an integer of about 5000"),
        (lambda: fd.plan(VP, "ddim", 6, prediction=10**5000), ValueError, "unknown prediction an"),
        (lambda: fd.plan(VP, 3, 6), TypeError, "solver is a name"),
        (lambda: fd.plan(VP, fd.solvers.DDIM(), 6, eta=1.0), TypeError, "Set them on it"),
        (lambda: fd.plan("vp", "ddim", 6), TypeError, "schedule is a"),
        (lambda: fd.plan(fd.schedules.EDM(), "ddpm", 6, variance="fixed_large"),
         ValueError, "variance preserving"),
        (lambda: fd.plan(VP, "deis-3", 6, t_min=0.0, grid="logsnr", t_max=0.0005),
         ValueError, "below t_max"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_with_the_reason(make, error, says):
    with pytest.raises(error, match=says):
        make()
