"""Folders of safetensors files as transformers saves them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from qwen2_ascend.checkpoint.formats import hugging_face
from qwen2_ascend.checkpoint.formats.stored import StoredTensor
from qwen2_ascend.checkpoint.readers.base import Source, check_layer_count, match
from qwen2_ascend.checkpoint.rules import hugging_face_pieces
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import raise_if

_EMBEDDING, _PREFIX = "model.embed_tokens.weight", "model."


def read_hugging_face(folder: Path, config: Qwen2Config) -> Source:
    """Reads every header of a model's folder and fits the tensors to the table.

    Raises:
        UserError: damaged files, or tensors that do not fit the config; every fault at once.
    """
    tensors = {
        name: tensor
        for name, tensor in hugging_face.read_tensors(folder).items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    if (prefix := _prefix(tensors)) == "":  # as transformers' Qwen2Model is saved by itself
        tensors = {f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()}
    raise_if(f"{folder}: {fault}" for fault in _other_models(tensors, prefix))
    check_layer_count(folder, config, len(tensors))
    pieces = hugging_face_pieces(config)
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        # some tools write the tied output too; equal bytes are checked before the work begins
        pieces["lm_head.weight"] = pieces["model.embed_tokens.weight"]
    held, faults = match(pieces, tensors)
    rows = (tensors[_EMBEDDING].shape or (0,))[0] if _EMBEDDING in tensors else config.vocab_size
    if rows != config.vocab_size:
        faults.append(
            f'config.json says "vocab_size": {config.vocab_size}, the embedding has {rows} '
            f"rows; where tokens were added to the model, set it to {rows}."
        )
    if "lm_head.weight" in set(pieces) - set(tensors):
        faults.append(
            'config.json says "tie_word_embeddings": false, but there is no lm_head.weight; '
            "set it to true if the output shares the embedding."
        )
    raise_if(f"{folder}: {fault}" for fault in faults)
    return Source(
        kind="hf",
        folder=folder,
        config=config,
        held=tuple(held),
        format="safetensors",
        padded_vocab_size=config.vocab_size,
    )


def _prefix(tensors: Mapping[str, StoredTensor]) -> str:
    """What stands before the embedding's own name: that of the model in the model."""
    own = _EMBEDDING.removeprefix(_PREFIX)
    names = (name.removesuffix(own) for name in tensors if name.endswith(own))
    return next((name for name in names if name == "" or name.endswith(".")), _PREFIX)


def _other_models(tensors: Mapping[str, StoredTensor], prefix: str) -> Iterator[str]:
    """What says that a folder holds no plain language model, however its config.json calls it."""
    if prefix not in ("", _PREFIX):
        yield (
            f"its tensors' names begin with {prefix} where {_PREFIX} is expected: a model was "
            "saved inside another one (torch.compile, DistributedDataParallel, PEFT, a vision "
            "model). Save the inner one (of PEFT: model.merge_and_unload())."
        )
    elif heads := {"score.weight", "classifier.weight", "qa_outputs.weight"} & tensors.keys():
        yield (
            f"{heads.pop()} is the head of a reward model or a classifier; this project trains "
            "language models, which have an lm_head or a tied embedding instead."
        )
