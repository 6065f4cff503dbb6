"""Opens a checkpoint of any kind: a folder is asked once what it is, and its reader reads it."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from qwen2_ascend.checkpoint.formats import hugging_face, megatron
from qwen2_ascend.checkpoint.readers.base import Reader, Source
from qwen2_ascend.checkpoint.readers.hugging_face import HuggingFaceReader
from qwen2_ascend.checkpoint.readers.ranks import RanksReader, open_rank_states
from qwen2_ascend.checkpoint.readers.torch_dist import TorchDistReader, open_torch_dist_states
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError

__all__ = [
    "Source",
    "find_reader",
    "lacks_config",
    "open_rank_states",
    "open_source",
    "open_states",
    "open_torch_dist_states",
    "target_dtype",
]


def find_reader(folder: str | Path, kind: str | None = None) -> Reader:
    """Asks a folder what it is.

    Args:
        folder: a checkpoint's folder; of Megatron's also one iteration's.
        kind: "hf" or "mg", where the user says it.

    Raises:
        UserError: it holds neither, or both and `kind` does not say which, or the other kind.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(hugging_face.missing_model(folder))
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
    return HuggingFaceReader(folder) if kind == "hf" else _megatron_reader(folder)


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
    reader = find_reader(folder, kind)
    config_folder = _config_folder(Path(folder), reader, hf_cfg_dir)
    config = Qwen2Config.from_pretrained(config_folder)
    return reader.read(config, hugging_face.side_files(config_folder))


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
    return not any(map(_has_config, _megatron_reader(folder).config_folders))


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


def _megatron_reader(folder: Path) -> RanksReader | TorchDistReader:
    iteration = megatron.iteration_folder(folder)
    of_kind = TorchDistReader if megatron.is_torch_dist(iteration) else RanksReader
    return of_kind(folder, iteration)


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _config_folder(folder: Path, reader: Reader, given: str | Path | None) -> Path:
    if given is not None:
        return Path(given).parent if Path(given).is_file() else Path(given)
    for candidate in filter(_has_config, reader.config_folders):
        return candidate
    raise UserError(
        f"{folder}: has no config.json; name the Hugging Face folder that has it with --hf-cfg-dir."
    )
