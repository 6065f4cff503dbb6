"""What MindSpeed-LLM's flags mean where a model is only asked; pasted_flags.py is the mechanism."""

from __future__ import annotations

from typing import Any

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.pasted_flags import EXPERTS, MODEL_FLAGS, NO_EXPERT, Meaning, Table

OPERATORS = "--backend says whose operators compute"
NO_STATES = "nothing but weights is loaded"
NO_TRAINING = "nothing is trained"
PADDING = "rows of padding are no words"


def _is_within_context(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
    context = config.max_position_embeddings
    if value is not None and value.isdecimal() and int(value) <= context:
        return None
    return (
        f"the config says max_position_embeddings={context}, and it decides; change that, with "
        "YaRN rope scaling, or leave this out"
    )


def _holds_the_vocabulary(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
    if value is not None and value.isdecimal() and int(value) >= config.vocab_size:
        return None
    return f"is below the vocabulary, vocab_size={config.vocab_size} in the config; leave it out"


SERVED_FLAGS: Table = {
    **MODEL_FLAGS,
    "--seq-length": Meaning("a text has the length that it has", None),
    "--max-position-embeddings": Meaning(
        "a text may be as long as the config says", None, check=_is_within_context
    ),
    "--micro-batch-size": Meaning("how many texts are worked on at once changes none", None),
    "--padded-vocab-size": Meaning(PADDING, None, check=_holds_the_vocabulary),
    "--make-vocab-size-divisible-by": Meaning(PADDING, None),
    "--hidden-dropout": Meaning(NO_TRAINING, None),
    "--attention-dropout": Meaning(NO_TRAINING, None),
    "--no-gradient-accumulation-fusion": Meaning(NO_TRAINING),
    "--init-method-std": Meaning(NO_TRAINING, None),
    "--input-layernorm-in-fp32": Meaning("norms are computed in fp32"),
    "--use-flash-attn": Meaning(OPERATORS),
    "--use-fused-rmsnorm": Meaning(OPERATORS),
    "--use-fused-swiglu": Meaning(OPERATORS),
    "--use-fused-rotary-pos-emb": Meaning(OPERATORS),
    "--sequence-parallel": Meaning("every rank has whole sequences"),
    "--use-kv-cache": Meaning("the cache is always used"),
    "--no-load-rng": Meaning(NO_STATES),
    "--no-load-optim": Meaning(NO_STATES),
    "--finetune": Meaning(NO_STATES),
    "--exit-on-missing-checkpoint": Meaning("--load without a checkpoint is an error"),
    "--ckpt-format": Meaning("--load finds the format", ("torch", "torch_dist")),
    "--distributed-backend": Meaning("the device says which", ("nccl", "hccl", "gloo")),
    "--no-shared-storage": Meaning("each rank reads what it needs from --load"),
    "--context-parallel-size": Meaning("texts are not cut over ranks", ("1",)),
    "--expert-model-parallel-size": Meaning("there are no experts; remove it", ("1",)),
    "--spec": Meaning("the layers are Qwen2's; leave it out", None, refused=True),
    **dict.fromkeys(sorted(EXPERTS), NO_EXPERT),
    "--lora-fusion": Meaning("the adapter is merged into the weights"),
}
"""The pasted flags of every command that asks a model."""

GENERATE_FLAGS: Table = {
    **SERVED_FLAGS,
    "--max-length": Meaning("say --max-new-tokens", None, refused=True),
    "--add-eos-token": Meaning("say --stop, with the token's text", None, refused=True),
}
"""The pasted flags of launch/generate_qwen2.py."""
