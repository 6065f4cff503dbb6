"""Flags that Megatron-LM's and MindSpeed-LLM's Qwen2 scripts paste and that set nothing here.

What holds here anyway is accepted and said in the log; so is the model's shape where it is what the
config says. The rest is refused with what to do instead, all of it at once: a pasted script either
means here what it meant there, or does not start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.launching import parse_flags

if TYPE_CHECKING:
    from qwen2_ascend.training.settings import TrainingSettings

S = TypeVar("S", bound="TrainingSettings")
Pasted = tuple[tuple[str, str | None], ...]
"""Flags and their values, None where they have none, in the order of the command line."""


class Meaning(NamedTuple):
    """What becomes of one flag."""

    says: str
    """Why nothing is to be done; of a flag that is refused, what to do instead."""
    values: tuple[str, ...] | None = ()
    """Those that are accepted; () for a flag that takes none, None for any."""
    refused: bool = False


SHAPE = {
    "--num-layers": "num_layers",
    "--hidden-size": "hidden_size",
    "--ffn-hidden-size": "ffn_hidden_size",
    "--num-attention-heads": "num_attention_heads",
    "--num-query-groups": "num_query_groups",
    "--kv-channels": "kv_channels",
    "--vocab-size": "vocab_size",
    "--norm-epsilon": "norm_epsilon",
    "--rotary-base": "rotary_base",
    "--rope-scaling-type": "yarn.type",
    "--rope-scaling-factor": "yarn.factor",
    "--rope-scaling-original-max-position-embeddings": "yarn.original_max_position_embeddings",
}
"""The model's shape by the config's names for it."""

ALWAYS = "every Qwen2 has it"
SPEED = "it changes speed or memory, not results; leave it out"
NO_CP = "without context parallelism it has no meaning"
MEANINGS = {
    "--use-mcore-models": Meaning("all models are megatron-core's"),
    "--swiglu": Meaning(ALWAYS),
    "--group-query-attention": Meaning("the config says how many groups"),
    "--add-qkv-bias": Meaning(ALWAYS),
    "--disable-bias-linear": Meaning(ALWAYS),
    "--use-rotary-position-embeddings": Meaning(ALWAYS),
    "--position-embedding-type": Meaning(ALWAYS, ("rope",)),
    "--normalization": Meaning(ALWAYS, ("RMSNorm",)),
    "--attention-dropout": Meaning("the config says it", ("0",)),
    "--hidden-dropout": Meaning("Qwen2 has none", ("0",)),
    "--attention-softmax-in-fp32": Meaning("softmax is in fp32, fused or not"),
    "--no-masked-softmax-fusion": Meaning("attention has no masked softmax kernel"),
    "--no-gradient-accumulation-fusion": Meaning("gradients are accumulated by plain operators"),
    "--accumulate-allreduce-grads-in-fp32": Meaning("gradients are accumulated in fp32"),
    "--transformer-impl": Meaning("there is no other", ("local",)),
    "--sparse-mode": Meaning("attention is causal", ("2",)),
    "--tokenizer-type": Meaning("there is no other", ("PretrainedFromHF", "HuggingFaceTokenizer")),
    "--tokenizer-not-use-fast": Meaning("fast tokenizers give the same tokens"),
    "--distributed-backend": Meaning("the device says which", ("nccl", "hccl", "gloo")),
    "--log-throughput": Meaning("it is in every line of the log"),
    "--exit-on-missing-checkpoint": Meaning("--load without a checkpoint is an error"),
    "--enable-hf2mg-convert": Meaning("--load takes a Hugging Face folder"),
    "--model-type-hf": Meaning("the config says it", ("qwen2", "qwen25")),
    "--ai-framework": Meaning("there is no other", ("pytorch",)),
    "--context-parallel-size": Meaning(
        "there is no context parallelism; use --sequence-parallel and --recompute-granularity full",
        ("1",),
    ),
    "--context-parallel-algo": Meaning(NO_CP, None),
    "--cp-attention-mask-type": Meaning(NO_CP, None),
    "--use-cp-send-recv-overlap": Meaning(NO_CP),
    "--use-fused-ring-attention-update": Meaning(NO_CP),
    "--expert-model-parallel-size": Meaning("there are no experts; remove it", ("1",)),
    # refused
    "--reuse-fp32-param": Meaning(SPEED, refused=True),
    "--swap-attention": Meaning("recompute instead: --recompute-granularity", refused=True),
    "--recompute-activation-function": Meaning("recompute more: --recompute-granularity", (), True),
    "--recompute-activation-function-num-layers": Meaning(
        "recompute more: --recompute-granularity", None, True
    ),
    "--use-ascend-mc2": Meaning(SPEED, refused=True),
    "--use-mc2": Meaning(SPEED, refused=True),
    "--use-ascend-coc": Meaning(SPEED, refused=True),
    "--coc-fused-kernel": Meaning(SPEED, refused=True),
    "--coc-parallel-num": Meaning(SPEED, None, True),
    "--manual-gc": Meaning(SPEED, refused=True),
    "--manual-gc-interval": Meaning(SPEED, None, True),
    "--o2-optimizer": Meaning("the optimizer's state is in fp32; leave it out", refused=True),
    "--o2-gradient": Meaning("gradients are added up in fp32; leave it out", refused=True),
    "--no-check-for-nan-in-loss-and-grad": Meaning(
        "say --on-nonfinite skip to go on without the update", refused=True
    ),
    "--tie-embeddings-and-output-weights": Meaning("the config says it; leave it out", (), True),
}
PRETRAINING = {
    "--handler-name": Meaning("the data is tokenized already", ("GeneralPretrainHandler",)),
    "--tokenizer-name-or-path": Meaning("the data is tokenized already", None),
    "--tokenizer-model": Meaning("the data is tokenized already", None),
    "--reset-attention-mask": Meaning(
        "in pretraining a token sees all before it in its sample; leave it out, or fine-tune with "
        "--pack, where documents see only themselves",
        refused=True,
    ),
    "--is-instruction-dataset": Meaning("chats are for launch/finetune_qwen2.py", refused=True),
}
TUNING = {
    "--is-instruction-dataset": Meaning("the data is chats"),
    "--reset-attention-mask": Meaning("chats in one sample see only themselves"),
    "--reset-position-ids": Meaning("positions are counted from each chat's start"),
    "--padded-samples": Meaning("the last step takes from the next epoch what it lacks"),
    "--lora-fusion": Meaning("adapters exchange nothing but their low-rank products"),
}
"""Of fine-tuning's launchers alone."""

