"""What workers that train share: a model, process groups as a launcher makes them, a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from distributed.harness import Run
from helpers import make_tiny_hugging_face_folder, tiny_config

TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
VPP2 = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"
ZERO1 = "--use-distributed-optimizer"
OVERLAP = f"{ZERO1} --overlap-grad-reduce --overlap-param-gather"
WEIGHT_DECAY = 0.1
"""Every job that `reference` is compared with decays its matrices by it."""
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def tiny_folder(run: Run, name: str, **changes: Any) -> Path:
    """Weights of the tiny model with random biases and norms; the first rank that asks writes."""
    folder = run.folder / name
    if run.runtime.rank == 0 and not folder.exists():
        make_tiny_hugging_face_folder(folder, tiny_config(**changes))
    run.runtime.barrier()
    return folder


def join(run: Run, plan: Any, validate: Callable[..., None]) -> None:
    """Checks a plan, makes its process groups and seeds the ranks, as a launcher does."""
    from qwen2_ascend import runtime

    validate(plan.settings, plan.config, run.runtime.world_size)
    runtime.destroy_model_parallel()
    runtime.initialize_model_parallel(plan.layout, plan.config.num_layers)
    run.runtime.seed_all(plan.settings.runtime.seed)


def settle(training: Any) -> None:
    """Waits for weights that are gathered only when the next forward needs them."""
    from qwen2_ascend.training.loop import gathered_parameters

    with gathered_parameters(training.chunks):
        pass


def save_once(training: Any, make: Callable[[Callable[[str], None]], Any]) -> Path:
    """Writes the state of `training` with the checkpointer that `make` makes.

    Returns:
        The folder of the iteration.
    """
    folder = training.settings.checkpoint.save
    with closing(make(lambda line: None)) as checkpointer:
        checkpointer.claim()
        checkpointer.save()
        checkpointer.finish()
    training.runtime.barrier()
    return folder / f"iter_{training.progress.iteration:07d}"


def gather_state(optimizer: Any, chunks: Sequence[Any]) -> Iterator[tuple[int, str, dict]]:
    """Yields (chunk, parameter name, tensors by kind, fp32 and of the parameter's shape).

    They are put together from all ranks' slices.

    All ranks of a data-parallel group must exhaust it together; each gets the same.
    """
    import torch
    from megatron.core import parallel_state

    from qwen2_ascend.training.optimizer import is_distributed, kinds_of, state_slices

    states = state_slices(optimizer)
    for index, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                continue
            own, whole = states.get(parameter), {}
            for kind in kinds_of(parameter):
                whole[kind] = torch.zeros(parameter.numel(), device=parameter.device)
                if own is not None:
                    whole[kind][own.start : own.stop] = own.tensors[kind].reshape(-1)
                if is_distributed(optimizer):
                    group = parallel_state.get_data_parallel_group()
                    torch.distributed.all_reduce(whole[kind], group=group)
                whole[kind] = whole[kind].reshape(parameter.shape).cpu()
            yield index, name, whole


def apart(own: Sequence[float], expected: Sequence[float]) -> float:
    """The largest difference of two numbers in the same place."""
    return max(abs(a - b) for a, b in zip(own, expected, strict=True))


# --- transformers and torch alone ----------------------------------------------------------------


def mock_batches(steps: int, size: int, length: int, vocab_size: int) -> list[list[Any]]:
    """The samples of each step with --mock-data."""
    from qwen2_ascend.training.mock_data import MockDataset

    data = MockDataset(steps * size, length, vocab_size, seed=1234)
    return [[data[step * size + place] for place in range(size)] for step in range(steps)]


def stacked(batch: Sequence[Any]) -> list[Any]:
    """The tokens and the labels of samples, `[b, s]` each."""
    import torch

    return [torch.stack([sample[key] for sample in batch]) for key in ("tokens", "labels")]


def mean_loss(model: Any, batch: Sequence[Any]) -> Any:
    """The mean over all tokens, added up in fp64."""
    import torch

    tokens, labels = stacked(batch)
    logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")
    return losses.double().mean()


def reference(
    folder: Path,
    batches: Sequence[Any],
    loss_of: Callable[[Any, Any], Any],
    *,
    lr: Callable[[int], float],
    clip: float,
    change: Callable[[Any], Any] | None = None,
) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of transformers and torch.optim.AdamW alone.

    Args:
        folder: of the model.
        batches: of each step.
        loss_of: the loss of a model and a batch.
        lr: the learning rate of each step.
        clip: the largest norm of the gradient.
        change: is done to the model before anything else.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).float().train()
    if change is not None:
        change(model)
    tuned = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in tuned if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in tuned if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    losses, norms = [], []
    for step, batch in enumerate(batches):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(tuned, clip).item())
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        optimizer.step()
    return losses, norms
