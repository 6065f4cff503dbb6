"""How the modules of the package depend on one another."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import qwen2_ascend

PACKAGE = Path(qwen2_ascend.__file__).parent
LEFT = {
    "qwen2_ascend.finetuning.deepspeed.settings",
    "qwen2_ascend.ops.npu",
    "qwen2_ascend.runtime.startup",
}
"""One module of each circle that is still there, and that the others of it do without: DeepSpeed's
settings and its JSON, `ops` and its fused operators (each takes a type from the other), and
the device that is closed by what starts it."""


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, modules: Set[str]) -> Iterator[str]:
    """Every module that code imports: at the top, inside functions, and for types alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module or ""


def imports_of(root: Path) -> dict[str, set[str]]:
    """The modules of the same package that each module imports."""
    files = {module_name(path, root): path for path in root.rglob("*.py")}
    return {
        name: {other for other in imported(ast.parse(path.read_text()), files.keys())}
        & files.keys() - {name}
        for name, path in files.items()
    }


def circle(graph: Mapping[str, Set[str]]) -> list[str]:
    """The modules of one circle, or none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other() -> None:
    graph = imports_of(PACKAGE)
    without = {name: others - LEFT for name, others in graph.items() if name not in LEFT}
    assert not circle(without), " <- ".join(circle(without))


@pytest.mark.parametrize("name", sorted(LEFT))
def test_what_is_left_out_is_in_a_circle_still(name: str) -> None:
    graph = imports_of(PACKAGE)
    others = LEFT - {name}
    assert circle({one: of - others for one, of in graph.items() if one not in others})


def test_the_comparison_of_arrays_knows_no_model() -> None:
    """Of the rest it takes errors, files, tables and what reads file formats."""
    beneath = ("comparison", "errors", "files", "markdown", "checkpoint.formats")
    beneath += ("checkpoint.progress",)
    allowed = tuple(f"qwen2_ascend.{name}" for name in beneath)
    graph = imports_of(PACKAGE)
    own = {name: others for name, others in graph.items() if ".comparison" in name}
    assert len(own) > 5
    taken = {other for others in own.values() for other in others} - {"qwen2_ascend"}
    assert not [name for name in taken if not name.startswith(allowed)]


@pytest.mark.parametrize(
    "back",
    [
        "import pack.first",
        "from pack.first import x",
        "from pack import first",
        "def f():\n    from pack.first import x",
        "if TYPE_CHECKING:\n    from pack.first import x",
    ],
)
def test_a_circle_is_found_however_it_is_closed(back: str, tmp_path: Path) -> None:
    root = tmp_path / "pack"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "first.py").write_text("from pack.second import y\n")
    (root / "second.py").write_text("")
    assert not circle(imports_of(root))
    (root / "second.py").write_text(back)
    assert {"pack.first", "pack.second"} == set(circle(imports_of(root)))


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those of attributes included."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                yield child.lineno, str(child.value.value).lstrip()


def test_docstrings_are_no_ends_of_sentences() -> None:
    """A reader sees them in --help and in editors, far from the name that they would go on from."""
    assert not [
        f"{path.relative_to(PACKAGE)}:{line}: {text.splitlines()[0]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, text in docstrings(ast.parse(path.read_text(encoding="utf-8")))
        if text.startswith(("Of ", "And "))
    ]
