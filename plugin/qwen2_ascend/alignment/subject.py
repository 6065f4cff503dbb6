"""The run that is judged: this project's model at its layout, on its device, recorded on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor
from torch.nn.functional import cross_entropy

from qwen2_ascend.alignment.capture import WHOLE, Taken, joined, places
from qwen2_ascend.alignment.gather import gather_activations, gather_gradients
from qwen2_ascend.alignment.hooks import copied
from qwen2_ascend.alignment.memory import give_memory_back
from qwen2_ascend.alignment.record import Record
from qwen2_ascend.alignment.settings import AlignSettings
from qwen2_ascend.alignment.sublayers import LOSS
from qwen2_ascend.checkpoint.load import load_checkpoint_weights
from qwen2_ascend.checkpoint.readers.base import Source
from qwen2_ascend.model.build import build_model
from qwen2_ascend.model.sequence_cut import SequenceCut
from qwen2_ascend.runtime import Runtime
from qwen2_ascend.training.setup import build_run

if TYPE_CHECKING:
    from qwen2_ascend.alignment.judge import Curve

Plant = Callable[[list[Any]], None]
"""Changes the loaded chunks; tests plant faults so."""


def run_subject(
    settings: AlignSettings,
    source: Source,
    runtime: Runtime,
    tokens: Tensor,
    plant: Plant | None = None,
) -> tuple[Record | None, Curve | None]:
    """The record (on rank 0) and, where asked for, the losses of training steps.

    Args:
        settings: what `validate` has checked.
        source: the weights.
        runtime: the started one, with the groups of the layout.
        tokens: `[steps, n, b, s + 1]`.
        plant: changes the loaded chunks, as tests do.
    """
    curve = None
    if settings.checks.train_iters:
        curve = train(settings, source, runtime, tokens.flatten(0, 2), plant)
        give_memory_back()  # weights, gradients and optimizer
    return record(settings, source, runtime, tokens[0], plant), curve


def build(
    settings: AlignSettings, source: Source, runtime: Runtime, plant: Plant | None = None
) -> list[Any]:
    """This rank's chunks with their weights, on the device.

    Raises:
        UserError: the weights do not fit the model.
    """
    training, config = settings.training(), source.config
    padded = settings.padded_vocab_size(config)
    layout = training.layout()
    chunks = build_model(
        config,
        layout,
        padded_vocab_size=padded,
        dtype=settings.precision,
        backend=settings.fusion.backend(runtime.name),
        plain=settings.fusion.plain,
        perform_initialization=False,
        sequence_parallel=_is_sequence_parallel(settings),
        deterministic_mode=settings.machine.deterministic,
    )
    load_checkpoint_weights(
        chunks,
        source,
        layout,
        padded_vocab_size=padded,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_stage=parallel_state.get_pipeline_model_parallel_rank(),
    )
    if plant is not None:
        plant(chunks)
    return [chunk.to(runtime.device) for chunk in chunks]


def record(
    settings: AlignSettings,
    source: Source,
    runtime: Runtime,
    tokens: Tensor,
    plant: Plant | None = None,
) -> Record | None:
    """One forward and, unless left out, backward: recorded on rank 0, None elsewhere.

    Args:
        settings: what `settings.validate` has checked.
        source: the weights.
        runtime: the started one, with the groups of the layout.
        tokens: `[n, b, s + 1]`.
        plant: see `Plant`.
    """
    config = source.config
    chunks = build(settings, source, runtime, plant)
    with_gradients = not settings.checks.no_gradients
    # megatron-core adds up in fp32 what has fewer digits
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=settings.precision != "fp64")
    wrapped = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    wrapped[0].config.finalize_model_grads_func = finalize_model_grads if with_gradients else None
    with copied(places(wrapped)) as seen:
        losses = _forward_backward(settings, wrapped, tokens.to(runtime.device), with_gradients)
    taken = joined(seen)
    if losses:
        taken[LOSS] = Taken(torch.cat(losses).unsqueeze(0), WHOLE)
    activations, disagreement = gather_activations(
        taken,
        config,
        runtime,
        sequence_parallel=_is_sequence_parallel(settings),
        sequence_cut=SequenceCut.of_layout(settings.training().layout()),
    )
    gradients = {}
    if with_gradients:
        layout, padded = settings.training().layout(), settings.padded_vocab_size(config)
        gradients = gather_gradients(wrapped, config, layout, padded, runtime)
    if runtime.rank != 0:
        return None
    return Record(
        config=config,
        precision=settings.precision,
        origin=describe(settings, runtime, source),
        tensor_parallel=settings.parallel.tensor_model_parallel_size,
        unfused_attention="attention" in settings.fusion.plain,
        tokens=tokens,
        activations=activations,
        loss=activations[LOSS].double().mean().item(),
        disagreement=disagreement,
        gradients=gradients,
    )


def describe(settings: AlignSettings, runtime: Runtime, source: Source) -> str:
    """One line for logs and records."""
    parallel = settings.parallel
    words = [f"TP{parallel.tensor_model_parallel_size} PP{parallel.pipeline_model_parallel_size}"]
    if (cp := parallel.context_parallel_size) > 1:
        words = [f"{words[0]} CP{cp}", parallel.context_parallel_algo]
    if (per_chunk := parallel.num_layers_per_virtual_pipeline_stage) is not None:
        words.append(f"{per_chunk} layer(s) per virtual stage")
    if _is_sequence_parallel(settings):
        words.append("sequence parallel")
    words.append(settings.fusion.describe(runtime.name))
    return f"{settings.precision}, {', '.join(words)}; {runtime.describe()}; {source.folder}"


def train(
    settings: AlignSettings,
    source: Source,
    runtime: Runtime,
    tokens: Tensor,
    plant: Plant | None = None,
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, the same on every rank: training's own step.

    Args:
        tokens: `[steps * n * b, s + 1]`.
    """
    chunks = build(settings, source, runtime, plant)
    length = settings.tokens.seq_length
    data = [
        {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(length),
            "position_ids": torch.arange(length),
        }
        for text in tokens
    ]
    run = build_run(settings.training(), runtime, chunks, train_data=data)
    batches: Iterator[Any] = run.batches()
    steps = [run.step(batches) for _ in range(settings.checks.train_iters)]
    return [(step.loss, step.grad_norm) for step in steps]


