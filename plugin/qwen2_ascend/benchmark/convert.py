"""The splitter against `cp` and fsync of the same input, interleaved in one run."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwen2_ascend import markdown
from qwen2_ascend.benchmark.measure import Measured, run_measured, spread
from qwen2_ascend.checkpoint.formats.hugging_face import INDEX_FILE, index_json, plan_files
from qwen2_ascend.checkpoint.formats.stored import TensorSpec
from qwen2_ascend.checkpoint.rules import hugging_face_pieces
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.planning.parameters import num_parameters


@dataclass(frozen=True, kw_only=True)
class ConvertBenchmark:
    """Time and memory of converting a model, both directions, against cp + fsync of its input.

    The model has a published size's dimensions and random weights. Each round runs cp, then the
    conversion, so that both meet the same state of a noisy machine; ratios are of the pairs.
    """

    model: str = "1.5B"
    """Published size: 0.5B, 1.5B, 3B, 7B, 14B, 32B or 72B."""
    target_tensor_parallel_size: int = 2
    """Tensor-parallel ranks."""
    target_pipeline_parallel_size: int = 2
    """Pipeline stages."""
    save_format: Literal["megatron", "safetensors", "torch_dist"] = "megatron"
    """The format of the shards."""
    rounds: int = 5
    """Measured pairs in each direction, after one that is not counted."""
    directory: Path | None = None
    """Where to work: a folder on the disk to be measured; the system's temporary one by default."""
    json: Path | None = None
    """Also write the figures there."""


def run(options: ConvertBenchmark) -> None:
    """Measures and prints a table.

    Raises:
        UserError: the disk has no room for input, copy and result.
    """
    config = Qwen2Config.named(options.model)
    needed = 4 * 2 * num_parameters(config)
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="qwen2-benchmark-") as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < needed:
            raise UserError(
                f"{folder}: needs {needed / 1e9:.0f} GB free; name another --directory."
            )
        write_random_model(folder / "hf", config)
        rows = {}
        to_shards = _conversion(folder / "hf", options, "mg")
        rows["HF to shards"] = _measure(folder, folder / "hf", to_shards, options.rounds)
        run_measured(to_shards(folder / "shards"))
        to_hf = _conversion(folder / "shards", options, "hf")
        rows["shards to HF"] = _measure(folder, folder / "shards", to_hf, options.rounds)
    _print(options, config, rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def write_random_model(folder: Path, config: Qwen2Config, seed: int = 0) -> None:
    """Writes a Hugging Face folder of `config` with random finite weights, without torch."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_hugging_face(), indent=2) + "\n")
    pieces = hugging_face_pieces(config)
    specs = {name: TensorSpec(piece.shape, config.dtype) for name, piece in pieces.items()}
    files = plan_files(specs, 5 * 10**9)
    random = np.random.default_rng(seed)
    words = random.integers(0, 2**16, 1 << 22, dtype=np.uint16) & np.uint16(0xBFFF)
    block = words.tobytes()
    for file in files:
        with open(folder / file.name, "wb") as out:
            out.write(file.header)
            left = file.total_bytes - len(file.header)
            while left:
                left -= out.write(block[:left])
            out.flush()
            os.fsync(out.fileno())
    if (index := index_json(files)) is not None:
        (folder / INDEX_FILE).write_bytes(index)


def _conversion(source: Path, options: ConvertBenchmark, kind: str) -> Callable[[Path], list[str]]:
    command = [sys.executable, "-m", "qwen2_ascend.cli", "convert", "--save-model-type", kind]
    command += ["--load-dir", str(source)]
    if kind == "mg":
        command += ["--save-format", options.save_format]
        command += ["--target-tensor-parallel-size", str(options.target_tensor_parallel_size)]
        command += ["--target-pipeline-parallel-size", str(options.target_pipeline_parallel_size)]
    return lambda target: [*command, "--save-dir", str(target)]


def _measure(
    folder: Path, source: Path, convert: Callable[[Path], list[str]], rounds: int
) -> dict[str, Any]:
    """Interleaved runs; the first pair only warms the page cache."""
    copied, converted = [], []
    bytes_in = bytes_out = 0
    for i in range(rounds + 1):
        copy, bytes_in = _fresh(folder / "copy", _copy_command(source, folder / "copy"))
        result, bytes_out = _fresh(folder / "result", convert(folder / "result"))
        print(f"  round {i}: cp {copy.seconds:.2f} s, convert {result.seconds:.2f} s", flush=True)
        if i:
            copied.append(copy)
            converted.append(result)
    return {
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "copy": copied,
        "convert": converted,
    }


def _fresh(target: Path, command: list[str]) -> tuple[Measured, int]:
    """Runs with nothing to flush from before, and removes the result; also says its size."""
    os.sync()
    try:
        measured = run_measured(command)
        return measured, sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _copy_command(source: Path, target: Path) -> list[str]:
    script = 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +'
    return ["sh", "-c", script, "sh", str(source), str(target)]


def _print(options: ConvertBenchmark, config: Qwen2Config, rows: dict[str, dict]) -> None:
    size = 2 * num_parameters(config) / 1e9
    print(
        f"\nQwen2.5-{options.model} dimensions, {size:.2f} GB bf16, "
        f"TP{options.target_tensor_parallel_size} PP{options.target_pipeline_parallel_size}, "
        f"{options.save_format}; {options.rounds} interleaved pairs, median (lowest-highest)\n"
    )
    head = ("direction", "GB in", "GB out", "convert, s", "cp + fsync, s", "ratio of pairs")
    head += ("ratio per byte written", "anonymous memory, MB")
    lines = []
    for direction, row in rows.items():
        ours = [run.seconds for run in row["convert"]]
        theirs = [run.seconds for run in row["copy"]]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        per_byte = [ratio * row["bytes_in"] / row["bytes_out"] for ratio in ratios]
        cells = [direction, f"{row['bytes_in'] / 1e9:.2f}", f"{row['bytes_out'] / 1e9:.2f}"]
        cells += [spread(values) for values in (ours, theirs, ratios, per_byte)]
        cells += [f"{max(run.peak_anonymous_bytes for run in row['convert']) / 1e6:.0f}"]
        lines.append(cells)
    print(markdown.table(head, lines))
