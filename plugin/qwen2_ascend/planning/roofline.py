"""Seconds of a training step, predicted: a roofline, not a measurement.

Matrix products take their arithmetic over a share of the device's peak; what is read and written
element by element takes its bytes over a share of the memory's bandwidth; collectives take the
bytes a rank sends in a ring over a share of the slowest link. Nothing overlaps. docs/planning.md
has the formulas, and says what is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from qwen2_ascend.planning.devices import Device
from qwen2_ascend.planning.job import Cut
from qwen2_ascend.planning.parameters import Parameters, parameters
from qwen2_ascend.planning.traffic import KINDS, Kind, rank_traffic


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of what the device can do at most; assumptions."""

    arithmetic: float = 0.5
    memory: float = 0.7
    links: float = 0.7


class StepTime(NamedTuple):
    """Seconds of a step, by what they are spent on."""

    arithmetic: float
    memory: float
    tensor_parallel: float
    pipeline: float
    """Sending hidden states to the next stage."""
    bubble: float
    """Waiting for the pipeline to fill and to empty."""
    data_parallel: float
    update: float

    @property
    def total(self) -> float:
        return sum(self)


def step_time(
    cut: Cut,
    device: Device,
    efficiency: Efficiency,
    *,
    devices_per_node: int,
    weights: dict[int, Parameters] | None = None,
) -> StepTime:
    """Of the slowest stage, which the others wait for."""
    stages = {0, cut.pp - 1}
    of_stages = [
        _stage_time(cut, stage, device, efficiency, devices_per_node, (weights or {}).get(stage))
        for stage in stages
    ]
    return max(of_stages, key=lambda time: time.total)


def bubble_fraction(cut: Cut) -> float:
    """Share of a step that a stage waits: (p - 1) / v over that and the micro-batches' own time
    (Narayanan et al. 2021, arXiv:2104.04473)."""
    wait = (cut.pp - 1) / cut.num_chunks
    return wait / (cut.num_microbatches + wait)


def _stage_time(
    cut: Cut,
    stage: int,
    device: Device,
    efficiency: Efficiency,
    devices_per_node: int,
    weights: Parameters | None,
) -> StepTime:
    weights = weights or parameters(cut, stage)
    n = cut.num_microbatches
    arithmetic = n * stage_flops(cut, stage) / (device.peak_flops * efficiency.arithmetic)
    bandwidth = device.memory_bandwidth * efficiency.memory
    memory = n * stage_elementwise_bytes(cut, stage) / bandwidth
    sent = rank_traffic(cut, stage, weights)
    links = _links(cut, device, devices_per_node)
    seconds = {kind: sent[kind] / (links[kind] * efficiency.links) for kind in KINDS}
    tensor, pipeline, data = seconds["TP"] + seconds["SP"], seconds["PP"], seconds["DP"]
    busy = arithmetic + memory + tensor + pipeline
    bubble = busy * (cut.pp - 1) / (cut.num_chunks * n)
    share = cut.dp if cut.distributed_optimizer else 1
    # AdamW reads a gradient, reads and writes a weight and two moments in fp32, writes a 16-bit one
    update = sum(weights.buffers) / share * (28 + cut.job.element) / bandwidth
    return StepTime(arithmetic, memory, tensor, pipeline, bubble, data, update)


def _links(cut: Cut, device: Device, devices_per_node: int) -> dict[Kind, float]:
    """Bytes per second of each kind of group: ranks are numbered TP first, then DP, then PP."""

    def link(span: int) -> float:
        return device.node_bandwidth if span <= devices_per_node else device.network_bandwidth

    return {
        "TP": link(cut.tp),
        "SP": link(cut.tp),
        "DP": link(cut.tp * cut.dp),
        "PP": link(cut.num_devices),
    }


def stage_flops(cut: Cut, stage: int) -> float:
    """Of one micro-batch on one rank, forward and backward and what is recomputed.

    As training/logging.py's train_flops counts: backward is twice forward, a causal token sees
    (s + 1) / 2 others.
    """
    job, config, t = cut.job, cut.job.config, cut.tokens
    h, width, heads = config.hidden_size, config.kv_channels, config.num_attention_heads
    matrices = cut.qkv_rows * h + heads * width * h + 3 * h * config.ffn_hidden_size
    core = 4 * heads * width * (job.seq_length + 1) / 2
    layer = 2 * matrices + core
    # frozen weights have no gradient: backward is once forward, and the adapters are small
    times = 3 if job.lora_rank is None else 2
    passes = times * layer + (core if job.lora_rank is not None else 0)
    if cut.recompute != "none":
        passes += layer if cut.recompute == "full" else core
    total = cut.layers_per_stage * passes
    if cut.is_last(stage):
        # a chunked loss computes its logits again
        again = job.cross_entropy_chunk_size is not None
        total += (times + again) * 2 * h * cut.padded_vocab_size
    return total * t / cut.tp


def stage_elementwise_bytes(cut: Cut, stage: int) -> float:
    """Read and written by norms, residuals, rotary, SwiGLU and the loss; backward twice forward."""
    config, t, e = cut.job.config, cut.tokens, cut.job.element
    h = config.hidden_size / (cut.tp if cut.sequence_parallel else 1)
    # two norms read and write h, two residuals read 2 h and write h; rotary reads and writes its
    # heads; SwiGLU reads 2 f and writes f
    rotary = 2 * (cut.heads + cut.groups) * config.kv_channels
    layer = 10 * h + rotary + 3 * config.ffn_hidden_size / cut.tp
    passes = 4 if cut.recompute == "full" else 3
    total = cut.layers_per_stage * layer * passes * e
    if cut.is_last(stage):
        # logits are read in 16 bits and handled in fp32: maximum, exponential, sum, gradient
        total += 6 * 4 * cut.padded_vocab_size / cut.tp
    return total * t
