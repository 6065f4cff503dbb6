"""Published measurements of training on real cards, as the planner's questions.

measured_rows.json has them, field by field, each with its source: MindSpeed-LLM's CI baselines and
README on 910B, and megatron-core with Transformer Engine on GPUs. Chips of a "910B" are not named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.planning.devices import Device, find_device
from qwen2_ascend.planning.job import Cut, Job

ROWS = Path(__file__).with_name("measured_rows.json")
DEVICES = {"A100 80GB (not stated)": "A100", "A800": "A100"}


class TimedRow(NamedTuple):
    """A measured step that the planner can state."""

    name: str
    cut: Cut
    device: Device
    devices_per_node: int
    seconds: float
    """Of a step."""

    @property
    def kind(self) -> str:
        return self.device.backend


def timed_rows() -> list[TimedRow]:
    """All of them."""
    return [_timed(row) for row in rows() if why_no_time(row) is None]


def rows() -> list[dict[str, Any]]:
    """As they are in the file."""
    return json.loads(ROWS.read_text(encoding="utf-8"))["rows"]


def why_no_time(row: dict[str, Any]) -> str | None:
    """What of a row the model of a step's time does not state, in words; None if it states all."""
    return next(_not_stated(row), None)


def _not_stated(row: dict[str, Any]) -> Iterator[str]:
    time, layout = row["measured"].get("time") or {}, row["layout"] or {}
    if not time.get("ms_per_step"):
        yield "no time was measured"
    if time.get("tokens_unknown") or "variable" in row["batch"]["data"]:
        yield "chats of unknown lengths"
    if row["code"] == "legacy":
        yield "Megatron's legacy models are other code"
    if row["kernels"].get("deterministic"):
        yield "deterministic kernels"
    if layout.get("tp_2d"):
        yield "two-dimensional tensor parallelism"
    if layout.get("cp_algorithm") == "adaptive_cp_algo":
        yield "adaptive context parallelism"
    if any("sliding window" in note for note in row["notes"]):
        yield "a sliding window"
    if row["lora"]:
        yield "LoRA whose targets are not stated, or that is fused otherwise"
    if "fp8" in row["precision"]["weights"]:
        yield "fp8 products"
    if "CPU" in row["optimizer"]["kind"]:
        yield "an optimizer on the host"


def _timed(row: dict[str, Any]) -> TimedRow:
    name = row["device"]["name"]
    return TimedRow(
        name=row["id"],
        cut=as_cut(row),
        device=find_device(DEVICES.get(name, name)),
        devices_per_node=row["device"]["devices_per_node"],
        seconds=row["measured"]["time"]["ms_per_step"] / 1e3,
    )


def as_cut(row: dict[str, Any]) -> Cut:
    """The layout of a row; layers that do nothing are left out."""
    layout, batch, recompute = row["layout"], row["batch"], row["recompute"]
    per_stage = _layers(row)
    algorithm = layout["cp_algorithm"] or ""
    is_all_to_all = "ulysses" in algorithm or algorithm == "a2a"
    counted = recompute["num_layers"]
    if recompute["layers_counted_per"] == "model chunk":
        counted *= per_stage[0] // (layout["layers_per_chunk"] or per_stage[0])
    chunk = layout["layers_per_chunk"]
    has_even_chunks = chunk is not None and not row["noop_layers"]
    return Cut(
        job=_job(row),
        tp=layout["tp"],
        pp=layout["pp"],
        dp=layout["dp"],
        cp=layout["cp"],
        ulysses=layout["cp"] if is_all_to_all else layout["ulysses_degree"] or 1,
        layers_per_chunk=chunk if has_even_chunks else None,
        num_layer_list=None if len(set(per_stage)) == 1 else per_stage,
        sequence_parallel=layout["sequence_parallel"],
        distributed_optimizer=bool(row["optimizer"]["distributed"]),
        recompute=recompute["granularity"],
        recomputed_layers=counted if recompute["method"] == "block" else None,
        micro_batch_size=batch["micro_batch_size"],
        mc2=bool(row["kernels"].get("mc2") or row["kernels"].get("coc")),
        overlap_grad_reduce=bool(row["optimizer"]["overlap_grad_reduce"]),
    )


def _layers(row: dict[str, Any]) -> tuple[int, ...]:
    layout = row["layout"]
    counts = list(layout["layers_per_stage"])
    for number in row["noop_layers"] or ():
        counts[number // (layout["layers_per_chunk"] or counts[0]) % layout["pp"]] -= 1
    return tuple(counts)


def _job(row: dict[str, Any]) -> Job:
    model, batch = row["model"], row["batch"]
    is_npu = row["device"]["name"].startswith("910")
    config = Qwen2Config(
        num_layers=sum(_layers(row)),
        hidden_size=model["hidden_size"],
        ffn_hidden_size=model["ffn_hidden_size"],
        num_attention_heads=model["num_attention_heads"],
        num_query_groups=model["num_query_groups"],
        kv_channels=model["kv_channels"],
        vocab_size=model["padded_vocab_size"],
        max_position_embeddings=batch["seq_length"],
        tie_word_embeddings=model["tied"],
    )
    return Job(
        config=config,
        seq_length=batch["seq_length"],
        global_batch_size=batch["global_batch_size"],
        backend="npu" if is_npu else "cuda",
    )
