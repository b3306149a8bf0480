# SPDX-License-Identifier: Apache-2.0
"""The house: who imports whom, how long things are, and whose names are whose."""

import ast
import importlib
from pathlib import Path

import pytest

import fastdiff as fd

ROOT = Path(__file__).resolve().parent.parent

# Lowest first. A module imports from the rooms below its own, and inside its own without a cycle.
FLOORS = (
    ("_text", "_files"),
    ("schedules",),
    ("grids", "plans"),
    ("_core", "_native", "_cuda"),
    ("noise", "kernels"),
    ("solvers", "backends", "conditioning"),
    ("guidance",),
    ("engine",),
    ("capture",),
    ("gradients",),
    ("sampler", "batcher"),
    ("models",),
    ("tune",),
    ("",),
    ("bench",),
    ("cli",),
)
LINES = {"fastdiff": 400, "kernels": 400, "csrc": 400, "tests": 500, "benchmarks": 300}
PARAMETERS = 8


def sources(folder: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    """The files of a folder that git would keep."""
    found = (ROOT / folder).rglob("*")
    links = ROOT / "fastdiff" / "kernels"  # a link some checkouts have for type checkers
    return sorted(
        p for p in found if p.suffix in suffixes and links not in p.parents and p.is_file()
    )


def module_of(path: Path) -> str:
    """The dotted name of a file of the library."""
    folder = "kernels" if (ROOT / "kernels") in path.parents else "fastdiff"
    parts = path.relative_to(ROOT / folder).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("fastdiff", *(("kernels",) if folder == "kernels" else ()), *parts))


FILES = {module_of(p): p for p in (*sources("fastdiff"), *sources("kernels"))}


def imports_of(module: str, tree: ast.AST, known: set[str]) -> set[str]:
    """Modules of the library that a module imports anywhere, inside functions too.

    Importing a name from a package is importing the submodule of that name where there is one, and
    the package itself where there is none.
    """
    package = module if is_package(module) else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            each = (f"{base}.{alias.name}" for alias in node.names)
            names = [name if name in known else base for name in each]
        found |= {name for name in names if name in known and name != module}
    return found


def is_package(module: str) -> bool:
    return module in FILES and FILES[module].name == "__init__.py"


def graph() -> dict[str, set[str]]:
    """Which modules each module imports."""
    known = set(FILES)
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
    return {name: imports_of(name, tree, known) for name, tree in trees.items()}


def cycle_in(edges: dict[str, set[str]]) -> list[str]:
    """A cycle, or an empty list."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(node: str) -> list[str]:
        state[node] = 1
        path.append(node)
        for other in sorted(edges.get(node, ())):
            if state.get(other) == 1:
                return [*path[path.index(other) :], other]
            if other not in state:
                found = visit(other)
                if found:
                    return found
        state[node] = 2
        path.pop()
        return []

    for node in sorted(edges):
        if node not in state:
            found = visit(node)
            if found:
                return found
    return []


def floor_of(module: str) -> int | None:
    """The floor of a module; None where it stands on none."""
    name = module.removeprefix("fastdiff").removeprefix(".").split(".")[0]
    return next((i for i, rooms in enumerate(FLOORS) if name in rooms), None)


# -- imports ---------------------------------------------------------------------------------------


def test_no_module_imports_itself_by_way_of_others():
    assert cycle_in(graph()) == []


def test_a_cycle_is_found_through_lazy_imports_and_inside_a_package():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    lazy = ast.parse("def f():\n    from . import plan\n    from .stage import Stage")
    known = {"fastdiff.plans.plan", "fastdiff.plans.stage", "fastdiff.plans.text"}
    assert imports_of("fastdiff.plans.text", lazy, known) == known - {"fastdiff.plans.text"}


def test_every_module_stands_on_a_floor_and_imports_from_below():
    homeless = [name for name in FILES if floor_of(name) is None]
    assert homeless == []
    upward = []
    for name, others in graph().items():
        for other in sorted(others):
            same_room = name.split(".")[1:2] == other.split(".")[1:2]
            own, its = floor_of(name), floor_of(other)
            assert own is not None
            assert its is not None
            if its > own or (its == own and not same_room):
                upward.append(f"{name} imports {other}")
    assert upward == []


COMPILED = ("schedules", "grids", "plans", "solvers")


@pytest.mark.parametrize("room", COMPILED)
def test_what_compiles_a_plan_imports_no_torch(room):
    named = []
    for name, path in FILES.items():
        if name.split(".")[1:2] != [room]:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [f"{name}: {n}" for n in names if n.split(".")[0] == "torch"]
    assert named == []


# -- budgets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", LINES)
def test_no_file_is_longer_than_its_budget(folder):
    suffixes = (".py", ".h", ".cpp", ".cu") if folder in ("csrc", "tests") else (".py",)
    long = {}
    for path in sources(folder, suffixes):
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > LINES[folder]:
            long[str(path.relative_to(ROOT))] = count
    assert long == {}


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters besides self, and besides the keyword-only ones of public functions."""
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args]
    count = len(named) - (bool(named) and named[0].arg in ("self", "cls", "ctx"))
    private = node.name.startswith("_") and not node.name.startswith("__")
    return count + (len(arguments.kwonlyargs) if private else 0)


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles a function: its parameters are what the device is handed."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_no_function_has_more_than_eight_parameters():
    many = {}
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if function and not is_kernel(node) and parameters(node) > PARAMETERS:
                many[f"{name}.{node.name}"] = parameters(node)
    assert many == {}


# -- names -----------------------------------------------------------------------------------------

# Private names of others that have no public form: PyTorch's own.
FOREIGN = ("torch", "forward_ad")


def foreign_privates(tree: ast.Module) -> list[str]:
    """Accesses `object._name` where the object is not self and the name is not the module's own."""
    own = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
    }
    own |= {
        target.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute)
    }
    own |= {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
            continue
        if node.attr.startswith("__") or node.attr in own or node.attr in TENSORS:
            continue
        root = node.value
        while isinstance(root, ast.Attribute | ast.Call | ast.Subscript):
            root = root.func if isinstance(root, ast.Call) else root.value
        if isinstance(root, ast.Name) and root.id in ("self", "cls", *FOREIGN):
            continue
        found.append(ast.unparse(node))
    return found


# Attributes of PyTorch's tensors, modules and operators, and of named tuples: they have no other.
TENSORS = (
    *("_version", "_parameters", "_buffers", "_modules", "_backward_hooks"),
    *("_schema", "_replace", "_fields", "_asdict"),
)


def test_no_object_touches_anothers_private_names():
    found = {}
    for name, path in FILES.items():
        touched = foreign_privates(ast.parse(path.read_text(encoding="utf-8")))
        if touched:
            found[name] = touched
    assert found == {}


def test_private_names_are_found():
    assert foreign_privates(ast.parse("f(sampler._plan)")) == ["sampler._plan"]
    assert foreign_privates(ast.parse("f(self._plan, tensor._version)")) == []


def test_fastdiff_plan_is_the_function_and_nothing_else():
    assert callable(fd.plan)
    with pytest.raises(ModuleNotFoundError, match=r"fastdiff\.plan"):
        importlib.import_module("fastdiff.plan")
    shadowed = [
        name
        for name in fd.__all__
        if f"fastdiff.{name}" in FILES and getattr(fd, name).__name__ != f"fastdiff.{name}"
    ]
    assert shadowed == []
