"""Merges a LoRA adapter into weights while they are copied: W + scaling * B A, band by band.

The plan stays as it is, since an adapter changes values and not places. Sums are made in fp32 and
rounded once, to the target's dtype; what is held is the adapter and a band.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwen2_ascend.checkpoint.adapter import Adapter
from qwen2_ascend.checkpoint.casting import CastLosses
from qwen2_ascend.checkpoint.copying import Reader, within
from qwen2_ascend.checkpoint.plan import Copy, StoredSlice, overlap, volume
from qwen2_ascend.checkpoint.rules import Box


class _Product(NamedTuple):
    """What is added to a box of one weight: the two factors, in fp32."""

    box: Box
    b: np.ndarray
    """`[rows, r]`"""
    a: np.ndarray
    """`[r, columns]`"""
    scaling: np.float32

    def add_to(self, values: np.ndarray, box: Box) -> None:
        """Adds what of it lies in `box`, of which `values` are the `[blocks, rows, columns]`."""
        common = overlap(self.box, box)
        if not volume(common):
            return
        blocks, (r0, r1), (c0, c1) = common
        per_block = self.box[1][1] - self.box[1][0]
        for block in range(*blocks):
            first = (block - self.box[0][0]) * per_block + r0 - self.box[1][0]
            a = self.a[:, c0 - self.box[2][0] : c1 - self.box[2][0]]
            product = self.b[first : first + r1 - r0] @ a * self.scaling
            row, column = box[1][0], box[2][0]
            values[block - box[0][0], r0 - row : r1 - row, c0 - column : c1 - column] += product


class MergingReader(Reader):
    """Reads weights as if they had been stored merged with an adapter."""

    def __init__(self, adapter: Adapter, losses: CastLosses | None = None) -> None:
        super().__init__(losses)
        self._products: dict[str, list[_Product]] = defaultdict(list)
        matrices: dict[StoredSlice, np.ndarray] = {}
        for held in adapter.held:
            values = self.view(held, held.piece.box).astype(np.float32)
            matrices[held] = values.reshape(held.piece.shape)
        for one in adapter.factors:
            own = adapter.lora.scaling if one.scaling is None else one.scaling
            product = _Product(one.box, matrices[one.b], matrices[one.a], np.float32(own))
            self._products[one.tensor].append(product)

    def fill(self, out: np.ndarray, box: Box, copies: Sequence[Copy]) -> None:
        tensors = {copy.source.piece.tensor for copy in copies}
        products = [product for tensor in tensors for product in self._products.get(tensor, ())]
        if not products:
            return super().fill(out, box, copies)
        values = np.zeros(out.shape, np.float32)
        super().fill(values, box, copies)
        for product in products:
            product.add_to(values, box)
        for copy in copies:
            common = overlap(copy.box, box)
            if volume(common):
                inner = within(common, box)
                self.cast(out[inner], values[inner], copy.source, common)
