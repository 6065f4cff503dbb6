"""PackedBatch: a micro-batch of packed documents, which attention must keep apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class PackedBatch(PackedSeqParams):
    """What the layers need to know of a packed micro-batch; GPTModel's `packed_seq_params`.

    Made once per micro-batch: the ends as host numbers, because a fused kernel wants them so and
    fetching them from the device would stop it in every layer.

    Args:
        ends: where each document ends, counted over the rows of the batch one after the other:
            rising, without the leading 0, the last is b * s. No document spans two rows; padding
            is a document too.
        position_ids: `[b, s]`; of packed documents from 0 in each. Under context parallelism this
            rank's part of them, while `ends` is of the whole rows.
        num_parts: context_parallel_size.
    """

    def __init__(self, ends: Sequence[int], position_ids: Tensor, num_parts: int = 1) -> None:
        longest = max(end - start for start, end in pairwise((0, *ends)))
        super().__init__(qkv_format="thd", max_seqlen_q=longest, max_seqlen_kv=longest)
        assert ends[-1] == num_parts * position_ids.numel(), (ends[-1], position_ids.shape)
        self.ends = tuple(ends)
        self._position_ids = position_ids
        self._cos_sin: Tensor | None = None

    def cos_sin(self, table: Tensor) -> Tensor:
        """Each token's rotation, `[2, s, b, hn]`, from the table of positions `[2, length, hn]`."""
        if self._cos_sin is None:
            self._cos_sin = table[:, self._position_ids.t()]
        return self._cos_sin
