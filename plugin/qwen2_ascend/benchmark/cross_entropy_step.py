"""Forward and backward of the output layer and its loss, once, in a process that is measured."""

from __future__ import annotations

import os
import time

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from qwen2_ascend import runtime
from qwen2_ascend.benchmark.measure import PeakMemory
from qwen2_ascend.dtypes import TORCH_DTYPES
from qwen2_ascend.model.cross_entropy import chunked_cross_entropy
from qwen2_ascend.parallel import ParallelLayout


def step(
    *, vocab_size: int, hidden_size: int, seq_length: int, dtype: str, chunk_size: int
) -> tuple[float, int]:
    """Seconds, and the bytes that were held before; a chunk_size of 0 is the plain way."""
    runtime.initialize_model_parallel(ParallelLayout(), 1)
    torch_dtype = TORCH_DTYPES[dtype]
    hidden = torch.randn(seq_length, 1, hidden_size).to(torch_dtype)
    weight = torch.randn(vocab_size, hidden_size, dtype=torch_dtype).mul_(0.02)
    labels = torch.randint(vocab_size, (1, seq_length))
    floor = PeakMemory(os.getpid()).sample() + weight.nbytes
    hidden.requires_grad_()
    weight.requires_grad_()
    started = time.perf_counter()
    _losses(hidden, weight, labels, chunk_size).sum().backward()
    return time.perf_counter() - started, floor


def _losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    if chunk_size:
        return chunked_cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
    return vocab_parallel_cross_entropy(hidden @ weight.t(), labels.t().contiguous())
