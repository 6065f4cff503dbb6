"""LoRA checkpoints in Megatron shards, as MindSpeed-LLM's training writes them. No torch.

    SAVE/iter_0000100/mp_rank_TT[_PPP]/model_optim_rng.pt

A module has one pair of matrices, cut as its weight is: linear_qkv's and linear_fc1's lora_B by
rows, linear_proj's and linear_fc2's lora_A by columns. Beside them may lie the weights that they
were trained on, as `base_layer.weight`, and all the others.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen2_ascend.checkpoint.adapter import Adapter, Factors
from qwen2_ascend.checkpoint.formats import megatron
from qwen2_ascend.checkpoint.formats.stored import WEIGHT_DTYPES, StoredTensor
from qwen2_ascend.checkpoint.plan import StoredSlice
from qwen2_ascend.checkpoint.rules import Shard, TensorSlice, qwen2_rules
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, at_most, raise_if
from qwen2_ascend.lora_config import PROJECTIONS, LoraConfig
from qwen2_ascend.parallel import ParallelLayout

Shards = Mapping[Shard, Mapping[str, StoredTensor]]

_MATRIX = re.compile(
    r"decoder\.layers\.(\d{1,9})\.((?:self_attention|mlp)\.(\w+))\.lora_([ABab])(?:\.default)?"
    r"\.weight"
)
_BASE = ".base_layer."


def open_megatron_adapter(
    folder: Path,
    shards: Shards,
    layout: ParallelLayout,
    config: Qwen2Config,
    args: Namespace | None,
    alpha: float | None,
) -> Adapter:
    """Opens the adapter of an iteration whose headers are read.

    Args:
        folder: of the iteration.
        shards: every rank's tensors.
        layout: how the shards are cut.
        config: of the model that was adapted.
        args: the training arguments, which say alpha.
        alpha: where the training arguments do not say it.

    Raises:
        UserError: it does not fit the model; every fault at once.
    """
    faults: list[str] = []
    factors = list(_all_factors(folder, shards, layout, config, faults))
    sizes = {one.a.stored.shape[:1] for one in factors}
    faults += [] if len(sizes) == 1 else [f"{folder}: its lora_A have {sorted(sizes)} rows."]
    faults += _missing(folder, factors, layout, config)
    raise_if(at_most(faults))
    return Adapter(
        folder=folder,
        lora=LoraConfig(
            rank=factors[0].a.stored.shape[0],
            alpha=_alpha(folder, args, alpha),
            targets=_targets(factors),
        ),
        factors=tuple(factors),
        base=tuple(_base(shards, layout, config)),
    )


def _all_factors(
    folder: Path, shards: Shards, layout: ParallelLayout, config: Qwen2Config, faults: list[str]
) -> Iterator[Factors]:
    """Every pair of matrices with its place; what does not fit is added to `faults`."""
    stages = layout.stages(config.num_layers)
    rules = {rule.megatron: rule for rule in qwen2_rules(config)}
    for shard, tensors in shards.items():
        layers = stages[shard.pp_stage][shard.chunk]
        where = folder / megatron.rank_folder_name(shard.tp_rank, shard.pp_stage, layout.pp)
        for (local, module), pair in _pairs(tensors).items():
            rule = rules.get(f"decoder.layers.{{}}.{module}.weight")
            if rule is None or local >= len(layers):
                faults.append(f"{where}: layer {local}: {module} is no module of this Qwen2.")
            elif set(pair) != {"A", "B"}:
                faults.append(f"{where}: layer {local}: {module} has no pair of lora_A and lora_B.")
            else:
                tensor = rule.megatron.format(layers[local])
                made = Factors(tensor, rule.shard(layout.tp, shard.tp_rank), pair["A"], pair["B"])
                faults += [f"{where}: {fault}" for fault in _faults(made)]
                yield made


def has_matrices(shards: Shards) -> bool:
    """Whether any rank has an adapter's matrices."""
    return any(_MATRIX.fullmatch(name) for tensors in shards.values() for name in tensors)


def _pairs(tensors: Mapping[str, StoredTensor]) -> dict[tuple[int, str], dict[str, StoredSlice]]:
    """A rank's matrices "A" and "B" by local layer and module."""
    pairs: dict[tuple[int, str], dict[str, StoredSlice]] = {}
    for name, stored in tensors.items():
        if match := _MATRIX.fullmatch(name):
            pair = pairs.setdefault((int(match[1]), match[2]), {})
            pair[match[4].upper()] = _held(name, stored)
    return pairs


def _held(name: str, stored: StoredTensor) -> StoredSlice:
    """The matrix as a box of a view of its own."""
    box = ((0, 1), *((0, n) for n in (*stored.shape, 1, 1)[:2]))
    return StoredSlice(name, TensorSlice(name, box, stored.shape), stored)


def _faults(made: Factors) -> Iterator[str]:
    blocks, rows, columns = (stop - start for start, stop in made.box)
    rank = made.a.stored.shape[0] if made.a.stored.shape else 0
    for held, shape in ((made.a, (rank, columns)), (made.b, (blocks * rows, rank))):
        if held.stored.shape != shape or held.stored.dtype not in WEIGHT_DTYPES:
            yield (
                f"{held.name}: expected shape {shape} in {'/'.join(WEIGHT_DTYPES)}, found "
                f"{held.stored.shape} in {held.stored.dtype}."
            )


def _missing(
    folder: Path, factors: list[Factors], layout: ParallelLayout, config: Qwen2Config
) -> Iterator[str]:
    """Layers and ranks that a module of the adapter lacks."""
    for module in dict.fromkeys(one.tensor.split(".", 3)[3] for one in factors):
        found = sum(one.tensor.endswith(f".{module}") for one in factors)
        if found != (wanted := config.num_layers * layout.tp):
            yield f"{folder}: {found} pairs of matrices for {module}, {wanted} are needed."


def _targets(factors: list[Factors]) -> tuple[str, ...]:
    modules = {one.tensor.split(".")[-2] for one in factors}
    return tuple(module for module in dict.fromkeys(PROJECTIONS.values()) if module in modules)


def _alpha(folder: Path, args: Namespace | None, given: float | None) -> float:
    alpha: Any = getattr(args, "lora_alpha", None)
    alpha = given if alpha is None else alpha
    if type(alpha) not in (int, float):
        raise UserError(f"{folder}: does not say the adapter's alpha; give --lora-alpha.")
    return float(alpha)


def _base(shards: Shards, layout: ParallelLayout, config: Qwen2Config) -> Iterator[StoredSlice]:
    """The modules' own weights and biases, where they are stored."""
    stages = layout.stages(config.num_layers)
    rules = {rule.megatron: rule for rule in qwen2_rules(config)}
    for shard, tensors in shards.items():
        for name, stored in tensors.items():
            match = re.fullmatch(r"decoder\.layers\.(\d{1,9})\.(.+)", name)
            if match is None or _BASE not in name:
                continue
            rule = rules.get(f"decoder.layers.{{}}.{match[2].replace(_BASE, '.')}")
            layers = stages[shard.pp_stage][shard.chunk]
            if rule is not None and int(match[1]) < len(layers):
                box = rule.shard(layout.tp, shard.tp_rank)
                yield StoredSlice(name, rule.piece(box, layers[int(match[1])]), stored)
