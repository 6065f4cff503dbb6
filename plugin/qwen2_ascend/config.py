"""Qwen2Config: the shape of a Qwen2 / Qwen2.5 model, read from Hugging Face's config.json.

Megatron's words are used throughout; Hugging Face's appear in this reader and in the mapping
table (`checkpoint/rules.py`) and nowhere else. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from qwen2_ascend.errors import UserError, raise_if, shown
from qwen2_ascend.files import json_value, read_text

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN rope scaling (Peng et al. 2023, arXiv:2309.00071), as Qwen's cards enable it."""

    factor: float
    """How many times longer the context becomes."""
    original_max_position_embeddings: int
    """Context length, in tokens, that the model was trained with."""
    beta_fast: float = 32.0
    """Rotations over the original context above which a frequency is left alone."""
    beta_slow: float = 1.0
    """Rotations below which a frequency is fully interpolated."""
    attention_factor: float
    """What cos and sin are multiplied by; 0.1 ln(factor) + 1 unless the config says otherwise."""
    truncate: bool = True
    """Round the two bounds of the frequency ramp to whole dimensions."""


@dataclass(frozen=True, kw_only=True)
class Qwen2Config:
    """Shape and constants of one Qwen2 model, all that splitting and building it needs."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    kv_channels: int
    """Width of one head."""
    vocab_size: int
    """Rows of the embedding in the Hugging Face files, before any padding."""
    max_position_embeddings: int = 32768
    rotary_base: float = 1_000_000.0
    yarn: YarnScaling | None = None
    norm_epsilon: float = 1e-6
    tie_word_embeddings: bool = False
    init_method_std: float = 0.02
    attention_dropout: float = 0.0
    dtype: str = "bf16"
    """What the config says the weights are: bf16, fp16 or fp32."""

    def __post_init__(self) -> None:
        raise_if(self._faults())

    def _faults(self) -> list[str]:
        faults = [
            f"{name}={value} must be a positive whole number."
            for name, value in asdict(self).items()
            if name in _SIZES and not (type(value) is int and value > 0)
        ]
        if faults:
            return faults
        if self.num_attention_heads % self.num_query_groups:
            faults.append(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups} (num_key_value_heads)."
            )
        if self.kv_channels % 2:
            faults.append(f"kv_channels={self.kv_channels} (head width) is odd; RoPE needs pairs.")
        if not (math.isfinite(self.norm_epsilon) and self.norm_epsilon > 0):
            faults.append(f"norm_epsilon={self.norm_epsilon} must be above zero.")
        if not (math.isfinite(self.rotary_base) and self.rotary_base > 1):
            faults.append(f"rotary_base={self.rotary_base} must be above one.")
        if not 0 <= self.attention_dropout < 1:
            faults.append(f"attention_dropout={self.attention_dropout} must be from 0 to below 1.")
        if not (math.isfinite(self.init_method_std) and self.init_method_std >= 0):
            faults.append(f"init_method_std={self.init_method_std} must not be below zero.")
        if self.dtype not in DTYPES.values():
            faults.append(f"dtype={self.dtype} is not one of bf16, fp16, fp32.")
        return faults

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_query_groups

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Qwen2Config:
        """Reads `folder/config.json` (or the file itself).

        Raises:
            UserError: no such file, not JSON, or a model this project does not implement.
        """
        path = Path(folder)
        path = path / "config.json" if path.is_dir() else path
        try:
            raw = json_value(read_text(path, most=1 << 20))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; give a Hugging Face model folder.") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as JSON: {error}") from None
        if not isinstance(raw, dict):
            raise UserError(f"{path}: holds {type(raw).__name__}, not a JSON object.")
        try:
            return cls.from_dict(raw)
        except UserError as error:
            raise UserError(f"{path}: {fault}" for fault in error.faults) from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Qwen2Config:
        """Reads the contents of a config.json, in transformers-4 or transformers-5 spelling.

        Raises:
            UserError: missing keys, or a feature this project does not implement; all at once.
        """
        if raw.get("model_type") != "qwen2":
            raise UserError(
                f'model_type={raw.get("model_type")!r} is not "qwen2"; '
                "this project trains Qwen2 and Qwen2.5 dense models only."
            )
        if "num_key_value_heads" in raw and raw["num_key_value_heads"] is None:
            raw = {**raw, "num_key_value_heads": raw.get("num_attention_heads")}
        raise_if(_wrong_types(raw))
        raw = _with_defaults(raw)
        raise_if(_unimplemented(raw))
        sizes = {ours: raw[theirs] for theirs, ours in _HF_SIZES.items()}
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        head_dim = raw.get("head_dim")
        if head_dim is None and heads > 0 and hidden % heads:
            raise UserError(
                f"hidden_size={hidden} is not a multiple of num_attention_heads={heads} "
                "and the config gives no head_dim."
            )
        return cls(
            **sizes,
            kv_channels=head_dim or hidden // max(heads, 1),
            max_position_embeddings=raw["max_position_embeddings"],
            rotary_base=float(_rope(raw).get("rope_theta", raw["rope_theta"])),
            yarn=_yarn(raw),
            norm_epsilon=raw["rms_norm_eps"],
            tie_word_embeddings=raw["tie_word_embeddings"],
            init_method_std=raw["initializer_range"],
            attention_dropout=raw["attention_dropout"],
            dtype=DTYPES[_dtype_name(raw)],
        )

    @classmethod
    def named(cls, name: str) -> Qwen2Config:
        """The config of a published model, by its name or by its size alone.

        Args:
            name: `Qwen2.5-72B-Instruct`, `Qwen2.5-Math-7B`, `Qwen2-7B`, `QwQ-32B` and so on, in
                any case. Without `Qwen2` or `Qwen2.5` it is of Qwen2.5; a size alone, `72B`, is
                the base model's.

        Raises:
            UserError: a model that was not published.
        """
        found = _PUBLISHED.get(_key(name))
        if found is None:
            raise UserError(f"model {name!r} is not known; known are {_known_names()}.")
        layers, hidden, ffn, heads, groups, vocabulary = _SHAPES[found.size]
        return cls(
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=hidden // heads,
            vocab_size=vocabulary,
            max_position_embeddings=found.max_position_embeddings,
            rotary_base=found.rotary_base,
            norm_epsilon=found.norm_epsilon,
            tie_word_embeddings=found.is_tied,
        )

    def with_yarn(
        self,
        factor: float,
        original_max_position_embeddings: int,
        *,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
    ) -> Qwen2Config:
        """The same with YaRN scaling, and at least as many positions as that makes."""
        yarn = YarnScaling(
            factor=float(factor),
            original_max_position_embeddings=original_max_position_embeddings,
            beta_fast=beta_fast,
            beta_slow=beta_slow,
            attention_factor=0.1 * math.log(factor) + 1.0,
        )
        stretched = int(factor * original_max_position_embeddings)
        positions = max(self.max_position_embeddings, stretched)
        return replace(self, yarn=yarn, max_position_embeddings=positions)

    def with_own_yarn(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The contents of a config.json with this config's YaRN scaling and number of positions."""
        assert self.yarn is not None
        scaling = {"rope_type": "yarn", **asdict(self.yarn)}
        spelling = {"rope_scaling": {"type": "yarn", **scaling}}
        if raw.get("rope_parameters"):  # transformers 5; rope_theta is in it
            spelling = {"rope_parameters": {**raw["rope_parameters"], **scaling}}
        return {**raw, **spelling, "max_position_embeddings": self.max_position_embeddings}

    def to_hugging_face(self) -> dict[str, Any]:
        """A config.json's contents for this shape, in the spelling that every release reads."""
        raw: dict[str, Any] = {theirs: getattr(self, ours) for theirs, ours in _HF_SIZES.items()}
        raw |= {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "head_dim": self.kv_channels,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rotary_base,
            "rms_norm_eps": self.norm_epsilon,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.init_method_std,
            "attention_dropout": self.attention_dropout,
            "use_sliding_window": False,
            "torch_dtype": next(k for k, v in DTYPES.items() if v == self.dtype),
        }
        if self.yarn:
            return self.with_own_yarn(raw)
        return raw


