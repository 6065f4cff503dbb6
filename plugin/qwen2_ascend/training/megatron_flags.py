"""What the pasted flags of pretraining and fine-tuning mean; pasted_flags.py is the mechanism."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.launching import parse_flags
from qwen2_ascend.pasted_flags import MODEL_FLAGS, Meaning, Table, same, split_flags

if TYPE_CHECKING:
    from qwen2_ascend.training.settings import TrainingSettings

S = TypeVar("S", bound="TrainingSettings")

SPEED = "it changes speed or memory, not results; leave it out"
NO_CP = "without context parallelism it has no meaning"
NOTHING = "nothing depends on it"


def training_flags(kind: type[TrainingSettings]) -> Table:
    """The table of a launcher, by its settings."""
    return {**SHARED, **(TUNING if "tuning" in kind.__dataclass_fields__ else PRETRAINING)}


def parse_training_flags(kind: type[S], program: str, arguments: Sequence[str] | None) -> S:
    """As `parse_flags`, with what is pasted of others' flags beside the settings."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    rest, pasted = split_flags(given, training_flags(kind))
    return replace(parse_flags(kind, program, rest), pasted=pasted)


def _holds_the_samples(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
    length = settings.batch.seq_length
    is_enough = value is not None and value.isdecimal() and int(value) >= length
    return None if is_enough else f"is below --seq-length {length}; leave it out"


def _has_weights(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
    has_weights = settings.model.load or settings.model.pretrained_checkpoint
    if has_weights or same(value, str(config.init_method_std)):
        return None
    return f"the config's initializer_range is {config.init_method_std}; change that"


def _is_one_node(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size <= int(os.environ.get("LOCAL_WORLD_SIZE", world_size)):
        return None
    return "rank 0 writes indices for all nodes; give --data-cache-path on storage that all share"


def _pads_to_the_longest(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
    if getattr(settings.data, "variable_seq_lengths", False):
        return None
    return "say --variable-seq-lengths, in fine-tuning, to pad to the longest chat only"


SHARED: Table = {
    **MODEL_FLAGS,
    "--max-position-embeddings": Meaning(NOTHING, None, check=_holds_the_samples),
    "--init-method-std": Meaning(NOTHING, None, check=_has_weights),
    "--no-shared-storage": Meaning(NOTHING, check=_is_one_node),
    "--no-pad-to-seq-lengths": Meaning(NOTHING, check=_pads_to_the_longest),
    "--attention-dropout": Meaning("the config says it", ("0",)),
    "--no-gradient-accumulation-fusion": Meaning("gradients are accumulated by plain operators"),
    "--accumulate-allreduce-grads-in-fp32": Meaning("gradients are accumulated in fp32"),
    "--sparse-mode": Meaning("attention is causal", ("2",)),
    "--distributed-backend": Meaning("the device says which", ("nccl", "hccl", "gloo")),
    "--log-throughput": Meaning("it is in every line of the log"),
    "--exit-on-missing-checkpoint": Meaning("--load without a checkpoint is an error"),
    "--enable-hf2mg-convert": Meaning("--load takes a Hugging Face folder"),
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
}
PRETRAINING: Table = {
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
TUNING: Table = {
    "--is-instruction-dataset": Meaning("the data is chats"),
    "--reset-attention-mask": Meaning("chats in one sample see only themselves"),
    "--reset-position-ids": Meaning("positions are counted from each chat's start"),
    "--padded-samples": Meaning("the last step takes from the next epoch what it lacks"),
    "--lora-fusion": Meaning("adapters exchange nothing but their low-rank products"),
}
"""Of fine-tuning's launchers alone."""
