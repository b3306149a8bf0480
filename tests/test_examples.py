# SPDX-License-Identifier: Apache-2.0
"""The examples, run whole in a small setting: what they print is what they claim."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def load(name):
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.append(folder)  # where the examples find what they share
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(module, out, *options):
    """The rows that an example prints, by their first cells, each a list of the other cells."""
    done = CliRunner().invoke(module.main, ["--out", str(out), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = [re.split(r"\s{2,}", line.strip()) for line in done.output.splitlines()]
    return rows


def pictures(folder):
    return {p.name for p in folder.iterdir() if p.read_bytes().startswith(b"\x89PNG")}


needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="the digits come with scikit-learn"
)


@needs_digits
def test_an_optimised_noise_is_seen_as_the_wanted_digit(tmp_path, monkeypatch):
    example = load("optimise_latent")
    monkeypatch.setattr(example, "COMPARED_AT", (4, 8))
    rows = run(example, tmp_path, "--steps", "5", "--count", "5", "--iterations", "10")
    table = {row[0]: row[1:] for row in rows if len(row) == 6}
    for name in ("backprop", "discrete", "AdjointDEIS"):
        _, before, after, *_ = table[name]
        assert float(after) < 0.5 * float(before)
    assert table["discrete"][1:] == table["backprop"][1:]
    apart = {row[0]: row[1:] for row in rows if len(row) == 3}
    assert all(float(value) < 1e-5 for value in apart["discrete"])
    assert all(float(value) < 0.5 for value in apart["AdjointDEIS"])
    assert pictures(tmp_path) == {"optimise-latent.png"}


@needs_digits
def test_finetuning_earns_reward_in_flat_memory(tmp_path, monkeypatch):
    example = load("finetune_reward")
    monkeypatch.setattr(example, "MEASURED_AT", (3, 6))
    small = ("--steps", "4", "--iterations", "8", "--batch", "16", "--count", "40")
    rows = run(example, tmp_path, "--rate", "5e-4", *small)
    (few, *_), (many, *_) = (
        [list(map(float, row[1:])) for row in rows if row[0] == n] for n in "36"
    )
    assert many[0] < few[0] + 0.2  # MiB: three more states of 4 KiB, printed to 0.1
    assert many[1] > 1.8 * few[1]
    assert max(few[2], many[2]) < 1e-5
    table = {row[0]: row[1:] for row in rows}
    assert float(table["after"][0]) > 0.5 * float(table["before"][0])  # rewards are negative
    assert pictures(tmp_path) == {"finetune-reward.png"}
    example.fd.models.digits(tmp_path / "finetune-reward.safetensors")


@needs_digits
def test_a_fixed_point_is_nearer_than_an_explicit_inversion_and_both_than_fewer_steps(tmp_path):
    options = ("--steps", "8,16", "--solvers", "ddim,deis-2", "--sweeps", "20", "--count", "3")
    rows = run(load("invert"), tmp_path, *options)
    table = {(row[0], row[1]): row[2:] for row in rows if row[1:2] in (["8"], ["16"])}
    assert len(table) == 4
    for solver in ("ddim", "deis-2"):
        (coarse, _, _, coarse_fixed, *_), (fine, _, _, fine_fixed, *_) = (
            list(map(float, table[solver, steps])) for steps in ("8", "16")
        )
        assert fine < 0.8 * coarse
        assert fine_fixed < 0.1 * coarse_fixed
        assert coarse_fixed < 0.1 * coarse
        assert fine_fixed < 1e-3 * fine
    assert pictures(tmp_path) == {"invert.png"}


@needs_digits
def test_rows_that_cannot_be_inverted_so_are_refused(tmp_path):
    options = ["--out", str(tmp_path), "--solvers", "heun", "--steps", "2"]
    done = CliRunner().invoke(load("invert").main, options)
    assert done.exit_code == 2
    assert "deis-2" in done.output


@pytest.mark.parametrize("name", ["optimise_latent", "finetune_reward", "invert", "train_digits"])
def test_without_scikit_learn_one_sentence_says_what_to_install(name, tmp_path):
    path = ROOT / "examples" / f"{name}.py"
    code = (
        "import runpy, sys; sys.modules['sklearn'] = None\n"
        f"sys.path.insert(0, {str(path.parent)!r})\n"
        f"sys.argv = ['{name}', '--out', {str(tmp_path / 'out')!r}]\n"
        f"runpy.run_path({str(path)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    (line,) = (text for text in done.stderr.splitlines() if not text.startswith("classifier:"))
    assert line == (
        "Error: digits_data: the images come with scikit-learn; it is not installed. "
        "Run: pip install scikit-learn"
    )


def test_the_readme_names_the_examples_that_there_are():
    named = set(re.findall(r"^    python examples/(\w+)\.py", README, re.MULTILINE))
    assert named == {path.stem for path in (ROOT / "examples").glob("*.py")} - {"common"}
