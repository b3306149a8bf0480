# SPDX-License-Identifier: Apache-2.0
"""What is built from the tree: what it holds, that it installs and samples, and what it needs."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (
    *(".*", "build", "dist", "out", "*.egg-info", "__pycache__", "*.so", "tests", "shared"),
    *("docs", "benchmarks"),
)

pytestmark = pytest.mark.slow


def run(*command, cwd, **environment):
    """A program that may not ask, and builds no CUDA part, which takes minutes."""
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "FASTDIFF_CUDA": "0", **environment},
    )


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A copy of what is under version control and belongs to the package."""
    tree = tmp_path_factory.mktemp("build") / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return tree


@pytest.fixture(scope="session")
def wheel(tree):
    """The wheel that `python -m build` makes of the sdist, with the tools that are installed."""
    out = tree.parent / "dist"
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(out.glob("*.tar.gz"))) == 1
    (wheel,) = out.glob("*.whl")
    return wheel


def shipped_files() -> set[str]:
    """What a wheel holds, read off the tree."""
    files = {"fastdiff/py.typed"}
    for folder, name in (("fastdiff", "fastdiff"), ("kernels", "fastdiff/kernels")):
        for pattern in ("*.py", "*.json", "*.safetensors"):
            files |= {
                f"{name}/{path.relative_to(ROOT / folder).as_posix()}"
                for path in (ROOT / folder).rglob(pattern)
            }
    return files


def test_a_wheel_built_from_the_sdist_holds_the_tree(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    compiled = {n for n in names if n.endswith(".so")}
    assert {Path(n).name.split(".")[0] for n in compiled} >= {"_native"}
    assert names - compiled == shipped_files()


SAMPLE = """
import torch, fastdiff as fd
assert fd.backends.status()["cpu"] == "available", fd.backends.status()
plan = fd.plan(fd.schedules.VPLinear(), "dpmpp-2m", 4)
x = fd.sample(lambda x, t: torch.tanh(x), fd.noise.prior(plan, (2, 3)), plan, backend="cpu")
assert bool(torch.isfinite(x).all())
print(fd.__file__)
"""


def test_the_wheel_installs_into_a_clean_environment_samples_and_measures(wheel, tmp_path):
    home = tmp_path / "environment"
    done = run(sys.executable, "-m", "venv", "--without-pip", home, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    python = home / "bin" / "python"
    (packages,) = home.glob("lib/python*/site-packages")
    # The dependencies, PyTorch among them, are those of this environment, read after its own.
    shared = [path for path in sys.path if Path(path).name == "site-packages"]
    shared.append(sysconfig.get_path("purelib"))
    (packages / "dependencies.pth").write_text("\n".join(dict.fromkeys(shared)) + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps")
    done = run(*pip, "--force-reinstall", "--target", packages, wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(python, "-c", SAMPLE, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(home), done.stdout
    bench = ("-m", "fastdiff.cli", "bench", "stage", "--size", "64KiB", "--rounds", "1")
    done = run(python, *bench, "--json", "r.jsonl", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert "no commit is known: the package as it is installed" in done.stdout
    assert "fastdiff cpu" in done.stdout
    lines = (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()
    (commit,) = {json.loads(line)["commit"] for line in lines}
    assert commit.startswith("version ")


def test_an_installation_without_a_compiler_says_what_is_missing(tree, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    done = run(
        *(sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"),
        *("--no-index", "--target", tmp_path / "target", tree),
        cwd=tmp_path,
        PATH=nowhere,
        CXX=f"{nowhere}/c++",
        CC=f"{nowhere}/cc",
        LDSHARED=f"{nowhere}/c++ -shared",
    )
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "fastdiff: the compiled core needs a C++17 compiler" in said, said
    assert "apt install g++" in said
