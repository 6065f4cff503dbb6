"""Megatron checkpoint folders: iterations, ranks, and each rank's tensors.

    SAVE/latest_checkpointed_iteration.txt          "1", or "release"
    SAVE/iter_0000001/mp_rank_TT[_PPP]/model_optim_rng.pt      or model.safetensors
    SAVE/iter_0000001/.metadata, *.distcp, common.pt           torch_dist

With an interleaved pipeline a rank holds several models, "model0", "model1", ...: keys of the .pt,
names of the .safetensors.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2_ascend.checkpoint.formats import safetensors, torch_pt
from qwen2_ascend.checkpoint.formats.stored import StoredTensor
from qwen2_ascend.checkpoint.rules import Shard
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.files import read_text

TRACKER_FILE = "latest_checkpointed_iteration.txt"
PT_FILE = "model_optim_rng.pt"
MANIFEST_FILE = "qwen2_ascend_manifest.json"
"""What this project writes into a folder last: with it, the folder is complete."""
_MAX_TRACKER_BYTES = 4096

_PLACES = (("", ""), (".", ".replaced"))
"""Where an iteration may lie: a run that was killed between two renames left it in the second."""
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_MODEL = re.compile(r"model(\d*)")
_ALIASES = (
    (".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight"),
    (".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight"),
)
"""Names that Transformer Engine's fused layers give the norms."""


def is_checkpoint_folder(folder: Path) -> bool:
    is_one = (folder / TRACKER_FILE).is_file() or is_iteration_folder(folder)
    return is_one or any(is_iteration_folder(path) for path in complete_iterations(folder))


def complete_iterations(folder: Path) -> list[Path]:
    """The iterations in `folder` that are complete by their manifests, the newest first."""
    found = [
        path
        for path in folder.glob("iter_*")
        if re.fullmatch(r"iter_[0-9]{1,12}", path.name) and (path / MANIFEST_FILE).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("iter_")), reverse=True)


def is_iteration_folder(folder: Path) -> bool:
    return (folder / ".metadata").is_file() or any(folder.glob("mp_rank_*"))


def is_torch_dist(iteration_folder: Path) -> bool:
    return (iteration_folder / ".metadata").is_file()


def iteration_folder(folder: Path) -> Path:
    """The folder of the iteration that `folder`'s tracker file names, or `folder` if it is one.

    Without a tracker file it is the newest iteration that is complete by its manifest: the run was
    killed between the two.

    Raises:
        UserError: there is none, or the tracker names an iteration that is not there.
    """
    if is_iteration_folder(folder):
        return folder
    tracker = folder / TRACKER_FILE
    if not tracker.is_file():
        if complete := complete_iterations(folder):
            return complete[0]
        there = sorted(path.name for path in folder.glob("iter_*") if path.is_dir())
        hint = f" It holds {', '.join(there[-3:])}; give one of them." if there else ""
        raise UserError(f"{folder}: has no {TRACKER_FILE}, so no complete checkpoint.{hint}")
    said = read_text(tracker, "replace", _MAX_TRACKER_BYTES).strip()
    name = f"iter_{int(said):07d}" if re.fullmatch(r"[0-9]{1,12}", said) else said
    if not re.fullmatch(r"release|iter_[0-9]+", name):
        raise UserError(f'{tracker}: says {said[:40]!r}, neither a number nor "release".')
    for dot, end in _PLACES:
        if is_iteration_folder(folder / f"{dot}{name}{end}"):
            return folder / f"{dot}{name}{end}"
    if (folder / name / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{folder / name}: is of a LoRA run, adapters without their model; give the model's "
            f"folder, and these with --lora-load {folder}."
        )
    raise UserError(f"{tracker}: names {name}, which is missing or holds no checkpoint.")


def tracked_folder(folder: Path) -> Path:
    """The folder that the tracker file names, whatever it holds; without one the newest complete
    iteration, or `folder` itself."""
    tracker = folder / TRACKER_FILE
    if not tracker.is_file():
        return next(iter(complete_iterations(folder)), folder)
    said = read_text(tracker, "replace", _MAX_TRACKER_BYTES).strip()
    tracked, replaced = (folder / f"{dot}iter_{said.rjust(7, '0')}{end}" for dot, end in _PLACES)
    return replaced if replaced.is_dir() and not tracked.exists() else tracked


def read_ranks(
    folder: Path,
) -> tuple[dict[Shard, dict[str, StoredTensor]], Namespace | None]:
    """Where every rank's tensors lie in one iteration's mp_rank tree.

    The training arguments of rank 0 come too, where the format keeps them.

    Raises:
        UserError: ranks missing, or files that are damaged or hold something else.
    """
    ranks = rank_folders(folder)
    shards: dict[Shard, dict[str, StoredTensor]] = {}
    args = None
    for (tp_rank, pp_stage), rank_folder in sorted(ranks.items()):
        models, rank_args = _read_rank(rank_folder)
        args = args or rank_args
        for chunk, tensors in models.items():
            shards[Shard(tp_rank, pp_stage, chunk)] = _clean(tensors)
    return shards, args


