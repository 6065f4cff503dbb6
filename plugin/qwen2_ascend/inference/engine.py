"""Engine: one rank's part of the model with a KV cache; tokens in, the next tokens out.

megatron-core's own inference contexts differ from release to release and bring a scheduler of
their own, so the layers are called one by one here. Shapes in Megatron's letters: `s` sequence, `b`
batch, `h` hidden, `v` this rank's rows of the vocabulary; `n` sequences of one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from qwen2_ascend.checkpoint.adapter import Adapter
from qwen2_ascend.checkpoint.load import load_checkpoint_weights
from qwen2_ascend.checkpoint.readers.base import Source
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.dtypes import DTYPE_NAMES
from qwen2_ascend.errors import UserError
from qwen2_ascend.inference import communication
from qwen2_ascend.model.build import build_model
from qwen2_ascend.model.kv_cache import KVCache, NewTokens
from qwen2_ascend.model.modules import column_linear
from qwen2_ascend.parallel import ParallelLayout, padded_vocab_size
from qwen2_ascend.runtime import current
from qwen2_ascend.vocabulary import check_tokens

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

ROUND_UP = 256
"""Tokens by which the cache grows."""

NOT_FINITE = -1
"""Stands for the token of a sequence whose logits are infinite or no numbers."""

Choose = Callable[[Tensor], list[int]]
"""Chooses n tokens from logits `[n, vocabulary]` in fp32."""


def not_finite(dtype: torch.dtype) -> str:
    """What to say where logits are infinite or no numbers."""
    name = DTYPE_NAMES[dtype]
    way_out = "compute in --bf16 or --fp32" if name == "fp16" else "look for a step that diverged"
    return (
        f"the model's logits are not finite in {name}: its weights hold infinities or NaNs, or "
        f"what is computed from them overflows; {way_out}."
    )


def load_engine(
    source: Source | str | Path,
    layout: ParallelLayout,
    *,
    dtype: str,
    backend: str = "torch",
    num_rows: int = 1,
    config: Qwen2Config | None = None,
    adapter: Adapter | None = None,
) -> Engine:
    """The engine of this rank, with its weights read from a checkpoint of any kind.

    `runtime.initialize_model_parallel` has built the process groups of `layout`.

    Args:
        source: an opened checkpoint, or its folder.
        layout: the cut, without an interleaved pipeline.
        dtype: fp32, bf16 or fp16, of weights and activations.
        backend: whose operators the layers call, "torch" or "npu".
        num_rows: sequences at once.
        config: the model's shape; needed with a folder only.
        adapter: to merge into the weights.

    Raises:
        UserError: the checkpoint does not fit, the model or `dtype`.
    """
    config = source.config if isinstance(source, Source) else config
    assert config is not None, "with a folder give its config"
    # Nothing is saved, so whatever the ranks can share out evenly will do.
    padded = padded_vocab_size(config, layout.tp, divisible_by=1)
    chunks = build_model(
        config,
        layout,
        padded_vocab_size=padded,
        dtype=dtype,
        backend=backend,
        perform_initialization=False,
    )
    load_checkpoint_weights(
        chunks,
        source,
        layout,
        padded_vocab_size=padded,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_stage=parallel_state.get_pipeline_model_parallel_rank(),
        adapter=adapter,
    )
    return Engine(chunks[0].to(current().device), config, num_rows=num_rows)


class Engine:
    """One rank's stage of the model; every rank calls the same methods in the same order.

    Args:
        model: this rank's one chunk, with its weights.
        config: the model's shape.
        num_rows: sequences at once.
    """

    def __init__(self, model: GPTModel, config: Qwen2Config, *, num_rows: int = 1) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.config = config
        self.is_first: bool = model.pre_process
        self.is_last: bool = model.post_process
        self.dtype = next(model.parameters()).dtype
        self.device = next(model.parameters()).device
        tp = parallel_state.get_tensor_model_parallel_world_size()
        self.cache = KVCache(
            num_layers=len(self.model.decoder.layers),
            num_rows=num_rows,
            num_groups=max(config.num_query_groups // tp, 1),
            width=config.kv_channels,
            dtype=self.dtype,
            device=self.device,
        )

    def with_rows(self, num_rows: int) -> Engine:
        """Another engine of the same model."""
        return Engine(self.model, self.config, num_rows=num_rows)

    def reserve(self, num_tokens: int) -> None:
        """Makes room for sequences of up to `num_tokens` tokens."""
        wanted = -(-num_tokens // ROUND_UP) * ROUND_UP
        self.cache.reserve(min(wanted, self.config.max_position_embeddings))

    @torch.inference_mode()
    def next_tokens(
        self, tokens: Sequence[int], new: NewTokens, choose: Choose | None = None
    ) -> list[int]:
        """Runs the newest tokens through the model; each sequence's next one, on every rank.

        Args:
            tokens: the newest tokens, one sequence's after the other's.
            new: where they go in the cache.
            choose: picks from the logits; the largest without it. It is called on one rank only.

        Raises:
            UserError: logits are not finite, so there is nothing to choose from.
        """
        logits = self._last_logits(tokens, new)
        found = None
        if logits is not None:
            found = self._largest(logits) if choose is None else self._chosen(logits, choose)
        chosen = communication.from_last_stage(found, len(new.rows), self.device)
        if NOT_FINITE in chosen:
            raise UserError(not_finite(self.dtype))
        return chosen

    @torch.inference_mode()
    def last_logits(self, tokens: Sequence[int], new: NewTokens) -> Tensor | None:
        """Each sequence's logits after its newest token, `[n, vocabulary]` in fp32.

        On the ranks of the last stage; None elsewhere.
        """
        logits = self._last_logits(tokens, new)
        return None if logits is None else self._whole(logits)

    @torch.inference_mode()
    def hidden_states(self, tokens: Sequence[int], new: NewTokens) -> Tensor | None:
        """The normed output of the last layer, `[s, b, h]`; None before the last stage."""
        hidden = self._layers(tokens, new)
        return self.model.decoder.final_layernorm(hidden) if self.is_last else None

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's columns of the logits, `[s, b, v]` in fp32, without those of padding."""
        weight = self.model.output_layer.weight
        if self.model.share_embeddings_and_output_weights:
            weight = self.model.shared_embedding_or_output_weight()
        num_columns = max(0, self.config.vocab_size - self.first_column)
        return column_linear(hidden, weight)[..., :num_columns].float()

    def _last_logits(self, tokens: Sequence[int], new: NewTokens) -> Tensor | None:
        """This rank's columns `[n, v]` after each sequence's newest token; None before the end."""
        hidden = self._layers(tokens, new)
        if not self.is_last:
            return None
        if (positions := new.last_positions(self.device)) is not None:
            hidden = hidden[positions]
        normed = self.model.decoder.final_layernorm(hidden)
        return self.logits(normed).view(len(new.rows), -1)

    def _layers(self, tokens: Sequence[int], new: NewTokens) -> Tensor:
        """`[s, b, h]` out of this stage's layers, which the next stage has been sent."""
        s, b = new.shape
        check_tokens(tokens, self.config.vocab_size)
        if self.is_first:
            ids = torch.tensor(tokens, device=self.device).view(s, b)
            hidden = self.model.embedding.word_embeddings(ids)
        else:
            shape = (s, b, self.config.hidden_size)
            hidden = communication.from_previous_stage(shape, self.dtype, self.device)
        cos_sin = new.cos_sin(self.model.rotary_pos_emb(self.cache.capacity))
        layers = self.model.decoder.layers
        for layer, cache in zip(layers, self.cache.layers(new), strict=True):
            attend = layer.self_attention.cached
            hidden = hidden + attend(layer.input_layernorm(hidden), cos_sin, cache)
            hidden = hidden + layer.mlp.inferred(layer.pre_mlp_layernorm(hidden))
        if not self.is_last:
            communication.to_next_stage(hidden)
        return hidden

    def _largest(self, logits: Tensor) -> list[int]:
        """argmax over the whole vocabulary of which each rank has its columns."""
        values, indices = logits.max(dim=-1)
        is_finite = logits.isfinite().all(dim=-1)
        # such a row wins over all ranks
        values = values.where(is_finite, torch.inf)
        indices = indices.where(is_finite, NOT_FINITE - self.first_column)
        return communication.best_over_ranks(values, indices, self.first_column).tolist()

    def _chosen(self, logits: Tensor, choose: Choose) -> list[int] | None:
        """What `choose` picks on the first tensor parallel rank; None on the others."""
        whole = self._whole(logits)
        if parallel_state.get_tensor_model_parallel_rank() > 0:
            return None
        return choose(whole) if whole.isfinite().all() else [NOT_FINITE] * len(whole)

    def _whole(self, logits: Tensor) -> Tensor:
        """`[n, vocabulary]` from each rank's columns."""
        return communication.joined_columns(logits, self.config.vocab_size)

    @property
    def first_column(self) -> int:
        """Where this rank's logits begin in the whole vocabulary."""
        tp = parallel_state.get_tensor_model_parallel_world_size()
        padded = -(-self.config.vocab_size // tp)
        return padded * parallel_state.get_tensor_model_parallel_rank()
