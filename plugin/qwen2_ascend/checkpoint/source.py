"""Opens a checkpoint of any kind: a folder is asked once what it is, and one reader reads it."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qwen2_ascend.checkpoint.formats import hugging_face, megatron
from qwen2_ascend.checkpoint.readers.base import Source
from qwen2_ascend.checkpoint.readers.hugging_face import read_hugging_face
from qwen2_ascend.checkpoint.readers.ranks import open_rank_states, read_rank_tree
from qwen2_ascend.checkpoint.readers.torch_dist import open_torch_dist_states, read_torch_dist
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError


def find_weights(folder: str | Path, kind: str | None = None) -> tuple[str, Path]:
    """Asks a folder what it is.

    Args:
        folder: a checkpoint's folder; of Megatron's also one iteration's.
        kind: "hf" or "mg", where the user says it.

    Returns:
        The kind, and where the weights are: in the folder itself, or in that of an iteration.

    Raises:
        UserError: it holds neither, or both and `kind` does not say which, or the other kind.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.{hugging_face.hub_hint(folder)}")
    is_hf = hugging_face.is_model_folder(folder)
    is_mg = megatron.is_checkpoint_folder(folder)
    if kind is None:
        kind = _only_kind(folder, is_hf, is_mg)
    elif kind == "mg" and is_hf and not is_mg:
        raise UserError(
            f"{folder}: is a Hugging Face folder, no Megatron shards; leave --load-model-type out, "
            "or say hf."
        )
    elif kind == "hf" and is_mg and not is_hf:
        raise UserError(
            f"{folder}: holds Megatron shards, no Hugging Face weights; leave --load-model-type "
            "out, or say mg."
        )
    return kind, folder if kind == "hf" else megatron.iteration_folder(folder)


def open_source(
    folder: str | Path, kind: str | None = None, hf_cfg_dir: str | Path | None = None
) -> Source:
    """Opens a Hugging Face folder, Megatron shards or a training checkpoint.

    Args:
        folder: the folder; for Megatron also one iteration's.
        kind: "hf" or "mg"; detected when None.
        hf_cfg_dir: where config.json and the tokenizer are, if not beside the weights.

    Raises:
        UserError: anything in it that does not fit the config; every fault at once.
    """
    kind, weights = find_weights(folder, kind)
    config_folder = _config_folder(Path(folder), weights, hf_cfg_dir)
    config = Qwen2Config.from_pretrained(config_folder)
    if kind == "hf":
        source = read_hugging_face(weights, config)
    elif megatron.is_torch_dist(weights):
        source = read_torch_dist(weights, config)
    else:
        source = read_rank_tree(weights, config)
    return replace(source, side_files=hugging_face.side_files(config_folder))


def open_states(
    folder: Path,
    config: Qwen2Config,
    kinds: Mapping[str, str],
    *,
    args: Namespace,
    sharding_type: str | None,
) -> dict[str, Source]:
    """What an iteration holds beside every weight, such as Adam's moments.

    Args:
        folder: the iteration's folder.
        config: the model's; rows from its vocab_size on are padding and are not loaded.
        kinds: what is wanted, "" for the weights, each with what its keys in a torch_dist folder
            have before the weight's own.
        args: the `args` of the run that wrote it.
        sharding_type: how a torch_dist folder keeps the distributed optimizer's state.

    Returns:
        By kind, a source that is read as if its tensors were weights.

    Raises:
        UserError: as `open_source`.
    """
    if not megatron.is_torch_dist(folder):
        return open_rank_states(folder, config, kinds)
    return open_torch_dist_states(folder, config, kinds, args=args, sharding_type=sharding_type)


def target_dtype(source: Source, wanted: str | None) -> str:
    """The dtype to write: `wanted` (--dtype), or the one that all the source's tensors have.

    Raises:
        UserError: the source leaves it in doubt.
    """
    if wanted is not None:
        return wanted
    counts = Counter(held.stored.dtype for held in source.held)
    found = counts.most_common(1)[0][0]
    if len(counts) > 1:
        mix = ", ".join(f"{n} x {dtype}" for dtype, n in counts.items())
        raise UserError(f"{source.folder}: mixes dtypes ({mix}); say for example --dtype {found}.")
    if source.kind == "hf" and found != source.config.dtype:
        raise UserError(
            f"{source.folder}: config.json says {source.config.dtype}, the tensors are {found}; "
            f"say --dtype {found} to keep them or --dtype {source.config.dtype} to cast them."
        )
    return found


def lacks_config(folder: Path) -> bool:
    """Whether shards have no config.json beside them, as those of Megatron-LM and MindSpeed-LLM."""
    if not megatron.is_checkpoint_folder(folder):
        return False
    return _own_config_folder(folder, megatron.iteration_folder(folder)) is None


def _only_kind(folder: Path, is_hf: bool, is_mg: bool) -> str:
    """What a folder holds, where nobody says it."""
    if is_hf and is_mg:
        raise UserError(
            f"{folder}: holds Hugging Face weights and Megatron shards; say which with "
            "--load-model-type."
        )
    if is_mg or is_hf:
        return "mg" if is_mg else "hf"
    if any(folder.glob("iter_*")):
        megatron.iteration_folder(folder)  # says what is missing
    hugging_face.read_tensors(folder)  # says what is missing
    return "hf"


def _own_config_folder(folder: Path, weights: Path) -> Path | None:
    """Where a checkpoint has config.json and the tokenizer itself."""
    places = (folder, weights, weights.parent)
    return next((place for place in places if (place / "config.json").is_file()), None)


def _config_folder(folder: Path, weights: Path, given: str | Path | None) -> Path:
    if given is not None:
        return Path(given).parent if Path(given).is_file() else Path(given)
    if found := _own_config_folder(folder, weights):
        return found
    raise UserError(
        f"{folder}: has no config.json; name the Hugging Face folder that has it with --hf-cfg-dir."
    )
