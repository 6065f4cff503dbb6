"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors. No torch.

Read strictly: what PEFT's LoRA can be and this project's is not is refused by name, never left out.
An adapter that differs from layer to layer can be merged, but not trained further.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen2_ascend.checkpoint.adapter import Adapter, Factors
from qwen2_ascend.checkpoint.adapter_rules import (
    PEFT_PREFIX,
    peft_name,
    peft_pieces,
    projection,
    target_rules,
)
from qwen2_ascend.checkpoint.formats.safetensors import read_header
from qwen2_ascend.checkpoint.formats.stored import WEIGHT_DTYPES, StoredTensor
from qwen2_ascend.checkpoint.plan import StoredSlice
from qwen2_ascend.checkpoint.rules import TensorSlice
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, at_most, name_faults, raise_if, shown
from qwen2_ascend.files import links_out, read_json
from qwen2_ascend.lora_config import PROJECTIONS, LoraConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


# Settings of PEFT's that change what an adapter computes, and the values that change nothing.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "modules_to_save": ([],),
    "layer_replication": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "megatron_config": ({},),
    "corda_config": ({},),
    "eva_config": ({},),
    "alora_invocation_tokens": ([],),
    "arrow_config": ({},),
    "lora_ga_config": ({},),
    "velora_config": ({},),
    "monteclora_config": ({},),
    "kasa_config": ({},),
    # the others change the base weights when the adapter begins
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}

# Those by which an adapter differs from layer to layer.
_PATTERNS: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("rank_pattern", "alpha_pattern", "layers_to_transform"), ()
)


def encode_config(lora: LoraConfig, base_model: str | None = None) -> bytes:
    """The contents of adapter_config.json."""
    return (json.dumps(lora.to_peft(base_model), indent=2, sort_keys=True) + "\n").encode()


def other_base(folder: Path, model: Path) -> str | None:
    """The model that the adapter in `folder` says it was trained on, if its name is not `model`'s.

    None where it says none, or is no PEFT folder.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None
    said = read_json(folder / CONFIG_FILE)
    base = said.get("base_model_name_or_path") if isinstance(said, dict) else None
    if not isinstance(base, str) or not base or Path(base).name == model.resolve().name:
        return None
    return base


def read_lora_config(folder: str | Path) -> LoraConfig:
    """What the adapter in `folder` is; reads headers only.

    Raises:
        UserError: no adapter is there, or one that is not implemented; every fault at once.
    """
    folder = Path(folder)
    raw = _checked_config(folder)
    raise_if(
        f"{folder / CONFIG_FILE}: {fault} is not implemented in training; merge the adapter with "
        "qwen2-ascend convert --adapter, and go on from the merged model."
        for fault in _used(raw, _PATTERNS)
    )
    return _lora_config(folder, raw, _tensors(folder))


def _checked_config(folder: Path) -> Mapping[str, Any]:
    """The contents of adapter_config.json.

    Raises:
        UserError: they ask for what can be neither trained nor merged here.
    """
    raise_if(links_out(folder, (folder / CONFIG_FILE, folder / WEIGHTS_FILE)))
    raw = _read_config(folder / CONFIG_FILE)
    faults = [] if raw.get("peft_type") == "LORA" else [f"peft_type={raw.get('peft_type')!r}"]
    raise_if(
        f"{folder / CONFIG_FILE}: {fault} is not implemented; {_WAY_OUT}"
        for fault in faults + _used(raw, _UNUSED)
    )
    return raw


_WAY_OUT = (
    "merge the adapter with peft (model.merge_and_unload().save_pretrained) and take that folder."
)


def _used(raw: Mapping[str, Any], settings: Mapping[str, tuple[Any, ...]]) -> list[str]:
    return [
        f"{key}={shown(raw[key])}"
        for key, harmless in settings.items()
        if raw.get(key) is not None and not _is_one_of(raw[key], harmless)
    ]


def _lora_config(
    folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> LoraConfig:
    try:
        return LoraConfig(
            rank=raw.get("r", 8),
            alpha=raw.get("lora_alpha", 8),
            dropout=raw.get("lora_dropout", 0.0),
            targets=_targets(tensors),
            use_rslora=bool(raw.get("use_rslora", False)),
        )
    except UserError as error:
        raise UserError(f"{folder}: {fault}" for fault in error.faults) from None
    except TypeError as error:
        told = ", ".join(
            f"{key}={shown(raw.get(key))}" for key in ("r", "lora_alpha", "lora_dropout")
        )
        raise UserError(f"{folder / CONFIG_FILE}: {told}: {error}.") from None


def open_adapter(folder: str | Path, config: Qwen2Config) -> Adapter:
    """Opens an adapter folder of the model of `config`; reads headers only.

    Raises:
        UserError: it is none, or does not fit the model; every fault at once.
    """
    folder = Path(folder)
    raw = _checked_config(folder)
    tensors = _tensors(folder)
    lora = _lora_config(folder, raw, tensors)
    stems = _stems(raw, config, lora, tensors)
    ranks = _ranks(raw, lora, tensors, stems)
    pieces = {
        name: piece
        for rank in sorted(set(ranks.values()))
        for name, piece in peft_pieces(config, replace(lora, rank=rank)).items()
        if ranks.get(_stem(name)) == rank
    }
    alphas = _alphas(folder, raw)
    scalings = {}
    for stem, rank in ranks.items():
        alpha = next((a for key, a in alphas.items() if _is_named(stem, key)), lora.alpha)
        scalings[f"{stem}.weight"] = replace(lora, rank=rank, alpha=alpha).scaling
    held = {one.name: one for one in _held(folder / WEIGHTS_FILE, pieces)}
    factors = tuple(
        Factors(
            rule.megatron.format(layer),
            box,
            *(held[peft_name(name, matrix).format(layer)] for matrix in "AB"),
            scaling=scalings[name.format(layer)],
        )
        for rule in target_rules(config, lora)
        for layer in range(config.num_layers)
        for name, box in rule.parts
        if name.format(layer) in scalings
    )
    return Adapter(folder=folder, lora=lora, factors=factors)


def _stems(
    raw: Mapping[str, Any],
    config: Qwen2Config,
    lora: LoraConfig,
    tensors: Mapping[str, StoredTensor],
) -> tuple[str, ...]:
    """The modules that have to have tensors, as PEFT calls them in the model.

    Where a regular expression, or names with dots, say which these are, their tensors do.
    """
    every = tuple(dict.fromkeys(map(_stem, peft_pieces(config, lora))))
    words = [raw.get("target_modules") or [], raw.get("exclude_modules") or []]
    are_plain = all(isinstance(word, list) for word in words) or words == ["all-linear", []]
    if not are_plain or any("." in str(name) for word in words for name in word):
        found = set(map(_stem, tensors))
        return tuple(stem for stem in every if stem in found)
    layers = raw.get("layers_to_transform")
    if layers is None or layers == []:
        return every
    wanted = {f"layers.{layer}." for layer in (layers if isinstance(layers, list) else [layers])}
    return tuple(stem for stem in every if any(layer in stem for layer in wanted))


def _ranks(
    raw: Mapping[str, Any],
    lora: LoraConfig,
    tensors: Mapping[str, StoredTensor],
    stems: Sequence[str],
) -> dict[str, int]:
    """The rank of each module: as its A says, where the config has a pattern of ranks."""
    ranks = dict.fromkeys(stems, lora.rank)
    if raw.get("rank_pattern"):
        for name, stored in tensors.items():
            if (stem := _stem(name)) in ranks and ".lora_A." in name and stored.shape:
                ranks[stem] = max(1, stored.shape[0])
    return ranks


def _alphas(folder: Path, raw: Mapping[str, Any]) -> Mapping[str, float]:
    """PEFT's alpha_pattern.

    Raises:
        UserError: it holds regular expressions, or no numbers.
    """
    alphas = raw.get("alpha_pattern") or {}
    good = isinstance(alphas, dict) and all(
        re.fullmatch(r"\^?[\w.]+", key) and type(alpha) in (int, float) and 0 < alpha < 1e300
        for key, alpha in alphas.items()
    )
    if not good:
        raise UserError(
            f"{folder / CONFIG_FILE}: alpha_pattern={shown(alphas)} is implemented for names of "
            f"modules and numbers above zero; {_WAY_OUT}"
        )
    return alphas


def _is_named(stem: str, key: str) -> bool:
    """Whether a key of a pattern means a module: its name, or the end of it."""
    return stem == key.removeprefix("^") or (key[0] != "^" and stem.endswith(f".{key}"))


def _stem(name: str) -> str:
    """The module of an adapter's tensor: `model.layers.0.self_attn.q_proj`."""
    return name.removeprefix(PEFT_PREFIX).partition(".lora_")[0]


