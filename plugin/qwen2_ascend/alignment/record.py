"""Record: what one run computed, in transformers' shapes and names; a folder holds one.

    description.json          what ran: model, precision, layout, device, releases; losses
    tokens.safetensors        tokens [n, b, s + 1] of the recorded step: n micro-batches
    activations.safetensors   every sublayer's output, [n * b, s, features], in the run's dtype;
                              the loss of every token, [n * b, 1, s]
    gradients.safetensors     every parameter's gradient under its Hugging Face name, where taken

Nothing in it depends on a layout: records made at different ones compare, and
`qwen2-ascend compare` reads the files as any others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qwen2_ascend.alignment.sublayers import sublayers
from qwen2_ascend.comparison.dumps import PRECISION
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import json_value, read_text, require_regular

FORMAT = "qwen2-ascend alignment record"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run."""

    config: Qwen2Config
    precision: str
    """fp64, fp32, bf16 or fp16: of parameters and activations."""
    origin: str
    """What ran where, in a line."""
    tensor_parallel: int = 1
    """Ranks that shared each layer; sums over more of them round more often."""
    unfused_attention: bool = False
    """Attention rounded its scores before the softmax, as transformers' eager attention does."""
    tokens: torch.Tensor
    """`[n, b, s + 1]`: n micro-batches, each sequence with the token after its last."""
    activations: Mapping[str, torch.Tensor]
    """Named as in `sublayers`: `[n * b, s, features]` on the host; the loss `[n * b, 1, s]`."""
    loss: float
    """Mean over the tokens, in nats."""
    disagreement: Mapping[str, float] = field(default_factory=dict)
    """Where the tensor-parallel ranks hold different values of what should be the same on all: by
    how much, at the worst token, relative to it."""
    gradients: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The loss's gradients on the host, in Hugging Face's names; empty where none were taken."""


def save_record(record: Record, folder: Path) -> None:
    """Writes `folder`, which is new or holds an earlier record.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {"tokens": {"tokens": record.tokens}, "activations": record.activations}
    if record.gradients:
        files["gradients"] = record.gradients
    else:
        (folder / "gradients.safetensors").unlink(missing_ok=True)
    for name, tensors in files.items():
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, folder / f"{name}.safetensors", {PRECISION: record.precision})
    description = {
        "format": FORMAT,
        "version": VERSION,
        "origin": record.origin,
        "precision": record.precision,
        "tensor_model_parallel_size": record.tensor_parallel,
        "unfused_attention": record.unfused_attention,
        "loss": record.loss,
        "disagreement": dict(record.disagreement),
        "config": record.config.to_hugging_face(),
    }
    text = json.dumps(description, indent=2) + "\n"
    (folder / "description.json").write_text(text, encoding="utf-8")


def load_record(folder: Path) -> Record:
    """Reads what `save_record` has written.

    Raises:
        UserError: it is not there, not whole, or not of this kind.
    """
    description = _description(folder)
    config = Qwen2Config.from_dict(description["config"])
    tokens = _tensors(folder, "tokens").get("tokens")
    activations = _tensors(folder, "activations")
    expected = [sublayer.name for sublayer in sublayers(config.num_layers)]
    missing = [name for name in expected if name not in activations]
    if tokens is None or missing:
        named = ", ".join(missing[:5]) or "tokens"
        raise UserError(f"{folder}: the record is not whole, {named} is missing; make it again.")
    has_gradients = (folder / "gradients.safetensors").exists()
    return Record(
        config=config,
        precision=description["precision"],
        origin=description["origin"],
        tensor_parallel=description["tensor_model_parallel_size"],
        unfused_attention=description["unfused_attention"],
        tokens=tokens,
        activations=activations,
        loss=description["loss"],
        disagreement=description["disagreement"],
        gradients=_tensors(folder, "gradients") if has_gradients else {},
    )


def _description(folder: Path) -> dict[str, Any]:
    path = folder / "description.json"
    try:
        found = json_value(read_text(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path}: is not of an alignment record; give what --dump has written.")
    if found.get("version") != VERSION:
        raise UserError(
            f"{path}: version {found.get('version')} is not {VERSION}, which this release reads; "
            "make the record again."
        )
    return found


def _tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    path = folder / f"{name}.safetensors"
    try:
        require_regular(path)
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
