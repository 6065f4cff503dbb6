"""Imports stand at the top; one inside a function brings a package that is to come later or never.

`--help` and refusals do not wait for torch, megatron-core is imported once the runtime has
started, and what belongs to an extra need not be installed. Everything else stands at the top, but
for one import of a command.py, which --help does without; the package itself imports nothing there,
so that each of its modules can be had alone.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import qwen2_ascend
from qwen2_ascend.runtime import _HOMES
from test_structure import module_name

PACKAGE = Path(qwen2_ascend.__file__).parent
QUICK = {"ml_dtypes", "psutil", "safetensors", "tqdm", "tyro", "xxhash"}
"""Packages of the core install that nobody waits for."""
ELSEWHERE = {"safetensors.torch": "torch"}
"""Modules that bring another package than their own."""


class Imports:
    """What the modules of a package import, at the top and inside functions."""

    def __init__(self, root: Path) -> None:
        self.trees = {module_name(p, root): ast.parse(p.read_text()) for p in root.rglob("*.py")}
        self.homes = {
            f"{root.name}.runtime.{k}": f"{root.name}.runtime.{v}" for k, v in _HOMES.items()
        }
        self.packages = cache(self._packages)

    def needless(self) -> list[str]:
        """The imports inside functions that bring no package which their module has not."""
        return [
            f"{module}:{node.lineno} {ast.unparse(node)}"
            for module, tree in self.trees.items()
            if "." in module
            for node in inside_functions(tree)
            if not (module.endswith(".command") and len(list(inside_functions(tree))) == 1)
            if not self._brings(node) - self.packages(module)
        ]

    def _brings(self, node: ast.Import | ast.ImportFrom) -> frozenset[str]:
        return frozenset().union(*map(self.packages, self._modules(node)))

    def _packages(self, module: str) -> frozenset[str]:
        """What importing a module brings that one may have to wait for, or not have."""
        found, seen, todo = set[str](), set[str](), [module]
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in self.trees:
                todo += [
                    other
                    for node in at_the_top(self.trees[name].body)
                    for other in self._modules(node)
                ]
                todo += [name.rpartition(".")[0]] if "." in name else []
            else:
                found.add(ELSEWHERE.get(name, name.partition(".")[0]))
        return frozenset(found - QUICK - sys.stdlib_module_names)

    def _modules(self, node: ast.Import | ast.ImportFrom) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        inner = [self.homes.get(name, name) for name in inner]
        return [name if name in self.trees else str(node.module) for name in inner]


def at_the_top(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run with the module."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from at_the_top(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for part in ("body", "orelse", "finalbody"):
                yield from at_the_top(getattr(node, part, []))


def inside_functions(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Those of functions, but for what is tried and may fail."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    tried = {n for t in ast.walk(tree) if isinstance(t, ast.Try) for n in ast.walk(t)}
    nodes = {n for f in ast.walk(tree) if isinstance(f, functions) for n in ast.walk(f)}
    yield from (n for n in nodes - tried if isinstance(n, (ast.Import, ast.ImportFrom)))


def test_an_import_inside_a_function_brings_something() -> None:
    found = Imports(PACKAGE).needless()
    assert found == []


@pytest.mark.parametrize("room", ["training", "finetuning", "finetuning.deepspeed"])
def test_a_launcher_imports_in_stages(room: str) -> None:
    """No mistake waits for torch, and nothing brings megatron-core before the start."""
    imports, heavy = Imports(PACKAGE), {"torch", "transformers", "megatron", "deepspeed"}
    assert not imports.packages(f"{PACKAGE.name}.{room}.launch") & heavy
    assert imports.packages(f"{PACKAGE.name}.training.start") & heavy == {"torch"}


@pytest.mark.parametrize("module", ["alignment.align", "evaluation.evaluate", "inference.generate"])
def test_what_runs_before_the_start_brings_no_megatron(module: str) -> None:
    assert "megatron" not in Imports(PACKAGE).packages(f"{PACKAGE.name}.{module}")


@pytest.mark.parametrize(
    "code, right",
    [
        ("def f():\n    import torch", True),
        ("import torch\ndef f():\n    import torch.nn", False),
        ("def f():\n    import json", False),
        ("def f():\n    from pack.heavy import x", True),
        ("def f():\n    from pack.light import x", False),
        ("from pack.heavy import y\ndef f():\n    from pack.heavy import x", False),
        ("class A:\n    def f(self):\n        from safetensors.torch import save", True),
        ("def f():\n    try:\n        import json\n    except ImportError:\n        pass", True),
        ("if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch", True),
    ],
)
def test_which_imports_bring_something(code: str, right: bool, tmp_path: Path) -> None:
    root = tmp_path / "pack"
    root.mkdir()
    modules: Mapping[str, str] = {
        "__init__": "",
        "heavy": "import torch",
        "light": "import tyro",
        "asking": code,
    }
    for name, text in modules.items():
        (root / f"{name}.py").write_text(text)
    assert (Imports(root).needless() == []) is right
