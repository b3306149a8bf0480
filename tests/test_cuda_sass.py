# SPDX-License-Identifier: Apache-2.0
"""Loads and stores in the machine code of the CUDA kernels; needs cuobjdump, and no GPU."""

import re

import pytest
from support import sass
from support.sass import Instruction


@pytest.fixture(scope="module", params=sass.ARCHITECTURES)
def stages(request, tmp_path_factory) -> dict[str, list[Instruction]]:
    """The stage kernels of an architecture, by name."""
    path = sass.module_with(request.param, tmp_path_factory.mktemp("sass"))
    if path is None:
        pytest.skip("needs cuobjdump, and the CUDA module built for it or nvcc")
    found = {
        name: sass.instructions(text)
        for name, text in sass.dumped(path, request.param).items()
        if "stage" in name
    }
    assert len(found) in (32, len(sass.SOME))
    return found


def wide_stores(kernel: str) -> int:
    """Stores of 16 bytes that a kernel has at least.

    x, push and push_x without e, and e with it: 7, which float64 doubles; m in float32 and, twice,
    in float64, without e and with it: 6.
    """
    return (14 if "RowId" in kernel else 7) + 6


@pytest.mark.slow
def test_whole_quads_are_stored_at_once(stages):
    for name, code in stages.items():
        assert sass.split_quads(code, "STG") == [], name
        stores = [i for i in code if re.match(r"STG\.E(\.\w+)*\.128", i.code)]
        assert len(stores) >= wide_stores(name), name


@pytest.mark.slow
def test_whole_quads_are_loaded_at_once(stages):
    for name, code in stages.items():
        assert sass.split_quads(code, "LDG") == [], name
        assert any(re.match(r"LDG\.E(\.\w+)*\.128", i.code) for i in code), name


QUAD = """
        /*0000*/              @P0 BRA 0x60 ;
        /*0010*/              @{a} STG.E desc[UR6][R4.64], R8 ;
        /*0020*/              {between} ;
        /*0030*/              @{b} STG.E desc[UR6][R4.64+0x8], R10 ;
        /*0040*/              @{a} STG.E desc[UR6][R4.64+0x4], R9 ;
        /*0050*/              @{b} STG.E desc[UR6][R4.64+0xc], R11 ;
        /*0060*/              EXIT ;
"""


@pytest.mark.parametrize(
    ("a", "b", "between", "split"),
    [
        ("P1", "P1", "FADD R1, R2, R3", True),
        ("!PT", "!PT", "FADD R1, R2, R3", True),
        ("P1", "!P1", "FADD R1, R2, R3", False),
        ("P1", "P2", "FADD R1, R2, R3", False),
        ("P1", "P1", "ISETP.GT.AND P1, PT, R2, 0x1, PT", False),
        ("P1", "P1", "IMAD.WIDE R4, R2, 0x4, R6", False),
        ("P1", "P1", "@P2 BRA 0x10", False),
    ],
)
def test_a_split_quad_is_told_from_single_elements(a, b, between, split):
    code = sass.instructions(QUAD.format(a=a, b=b, between=between))
    assert len(code) == 7
    assert bool(sass.split_quads(code, "STG")) == split