_HF_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "vocab_size": "vocab_size",
}

# transformers' defaults, for keys that are absent or null
_HF_DEFAULTS = {
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
}
_YARN_NUMBERS = (
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
)
_SIZES = {*_HF_SIZES.values(), "kv_channels", "max_position_embeddings"}

# layers, hidden, ffn, heads, groups, vocabulary
_SHAPES = {
    "0.5B": (24, 896, 4864, 14, 2, 151936),
    "1.5B": (28, 1536, 8960, 12, 2, 151936),
    "3B": (36, 2048, 11008, 16, 2, 151936),
    "7B": (28, 3584, 18944, 28, 4, 152064),
    "14B": (48, 5120, 13824, 40, 8, 152064),
    "32B": (64, 5120, 27648, 40, 8, 152064),
    "72B": (80, 8192, 29568, 64, 8, 152064),
}
_TIED = ("0.5B", "1.5B", "3B")
_LARGE = ("14B", "32B", "72B")


class _Published(NamedTuple):
    """What a published config.json says besides its size's shape."""

    size: str
    max_position_embeddings: int
    rotary_base: float
    norm_epsilon: float
    is_tied: bool


def _series(
    prefix: str, sizes: Iterable[str], positions: Mapping[str, int], rotary_base: float
) -> dict[str, _Published]:
    """The base and the instruct models of one series.

    Args:
        prefix: how the names begin, such as `Qwen2.5-Math-`.
        sizes: those that were published.
        positions: max_position_embeddings of the base models, where it is not that of all the
            instruct models, which are under "Instruct".
        rotary_base: the rotary base of all.
    """
    found: dict[str, _Published] = {}
    for size in sizes:
        # base models of 14B and more were made with 1e-5, their instruct models with 1e-6
        of_base = 1e-5 if size in _LARGE else 1e-6
        instruct = positions["Instruct"]
        base = positions.get(size, positions.get("base", instruct))
        for name, most, epsilon in (("", base, of_base), ("-Instruct", instruct, 1e-6)):
            published = _Published(size, most, rotary_base, epsilon, size in _TIED)
            found[f"{prefix}{size}{name}"] = published
    return found


