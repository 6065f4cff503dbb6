"""Flags that Megatron-LM's and MindSpeed-LLM's scripts paste and that are no settings of ours.

Each command has one table of them. A flag there is what another flag says here (`becomes`), or
holds already (then the log says why), or holds only under a condition (`check`), or is refused with
the way out, all refusals at once. So a pasted script either means here what it meant there, or it
does not start. A flag that a command implements is no row of a table; it is one of its settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import raise_if

Pasted = tuple[tuple[str, str | None], ...]
"""Flags and their values, None where they have none, in the order of the command line."""
Check = Callable[[str | None, Any, Qwen2Config], str | None]
"""What to do instead, by a flag's value, the command's settings and the model, or None."""


class Meaning(NamedTuple):
    """What becomes of one flag."""

    says: str
    """Why nothing is to be done; of a flag that is refused, what to do instead."""
    values: tuple[str, ...] | None = ()
    """Those that are accepted; () for a flag that takes none, None for any."""
    refused: bool = False
    check: Check | None = None
    """A condition that the flag holds under."""
    becomes: tuple[str, ...] = ()
    """The words that say it to us; {} stands for the value."""


Table = Mapping[str, Meaning]


def _of_the_config(name: str) -> Meaning:
    """A flag of the model's shape, by the config's name for it."""

    def check(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
        found: Any = config
        for part in name.split("."):
            found = "yarn" if found is not None and part == "type" else getattr(found, part, None)
        if found is not None and same(value, str(found)):
            return None
        return f"the config says {found}, and it decides; change that, or leave this out"

    return Meaning("as the config says", None, check=check)


def _is_untied(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
    return (
        "the config says tie_word_embeddings; leave it out" if config.tie_word_embeddings else None
    )


ALWAYS = "every Qwen2 has it"
MODEL_FLAGS: Table = {
    "--num-layers": _of_the_config("num_layers"),
    "--hidden-size": _of_the_config("hidden_size"),
    "--ffn-hidden-size": _of_the_config("ffn_hidden_size"),
    "--num-attention-heads": _of_the_config("num_attention_heads"),
    "--num-query-groups": _of_the_config("num_query_groups"),
    "--kv-channels": _of_the_config("kv_channels"),
    "--vocab-size": _of_the_config("vocab_size"),
    "--norm-epsilon": _of_the_config("norm_epsilon"),
    "--rotary-base": _of_the_config("rotary_base"),
    "--rope-scaling-type": _of_the_config("yarn.type"),
    "--rope-scaling-factor": _of_the_config("yarn.factor"),
    "--rope-scaling-original-max-position-embeddings": _of_the_config(
        "yarn.original_max_position_embeddings"
    ),
    "--untie-embeddings-and-output-weights": Meaning("as the config says", check=_is_untied),
    "--tie-embeddings-and-output-weights": Meaning(
        "the config says it; leave it out", refused=True
    ),
    "--use-mcore-models": Meaning("all models are megatron-core's"),
    "--swiglu": Meaning(ALWAYS),
    "--group-query-attention": Meaning("the config says how many groups"),
    "--add-qkv-bias": Meaning(ALWAYS),
    "--disable-bias-linear": Meaning(ALWAYS),
    "--use-rotary-position-embeddings": Meaning(ALWAYS),
    "--position-embedding-type": Meaning(ALWAYS, ("rope",)),
    "--normalization": Meaning(ALWAYS, ("RMSNorm",)),
    "--hidden-dropout": Meaning("Qwen2 has none", ("0",)),
    "--attention-softmax-in-fp32": Meaning("softmax is in fp32, fused or not"),
    "--no-masked-softmax-fusion": Meaning("attention has no masked softmax kernel"),
    "--transformer-impl": Meaning("there is no other", ("local",)),
    "--tokenizer-type": Meaning("there is no other", ("PretrainedFromHF", "HuggingFaceTokenizer")),
    "--tokenizer-not-use-fast": Meaning("fast tokenizers give the same tokens"),
    "--model-type-hf": Meaning("the config says it", ("qwen2", "qwen25")),
    "--ai-framework": Meaning("there is no other", ("pytorch",)),
}
"""Flags of every command that opens a model: its shape, which the config decides, and others."""


CARRIAGE_RETURN = (
    "a word ends with a carriage return: the script was saved with Windows line ends, which cut "
    "its command short; mend it with: sed -i 's/\\r$//' SCRIPT"
)
NO_EXPERTS = (
    "{}: these are flags of a mixture-of-experts model, and this project trains Qwen2's and "
    "Qwen2.5's dense models only; take one of those, without such flags."
)
_EXPERTS = """
    --num-experts --n-shared-experts --shared-expert-gate --expert-interval
    --expert-tensor-parallel-size --gemm-gradient-accumulation-fusion
    --use-fused-moe-token-permute-and-unpermute --router-gating-in-fp32
    --moe-allgather-overlap-comm --moe-alltoall-overlap-comm --moe-aux-loss-coeff
    --moe-comm-aux-loss-coeff --moe-device-level-aux-loss-coeff --moe-enable-deepep
    --moe-expert-capacity-factor --moe-extended-tp --moe-fb-overlap --moe-ffn-hidden-size
    --moe-grouped-gemm --moe-hierarchical-alltoallv --moe-input-jitter-eps --moe-intermediate-size
    --moe-layer-freq --moe-layer-recompute --moe-pad-expert-input-to-capacity
    --moe-per-layer-logging --moe-permutation-async-comm --moe-permute-fusion
    --moe-router-bias-update-rate --moe-router-dtype --moe-router-enable-expert-bias
    --moe-router-group-topk --moe-router-load-balancing-type --moe-router-num-groups
    --moe-router-pre-softmax --moe-router-score-function --moe-router-topk
    --moe-router-topk-scaling-factor --moe-shared-expert-intermediate-size
    --moe-shared-expert-overlap --moe-token-dispatcher-type --moe-token-drop-policy
    --moe-tp-extend-ep --moe-train-capacity-factor --moe-use-legacy-grouped-gemm
    --moe-use-upcycling --moe-z-loss-coeff --moe-zero-memory --moe-zero-memory-num-layers
