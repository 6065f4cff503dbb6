"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors. No torch.

Read strictly: what PEFT's LoRA can be and this project's is not is refused by name, never left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2_ascend.checkpoint.adapter import Adapter, Factors
from qwen2_ascend.checkpoint.adapter_rules import (
    peft_name,
    peft_pieces,
    projection,
    target_rules,
)
from qwen2_ascend.checkpoint.formats.safetensors import read_header
from qwen2_ascend.checkpoint.formats.stored import StoredTensor
from qwen2_ascend.checkpoint.plan import Held
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, raise_if, shown
from qwen2_ascend.files import links_out, read_json
from qwen2_ascend.lora_config import PROJECTIONS, LoraConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_DTYPES = ("bf16", "fp16", "fp32")
_MOST_NAMED = 20

# Settings of PEFT's that change what an adapter computes, and the values that change nothing.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": ([],),
    "layers_to_transform": ([],),
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


class PeftAdapter(Adapter):
    """An opened PEFT folder."""


def encode_config(lora: LoraConfig, base_model: str | None = None) -> bytes:
    """The contents of adapter_config.json."""
    return (json.dumps(lora.to_peft(base_model), indent=2, sort_keys=True) + "\n").encode()


def read_lora_config(folder: str | Path) -> LoraConfig:
    """What the adapter in `folder` is; reads headers only.

    Raises:
        UserError: no adapter is there, or one that is not implemented; every fault at once.
    """
    folder = Path(folder)
    raise_if(links_out(folder, (folder / CONFIG_FILE, folder / WEIGHTS_FILE)))
    raw = _read_config(folder / CONFIG_FILE)
    faults = [] if raw.get("peft_type") == "LORA" else [f"peft_type={raw.get('peft_type')!r}"]
    faults += [
        f"{key}={raw[key]!r}"
        for key, harmless in _UNUSED.items()
        if raw.get(key) is not None and not _is_one_of(raw[key], harmless)
    ]
    raise_if(f"{folder / CONFIG_FILE}: {fault} is not implemented." for fault in faults)
    try:
        return LoraConfig(
            rank=raw.get("r", 8),
            alpha=raw.get("lora_alpha", 8),
            dropout=raw.get("lora_dropout", 0.0),
            targets=_targets(_tensors(folder)),
            use_rslora=bool(raw.get("use_rslora", False)),
        )
    except UserError as error:
        raise UserError(f"{folder}: {fault}" for fault in error.faults) from None
    except TypeError as error:
        told = ", ".join(
            f"{key}={shown(raw.get(key))}" for key in ("r", "lora_alpha", "lora_dropout")
        )
        raise UserError(f"{folder / CONFIG_FILE}: {told}: {error}.") from None


def open_adapter(folder: str | Path, config: Qwen2Config) -> PeftAdapter:
    """Opens an adapter folder of the model of `config`; reads headers only.

    Raises:
        UserError: it is none, or does not fit the model; every fault at once.
    """
    folder = Path(folder)
    lora = read_lora_config(folder)
    held = {one.name: one for one in held_tensors(folder / WEIGHTS_FILE, config, lora)}
    factors = tuple(
        Factors(
            rule.megatron.format(layer),
            box,
            *(held[peft_name(name, matrix).format(layer)] for matrix in "AB"),
        )
        for rule in target_rules(config, lora)
        for layer in range(config.num_layers)
        for name, box in rule.parts
    )
    return PeftAdapter(folder=folder, lora=lora, factors=factors)


def held_tensors(path: Path, config: Qwen2Config, lora: LoraConfig) -> tuple[Held, ...]:
    """The tensors of one file under an adapter's names, checked against the model's shape.

    Raises:
        UserError: missing or extra tensors, shapes or dtypes that are not right.
    """
    tensors, pieces = read_header(path).tensors, peft_pieces(config, lora)
    faults = _names("missing tensors", [name for name in pieces if name not in tensors])
    faults += _names("unexpected tensors", [name for name in tensors if name not in pieces])
    wrong = [
        f"{name}: expected shape {pieces[name].shape} in {'/'.join(_DTYPES)}, found "
        f"{stored.shape} in {stored.dtype}."
        for name, stored in tensors.items()
        if name in pieces and (stored.shape != pieces[name].shape or stored.dtype not in _DTYPES)
    ]
    faults += wrong[:_MOST_NAMED]
    raise_if(f"{path}: {fault}" for fault in faults)
    return tuple(Held(name, piece, tensors[name]) for name, piece in pieces.items())


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


def _names(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return [f"{len(names)} {what}: {', '.join(names[:_MOST_NAMED])}{more}."]
