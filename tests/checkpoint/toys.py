"""Toy checkpoints made without the package's own formats, and ways to run and inspect conversions.

Weights are random *bits*: NaNs with payloads, infinities and subnormals among them, so that
whatever is not a plain copy shows.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from commands import Ended
from helpers import tiny_config
from qwen2_ascend.checkpoint.command import main
from qwen2_ascend.cli import run_command
from qwen2_ascend.config import Qwen2Config

NUMPY = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "int32": np.dtype(np.int32),
}
SIDE_FILES = {
    "generation_config.json": b'{"do_sample":   true,\n"temperature": 0.7}\n',
    "tokenizer.json": '{"version": "1.0", "note": "\u4f60\u597d"}'.encode(),
    "tokenizer_config.json": b"{}\n",
    "vocab.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
    "chat_template.jinja": b"{% for m in messages %}{{ m.content }}{% endfor %}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
}


def toy_config(**changes: object) -> Qwen2Config:
    """Two layers, so that a conversion takes milliseconds."""
    return tiny_config(**{"num_layers": 2, "vocab_size": 96, "dtype": "bf16", **changes})


def hugging_face_shapes(config: Qwen2Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Qwen2 Hugging Face checkpoint, written down from transformers' naming."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    heads = config.num_attention_heads * config.kv_channels
    groups = config.num_query_groups * config.kv_channels
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "self_attn.q_proj.weight": (heads, hidden),
            layer + "self_attn.q_proj.bias": (heads,),
            layer + "self_attn.k_proj.weight": (groups, hidden),
            layer + "self_attn.k_proj.bias": (groups,),
            layer + "self_attn.v_proj.weight": (groups, hidden),
            layer + "self_attn.v_proj.bias": (groups,),
            layer + "self_attn.o_proj.weight": (hidden, heads),
            layer + "post_attention_layernorm.weight": (hidden,),
            layer + "mlp.gate_proj.weight": (ffn, hidden),
            layer + "mlp.up_proj.weight": (ffn, hidden),
            layer + "mlp.down_proj.weight": (hidden, ffn),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def random_weights(config: Qwen2Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random bits for every tensor, in the config's dtype."""
    generator, dtype = np.random.default_rng(seed), NUMPY[config.dtype]
    return {
        name: generator.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8)
        .view(dtype)
        .reshape(shape)
        for name, shape in hugging_face_shapes(config).items()
    }


def save_safetensors(path: Path, weights: dict[str, np.ndarray]) -> None:
    """Writes a file with the genuine library."""
    save_file(weights, path, {"format": "pt"})


def make_hugging_face_folder(
    folder: Path,
    config: Qwen2Config | None = None,
    *,
    seed: int = 0,
    num_files: int = 1,
    weights: dict[str, np.ndarray] | None = None,
    config_changes: dict[str, object] | None = None,
) -> Path:
    """A Hugging Face folder of random bits, with side files; returns `folder`."""
    config = config or toy_config()
    weights = random_weights(config, seed) if weights is None else weights
    folder.mkdir(parents=True, exist_ok=True)
    raw = {**config.to_hugging_face(), **(config_changes or {})}
    (folder / "config.json").write_text(json.dumps(raw, indent=3))
    for name, data in SIDE_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    if num_files == 1:
        save_safetensors(folder / "model.safetensors", weights)
        return folder
    weight_map = {}
    for i in range(num_files):
        file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[i::num_files]}
        save_safetensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


class Stored(NamedTuple):
    """A tensor as the genuine library reads it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def load_safetensors(*paths: Path) -> dict[str, Stored]:
    """Reads files with the genuine library."""
    return {
        name: Stored(array.dtype.name, array.shape, array.tobytes())
        for path in paths
        for name, array in load_file(path).items()
    }


def load_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of a Hugging Face folder."""
    return load_safetensors(*sorted(folder.glob("*.safetensors")))


def tree(folder: Path) -> dict[str, str]:
    """A hash of every file below `folder`, and a mark for every folder."""
    return {
        str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def fingerprint(folder: Path) -> dict[str, tuple]:
    """What must not change in a source: bytes, times and permissions."""
    return {
        name: (digest, (stat := (folder / name).stat()).st_mtime_ns, stat.st_mode)
        for name, digest in tree(folder).items()
    }


def convert(source: Path, target: Path, *flags: object, to: str = "mg") -> Ended:
    """Runs `qwen2-ascend convert` in this process."""
    argv = ["--load-dir", source, "--save-dir", target, "--save-model-type", to, *flags]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = run_command(lambda: main(list(map(str, argv))))
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Ended(status, out.getvalue(), err.getvalue())


def tp(size: int) -> list[object]:
    return ["--target-tensor-parallel-size", size]


def pp(size: int) -> list[object]:
    return ["--target-pipeline-parallel-size", size]
