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
from qwen2_ascend.planning.job import ALL_LAYERS, Job, RunLayout, Stack
from qwen2_ascend.planning.memory import (
    HCCL_BYTES,
    communicators,
    gradient_copy,
    resting_state,
    stage_memory,
)
from qwen2_ascend.planning.parameters import parameters

ROWS = Path(__file__).with_name("measured_rows.json")
DEVICES = {"A100 80GB (not stated)": "A100", "A800": "A100"}


class TimedRow(NamedTuple):
    """A measured step that the planner can state."""

    name: str
    cut: RunLayout
    device: Device
    devices_per_node: int
    seconds: float
    """Seconds of a step."""

    @property
    def kind(self) -> str:
        return self.device.backend


def timed_rows() -> list[TimedRow]:
    """All of them."""
    return [_timed(row) for row in rows() if why_no_time(row) is None]


class MemoryRow(NamedTuple):
    """Memory that a rank reported, and the planner's, in bytes; None where it is not stated."""

    name: str
    kind: str
    stage: int
    rest: tuple[float, float] | None
    """Measured and planned, between steps."""
    peak: tuple[float, float] | None


def memory_rows() -> list[MemoryRow]:
    """One for each pipeline stage of each row that states any."""
    found = [
        _memory(row, rank) for row in rows() if why_no_rest(row) is None for rank in _ranks(row)
    ]
    return [row for row in found if row.rest or row.peak]


def _ranks(row: dict[str, Any]) -> list[dict[str, Any]]:
    ranks = row["measured"]["memory"]["ranks"]
    return list({rank["stage"]: rank for rank in reversed(ranks)}.values())[::-1]


def _memory(row: dict[str, Any], rank: dict[str, Any]) -> MemoryRow:
    cut, stage = as_run_layout(row), rank["stage"]
    weights = parameters(cut, stage)
    kind = cut.job.backend
    rest = peak = None
    if rank["allocated_mib"]:
        planned = sum(resting_state(cut, weights)) + gradient_copy(cut, weights)
        rest = rank["allocated_mib"] * 2**20, planned
    if rank["max_allocated_mib"] and why_no_peak(row) is None:
        # HCCL's own memory is not torch's
        hccl = communicators(cut) * HCCL_BYTES if kind == "npu" else 0
        is_first = "first step" in row["measured"]["memory"]["moment"]
        memory = stage_memory(cut, stage, first_step=is_first)
        peak = rank["max_allocated_mib"] * 2**20, memory.total - hccl
    return MemoryRow(row["id"], kind, stage, rest, peak)


def rows() -> list[dict[str, Any]]:
    """The rows of the file."""
    return json.loads(ROWS.read_text(encoding="utf-8"))["rows"]


def why_no_rest(row: dict[str, Any]) -> str | None:
    """What of a row the planner's memory at rest does not state, in words; None if it states it."""
    return next(_not_at_rest(row), None)


def why_no_peak(row: dict[str, Any]) -> str | None:
    """The same of its peak."""
    return next(_not_at_peak(row), None)


def _not_at_rest(row: dict[str, Any]) -> Iterator[str]:
    memory, layout = row["measured"].get("memory"), row["layout"] or {}
    if not memory:
        yield "no memory was measured"
        return
    if "tool prints" in memory["moment"] or "not stated" in memory["moment"]:
        yield "what was read, or when, is not stated"
    if row["code"] == "legacy":
        yield "Megatron's legacy models are other code"
    if layout.get("tp_2d"):
        yield "two-dimensional tensor parallelism"
    if row["model"]["position"] == "alibi":
        yield "alibi's tables"
    if any(note.startswith("stage 0") for note in row["notes"]):
        yield "stages of different tensor parallelism"
    if any("LU-LoRA" in note for note in row["notes"]):
        yield "LU-LoRA"
    if "CPU" in row["optimizer"]["kind"]:
        yield "an optimizer on the host"


