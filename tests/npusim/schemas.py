"""Checks calls of torch_npu's operators against their recorded schemas, without torch_npu.

`schemas_2.13.json` holds the schema of every `npu::npu_*` operator of torch_npu 2.13.0; those of
2.14.0 are the same. Call sites are found in the source text: any use of an attribute with such a
name, and whatever else is taken from torch_npu under a name that begins with `npu_`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

RECORDED = Path(__file__).with_name("schemas_2.13.json")


@cache
def recorded_schemas() -> dict[str, list[torch._C.FunctionSchema]]:
    """An entry per overload, by operator name."""
    texts = json.loads(RECORDED.read_text(encoding="utf-8"))
    return {
        name: [torch._C.parse_schema(f"npu::{name}{text}") for text in overloads]
        for name, overloads in texts.items()
    }


def schemas_of_installed_torch_npu() -> dict[str, list[str]]:
    """What `schemas_*.json` holds, of the torch_npu that this process has imported."""
    texts: dict[str, list[str]] = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("npu::npu_") and schema.overload_name != "out":
            text = str(schema)
            texts.setdefault(schema.name.removeprefix("npu::"), []).append(text[text.index("(") :])
    return {name: sorted(overloads) for name, overloads in sorted(texts.items())}


@dataclass(frozen=True)
class Use:
    """A place in a source file that names an operator of torch_npu."""

    op: str
    node: ast.AST
    call: ast.Call | None
    """None where it is named but not called."""
    consumer: ast.AST | None
    """What the call's result goes to."""

    @property
    def line(self) -> int:
        return getattr(self.node, "lineno", 0)


def find_uses(source: str) -> list[Use]:
    """Every use of an operator in a module's source, in the order of the file."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    imported = _imported_operators(tree)
    uses = []
    for node in ast.walk(tree):
        op = _operator_named_by(node, imported)
        if op is None:
            continue
        parent = parents.get(node)
        if isinstance(parent, ast.Attribute) and parent.attr == "default":  # the only overload
            node, parent = parent, parents.get(parent)
        called = isinstance(parent, ast.Call) and parent.func is node
        call = parent if called else None
        uses.append(Use(op, node, call, parents.get(call) if call else None))
    return sorted(uses, key=lambda use: use.line)


def _imported_operators(tree: ast.AST) -> dict[str, str]:
    """Local name to operator, of `from torch_npu import npu_... [as ...]`."""
    return {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch_npu"
        for alias in node.names
        if alias.name.startswith("npu_")
    }


def _operator_named_by(node: ast.AST, imported: dict[str, str]) -> str | None:
    if isinstance(node, ast.Attribute):
        from_torch_npu = ast.unparse(node.value) in ("torch_npu", "torch.ops.npu")
        known = node.attr in recorded_schemas()
        return node.attr if known or (from_torch_npu and node.attr.startswith("npu_")) else None
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return imported.get(node.id)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) > 1:
        name = node.args[1]
        if isinstance(name, ast.Constant) and name.value in recorded_schemas():
            return str(name.value)
    return None


def faults(use: Use) -> list[str]:
    """What is wrong with a use, by the operator's schema; empty when some overload fits."""
    overloads = recorded_schemas().get(use.op)
    if overloads is None:
        return [f"{use.op} is not an operator of torch_npu 2.13"]
    if use.call is None:
        return [f"{use.op} is named but not called there, so its arguments cannot be checked"]
    found = [[*_argument_faults(use.call, s), *_result_faults(use, s)] for s in overloads]
    return [f"{use.op}: {fault}" for fault in min(found, key=len)]


def _spelled_out(keyword: ast.keyword) -> list[ast.keyword]:
    """The arguments of `**({"name": value} if condition else {})`; of others themselves."""
    choice = keyword.value
    if keyword.arg or not (isinstance(choice, ast.IfExp) and isinstance(choice.body, ast.Dict)):
        return [keyword]
    names = [name.value if isinstance(name, ast.Constant) else None for name in choice.body.keys]
    given = map(ast.keyword, names, choice.body.values)
    return list(given) if ast.unparse(choice.orelse) == "{}" else [keyword]


def _argument_faults(call: ast.Call, schema: torch._C.FunctionSchema) -> Iterator[str]:
    keywords = [spelled for keyword in call.keywords for spelled in _spelled_out(keyword)]
    if any(isinstance(a, ast.Starred) for a in call.args) or any(not k.arg for k in keywords):
        yield "*args and **kwargs hide the arguments; spell them out"
        return
    arguments = {argument.name: argument for argument in schema.arguments}
    positional = [a.name for a in schema.arguments if not a.kwarg_only]
    if len(call.args) > len(positional):
        yield f"{len(call.args)} positional arguments, and it takes {len(positional)}"
    given = dict(zip(positional, call.args, strict=False))
    for keyword in keywords:
        if keyword.arg not in arguments:
            yield f"no argument {keyword.arg!r}"
        elif keyword.arg in given:
            yield f"argument {keyword.arg!r} given twice"
        else:
            given[keyword.arg] = keyword.value
    for name, argument in arguments.items():
        if name not in given and not argument.has_default_value():
            yield f"argument {name!r} is missing"
        elif name in given and not _may_be(given[name], str(argument.type)):
            yield f"argument {name!r} is {ast.unparse(given[name])}, and it takes {argument.type}"


LITERALS = {
    "int": (int,),
    "float": (int, float),
    "number": (int, float),
    "str": (str,),
    "bool": (bool,),
}


def _may_be(value: ast.expr, type_name: str) -> bool:
    """Whether an expression can have the type; only a literal can be known not to."""
    optional = type_name.startswith("Optional[")
    type_name = type_name.removeprefix("Optional[").removesuffix("]") if optional else type_name
    if isinstance(value, (ast.List, ast.Tuple)):
        return type_name.startswith("List[")
    if isinstance(value, ast.UnaryOp) and isinstance(value.op, (ast.USub, ast.UAdd)):
        value = value.operand
    if not isinstance(value, ast.Constant):
        return True
    if value.value is None:
        return optional
    if isinstance(value.value, bool):
        return type_name == "bool"
    return isinstance(value.value, LITERALS.get(type_name, ()))


def _result_faults(use: Use, schema: torch._C.FunctionSchema) -> Iterator[str]:
    count = len(schema.returns)
    consumer = use.consumer
    if isinstance(consumer, ast.Assign) and isinstance(consumer.targets[0], ast.Tuple):
        targets = consumer.targets[0].elts
        starred = any(isinstance(target, ast.Starred) for target in targets)
        if len(targets) - 1 > count if starred else len(targets) != count:
            yield f"{count} result(s), unpacked into {len(targets)}"
    if isinstance(consumer, ast.Subscript) and consumer.value is use.call:
        index = consumer.slice
        if count == 1:
            yield "one result, and a subscript takes a piece of it"
        elif isinstance(index, ast.Constant) and not -count <= index.value < count:
            yield f"{count} results, and no number {index.value}"
