"""How the modules of the package depend on one another."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import qwen2_ascend

PACKAGE = Path(qwen2_ascend.__file__).parent
REPOSITORY = Path(__file__).parents[1]
LONGEST_FUNCTION = 60
"""Lines: what one screen shows."""


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
    found = circle(imports_of(PACKAGE))
    assert not found, " <- ".join(found)


def functions(root: Path) -> Iterator[tuple[str, int]]:
    """Every function under a folder, and its number of lines."""
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                yield f"{path}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_every_function_fits_on_a_screen() -> None:
    folders = [REPOSITORY / name for name in ("plugin", "examples", "launch", "tools")]
    found = [function for folder in folders for function in functions(folder)]
    assert len(found) > 1000
    assert not [f"{name}: {lines}" for name, lines in found if lines > LONGEST_FUNCTION]


def test_only_builders_of_models_ask_for_the_process_runtime() -> None:
    """Everything else is given its device, as megatron-core's ModuleSpec gives it to RMSNorm."""
    asking = r"from qwen2_ascend\.runtime(\.startup)? import [^\n]*\bcurrent\b"
    files = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "runtime"]
    found = {path.stem for path in files if re.search(asking, path.read_text())}
    assert found == {"build", "layer_spec", "engine"}


def test_the_comparison_of_arrays_knows_no_model() -> None:
    """Of the rest it takes errors, files, tables and what reads file formats."""
    beneath = ("comparison", "errors", "figures", "files", "markdown", "progress")
    beneath += ("checkpoint.formats",)
    allowed = tuple(f"qwen2_ascend.{name}" for name in beneath)
    graph = imports_of(PACKAGE)
    own = {name: others for name, others in graph.items() if ".comparison" in name}
    assert len(own) > 5
    taken = {other for others in own.values() for other in others} - {"qwen2_ascend"}
    assert not [name for name in taken if not name.startswith(allowed)]


def place_reads(code: str) -> list[int]:
    """The lines that read what torchrun says of a process's place."""
    names = {f"{of}{what}" for of in ("", "LOCAL_") for what in ("RANK", "WORLD_SIZE")}
    lines = []
    for node in ast.walk(ast.parse(code)):
        read: list[ast.expr] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".get", "getenv")):
            read = node.args[:1]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            read = [node.slice]
        elif isinstance(node, ast.Compare):
            read = [node.left]
        lines += [node.lineno for one in read if getattr(one, "value", None) in names]
    return lines


def test_what_torchrun_says_is_read_in_one_place() -> None:
    found = {path: place_reads(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert not [path for path, lines in found.items() if lines and path.name != "machine.py"]


def test_every_way_to_read_a_place_is_found() -> None:
    code = (
        "e.get('RANK', '0')\nos.getenv('WORLD_SIZE')\ne['LOCAL_RANK']\n'LOCAL_WORLD_SIZE' in e\n"
        "e['RANK'] = '1'\ne.setdefault('LOCAL_RANK', '0')\n{'RANK': '0'}\ne.get('RANKS')"
    )
    assert place_reads(code) == [1, 2, 3, 4]


def test_settings_are_not_asked_what_kind_they_are() -> None:
    """What some settings have and others lack is declared by `TrainingSettings`."""
    asked = re.compile(r"""hasattr\((\w+\.)*settings|getattr\((\w+\.)*settings[\w.]*, "\w+",""")
    assert not [path for path in PACKAGE.rglob("*.py") if asked.search(path.read_text())]


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