_LONG = {"base": 131072, "Instruct": 32768}
_MODELS: dict[str, _Published] = {
    **_series("Qwen2.5-", _SHAPES, {**_LONG, "0.5B": 32768, "3B": 32768}, 1e6),
    **_series("Qwen2.5-Coder-", tuple(_SHAPES)[:-1], {"Instruct": 32768}, 1e6),
    **_series("Qwen2.5-Math-", ("1.5B", "7B", "72B"), {"Instruct": 4096}, 1e4),
    **_series("Qwen2-", ("0.5B", "1.5B", "7B", "72B"), _LONG, 1e6),
    "QwQ-32B": _Published("32B", 40960, 1e6, 1e-5, False),
    "QwQ-32B-Preview": _Published("32B", 32768, 1e6, 1e-5, False),
    "DeepSeek-R1-Distill-Qwen-1.5B": _Published("1.5B", 131072, 1e4, 1e-6, False),
    "DeepSeek-R1-Distill-Qwen-7B": _Published("7B", 131072, 1e4, 1e-6, False),
    "DeepSeek-R1-Distill-Qwen-14B": _Published("14B", 131072, 1e6, 1e-5, False),
    "DeepSeek-R1-Distill-Qwen-32B": _Published("32B", 131072, 1e6, 1e-5, False),
}
"""The published models, by their names."""


def _key(name: str) -> str:
    """A name as it is looked up: in any case, of Qwen2.5 where it does not say.

    Qwen2 had no 3B, 14B and 32B; those names have always meant Qwen2.5's shape here.
    """
    key = name.lower().removeprefix("qwen/").removeprefix("deepseek-ai/")
    if key in ("qwen2-3b", "qwen2-14b", "qwen2-32b"):
        return key.replace("qwen2-", "qwen2.5-")
    if key.startswith("r1-distill"):
        return f"deepseek-{key}"
    return key if key.startswith(("qwen2", "qwq", "deepseek")) else f"qwen2.5-{key}"


_PUBLISHED = {name.lower(): published for name, published in _MODELS.items()}


def published_names() -> tuple[str, ...]:
    """The names of all models that `Qwen2Config.named` knows."""
    return tuple(_MODELS)


def _known_names() -> str:
    """Those names in few words."""
    others = (name for name in _MODELS if not name.startswith("Qwen2"))
    return (
        f"{', '.join(_SHAPES)}, with -Instruct behind and Qwen2-, Coder- or Math- before it where "
        f"that was published, and {', '.join(others)}"
    )


def _wrong_types(raw: Mapping[str, Any]) -> list[str]:
    """Values of a config.json that are not of the kind their key asks for."""
    faults = [
        f"{key}={raw.get(key)!r} must be a whole number."
        for key in _HF_SIZES
        if type(raw.get(key)) is not int
    ]
    given = {key: value for key, value in raw.items() if value is not None}
    for key, default in _HF_DEFAULTS.items():
        faults += _wrong_type(key, given.get(key, default), type(default))
    for key in ("sliding_window", "head_dim", "original_max_position_embeddings"):
        faults += _wrong_type(key, given.get(key, 0), int)
    layer_types = given.get("layer_types", [])
    faults += _wrong_type("layer_types", layer_types, list)
    for name in ("rope_parameters", "rope_scaling"):
        rope = given.get(name, {})
        faults += _wrong_type(name, rope, dict)
        if isinstance(rope, dict):
            faults += _wrong_rope_types(name, rope)
    if "hidden_act" in raw and raw["hidden_act"] is None:
        faults.append("hidden_act is null; it must be a string.")
    eos = given.get("eos_token_id", [])
    if not all(type(token) is int for token in (eos if isinstance(eos, list) else [eos])):
        faults.append(f"eos_token_id={shown(eos)} must be a whole number or a list of them.")
    layers = raw.get("num_hidden_layers")
    if not faults and layer_types and len(layer_types) != layers:
        faults.append(f"layer_types names {len(layer_types)} layers, num_hidden_layers={layers}.")
    return faults


