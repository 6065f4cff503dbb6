"""The planner's memory for a training job, from the flags of its script alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.planning.devices import GB, find_device
from qwen2_ascend.planning.job import ALL_LAYERS, Cut, Job, Recompute
from qwen2_ascend.planning.memory import fullest_stage

DEVICE = "910B"

Flags = Mapping[str, "str | None"]
"""Flags with the texts of their values; None where one takes none or it is not known."""


class UnknownError(ValueError):
    """What the planner has to know and the script does not say."""


def memory_line(flags: Flags, num_devices: int | None) -> str:
    """One sentence: what the fullest device needs, or why that is not known.

    Args:
        flags: of the script's command, by MindSpeed-LLM's names.
        num_devices: of all nodes; None where the script does not say.
    """
    try:
        cut = _cut(flags, num_devices)
        stage, memory = fullest_stage(cut)
    except (UnknownError, UserError) as error:
        return f"memory: not planned: {' '.join(str(error).split())}"
    device = find_device(DEVICE)
    verdict = "fits" if memory.total <= 0.9 * device.memory else "does not fit"
    return (
        f"memory: {memory.total / GB:.1f} GB on the fullest of {cut.num_devices} devices "
        f"(stage {stage} of {cut.label()}), which {verdict} a {DEVICE} of "
        f"{device.memory / GB:.1f} GB; computed by the planner, not measured"
    )


def _cut(flags: Flags, num_devices: int | None) -> Cut:
    for flag in ("--context-parallel-size", "--cp-size"):
        if flags.get(flag) not in (None, "1"):
            raise UnknownError(f"the planner does not know {flag}.")
    if num_devices is None:
        raise UnknownError("the script does not say how many devices there are.")
    tp = _number(flags, "--tensor-model-parallel-size", 1)
    pp = _number(flags, "--pipeline-model-parallel-size", 1)
    if num_devices % (tp * pp):
        raise UnknownError(f"TP {tp} x PP {pp} does not divide {num_devices} devices.")
    dp = num_devices // (tp * pp)
    micro = _number(flags, "--micro-batch-size", 1)
    job = Job(
        config=_config(flags),
        seq_length=_number(flags, "--seq-length"),
        global_batch_size=_number(flags, "--global-batch-size", micro * dp),
        dtype=next((name for name in ("bf16", "fp16") if f"--{name}" in flags), "fp32"),
        lora_rank=_number(flags, "--lora-r") if "--lora-r" in flags else None,
    )
    chunk = "--num-layers-per-virtual-pipeline-stage"
    cut = Cut(
        job=job,
        tp=tp,
        pp=pp,
        dp=dp,
        layers_per_chunk=_number(flags, chunk) if chunk in flags else None,
        sequence_parallel="--sequence-parallel" in flags,
        distributed_optimizer="--use-distributed-optimizer" in flags,
        recompute=_recompute(flags),
        recompute_activation_function=(
            ALL_LAYERS if "--recompute-activation-function" in flags else 0
        ),
        reuse_fp32_param="--reuse-fp32-param" in flags and job.dtype == "bf16",
        num_layer_list=_layer_list(flags),
        micro_batch_size=micro,
    )
    cut.layout.check(job.config, cut.padded_vocab_size)
    return cut


def _layer_list(flags: Flags) -> tuple[int, ...] | None:
    text = flags.get("--num-layer-list")
    if text is None:
        return None
    if not all(word.isdecimal() for word in text.split(",")):
        raise UnknownError(f"--num-layer-list {text} is not a list of whole numbers.")
    return tuple(map(int, text.split(",")))


def _recompute(flags: Flags) -> Recompute:
    granularity: Any = flags.get("--recompute-granularity") or "none"
    if granularity not in get_args(Recompute):
        raise UnknownError(f"--recompute-granularity {granularity} is none of the planner's.")
    return granularity


def _config(flags: Flags) -> Qwen2Config:
    heads, hidden = _number(flags, "--num-attention-heads"), _number(flags, "--hidden-size")
    vocabulary = "--padded-vocab-size" if "--padded-vocab-size" in flags else "--vocab-size"
    return Qwen2Config(
        num_layers=_number(flags, "--num-layers"),
        hidden_size=hidden,
        ffn_hidden_size=_number(flags, "--ffn-hidden-size"),
        num_attention_heads=heads,
        num_query_groups=_number(flags, "--num-query-groups", heads),
        kv_channels=_number(flags, "--kv-channels", hidden // heads),
        vocab_size=_number(flags, vocabulary),
        tie_word_embeddings="--untie-embeddings-and-output-weights" not in flags,
    )


def _number(flags: Flags, flag: str, default: int | None = None) -> int:
    """A flag's whole number.

    Raises:
        UnknownError: the script does not say it.
    """
    value = flags.get(flag)
    if value is None and flag not in flags and default is not None:
        return default
    if value is None or not value.isdecimal() or int(value) < 1:
        raise UnknownError(f"{flag} is not a number above zero that the script says.")
    return int(value)