def rank_folder_name(tp_rank: int, pp_stage: int, pp: int) -> str:
    return f"mp_rank_{tp_rank:02d}" + (f"_{pp_stage:03d}" if pp > 1 else "")


def model_key(chunk: int, num_chunks: int) -> str:
    """The name of one model chunk in its rank's file: "model", or "model0", "model1", ..."""
    return "model" if num_chunks == 1 else f"model{chunk}"


def plain_name(name: str) -> str | None:
    """The local-spec name of a tensor, or None for entries that are not weights."""
    if name.endswith("_extra_state") or name.endswith("rotary_pos_emb.inv_freq"):
        return None
    for fused, plain in _ALIASES:
        if name.endswith(fused):
            return name.removesuffix(fused) + plain
    return name


def torch_dist_key(name: str) -> str:
    """The key of a layer's tensor in a torch_dist folder; `name` has `{}` for the layer number.

    Layers are stacked on a leading axis, and the norms have the names of fused layers.
    """
    key = name.replace(".{}", "")
    for fused, plain in _ALIASES:
        if "{}" in name and key.endswith(plain):
            return key.removesuffix(plain) + fused
    return key


def rank_folders(folder: Path) -> dict[tuple[int, int], Path]:
    """The folders of an mp_rank tree, by tensor-parallel rank and pipeline stage.

    Raises:
        UserError: one is missing, or there are others.
    """
    ranks, odd, has_pp = {}, [], set()
    for path in sorted(folder.glob("mp_rank_*")):
        match = _RANK_FOLDER.fullmatch(path.name)
        if not match:
            odd.append(path.name)
            continue
        has_pp.add(match[2] is not None)
        ranks[int(match[1]), int(match[2] or 0)] = path
    if odd:
        raise UserError(f"{folder}: {', '.join(odd)}: not a tensor/pipeline-parallel rank.")
    if len(has_pp) > 1:
        raise UserError(f"{folder}: mixes mp_rank_TT and mp_rank_TT_PPP folders; one is stale.")
    tp, pp = (1 + max(rank[i] for rank in ranks) for i in (0, 1))
    raise_if(
        f"{folder}: {rank_folder_name(t, p, 2 if True in has_pp else 1)} is missing "
        f"(tensor-parallel size {tp}, pipeline-parallel size {pp})."
        for t in range(min(tp, 1024))
        for p in range(min(pp, 1024))
        if (t, p) not in ranks
    )
    return ranks


def _read_rank(folder: Path) -> tuple[dict[int, dict[str, StoredTensor]], Namespace | None]:
    """One rank's tensors by chunk, and its args."""
    files = sorted(
        path for path in folder.glob("model*.safetensors") if _MODEL.fullmatch(path.stem)
    )
    if files and (folder / PT_FILE).exists():
        raise UserError(f"{folder}: has both {PT_FILE} and {files[0].name}; one is stale.")
    if files:
        return {_chunk(path.stem): safetensors.read_header(path).tensors for path in files}, None
    path = folder / PT_FILE
    if not path.is_file():
        raise UserError(f"{folder}: holds neither {PT_FILE} nor model.safetensors.")
    state = torch_pt.read(path)
    models = models_of(path, state)
    args = state.get("args")
    return models, args if isinstance(args, Namespace) else None


def models_of(path: Path, state: Any) -> dict[int, dict[str, StoredTensor]]:
    """A rank's weights by chunk and name, in the order of its model.

    Args:
        path: of the rank's file.
        state: what it holds.

    Raises:
        UserError: it holds no model.
    """
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds {type(state).__name__}, not a Megatron checkpoint.")
    models = {
        _chunk(key): _clean(_tensors(path, value))
        for key, value in state.items()
        if isinstance(key, str) and _MODEL.fullmatch(key) and value
    }
    if not models:
        raise UserError(f'{path}: has no "model" (keys: {", ".join(map(str, state))[:200]}).')
    return models


def _tensors(path: Path, model: Any) -> dict[str, StoredTensor]:
    if not isinstance(model, Mapping):
        raise UserError(f"{path}: its model is {type(model).__name__}, not a table of tensors.")
    return {name: value for name, value in model.items() if isinstance(value, StoredTensor)}


def _chunk(key: str) -> int:
    return int(key.removeprefix("model") or 0)


def _clean(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    named = ((plain_name(name), tensor) for name, tensor in tensors.items())
    return {name: tensor for name, tensor in named if name is not None}