def _wrong_rope_types(name: str, rope: Mapping[str, Any]) -> list[str]:
    if any(isinstance(value, dict) for value in rope.values()):
        return [f"{name} differ by layer type, which is not implemented: {dict(rope)}."]
    faults = []
    for key in (*_YARN_NUMBERS, "rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            faults += _wrong_type(f"{name}.{key}", rope[key], float)
    if rope.get("truncate") is not None:
        faults += _wrong_type(f"{name}.truncate", rope["truncate"], bool)
    return faults


def _wrong_type(key: str, value: Any, kind: type) -> list[str]:
    if kind is float:
        # no bool, no NaN, and nothing that float() cannot hold
        good = type(value) in (int, float) and -1e300 < value < 1e300
    else:
        good = type(value) is kind
    return [] if good else [f"{key}={value!r} must be {_KINDS[kind]}."]


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "a JSON object",
}


def _with_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` without nulls and with transformers' defaults.

    A null sliding_window means none, an absent one means 4096 tokens.
    """
    given = {key: value for key, value in raw.items() if value is not None}
    return {**_HF_DEFAULTS, **given, "sliding_window": raw.get("sliding_window", 4096)}


def _rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 says `rope_parameters`, transformers 4 `rope_scaling` (null when unused).

    Where both are there the latter counts, all of it: users add it to a file that has the former.
    Likewise a length beside the dictionary goes before the one in it.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    beside = {"original_max_position_embeddings": raw.get("original_max_position_embeddings")}
    both = [*rope.items(), *beside.items()]
    return {key: value for key, value in both if value is not None}


def _rope_type(raw: Mapping[str, Any]) -> str:
    rope = _rope(raw)
    return rope.get("rope_type", rope.get("type", "default"))


def _yarn(raw: Mapping[str, Any]) -> YarnScaling | None:
    if _rope_type(raw) != "yarn":
        return None
    rope = _rope(raw)
    factor = float(rope["factor"])
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=int(
            rope.get("original_max_position_embeddings", raw["max_position_embeddings"])
        ),
        beta_fast=float(rope.get("beta_fast", 32.0)),
        beta_slow=float(rope.get("beta_slow", 1.0)),
        attention_factor=float(rope.get("attention_factor", 0.1 * math.log(factor) + 1.0)),
        truncate=rope.get("truncate", True),
    )


def _dtype_name(raw: Mapping[str, Any]) -> str:
    return str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")


def _unimplemented(raw: Mapping[str, Any]) -> list[str]:
    """What the config asks for and this project does not do, one sentence each."""
    faults = []
    if (sliding := _sliding_layers(raw)) > 0:
        faults.append(
            f"sliding window attention is in use on {sliding} layer(s) (sliding_window="
            f"{raw.get('sliding_window')}); it is not implemented. Qwen publishes its models with "
            '"use_sliding_window": false; set that if full attention is what you want.'
        )
    rope, rope_type = _rope(raw), _rope_type(raw)
    if rope_type not in ("default", "yarn"):
        faults.append(
            f"rope scaling type {rope_type!r} is not implemented; "
            'only "yarn" is, as Qwen documents it for long contexts.'
        )
    elif rope_type == "yarn":
        if not (factor := rope.get("factor")) or factor < 1:
            faults.append(f"yarn rope scaling: factor={factor!r} must be a number >= 1.")
        faults += [
            f"yarn rope scaling: {key}={rope[key]!r} must be above zero."
            for key in _YARN_NUMBERS[1:]
            if rope.get(key, 1) <= 0
        ]
        if rope.get("mscale") or rope.get("mscale_all_dim"):
            faults.append("yarn rope scaling: mscale and mscale_all_dim are not implemented.")
    partial = rope.get("partial_rotary_factor", raw["partial_rotary_factor"])
    if partial != 1:
        faults.append(f"partial_rotary_factor={partial} is not implemented; Qwen2 rotates all.")
    if raw["hidden_act"] != "silu":
        faults.append(f'hidden_act={raw["hidden_act"]!r} is not "silu"; Qwen2 is SwiGLU only.')
    if _dtype_name(raw) not in DTYPES:
        faults.append(f"torch_dtype={_dtype_name(raw)!r} is not one of {', '.join(DTYPES)}.")
    if raw.get("quantization_config"):
        faults.append(
            "quantization_config: the checkpoint is quantized; convert the unquantized one."
        )
    return faults


def _sliding_layers(raw: Mapping[str, Any]) -> int:
    if raw.get("layer_types"):
        return sum(kind != "full_attention" for kind in raw["layer_types"])
    if not raw["use_sliding_window"] or raw["sliding_window"] is None:
        return 0
    return max(0, raw["num_hidden_layers"] - max(0, raw["max_window_layers"]))
