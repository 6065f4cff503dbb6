"""Which names of a checkpoint's `args` a piece of Python reads, by its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

ASKING = {"_set_arg", "_compare", "check_for_arg"}
"""Functions of these tools whose first argument is such a name."""


def names_read(path: Path, functions: Iterable[str], holders: Iterable[str]) -> set[str]:
    """Every name that some functions of a file read.

    Args:
        path: the file.
        functions: names of functions or classes in it; none is the whole file.
        holders: expressions that stand for the args, such as "checkpoint_args".
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wanted, held = set(functions), set(holders)
    defined = (ast.FunctionDef, ast.ClassDef)
    roots = [n for n in ast.walk(tree) if isinstance(n, defined) and n.name in wanted]
    missing = wanted - {root.name for root in roots}
    assert not missing, f"{path} does not define {missing}"
    return {name for root in roots or [tree] for name in _names(root, held)}


def _names(root: ast.AST, holders: set[str]) -> Iterator[str]:
    methods = {id(node.func) for node in ast.walk(root) if isinstance(node, ast.Call)}
    for node in ast.walk(root):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in holders:
            if id(node) not in methods and not isinstance(node.ctx, ast.Store):
                yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield from _names_asked_for(node.func.id, node.args, holders)


def _names_asked_for(function: str, arguments: list[ast.expr], holders: set[str]) -> Iterator[str]:
    if function in ASKING:
        first = arguments[0]
    elif function in ("getattr", "hasattr") and ast.unparse(arguments[0]) in holders:
        first = arguments[1]
    else:
        return
    if isinstance(first, ast.Constant) and isinstance(first.value, str):
        yield first.value