"""
EXPERTS = frozenset(_EXPERTS.split())
"""Flags that only a model with experts has, besides all that begin with --moe-."""
NO_EXPERT = Meaning("there are no experts", None, refused=True)


def split_script(arguments: Sequence[str], table: Table) -> tuple[list[str], Pasted]:
    """Splits the command line of another tool's script as `split_flags` does.

    Flags of models with experts are taken whatever the table says; `expert_faults` names them.

    Raises:
        UserError: the words are from a script that no shell can run.
    """
    raise_if({CARRIAGE_RETURN for word in arguments if word.endswith("\r")})
    names = {word.partition("=")[0].replace("_", "-") for word in arguments}
    experts = {name: NO_EXPERT for name in names if _is_of_experts(name, None)}
    return split_flags(arguments, {**experts, **table})


def expert_faults(pasted: Pasted) -> list[str]:
    """One sentence where flags are for a model with experts, which is another than Qwen2."""
    flags = [flag for flag, value in pasted if _is_of_experts(flag, value)]
    return [NO_EXPERTS.format(", ".join(flags[:3]))] if flags else []


def split_flags(arguments: Sequence[str], table: Table) -> tuple[list[str], Pasted]:
    """A command line in our own words, and the flags that are no words of ours.

    A flag that `becomes` others is in both.
    """
    rest: list[str] = []
    pasted: list[tuple[str, str | None]] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        flag = f"--{flag[2:].replace('_', '-')}"
        meaning = table.get(flag) if word.startswith("--") else None
        if meaning is None:
            rest.append(word)
            continue
        given = [value] if has_value else []
        if meaning.values != () and not has_value:
            while words and not words[0].startswith("--"):
                given.append(words.pop(0))
        pasted.append((flag, " ".join(given) if given else None))
        for ours in meaning.becomes:
            rest += given if ours == "{}" else [ours]
    return rest, tuple(pasted)


def pasted_faults(
    pasted: Pasted, table: Table, settings: Any, config: Qwen2Config | None
) -> list[str]:
    """What of the pasted flags does not hold here, with what to do instead.

    Args:
        pasted: from `split_flags`.
        table: the table of the same command.
        settings: the settings of the same command; conditions ask it.
        config: the model's; None leaves out the conditions.
    """
    return [
        fault
        for flag, value in pasted
        for fault in _faults(said(flag, value), value, table[flag], settings, config)
    ]


def pasted_notes(pasted: Pasted, table: Table) -> list[str]:
    """Lines for the log: what of the pasted flags holds already, by reason."""
    by_reason: dict[str, list[str]] = {}
    for flag, value in pasted:
        by_reason.setdefault(table[flag].says, []).append(said(flag, value))
    return [f"{', '.join(flags)}: {reason}" for reason, flags in by_reason.items()]


def said(flag: str, value: str | None) -> str:
    """A flag as it was typed."""
    return flag if value is None else f"{flag} {value}"


def same(value: str | None, good: str) -> bool:
    """Whether a value is another, as numbers where both are."""
    try:
        return float(value or "") == float(good)
    except ValueError:
        return value == good


def _faults(
    said: str, value: str | None, meaning: Meaning, settings: Any, config: Qwen2Config | None
) -> Iterator[str]:
    if meaning.refused:
        yield f"{said} is not supported: {meaning.says}."
    elif meaning.values and not any(same(value, good) for good in meaning.values):
        yield f"{said}: only {' and '.join(meaning.values)} is supported: {meaning.says}."
    elif meaning.values == () and value is not None:
        yield f"{said}: takes no value."
    elif meaning.check is not None and config is not None:
        way_out = meaning.check(value, settings, config)
        if way_out is not None:
            yield f"{said}: {way_out}."


def _is_of_experts(flag: str, value: str | None) -> bool:
    if flag == "--expert-model-parallel-size":
        return not same(value, "1")
    return flag in EXPERTS or flag.startswith("--moe-")
