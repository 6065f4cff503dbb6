"""Direct loading refuses what it would otherwise take in silence."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import make_tiny_hugging_face_folder, tiny_config
from qwen2_ascend.checkpoint.load import load_checkpoint_weights
from qwen2_ascend.checkpoint.rules import Shard, megatron_pieces
from qwen2_ascend.errors import UserError
from qwen2_ascend.parallel import ParallelLayout

TIED = tiny_config(tie_word_embeddings=True)
LAYOUT = ParallelLayout()


class Parameters(torch.nn.Module):
    """Just the parameters of the whole model, under their Megatron names."""

    def __init__(self, without: str | None = None) -> None:
        super().__init__()
        pieces = megatron_pieces(TIED, LAYOUT, TIED.vocab_size)[Shard(0, 0, 0)]
        self._tensors = {n: torch.zeros(p.shape) for n, p in pieces.items() if n != without}

    def named_parameters(self, *_, **__):
        return iter(self._tensors.items())


def load(module: torch.nn.Module, folder) -> None:
    load_checkpoint_weights(
        [module], folder, LAYOUT, padded_vocab_size=TIED.vocab_size, tp_rank=0, pp_stage=0
    )


def test_a_tied_output_that_differs_is_refused(tmp_path):
    folder = make_tiny_hugging_face_folder(tmp_path / "hf", TIED)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    load(Parameters(), folder)  # an equal copy is harmless
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path)
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        load(Parameters(), folder)


def test_a_model_without_its_embedding_is_refused(tmp_path):
    folder = make_tiny_hugging_face_folder(tmp_path / "hf", TIED)
    with pytest.raises(UserError, match=r"embedding\.word_embeddings\.weight differ"):
        load(Parameters(without="embedding.word_embeddings.weight"), folder)