def held_tensors(path: Path, config: Qwen2Config, lora: LoraConfig) -> tuple[StoredSlice, ...]:
    """The tensors of one file under an adapter's names, checked against the model's shape.

    Raises:
        UserError: missing or extra tensors, shapes or dtypes that are not right.
    """
    return _held(path, peft_pieces(config, lora))


def _held(path: Path, pieces: Mapping[str, TensorSlice]) -> tuple[StoredSlice, ...]:
    tensors = read_header(path).tensors
    faults = name_faults("missing tensors", [name for name in pieces if name not in tensors])
    faults += name_faults("unexpected tensors", [name for name in tensors if name not in pieces])
    wrong = [
        f"{name}: expected shape {pieces[name].shape} in {'/'.join(WEIGHT_DTYPES)}, found "
        f"{stored.shape} in {stored.dtype}."
        for name, stored in tensors.items()
        if name in pieces
        and (stored.shape != pieces[name].shape or stored.dtype not in WEIGHT_DTYPES)
    ]
    faults += at_most(wrong)
    if any("embed_tokens" in name or "lm_head" in name for name in tensors):
        faults.append(
            "it holds an embedding or an output layer, because these were trained or tokens were "
            f"added; {_WAY_OUT}"
        )
    raise_if(f"{path}: {fault}" for fault in faults)
    return tuple(StoredSlice(name, piece, tensors[name]) for name, piece in pieces.items())


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        raise UserError(f"{path}: no such file; give a PEFT adapter folder.")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds {type(raw).__name__}, not a JSON object.")
    return raw


def _tensors(folder: Path) -> Mapping[str, StoredTensor]:
    if not (folder / WEIGHTS_FILE).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UserError(
                f"{folder}: holds adapter_model.bin only, a pickle; save it as safetensors first "
                "(peft: model.save_pretrained)."
            )
        raise UserError(f"{folder}: there is no {WEIGHTS_FILE} in it.")
    return read_header(folder / WEIGHTS_FILE).tensors


def _targets(tensors: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """The projections that have tensors; the config may say them as a pattern."""
    found = {projection(name) for name in tensors}
    return tuple(name for name in PROJECTIONS if name in found)


def _is_one_of(value: Any, harmless: tuple[Any, ...]) -> bool:
    return any(type(value) is type(one) and value == one for one in harmless) or value in ([], {})
