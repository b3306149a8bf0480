# SPDX-License-Identifier: Apache-2.0
"""The package as a whole: what it imports, exports, ships and does without its compiled part."""

import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastdiff as fd

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the repository, warnings shown and not raised."""
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


# -- imports ---------------------------------------------------------------------------------------


def test_import_brings_in_only_torch_numpy_and_the_standard_library():
    code = (
        "import json, sys, numpy, torch; before = set(sys.modules)\n"
        "import fastdiff\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    new = set(json.loads(done.stdout)) - set(sys.stdlib_module_names)
    assert new - {"numpy", "torch"} == {"fastdiff"}


def test_the_compiled_core_includes_no_torch_headers():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    include = re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10)/", re.MULTILINE)
    assert sources
    assert [p.name for p in sources if include.search(p.read_text(encoding="utf-8"))] == []


# -- the kernels' folder ---------------------------------------------------------------------------


def test_fastdiff_kernels_comes_from_the_folder_kernels():
    module = importlib.import_module("fastdiff.kernels")
    assert Path(module.__file__).resolve() == ROOT / "kernels" / "__init__.py"


def test_kernels_found_in_place_of_another_package_explains_itself():
    done = run_python("import kernels; kernels.get_kernel")
    assert done.returncode == 1
    assert "AttributeError" in done.stderr
    assert "this is fastdiff's kernels folder" in done.stderr
    assert "Remove fastdiff's repository root from sys.path" in done.stderr


def test_a_name_missing_from_fastdiff_kernels_is_an_ordinary_error():
    with pytest.raises(AttributeError, match=r"^module 'fastdiff.kernels' has no attribute 'no'$"):
        importlib.import_module("fastdiff.kernels").no  # noqa: B018


# -- public names ----------------------------------------------------------------------------------


# Adding a name is a decision, taking one away a breaking change: both edit this list.
PUBLIC = {
    "fastdiff": "Adapted AdjointDEIS Batcher CFG Discrete Graph Measure PerStage Plan Product "
    "Reduction Sampler Stage adaptive backends grids models noise plan sample schedules solvers "
    "tune",
    "fastdiff.backends": "Backend BoundStage LARGE Registers Table choose get measure names rivals "
    "status table",
    "fastdiff.grids": "build names",
    "fastdiff.models": "DigitsClassifier DigitsDiT EmpiricalDenoiser ExactModel GaussianMixture "
    "digits digits_classifier digits_data",
    "fastdiff.schedules": "Custom EDM FlowMatching PREDICTIONS Schedule Traits VE VPCosine "
    "VPDiscrete VPLinear from_dict prediction_name",
    "fastdiff.solvers": "AdamsBashforth AdamsMoulton Consistency DDIM DDPM DEIS "
    "DPMSolverMultistep DPMSolverSinglestep DPMSolverV3 Embedded EmbeddedDPM EmbeddedRK Euler "
    "ExponentialHeun GradientEstimation Heun IPNDM IPNDMV Info LCM LMS LogRhoDEIS "
    "ModelStatistics NStepStochastic PNDM Progressive RESMultistep RESSinglestep Recurrence "
    "Restart Reversible RhoAB RhoRK Row Rows Solver TABLEAUS TCD UniPC VelocityRK "
    "adaptive_info adaptive_names get info names plan",
    "fastdiff.tune": "Statistics ems",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_these_and_exist(module):
    imported = importlib.import_module(module)
    assert sorted(imported.__all__) == sorted(PUBLIC[module].split())
    assert [name for name in imported.__all__ if not hasattr(imported, name)] == []


# -- without the compiled core ---------------------------------------------------------------------

WITHOUT_NATIVE = """
import sys, warnings
sys.modules["fastdiff._native"] = None
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastdiff as fd
    plan = fd.plan(fd.schedules.VPLinear(), "ddim", 4)
    for seed in (0, 1):
        x = fd.noise.prior(plan, (2, 1, 8, 8), seeds=seed)
        y = fd.sample(lambda x, t: 0.1 * x, x, plan, seed=seed)
assert y.isfinite().all() and y.shape == x.shape
for w in caught:
    print(w.category.__name__, str(w.message).replace(chr(10), " "))
"""


def test_without_the_compiled_core_sampling_works_and_warns_once():
    done = run_python(WITHOUT_NATIVE)
    assert done.returncode == 0, done.stderr
    warned = done.stdout.splitlines()
    assert len(warned) == 1, warned
    assert "pip install" in warned[0]  # says how to build it


# -- what is shipped -------------------------------------------------------------------------------


def test_the_version_in_the_metadata_is_the_modules():
    assert importlib.metadata.version("fastdiff-engine") == fd.__version__


# -- the documents ---------------------------------------------------------------------------------


DOCUMENTS = [
    path.relative_to(ROOT).as_posix()
    for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")))
]


def python_blocks(document: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_readme_shows_some_python():
    assert python_blocks("README.md")


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if python_blocks(d)])
def test_the_python_in_a_document_runs_from_top_to_bottom(document, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(python_blocks(document))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_inside_a_document_lead_somewhere(document):
    path = ROOT / document
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_environment_variable_read_stands_in_the_table():
    sources = [ROOT / "setup.py"]
    for folder in ("fastdiff", "kernels", "csrc", "benchmarks"):
        sources += [p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".cpp", ".cu"}]
    used = set()
    for path in sources:
        text = path.read_text(encoding="utf-8")
        used |= set(re.findall(r"[\"'](FASTDIFF_[A-Z_]+)[\"']", text))
    table = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert used == set(re.findall(r"^\| `(FASTDIFF_[A-Z_]+)`", table, re.MULTILINE))
