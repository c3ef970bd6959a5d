"""The house rules: who may import whom, how long things may be, and what is nowhere to be found."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvilt

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "kvilt"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FUNCTION, MAX_FILE, MAX_PACKAGE, MAX_README = 50, 300, 10650, 150

# A module may import what stands above it, and its own unit. Units on one line never import each other.
LAYERS: list[dict[str, tuple[str, ...]]] = [
    {"errors": ("errors",), "types": ("types",)},
    {
        "registry": ("registry",),
        "plan": ("plan",),
        "wrapper": ("wrapper",),
        "codec": ("codec",),
        "documents": ("documents",),
    },
    {
        "model": (
            *("rope", "attention", "pieces", "placed", "pace"),
            *("support", "identity", "proof", "begun", "model", "probe", "loading"),
        ),
        "strategies": ("strategies",),
        "stores": ("stores",),
        "compress": ("compress",),
        "text": ("text",),
        "streaming": ("streaming",),
    },
    {"encoder": ("encoder",), "decode": ("decode",)},
    {"engine": ("engine",)},
    {"gates": ("gates",), "doctor": ("doctor",), "train": ("train",), "builtin": ("builtin",)},
    {"evaluate": ("evaluate",), "bench": ("bench",), "serve": ("serve",), "integrations": ("integrations",)},
    {"demo": ("demo",)},
    {"cli": ("cli",)},
    {"__main__": ("__main__",)},
]
UNIT = {part: (rank, unit) for rank, layer in enumerate(LAYERS) for unit, parts in layer.items() for part in parts}


def name_of(path: Path) -> str:
    """The first part of a module's name under kvilt: its file or folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """What a file imports of the package, function bodies and TYPE_CHECKING included: (first part, line)."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module == "kvilt":
            yield from ((alias.name, node.lineno) for alias in node.names if not alias.name.startswith("__"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvilt."):
            yield (node.module or "").split(".")[1], node.lineno
        elif isinstance(node, ast.Import):
            yield from ((a.name.split(".")[1], node.lineno) for a in node.names if a.name.startswith("kvilt."))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_every_file_has_a_layer() -> None:
    """Danger: a new module stands outside the rules."""
    assert {name_of(p) for p in FILES} - {"__init__"} <= set(UNIT)


def test_imports_run_downwards_and_siblings_never_import_each_other() -> None:
    """Danger: a strategy that knows a store, a store that knows a model: then nothing can be replaced."""
    wrong = []
    for path in FILES:
        if path == PACKAGE / "__init__.py":
            continue  # the public names, imported when used
        rank, unit = UNIT[name_of(path)]
        for part, line in imports(path):
            there, other = UNIT[part]
            if there > rank or (there == rank and other != unit):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {part}")
    assert not wrong


def test_strategies_see_no_model_no_store_and_no_clock() -> None:
    """Danger: a method that works with one model class or reads the time cannot be trained, tested or served elsewhere."""
    for path in (PACKAGE / "strategies").glob("*.py"):
        for node in ast.walk(tree_of(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"transformers", "time", "datetime"}, path


def test_nobody_asks_a_strategy_what_it_is() -> None:
    """Danger: the engine special-cases a method, and the next method needs a change in the engine."""
    methods = {
        node.name
        for path in (PACKAGE / "strategies").glob("*.py")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef) and node.name != "Strategy"  # the base says nothing about the method
    }
    wrong = []
    for path in FILES:
        if name_of(path) == "strategies":
            continue
        for node in ast.walk(tree_of(path)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"):
                continue
            asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} & methods
            wrong += [f"{path.relative_to(ROOT)}:{node.lineno} {sorted(asked)}"] if asked else []
    assert not wrong


def test_functions_and_files_are_short() -> None:
    """Danger: nobody reads what does not fit on a screen."""
    long = [f"{p.relative_to(ROOT)} {n}" for p in FILES if (n := len(p.read_text("utf-8").splitlines())) > MAX_FILE]
    for path in FILES:
        for node in functions(path):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            long += [f"{path.relative_to(ROOT)}:{node.lineno} {node.name} {lines}"] if lines > MAX_FUNCTION else []
    assert not long


def test_the_package_stays_within_its_budget() -> None:
    """Danger: a small library becomes a large one, one reasonable addition at a time."""
    spec = importlib.util.spec_from_file_location("count_lines", ROOT / "scripts" / "count_lines.py")
    assert spec is not None
    assert spec.loader is not None
    counter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counter)
    assert counter.by_folder().total() <= MAX_PACKAGE


def test_public_things_say_what_they_do() -> None:
    """Danger: a public name without a sentence is a private one that escaped."""
    silent = []
    for path in FILES:
        if not ast.get_docstring(tree_of(path)) and path.read_text("utf-8").strip():
            silent.append(str(path.relative_to(ROOT)))
        silent += [f"{path.relative_to(ROOT)}:{n.lineno} {n.name}" for n in _public(tree_of(path)) if not _says(n)]
    assert not silent


def _public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes of a module, and methods that introduce a name (an override says what its base says)."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if not isinstance(node, kinds) or node.name.startswith("_"):
            continue
        yield node
        if isinstance(node, ast.ClassDef) and not node.bases:
            yield from (m for m in node.body if isinstance(m, kinds) and not m.name.startswith("_"))


def _says(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    return bool(ast.get_docstring(node)) or _OBVIOUS.search(node.name) is not None


_OBVIOUS = re.compile(r"^(shape|dtype|length|fetch|model|put|end)$")  # promised by a Protocol or named by itself


def test_every_module_can_be_imported() -> None:
    """Danger: a module that only fails when somebody first needs it."""
    for module in pkgutil.walk_packages(kvilt.__path__, "kvilt."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def test_public_names_are_sorted_complete_and_there() -> None:
    """Danger: `from kvilt import X` fails for a name in the documentation."""
    assert list(kvilt.__all__) == sorted(kvilt.__all__)
    for name in kvilt.__all__:
        assert getattr(kvilt, name).__name__ == name
    assert set(kvilt.__all__) <= set(dir(kvilt))
    with pytest.raises(AttributeError):
        _ = kvilt.nothing_of_that_name


def test_nothing_is_unpickled() -> None:
    """Danger: reading somebody's cache or wrapper runs their code."""
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "dill", "joblib", "cloudpickle"} & {n.split(".")[0] for n in names}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options: dict[str | None, Any] = {k.arg: k.value for k in node.keywords}
                assert ast.unparse(options["weights_only"]) == "True", f"{path}:{node.lineno}"


def test_nothing_is_left_for_later() -> None:
    """Danger: a note to oneself that ships."""
    mark = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    assert not [f"{p}:{i}" for p in FILES for i, t in enumerate(p.read_text("utf-8").splitlines(), 1) if mark.search(t)]


def test_user_errors_are_never_asserts_on_arguments() -> None:
    """Danger: `python -O` removes the check, and without it the message says nothing."""
    for path in FILES:
        for node in functions(path):
            arguments = {a.arg for a in node.args.args + node.args.kwonlyargs} - {"self", "cls"}
            for inner in ast.walk(node):
                if isinstance(inner, ast.Assert):
                    test = inner.test.left if isinstance(inner.test, ast.Compare) else inner.test
                    assert not (isinstance(test, ast.Name) and test.id in arguments), f"{path}:{inner.lineno}"


def test_the_readme_is_short() -> None:
    """Danger: the first page becomes the manual."""
    readme = ROOT / "README.md"
    assert not readme.exists() or len(readme.read_text("utf-8").splitlines()) <= MAX_README
