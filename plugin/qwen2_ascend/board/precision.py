"""The reports that launch/align_qwen2.py writes, as the Precision page shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2_ascend.alignment.sublayers import LAYER, LOSS, describe, split_name
from qwen2_ascend.board.forms import finite
from qwen2_ascend.errors import UserError, printable
from qwen2_ascend.files import read_json

MAX_SUBLAYERS = 20_000
OUTSIDE = ("embedding", "final_layernorm", "logits", LOSS)
"""Sublayers outside of the layers."""


def read_report(path: Path) -> dict[str, Any]:
    """What the page draws of a report.

    Raises:
        UserError: the file is no report of align_qwen2.py, or cannot be read.
    """
    value = read_json(path)
    sublayers = value.get("sublayers") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(sublayers, list):
        raise UserError(f"{path.name}: is no report of launch/align_qwen2.py (no sublayers).")
    cells = [_cell(path, one) for one in sublayers[:MAX_SUBLAYERS]]
    return {
        "aligned": value.get("aligned") is True,
        "verdict": _text(value.get("verdict")),
        "first": _text(value.get("first")),
        "origin": _text(value.get("origin")),
        "precision": _text(value.get("precision")),
        "noise_factor": finite(value.get("noise_factor")),
        "logits": _numbers(value.get("logits")),
        "loss": _numbers(value.get("loss")),
        "columns": [{"name": one.name, "label": one.label} for one in LAYER],
        "layers": 1
        + max((cell["layer"] for cell in cells if cell["layer"] is not None), default=-1),
        "cells": cells,
        "steps": [_numbers(step) for step in _list(value.get("steps"))],
    }


def _cell(path: Path, found: Any) -> dict[str, Any]:
    """One sublayer: where it is in the picture, and its figures."""
    if not isinstance(found, Mapping) or not isinstance(found.get("name"), str):
        raise UserError(f"{path.name}: a sublayer has no name; it is no report of align_qwen2.py.")
    name = found["name"]
    try:
        layer, short = split_name(name)
        place = describe(name)
    except (ValueError, StopIteration):
        raise UserError(f"{path.name}: {printable(name[:80])} is no sublayer of Qwen2.") from None
    if layer is None and short not in OUTSIDE:
        raise UserError(f"{path.name}: {printable(name[:80])} is no sublayer of Qwen2.")
    if layer is not None and not 0 <= layer < MAX_SUBLAYERS:
        raise UserError(f"{path.name}: {printable(name[:80])} is no layer of a model.")
    return {
        "name": printable(name),
        "place": place,
        "layer": layer,
        "column": short,
        "ratio": finite(found.get("ratio")),
        "parted": found.get("parted") is True,
        "own": _numbers(found.get("own")),
        "noise": _numbers(found.get("noise")),
        "total": _numbers(found.get("total")),
        "total_noise": _numbers(found.get("total_noise")),
        "histogram": _histogram(found.get("histogram")),
    }


def _histogram(value: Any) -> dict[str, list[float]] | None:
    """Counts of tokens between edges of their error; None where the report has none."""
    if not isinstance(value, Mapping):
        return None
    edges, counts = _list(value.get("edges")), _list(value.get("counts"))
    numbers = [finite(x) for x in (*edges, *counts)]
    if len(edges) != len(counts) + 1 or None in numbers or len(counts) > 300:
        return None
    return {"edges": edges, "counts": counts}


def _numbers(value: Any) -> dict[str, float | bool | None]:
    if not isinstance(value, Mapping):
        return {}
    return {
        printable(str(name)): one if isinstance(one, bool) else finite(one)
        for name, one in list(value.items())[:40]
    }


def _list(value: Any) -> list[Any]:
    return value[:MAX_SUBLAYERS] if isinstance(value, list) else []


def _text(value: Any) -> str:
    return printable(value[:2000]) if isinstance(value, str) else ""
