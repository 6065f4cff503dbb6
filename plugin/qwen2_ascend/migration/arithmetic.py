"""Bash's `$((...))`: whole numbers, variables, brackets and + - * / %."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

_OPERATIONS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Mod: operator.mod,
}
_MOST_CHARACTERS = 200


def calculate(text: str, lookup: Callable[[str], str | None]) -> str | None:
    """The value of an expression; None where it holds anything else, or an unknown variable.

    Args:
        text: between the brackets.
        lookup: a variable's value, None where it is not known.
    """
    plain = re.sub(r"\$\{?([A-Za-z_]\w*)\}?", r"\1", text).strip()
    if len(plain) > _MOST_CHARACTERS:
        return None
    try:
        return str(_value(ast.parse(plain, mode="eval").body, lookup))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return None


def _value(node: Any, lookup: Callable[[str], str | None]) -> int:
    """A node's number.

    Raises:
        ValueError: it has none.
    """
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return int(lookup(node.id) or "")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, lookup)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, lookup), _value(node.right, lookup)
        if isinstance(node.op, ast.Div):
            return int(left / right)  # bash cuts towards zero
        if operation := _OPERATIONS.get(type(node.op)):
            return operation(left, right)
    raise ValueError("no arithmetic of whole numbers")