# what depends on other settings
SPECIAL = {
    "--untie-embeddings-and-output-weights": (),
    "--max-position-embeddings": None,
    "--init-method-std": None,
    "--no-shared-storage": (),
    "--no-pad-to-seq-lengths": (),
}


def parse_training_flags(kind: type[S], program: str, arguments: Sequence[str] | None) -> S:
    """As `parse_flags`, with what is pasted of others' flags beside the settings."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    rest, pasted = split_flags(given, kind)
    return replace(parse_flags(kind, program, rest), pasted=pasted)


def split_flags(arguments: Sequence[str], kind: type) -> tuple[list[str], Pasted]:
    """A command line without those flags, and those flags."""
    takes = {flag: meaning.values != () for flag, meaning in _meanings(kind).items()}
    takes |= dict.fromkeys(SHAPE, True)
    takes |= {flag: values is None for flag, values in SPECIAL.items()}
    rest, pasted, words = [], [], list(arguments)
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        flag = f"--{flag[2:].replace('_', '-')}"
        if not word.startswith("--") or flag not in takes:
            rest.append(word)
        elif not takes[flag] or has_value:
            pasted.append((flag, value if has_value else None))
        else:
            is_value = bool(words) and not words[0].startswith("--")
            pasted.append((flag, words.pop(0) if is_value else None))
    return rest, tuple(pasted)


def pasted_faults(settings: TrainingSettings, config: Qwen2Config) -> list[str]:
    """What of the pasted flags does not hold here, with what to do instead."""
    meanings = _meanings(type(settings))
    faults = []
    for flag, value in settings.pasted:
        said = flag if value is None else f"{flag} {value}"
        if flag in SHAPE:
            faults += _shape_faults(said, flag, value, config)
        elif flag in SPECIAL:
            faults += [f"{said}: {way_out}." for way_out in _special(flag, value, settings, config)]
        else:
            faults += _meaning_faults(said, value, meanings[flag])
    return faults


def pasted_notes(settings: TrainingSettings) -> list[str]:
    """Lines for the log: what of the pasted flags holds already."""
    meanings = _meanings(type(settings))
    shape = [f"{flag} {value}" for flag, value in settings.pasted if flag in SHAPE]
    notes = [f"as the config says: {', '.join(shape)}"] if shape else []
    by_reason: dict[str, list[str]] = {}
    for flag, value in settings.pasted:
        if flag not in SHAPE:
            reason = meanings[flag].says if flag in meanings else "nothing depends on it"
            by_reason.setdefault(reason, []).append(flag if value is None else f"{flag} {value}")
    return notes + [f"{', '.join(flags)}: {reason}" for reason, flags in by_reason.items()]


def _meanings(kind: type) -> dict[str, Meaning]:
    is_tuning = "tuning" in kind.__dataclass_fields__
    return {**MEANINGS, **(TUNING if is_tuning else PRETRAINING)}


def _meaning_faults(said: str, value: str | None, meaning: Meaning) -> list[str]:
    if meaning.refused:
        return [f"{said} is not supported: {meaning.says}."]
    if meaning.values and not any(_same(value, good) for good in meaning.values):
        return [f"{said}: only {' and '.join(meaning.values)} is supported: {meaning.says}."]
    if meaning.values == () and value is not None:
        return [f"{said}: takes no value."]
    return []


def _shape_faults(said: str, flag: str, value: str | None, config: Qwen2Config) -> list[str]:
    found: Any = config
    for name in SHAPE[flag].split("."):
        found = "yarn" if found is not None and name == "type" else getattr(found, name, None)
    if found is not None and _same(value, str(found)):
        return []
    return [f"{said}: the config says {found}, and it decides; change that, or leave this out."]


def _special(
    flag: str, value: str | None, settings: TrainingSettings, config: Qwen2Config
) -> Iterator[str]:
    """What to do instead, where the flag does not hold."""
    if flag == "--untie-embeddings-and-output-weights" and config.tie_word_embeddings:
        yield "the config says tie_word_embeddings; leave it out"
    if flag == "--max-position-embeddings" and not _at_least(value, settings.batch.seq_length):
        yield f"is below --seq-length {settings.batch.seq_length}; leave it out"
    has_weights = settings.model.load or settings.model.pretrained_checkpoint
    if flag == "--init-method-std" and not (
        has_weights or _same(value, str(config.init_method_std))
    ):
        yield f"the config's initializer_range is {config.init_method_std}; change that"
    if flag == "--no-shared-storage" and _num_nodes() > 1:
        yield (
            "rank 0 writes indices for all nodes; give --data-cache-path on storage that all nodes "
            "share"
        )
    if flag == "--no-pad-to-seq-lengths" and not getattr(
        settings.data, "variable_seq_lengths", False
    ):
        yield "say --variable-seq-lengths, in fine-tuning, to pad to the longest chat only"


def _num_nodes() -> int:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def _same(value: str | None, good: str) -> bool:
    """Whether a value is another, as numbers where both are."""
    try:
        return float(value or "") == float(good)
    except ValueError:
        return value == good


def _at_least(value: str | None, least: int) -> bool:
    try:
        return int(value or "") >= least
    except ValueError:
        return False
