"""The planner's memory for a training job, from the flags of its script alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_type_hints

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning.settings import FinetuneSettings, LoraSettings, TuningSettings
from qwen2_ascend.flags import flag_of
from qwen2_ascend.planning.devices import GB, find_device
from qwen2_ascend.planning.job import RunLayout
from qwen2_ascend.planning.memory import fullest_stage
from qwen2_ascend.training.optimizer_settings import OptimizerSettings, PrecisionSettings
from qwen2_ascend.training.planned import as_run_layout
from qwen2_ascend.training.recompute_settings import RecomputeSettings
from qwen2_ascend.training.settings import BatchSettings, ParallelSettings

T = TypeVar("T")

DEVICE = "910B"

Flags = Mapping[str, "str | None"]
"""Flags with the texts of their values; None where one takes none or it is not known."""


class UnknownError(ValueError):
    """What the planner has to know and the script does not say."""


def memory_line(flags: Flags, num_devices: int | None) -> str:
    """One sentence: what the fullest device needs, or why that is not known.

    Args:
        flags: the flags of the script's command, by MindSpeed-LLM's names.
        num_devices: the devices of all nodes; None where the script does not say.
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


def _cut(flags: Flags, num_devices: int | None) -> RunLayout:
    """The planner's view of what the launcher would be told."""
    if num_devices is None:
        raise UnknownError("the script does not say how many devices there are.")
    settings, config = _settings(flags), _config(flags)
    if num_devices % settings.model_parallel_size:
        sizes = settings.layout()
        cp = f" x CP {sizes.cp}" if sizes.cp > 1 else ""
        raise UnknownError(
            f"TP {sizes.tp} x PP {sizes.pp}{cp} does not divide {num_devices} devices."
        )
    cut = as_run_layout(settings, config, num_devices, find_device(DEVICE).backend)
    cut.layout.check(config, cut.padded_vocab_size)
    return cut


def _settings(flags: Flags) -> FinetuneSettings:
    """The launcher's settings, as far as the planner reads them."""
    return FinetuneSettings(
        parallel=_group(ParallelSettings, flags),
        batch=_group(BatchSettings, flags),
        precision=_group(PrecisionSettings, flags),
        recompute=_group(RecomputeSettings, flags),
        lora=LoraSettings(lora_r=_number(flags, "--lora-r") if "--lora-r" in flags else None),
        tuning=TuningSettings(stage="dpo" if flags.get("--stage") == "dpo" else "sft"),
        optimizer=OptimizerSettings(lr=0.0),
    )


def _group(kind: type[T], flags: Flags) -> T:
    """A group of settings out of the flags that have its fields' names."""
    said: dict[str, Any] = {}
    for field, hint in get_type_hints(kind).items():
        flag = flag_of(field)
        if flag not in flags:
            continue
        if hint is bool:
            said[field] = True
        elif int in (hint, *get_args(hint)):
            said[field] = _number(flags, flag)
        else:
            said[field] = flags[flag]
            choices = [one for part in (hint, *get_args(hint)) for one in get_args(part)]
            if any(isinstance(one, str) for one in choices) and flags[flag] not in choices:
                raise UnknownError(f"{flag} {flags[flag]} is none of the launcher's.")
    if kind is BatchSettings:
        said.setdefault("seq_length", _number(flags, "--seq-length"))
    return kind(**said)


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