def _not_at_peak(row: dict[str, Any]) -> Iterator[str]:
    yield from _not_at_rest(row)
    if not row["measured"].get("memory"):
        return
    if "variable" in row["batch"]["data"]:
        yield "chats of unknown lengths"
    if row["layout"]["cp_algorithm"] == "adaptive_cp_algo":
        yield "adaptive context parallelism"
    if row["lora"]:
        yield "LoRA whose targets are not stated, or that is fused otherwise"
    if row["swap_attention"] or row["recompute"].get("in_advance"):
        yield "MindSpeed's own swapping and recomputing in advance"


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
        cut=as_run_layout(row),
        device=find_device(DEVICES.get(name, name)),
        devices_per_node=row["device"]["devices_per_node"],
        seconds=row["measured"]["time"]["ms_per_step"] / 1e3,
    )


def as_run_layout(row: dict[str, Any]) -> RunLayout:
    """The layout of a row."""
    layout, batch, recompute = row["layout"], row["batch"], row["recompute"]
    per_stage = layout["layers_per_stage"]
    algorithm = layout["cp_algorithm"] or ""
    is_all_to_all = "ulysses" in algorithm or algorithm == "a2a"
    counted = recompute["num_layers"]
    if recompute["layers_counted_per"] == "model chunk":
        counted *= per_stage[0] // (layout["layers_per_chunk"] or per_stage[0])
    is_even = len(set(per_stage)) == 1
    precision = row["precision"]
    function = row["recompute_activation_function"]
    return RunLayout(
        job=_job(row),
        tp=layout["tp"],
        pp=layout["pp"],
        dp=layout["dp"],
        cp=layout["cp"],
        ulysses=layout["cp"] if is_all_to_all else layout["ulysses_degree"] or 1,
        layers_per_chunk=layout["layers_per_chunk"],
        num_layer_list=None if is_even else tuple(per_stage),
        noop_layers=tuple(row["noop_layers"] or ()),
        sequence_parallel=layout["sequence_parallel"],
        distributed_optimizer=bool(row["optimizer"]["distributed"]),
        recompute=recompute["granularity"],
        recomputed_layers=counted if recompute["method"] == "block" else None,
        recompute_activation_function=function["num_layers"] or ALL_LAYERS if function else 0,
        recompute_norm=row["recompute_norm_layers"] or 0,
        swap_attention=row["swap_attention"],
        reuse_fp32_param="packed" in precision["main_weights"],
        o2_gradient=precision["gradient_buffer"] in ("bf16", "fp16"),
        # the state of 12 bytes a weight is one of 16-bit gradients and moments
        o2_optimizer=precision["main_weights"] == "none",
        micro_batch_size=batch["micro_batch_size"],
        mc2=bool(row["kernels"].get("mc2") or row["kernels"].get("coc")),
        overlap_grad_reduce=bool(row["optimizer"]["overlap_grad_reduce"]),
    )


LOGIT_BYTES = {"1.0.0": 10, "2.0.0": 10, "2.1.0": 10, "2.2.0": 14}
"""Bytes of MindSpeed-LLM's branches: 16 bits, fp32, fp32 less the largest, and its exponential,
where these are tensors of their own; inferred from rows whose peak is the loss."""


def _stack(row: dict[str, Any]) -> Stack:
    """What its trainer holds that ours does not."""
    branch = row["source"]["branch"]
    if not row["device"]["name"].startswith("910"):
        # Transformer Engine's: the fused loss keeps 16-bit logits, AdamW works in place
        return Stack(
            logit_bytes=2 if row["kernels"].get("cross_entropy_fusion") else None, clips="in place"
        )
    clips_a_copy = branch in LOGIT_BYTES or branch == "2.3.0"
    return Stack(
        logit_bytes=LOGIT_BYTES.get(branch),
        clips="copy" if clips_a_copy else "in place",
        keeps_gathered_inputs=bool(row["kernels"].get("mc2")),
        has_whole_mask=True,
        copies_all=False,
    )


def _job(row: dict[str, Any]) -> Job:
    model, batch = row["model"], row["batch"]
    is_npu = row["device"]["name"].startswith("910")
    config = Qwen2Config(
        num_layers=sum(row["layout"]["layers_per_stage"]) - len(row["noop_layers"] or ()),
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
        dtype="fp16" if row["precision"]["weights"] == "fp16" else "bf16",
        backend="npu" if is_npu else "cuda",
        lora_rank=(row["lora"] or {}).get("rank"),
        stack=_stack(row),
    )
