"""What the pasted flags of pretraining and fine-tuning mean; pasted_flags.py is the mechanism."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qwen2_ascend.config import Qwen2Config, published_names
from qwen2_ascend.data.chat.rows import is_chat_file
from qwen2_ascend.launching import parse_pasted
from qwen2_ascend.machine import local_world_size, world_size
from qwen2_ascend.pasted_flags import (
    EXPERTS,
    MODEL_FLAGS,
    NO_EXPERT,
    Check,
    Meaning,
    Pasted,
    Table,
    same,
)

S = TypeVar("S")

NOTHING = "nothing depends on it"


def training_flags(kind: type[Any]) -> Table:
    """The table of a launcher, by its settings."""
    groups = kind.__dataclass_fields__
    table = {**SHARED, **(TUNING if "tuning" in groups else PRETRAINING)}
    return {**table, **ZERO} if kind.by_deepspeed else table


def parse_training_flags(kind: type[S], program: str, arguments: Sequence[str] | None) -> S:
    """Parses as `parse_flags` does; other tools' flags are returned beside the settings.

    Raises:
        UserError: as `parse_pasted`.
    """
    return parse_pasted(kind, program, arguments, training_flags(kind))


def config_of_run(config: Qwen2Config, pasted: Pasted) -> Qwen2Config:
    """The model's config with the YaRN scaling that pasted flags give it, where it has none.

    What is wrong with those flags is left to their checks.
    """
    yarn = {flag: value for flag, value in pasted if flag in YARN_FLAGS}
    if config.yarn is not None or yarn.get("--rope-scaling-type") != "yarn":
        return config
    numbers = {YARN_FLAGS[flag]: _number(value) for flag, value in yarn.items()}
    numbers = {name: number for name, number in numbers.items() if name}
    if any(number is None or number <= 0 for number in numbers.values()):
        return config
    factor = numbers.pop("factor", None)
    original = numbers.pop("original_max_position_embeddings", None)
    if factor is None or factor < 1 or original is None or original != int(original):
        return config
    return config.with_yarn(factor, int(original), **{k: float(v or 0) for k, v in numbers.items()})


def _number(value: str | None) -> float | None:
    try:
        number = float(value or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _yarn(name: str, default: float | None = None) -> Check:
    """A check of one of YaRN's numbers, by the name that `YarnScaling` has for it."""

    def check(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
        given = dict(settings.pasted)
        if config.yarn is not None:
            found = getattr(config.yarn, name)
            return None if same(value, str(found)) else IT_DECIDES.format(found)
        number = _number(value)
        if number is None or number <= 0 or (name == "factor" and number < 1):
            return f"must be a number {'from 1 on' if name == 'factor' else 'above zero'}"
        if name.startswith("original") and number != int(number):
            return "must be a whole number"
        if "--rope-scaling-type" in given or (default is not None and number == default):
            return None
        return "says nothing without --rope-scaling-type yarn; leave it out, or give that too"

    return check


def _yarn_type(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
    if value != "yarn":
        return "only yarn is supported; models with another scaling are not trained here"
    if config.yarn is not None:
        return None
    given = dict(settings.pasted)
    fast, slow = (_beta(given, name) for name in ("fast", "slow"))
    if fast is not None and slow is not None and fast > 0 and not fast > slow:
        return f"--beta-fast {fast:g} must be above --beta-slow {slow:g}"
    needed = ("--rope-scaling-factor", "--rope-scaling-original-max-position-embeddings")
    if missing := [flag for flag in needed if flag not in given]:
        return f"needs {' and '.join(missing)}"
    return None


def _beta(given: Mapping[str, str | None], name: str) -> float | None:
    default = {"fast": 32.0, "slow": 1.0}[name]
    flags = [flag for flag, of in YARN_FLAGS.items() if of == f"beta_{name}" and flag in given]
    return _number(given[flags[-1]]) if flags else default


def _of_a_published_model(flag: str, name: str) -> Meaning:
    """A flag of the shape that differs between models of one size; the way out names one."""
    meaning = MODEL_FLAGS[flag]
    check = meaning.check
    assert check is not None

    def named(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
        way_out = check(value, settings, config)
        given = settings.model.config
        if way_out is None or given is None or Path(given).exists():
            return way_out
        fit = [
            known
            for known in published_names()
            if (other := Qwen2Config.named(known)).num_layers == config.num_layers
            and other.hidden_size == config.hidden_size
            and same(value, str(getattr(other, name)))
        ]
        if not fit:
            return way_out
        return f"{given} has {getattr(config, name)}; say which model it is: {', '.join(fit)}"

    return meaning._replace(check=named)


def _holds_the_samples(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
    length = settings.batch.seq_length
    is_enough = value is not None and value.isdecimal() and int(value) >= length
    return None if is_enough else f"is below --seq-length {length}; leave it out"


def _has_weights(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
    has_weights = settings.model.load or settings.model.pretrained_checkpoint
    if has_weights or same(value, str(config.init_method_std)):
        return None
    return f"the config's initializer_range is {config.init_method_std}; change that"


def _nothing_is_prepared(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
    """Fine-tuning writes no index: prepared chats are read on every node, from its own disk."""
    data, has_one_node = settings.data, world_size() <= local_world_size(world_size())
    files = filter(is_chat_file, (*data.data_path, *data.train_data_path, *data.valid_data_path))
    if has_one_node or data.data_cache_path is not None or not (file := next(files, None)):
        return None
    return (
        f"rank 0 prepares {file} for all nodes; give --data-cache-path on storage that all share, "
        "or prepare it first: qwen2-ascend preprocess"
    )


def _mask(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
    """A general mask is what keeps documents apart where these are told by the mask itself."""
    if value == "causal" or (value == "general" and settings.keeps_apart):
        return None
    return "attention is causal; documents are kept apart by --reset-attention-mask alone"


def _no_o2_gradient(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
    if not settings.precision.o2_gradient:
        return None
    return "--o2-gradient accumulates in bf16; leave one of the two out"


IT_DECIDES = "the config says {}, and it decides; change that, or leave this out"
YARN_FLAGS: Mapping[str, str] = {
    "--rope-scaling-type": "",
    "--rope-scaling-factor": "factor",
    "--rope-scaling-original-max-position-embeddings": "original_max_position_embeddings",
    "--beta-fast": "beta_fast",
    "--beta-slow": "beta_slow",
    "--rope-scaling-beta-fast": "beta_fast",
    "--rope-scaling-beta-slow": "beta_slow",
}
"""Each flag's name in `YarnScaling`."""
YARN = "the run has this YaRN scaling, and the config.json that is saved with it says so"
MSCALE = "YaRN multiplies cos and sin by 0.1 ln(factor) + 1"

MASK_TYPE = Meaning(
    "attention is causal, and documents that are kept apart stay so", None, check=_mask
)

SHARED: Table = {
    **MODEL_FLAGS,
    "--max-position-embeddings": Meaning(NOTHING, None, check=_holds_the_samples),
    "--init-method-std": Meaning(NOTHING, None, check=_has_weights),
    "--norm-epsilon": _of_a_published_model("--norm-epsilon", "norm_epsilon"),
    "--rotary-base": _of_a_published_model("--rotary-base", "rotary_base"),
    "--rope-scaling-type": Meaning(YARN, None, check=_yarn_type),
    **{
        flag: Meaning(YARN, None, check=_yarn(name, {"beta_fast": 32, "beta_slow": 1}.get(name)))
        for flag, name in YARN_FLAGS.items()
        if name
    },
    "--rope-scaling-mscale": Meaning(MSCALE, ("1",)),
    "--rope-scaling-mscale-all-dim": Meaning(MSCALE, ("0",)),
    **dict.fromkeys(sorted(EXPERTS), NO_EXPERT),
    "--expert-model-parallel-size": Meaning("there are no experts", ("1",)),
    "--spec": Meaning("layers are Qwen2's; leave it out", None, refused=True),
    "--noop-layers": Meaning("give the stages their layers: --num-layer-list", None, refused=True),
    "--attention-dropout": Meaning("the config says it", ("0",)),
    "--no-gradient-accumulation-fusion": Meaning("gradients are accumulated by plain operators"),
    "--accumulate-allreduce-grads-in-fp32": Meaning(
        "gradients are accumulated in fp32", check=_no_o2_gradient
    ),
    "--use-precision-aware-optimizer": Meaning(
        "the optimizer's numbers are fp32, as its dtypes are by default"
    ),
    "--overlap-cpu-optimizer-d2h-h2d": Meaning("copies are not overlapped; the numbers are equal"),
    "--sparse-mode": Meaning("attention is causal", ("2",)),
    "--distributed-backend": Meaning("the device says which", ("nccl", "hccl", "gloo")),
    "--log-throughput": Meaning("it is in every line of the log"),
    "--exit-on-missing-checkpoint": Meaning("--load without a checkpoint is an error"),
    "--enable-hf2mg-convert": Meaning("--load takes a Hugging Face folder"),
    "--cp-attention-mask-type": MASK_TYPE,
    "--attention-mask-type": MASK_TYPE,
    "--use-cp-send-recv-overlap": Meaning(
        "the ring of --context-parallel-algo sends and receives while it computes"
    ),
    "--use-fused-ring-attention-update": Meaning(
        "its kernel is not used; parts of attention are joined by plain operators, in fp32"
    ),
    "--cp-window-size": Meaning("there is one ring, without rings in it", ("1",)),
    "--megatron-cp-in-bnsd": Meaning("the order of axes changes no number"),
    **dict.fromkeys(
        ("--ulysses-degree-in-cp", "--hierarchical-context-parallel-sizes"),
        Meaning(
            "rings and exchanged heads are not mixed; give one of them to --context-parallel-algo",
            None,
            refused=True,
        ),
    ),
    "--cp-comm-type": Meaning("say --context-parallel-algo", None, refused=True),
    # refused
    "--use-mc2": Meaning("say --use-ascend-mc2", refused=True),
    **dict.fromkeys(
        ("--wandb-project", "--wandb-exp-name", "--wandb-save-dir", "--wandb-entity"),
        Meaning("say --tensorboard-dir, or read SAVE/metrics.jsonl", None, refused=True),
    ),
    "--no-check-for-nan-in-loss-and-grad": Meaning(
        "say --on-nonfinite skip to go on without the update", refused=True
    ),
}
PRETRAINING: Table = {
    "--handler-name": Meaning("the data is tokenized already", ("GeneralPretrainHandler",)),
    "--tokenizer-name-or-path": Meaning(
        "the data is tokenized already; where --load has no config.json, that folder's is taken",
        None,
    ),
    "--tokenizer-model": Meaning("the data is tokenized already", None),
    "--is-instruction-dataset": Meaning("chats are for launch/finetune_qwen2.py", refused=True),
    "--no-pad-to-seq-lengths": Meaning(
        "samples are pieces of --seq-length, which need no padding; chats, which do, are for "
        "launch/finetune_qwen2.py",
        refused=True,
    ),
}
TUNING: Table = {
    "--is-instruction-dataset": Meaning("the data is chats"),
    "--reset-attention-mask": Meaning("chats in one sample see only themselves"),
    "--reset-position-ids": Meaning("positions are counted from each chat's start"),
    "--no-pad-to-seq-lengths": Meaning(
        "batches are padded to their longest chat: --variable-seq-lengths",
        becomes=("--variable-seq-lengths",),
    ),
    "--no-shared-storage": Meaning("no index is written", check=_nothing_is_prepared),
    "--padded-samples": Meaning("the last step takes from the next epoch what it lacks"),
    "--lora-fusion": Meaning("adapters exchange nothing but their low-rank products"),
}
"""The flags of fine-tuning's launchers alone."""
ZERO: Table = {
    "--context-parallel-size": Meaning(
        "every rank computes whole sequences; launch/finetune_qwen2.py cuts them", ("1",)
    ),
    "--context-parallel-algo": Meaning(
        "every rank computes whole sequences; launch/finetune_qwen2.py cuts them", None
    ),
}
"""The flags of the launcher with DeepSpeed alone."""
