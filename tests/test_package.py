# SPDX-License-Identifier: Apache-2.0
"""The package as a whole: what it imports, exports, ships and does without its compiled part."""

import ast
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastdiff as fd

ROOT = Path(__file__).resolve().parent.parent

# Lowest first. A module imports from lower layers and from its own. The package itself (""),
# which gathers the names of those below it, is open to the last layer only.
LAYERS = (
    {"_text", "_native", "kernels"},
    {"_core", "plans", "schedules", "grids", "plan", "noise", "transpose"},
    {"solvers", "backends"},
    {"sampler", "guidance", "graphs", "gradients", "traced", "batcher", "reference"},
    {""},
    {"integrations", "models", "search", "cli"},
)


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


def layer_of(module: str) -> int | None:
    """The layer of a dotted module of fastdiff; None where it stands in none."""
    name = module.removeprefix("fastdiff").removeprefix(".").split(".")[0]
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


def imported_modules(source: str, package: str) -> list[str]:
    """Modules of fastdiff that `source`, a file of `package`, imports anywhere, dotted in full."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            # `from fastdiff import plan` imports the module, `from fastdiff import Plan` a name
            for alias in node.names:
                is_module = base == "fastdiff" and layer_of(f"fastdiff.{alias.name}") is not None
                found.append(f"{base}.{alias.name}" if is_module else base)
    return [name for name in found if name.split(".")[0] == "fastdiff"]


def broken_layers(source: str, module: str, package: str) -> list[str]:
    """A sentence for every import by which `module` reaches above its layer."""
    own = layer_of(module)
    if own is None:
        return [f"{module} stands in no layer: add it to LAYERS"]
    broken = []
    for name in imported_modules(source, package):
        other = layer_of(name)
        if other is None:
            broken.append(f"{module} imports {name}, which stands in no layer")
        elif other > own:
            broken.append(f"{module} (layer {own}) imports {name} (layer {other})")
    return broken


def test_modules_import_only_from_their_own_layer_and_below():
    broken = []
    for folder, name in ((ROOT / "fastdiff", "fastdiff"), (ROOT / "kernels", "fastdiff.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            if module == "fastdiff":
                continue
            package = module if is_package else module.rpartition(".")[0]
            broken += broken_layers(path.read_text(encoding="utf-8"), module, package)
    assert broken == []


@pytest.mark.parametrize(
    ("source", "module", "package", "count"),
    [
        ("from ..plan import Layout", "fastdiff.backends.base", "fastdiff.backends", 0),
        ("from . import base", "fastdiff.backends.torch", "fastdiff.backends", 0),
        ("from .. import grids", "fastdiff.solvers", "fastdiff.solvers", 0),
        ("from . import plan", "fastdiff.sampler", "fastdiff", 0),
        ("from .plan import Plan", "fastdiff.noise", "fastdiff", 0),
        ("import torch\nimport numpy as np", "fastdiff.plan", "fastdiff", 0),
        ("import fastdiff as fd", "fastdiff.cli", "fastdiff", 0),
        ("from fastdiff.models import digits", "fastdiff.cli", "fastdiff", 0),
        ("from .solvers import get", "fastdiff.plan", "fastdiff", 1),
        ("from . import sampler", "fastdiff.schedules", "fastdiff", 1),
        ("from ..sampler import sample", "fastdiff.solvers.deis", "fastdiff.solvers", 1),
        ("def f():\n    from fastdiff import cli", "fastdiff.sampler", "fastdiff", 1),
        ("import fastdiff.backends.torch", "fastdiff.plan", "fastdiff", 1),
        ("import fastdiff", "fastdiff.solvers.deis", "fastdiff.solvers", 1),
        ("from . import Plan", "fastdiff.sampler", "fastdiff", 1),
        ("from fastdiff import Plan", "fastdiff.solvers.deis", "fastdiff.solvers", 1),
        ("from .unheard import f", "fastdiff.plan", "fastdiff", 1),
        ("", "fastdiff.unheard", "fastdiff", 1),
    ],
)
def test_the_layer_check_finds_what_is_broken(source, module, package, count):
    assert len(broken_layers(source, module, package)) == count


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
    "fastdiff": "AdjointDEIS Batcher CFG Discrete Graph PerStage Plan Sampler Stage backends grids "
    "models noise plan sample schedules solvers",
    "fastdiff.backends": "Backend BoundStage Registers choose get names status",
    "fastdiff.grids": "build names",
    "fastdiff.models": "DigitsClassifier DigitsDiT EmpiricalDenoiser ExactModel GaussianMixture "
    "digits digits_classifier digits_data",
    "fastdiff.schedules": "Custom EDM FlowMatching PREDICTIONS Schedule VE VPCosine VPDiscrete "
    "VPLinear prediction_name",
    "fastdiff.solvers": "DDIM DDPM DEIS DPMSolverMultistep DPMSolverSinglestep Euler Heun IPNDM "
    "Info LogRhoDEIS Reversible RhoAB RhoRK Rows Solver TABLEAUS get info names plan",
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


def shipped_files() -> set[str]:
    """What a wheel holds, read off the tree."""
    files = {"fastdiff/py.typed"}
    for folder, name in (("fastdiff", "fastdiff"), ("kernels", "fastdiff/kernels")):
        for pattern in ("*.py", "*.safetensors"):
            files |= {
                f"{name}/{path.relative_to(ROOT / folder).as_posix()}"
                for path in (ROOT / folder).rglob(pattern)
            }
    return files


@pytest.mark.slow
def test_a_wheel_built_from_the_sdist_holds_the_tree(tmp_path):
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns(
        ".*", "build", "dist", "out", "*.egg-info", "__pycache__", "*.so", "tests", "shared"
    )
    shutil.copytree(ROOT, tree, ignore=skip)
    backend = (
        "import sys; from setuptools import build_meta as b; print(b.build_sdist(sys.argv[1]))"
    )
    env = {**os.environ, "FASTDIFF_CUDA": "0"}  # the list is the same, the build shorter
    options = {"capture_output": True, "text": True, "cwd": tree, "stdin": subprocess.DEVNULL}
    options["env"] = env
    done = subprocess.run([sys.executable, "-c", backend, str(tmp_path)], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    done = subprocess.run([*pip, "-w", str(tmp_path), str(sdist)], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    compiled = {n for n in names if n.endswith(".so")}
    assert {Path(n).name.split(".")[0] for n in compiled} >= {"_native"}
    assert names - compiled == shipped_files()


# -- the documents ---------------------------------------------------------------------------------


DOCUMENTS = [
    path.relative_to(ROOT).as_posix()
    for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")))
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
