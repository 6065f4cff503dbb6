"""What the sides of the training and checkpoint benchmarks are given, and what they become.

All begin at the same weights and read the same batches, so their losses have to be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import default_collate

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.runtime import Runtime
from qwen2_ascend.training.mock_data import MockDataset

SEED = 1234


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a side does; everything that the command line of its process says."""

    side: str
    """One of `train.SIDES`."""
    folder: str
    """Hugging Face folder with the weights."""
    device: str
    dtype: str
    """fp32 or bf16."""
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    """Sequences of a step on the one device."""
    max_steps: int
    """More are never asked for."""
    lr: float = 1e-4
    clip_grad: float = 1.0
    weight_decay: float = 0.01
    use_distributed_optimizer: bool = False
    """Whether all ranks, which are data-parallel, share the optimizer's state."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What a side of the training benchmark is reduced to."""

    step: Callable[[], float]
    """One optimizer step; its loss."""
    runtime: Runtime
    model: Any
    optimizer: Any


@dataclass(frozen=True, kw_only=True)
class State:
    """What a side of the checkpoint benchmark is reduced to."""

    save: Callable[[Path], float | None]
    """Saves into a new folder; returns the seconds that count, or None for all until what was
    written is on the disk."""
    load: Callable[[Path], None]
    tensors: Callable[[], list[Any]]
    """All that has to come back: weights and moments."""


def batches(work: Work, runtime: Runtime) -> Iterator[dict[str, Any]]:
    """The micro-batches that this project's run reads, in its order."""
    vocab_size = Qwen2Config.from_pretrained(work.folder).vocab_size
    num_samples = work.max_steps * work.global_batch_size
    data = MockDataset(num_samples, work.seq_length, vocab_size, seed=SEED)
    for start in range(0, num_samples, work.micro_batch_size):
        batch = default_collate([data[start + i] for i in range(work.micro_batch_size)])
        yield {name: value.to(runtime.device) for name, value in batch.items()}


def optimized(optimizer: Any, model: Any) -> list[Any]:
    """A model's weights and the moments of megatron-core's optimizer."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [*weights(model), *(x for part in parts for x in moments(part.optimizer))]


def weights(model: Any) -> list[Any]:
    """The weights, without their graph."""
    return [parameter.data for parameter in model.parameters()]


def moments(optimizer: Any) -> list[Any]:
    """The moments of torch's AdamW, in the order of its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]