def _forward_backward(
    settings: AlignSettings, chunks: Sequence[Any], tokens: Tensor, with_gradients: bool
) -> list[Tensor]:
    """The last stage's losses `[b, s]` of each micro-batch, by megatron-core's schedule."""
    losses: list[Tensor] = []
    cut = SequenceCut.of_layout(settings.training().layout())

    def step(iterator: Iterator[int], model: Any) -> tuple[Tensor, Callable]:
        index = next(iterator)
        inputs, labels = tokens[index, :, :-1], tokens[index, :, 1:]
        if cut is not None:
            inputs, labels = cut.own(inputs, 1), cut.own(labels, 1)
        if settings.precision == "fp64":  # megatron-core's own loss goes through fp32
            output = model(inputs, None, None)
        else:
            output = model(inputs, None, None, labels=labels)

        def objective(found: Tensor) -> tuple[Tensor, dict]:
            if settings.precision == "fp64":
                found = _token_losses(found, labels)
            losses.append(found.detach().clone())
            # megatron-core takes the mean over the ranks of a cut sequence for granted, and
            # multiplies by their number
            return found.mean() / (cut.size if cut else 1), {}

        return output, objective

    _, b, s = tokens.shape
    with torch.set_grad_enabled(with_gradients):
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(range(len(tokens))) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(tokens),
            seq_length=s - 1,
            micro_batch_size=b,
            forward_only=not with_gradients,
        )
    return losses


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """`[b, s]` of this rank's columns of the logits, in their own dtype."""
    whole = gather_from_tensor_model_parallel_region(logits)
    losses = cross_entropy(whole.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape)


def _is_sequence_parallel(settings: AlignSettings) -> bool:
    parallel = settings.parallel
    return parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1
