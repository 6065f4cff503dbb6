"""The training loop: forward and backward through megatron-core's schedules, one update, again.

What is trained on is the mean loss per token of the whole global batch: each rank sums the losses
of its tokens, and the gradient is divided by all ranks' number of tokens. So the loss does not
depend on how the batch is cut into micro-batches and ranks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func

from qwen2_ascend.data.sampler import BATCH_KEYS, PretrainingBatchSampler, build_data_iterator
from qwen2_ascend.model.packed import PackedBatch
from qwen2_ascend.model.sequence_cut import SequenceCut
from qwen2_ascend.runtime import Runtime, supported_keywords
from qwen2_ascend.runtime.megatron_compat import finalize_gradients
from qwen2_ascend.training import optimizer as optimizers
from qwen2_ascend.training.length import RunLength
from qwen2_ascend.training.schedule import current_lr
from qwen2_ascend.training.settings import ParallelSettings, TrainingSettings

if TYPE_CHECKING:
    from qwen2_ascend.training.checkpointer import Checkpointer

Batch = dict[str, Any]
"""BATCH_KEYS, each a tensor `[b, s]`, and `ends`, a tuple of ints, when documents are packed."""


class Objective(Protocol):
    """What is minimized."""

    def __call__(
        self, losses: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The micro-batch's loss from the loss of every token.

        Args:
            losses: `[b, s]`.
            batch: what the model was given.

        Returns:
            The sum to be minimized; the number it is divided by; and what is reported, `[n]`: the
            mean, what it lacks of the sum, the number, and sums of `TrainingRun.metric_names`.
            Number and report are added up over the ranks of a context-parallel group, which each
            have a part of every row: what one of them says of a whole row, the others must not.
        """
        ...


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm is infinite or not a number; the weights are as before."""


@dataclass(kw_only=True)
class Progress:
    """How far the run is; a checkpoint holds it."""

    iteration: int = 0
    """Steps made, skipped ones too."""
    consumed_samples: int = 0
    """Sequences read by all ranks together."""
    skipped_iterations: int = 0
    """Steps that did not change the weights."""


class StepResult(NamedTuple):
    """What one step did, the same on every rank."""

    loss: float
    """Mean over the tokens of the global batch."""
    grad_norm: float
    num_tokens: int
    """Tokens that have a loss."""
    lr: float
    updated: bool
    overflow: bool
    """fp16: not updated, because the loss scale was too high; it is lower now."""
    peak_memory_bytes: int
    """The peak of the rank that has most."""
    stop_wanted: bool
    """Some rank was told to stop."""
    metrics: dict[str, float]
    """Means of what the objective reports besides its loss."""


class MicroBatchLoss(NamedTuple):
    """What the last stage knows of one micro-batch."""

    total: float
    num_tokens: int
    metrics: tuple[float, ...]
    """Sums."""


def token_loss(
    losses: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The Objective of language modelling: the mean over the tokens that have a loss.

    An fp32 sum of many losses is coarser than one loss; with the rest it is as fine as they are.

    Args:
        losses: `[b, s]`.
        batch: `loss_mask` `[b, s]` is 1 where the token has a loss.
    """
    losses, mask = losses.float(), batch["loss_mask"].float()
    total, tokens = (losses * mask).sum(), mask.sum()
    # new tensors: the schedule divides the returned loss in place
    mean = total.detach() / tokens.clamp(min=1)
    rest = ((losses.detach() - mean) * mask).sum()
    return total, tokens.to(torch.int), torch.stack((mean, rest, tokens))


@dataclass(kw_only=True)
class TrainingRun:
    """Everything a step needs."""

    settings: TrainingSettings
    runtime: Runtime
    chunks: list[Any]
    """This rank's model chunks, wrapped by `wrap_chunks`."""
    optimizer: Any
    schedule: Any
    train_data: Any
    """Map-style dataset of dicts with `data.sampler.BATCH_KEYS`."""
    valid_data: Any = None
    progress: Progress
    length: RunLength
    objective: Objective = token_loss
    metric_names: tuple[str, ...] = ()
    """What the objective reports besides its loss."""
    rows_per_sample: int = 1
    """Rows of a batch that one sample makes: 2 for a preference pair."""
    before_update: Callable[[], None] = lambda: None
    """Called in every step before weights or optimizer state change."""
    marks: Mapping[str, Any] = field(default_factory=dict)
    """What every checkpoint says of the run besides its progress."""
    beside: Mapping[str, bytes] = field(default_factory=dict)
    """Files, on rank 0, that lie beside the checkpoints from the moment the folder is this run's;
    not before, when another run may be saving into it."""

    @property
    def global_batch_size(self) -> int:
        return self.length.global_batch_size

    @property
    def train_iters(self) -> int:
        return self.length.train_iters

    @property
    def num_microbatches(self) -> int:
        per_step = self.settings.batch.micro_batch_size * data_parallel_place()[1]
        return self.global_batch_size // per_step

    @property
    def sequence_cut(self) -> SequenceCut | None:
        """Which part of every sequence this rank computes; None is all of it."""
        return SequenceCut.of_layout(self.settings.layout())

    def batches(self) -> Iterator[Batch | None]:
        """This rank's micro-batches of the training data, from `progress` on."""
        return self.batches_of(self.train_data, self.progress.consumed_samples)

    def batches_of(self, dataset: Any, consumed_samples: int = 0) -> Iterator[Batch | None]:
        """This rank's micro-batches of a dataset; None for stages that read no data."""
        at_an_end = self.chunks[0].module.pre_process or self.chunks[-1].module.post_process
        # every stage's attention has to know where packed documents end
        if not at_an_end and not getattr(dataset, "is_packed", False):
            while True:
                yield None
        yield from read_batches(self, dataset, consumed_samples)

    def step(self, batches: Iterator[Batch | None], *, stop_wanted: bool = False) -> StepResult:
        """One global batch: forward, backward, and the update if all numbers are finite.

        Raises:
            NonFiniteError: they are not, and `on_nonfinite` is "stop".
        """
        optimizer, settings = self.optimizer, self.settings
        lr = current_lr(self.schedule)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses = _forward_backward(self, take(self, batches))
        totals = all_gather_losses(self, losses, stop_wanted)
        may_overflow = optimizers.can_lower_loss_scale(optimizer)
        overflow = optimizer.prepare_grads()
        grad_norm = float("nan") if overflow else float(optimizer.get_grad_norm())
        overflow = overflow and may_overflow and optimizers.is_finite(totals.loss)
        updated = optimizers.is_finite(totals.loss, grad_norm)
        if not updated and not overflow and settings.precision.on_nonfinite == "stop":
            raise NonFiniteError(describe_nonfinite(self, losses, totals.loss, grad_norm))
        self.before_update()
        if updated:
            updated = optimizers.clip_and_step(optimizer, grad_norm)
            self.schedule.step(increment=self.global_batch_size)
        return self.finish_step(
            totals, grad_norm=grad_norm, lr=lr, updated=updated, overflow=overflow
        )

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss per token of the first `eval_iters` global batches of the validation data.

        The same samples each time, so the numbers can be compared.
        """
        for chunk in self.chunks:
            chunk.eval()
        batches = self.batches_of(self.valid_data)
        total, num_tokens = 0.0, 0
        for _ in range(self.settings.data.eval_iters or 0):
            totals = all_gather_losses(self, self.losses(take(self, batches)), False)
            total += totals.loss * totals.num_tokens
            num_tokens += totals.num_tokens
        for chunk in self.chunks:
            chunk.train()
        return total / max(num_tokens, 1)

    def losses(self, batches: list[Batch | None]) -> list[MicroBatchLoss]:
        """What the objective reports of micro-batches, without backward; on the last stage."""
        return _forward_backward(self, batches, forward_only=True)

    def finish_step(
        self, totals: StepTotals, *, grad_norm: float, lr: float, updated: bool, overflow: bool
    ) -> StepResult:
        """Counts a step that has been made, or left out; what it did."""
        self.progress.iteration += 1
        self.runtime.reached(self.progress.iteration)
        self.progress.consumed_samples += self.global_batch_size
        self.progress.skipped_iterations += not updated
        return StepResult(
            loss=totals.loss,
            grad_norm=grad_norm,
            num_tokens=totals.num_tokens,
            lr=lr,
            updated=updated,
            overflow=overflow,
            peak_memory_bytes=totals.peak_memory_bytes,
            stop_wanted=totals.stop_wanted,
            metrics=dict(zip(self.metric_names, totals.metrics, strict=True)),
        )

    def loss_scale(self) -> float:
        """What the loss is multiplied by before backward."""
        return optimizers.loss_scale(self.optimizer)


def wrap_chunks(
    chunks: Sequence[torch.nn.Module],
    settings: ParallelSettings,
    *,
    grad_reduce_in_fp32: bool = True,
) -> list[DistributedDataParallel]:
    """Puts model chunks into megatron-core's DistributedDataParallel and connects the schedules.

    Weights must be loaded before: wrapping moves them into contiguous buffers.

    Args:
        settings: how gradients and weights are exchanged.
        grad_reduce_in_fp32: False adds gradients up and reduces them in the weights' dtype.
    """
    config: Any = chunks[0].config
    # before wrapping, which chooses by it whether gradients are averaged or summed
    config.calculate_per_token_loss = True
    keywords = dict(
        grad_reduce_in_fp32=grad_reduce_in_fp32,
        overlap_grad_reduce=settings.overlap_grad_reduce,
        overlap_param_gather=settings.overlap_param_gather,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        check_for_nan_in_grad=False,
    )
    ddp_config = DistributedDataParallelConfig(
        **supported_keywords(DistributedDataParallelConfig, **keywords)
    )
    # buckets are for overlap, and later chunks' communication is hidden behind earlier ones
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if settings.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    config.finalize_model_grads_func = finalize_gradients
    return wrapped


@contextlib.contextmanager
def gathered_parameters(chunks: Sequence[Any]) -> Iterator[None]:
    """The door through which weights are read outside of forward.

    With --overlap-param-gather the last update's weights are gathered by hooks of the next forward;
    this waits for them. It may be entered within itself, and with chunks that are not wrapped.
    """
    hooked = [chunk for chunk in chunks if getattr(chunk, "remove_forward_pre_hook_handles", None)]
    for chunk in hooked:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in hooked:
            chunk.enable_forward_pre_hook()


def train(
    run: TrainingRun,
    *,
    on_step: Callable[[StepResult, float], None],
    on_validation: Callable[[float], None],
    checkpointer: Checkpointer | None = None,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> str | None:
    """Trains to the end of the run, or until told to stop.

    Args:
        run: begins at `run.progress`, which is kept up to date.
        on_step: called after every step with its result and its duration in seconds.
        on_validation: called with the validation loss.
        checkpointer: asked for a checkpoint at the interval and at the end.
        stop_wanted: asked once per step; true on any rank ends the run on all.

    Returns:
        Why the run ended early, or None when it is complete.

    Raises:
        NonFiniteError: the loss or the gradient norm is not finite, and `on_nonfinite` is "stop".
    """
    settings, progress = run.settings, run.progress
    optimizers.settle(run.optimizer)
    if checkpointer is not None:
        run.before_update = checkpointer.wait_until_copied
    batches = run.batches() if progress.iteration < run.train_iters else iter(())
    saved_at, reason, validates = progress.iteration, None, False
    while progress.iteration < run.train_iters and reason is None:
        begun = time.perf_counter()
        result = run.step(batches, stop_wanted=stop_wanted())
        on_step(result, time.perf_counter() - begun)
        validates = validates_after(run, result)
        is_end = progress.iteration >= run.train_iters
        if validates and not is_end:
            on_validation(run.evaluate())
        if result.stop_wanted:
            reason = "was told to stop (SIGTERM)"
        elif is_due(progress.iteration, settings.batch.exit_interval):
            reason = f"--exit-interval {settings.batch.exit_interval}"
        if checkpointer is None:
            continue
        checkpointer.poll()
        is_last = reason is not None or is_end
        if not is_last and is_due(progress.iteration, settings.checkpoint.save_interval):
            checkpointer.save()
            saved_at = progress.iteration
    if checkpointer is not None:
        if saved_at != progress.iteration:
            checkpointer.save(is_last=True)
        checkpointer.finish()
    if validates and progress.iteration >= run.train_iters:
        on_validation(run.evaluate())  # now that the last checkpoint is on the disk
    with gathered_parameters(run.chunks):
        pass  # whoever reads the weights from here on finds them whole
    return reason if progress.iteration < run.train_iters else None


@torch.no_grad()
def forward_only(run: TrainingRun, dataset: Any) -> Iterator[MicroBatchLoss]:
    """What `run.objective` reports of each micro-batch of `dataset`, in eval mode.

    Every rank must exhaust it; only those of the last stage get anything.

    Args:
        run: its model, layout and objective.
        dataset: as long as a number of global batches.
    """
    for chunk in run.chunks:
        chunk.eval()
    batches = run.batches_of(dataset)
    for _ in range(len(dataset) // run.global_batch_size):
        yield from run.losses(take(run, batches))
    for chunk in run.chunks:
        chunk.train()


def take(run: TrainingRun, batches: Iterator[Batch | None]) -> list[Batch | None]:
    """The micro-batches of a step; a dataset is as long as its run, so they are there."""
    taken = list(islice(batches, run.num_microbatches))
    assert len(taken) == run.num_microbatches, f"the data ended at {run.progress}"
    return taken


def is_due(iteration: int, interval: int | None) -> bool:
    """Whether something that happens every `interval` steps happens after this one."""
    return interval is not None and iteration % interval == 0


def validates_after(run: TrainingRun, result: StepResult) -> bool:
    """Whether the validation loss is measured after the step that has been made.

    It is at the interval, and after the run's last step unless the run was told to stop there.
    """
    if run.valid_data is None:
        return False
    iteration = run.progress.iteration
    is_end = iteration >= run.train_iters and not result.stop_wanted
    return is_end or is_due(iteration, run.settings.data.eval_interval)


def data_parallel_place() -> tuple[int, int]:
    """(rank, size) in the data-parallel group."""
    return (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )


def read_batches(run: TrainingRun, dataset: Any, consumed_samples: int) -> Iterator[Batch]:
    """This rank's micro-batches of `dataset`, from `consumed_samples` on."""
    num_workers = run.settings.data.num_workers
    if num_workers is None:
        num_workers = 0 if run.runtime.name == "cpu" else 2
    micro_batch_size = run.settings.batch.micro_batch_size
    return build_data_iterator(
        dataset, consumed_samples, micro_batch_size, *data_parallel_place(), num_workers
    )


def _forward_backward(
    run: TrainingRun, batches: list[Batch | None], *, forward_only: bool = False
) -> list[MicroBatchLoss]:
    """Sum of losses and number of tokens of each micro-batch; empty but on the last stage."""
    outputs = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, run),
        # every chunk sees all micro-batches; an iterator each
        data_iterator=[iter(batches) for _ in run.chunks],
        model=run.chunks,
        num_microbatches=run.num_microbatches,
        seq_length=run.settings.batch.seq_length,
        micro_batch_size=run.settings.batch.micro_batch_size * run.rows_per_sample,
        forward_only=forward_only,
    )
    return on_host(outputs)


def on_host(reports: Sequence[torch.Tensor]) -> list[MicroBatchLoss]:
    """What the objective reported of each micro-batch, by one transfer for all."""
    if not reports:
        return []
    return [
        MicroBatchLoss(mean * tokens + rest, round(tokens), tuple(metrics))
        for mean, rest, tokens, *metrics in torch.stack(list(reports)).tolist()
    ]


def _forward_step(
    run: TrainingRun, batches: Iterator[Batch | None], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable]:
    read = next(batches)
    if read is None:
        return model(None, None, None), run.objective
    batch = on_device(own_part(read, run.sequence_cut), run.runtime)
    packed: dict[str, Any] = {}
    if "ends" in batch:
        parts = run.settings.parallel.context_parallel_size
        packed["packed_seq_params"] = PackedBatch(batch["ends"], batch["position_ids"], parts)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **packed)
    return output, partial(run.objective, batch=batch)


def own_part(batch: Batch, cut: SequenceCut | None) -> Batch:
    """What of a micro-batch this rank of a context-parallel group computes; all read the same.

    Where documents end stays what it is of whole rows: attention sees those.
    """
    if cut is None:
        return batch
    return {**batch, **{key: cut.own(batch[key], dim=1) for key in BATCH_KEYS}}


def on_device(batch: Batch, runtime: Runtime) -> Batch:
    """The same with its tensors on the device."""
    return {
        name: value.to(runtime.device, non_blocking=True) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }


class StepTotals(NamedTuple):
    """What all ranks together have computed in a step; the same on each of them."""

    loss: float
    num_tokens: int
    peak_memory_bytes: int
    stop_wanted: bool
    metrics: list[float]


def all_gather_losses(
    run: TrainingRun, losses: list[MicroBatchLoss], stop_wanted: bool
) -> StepTotals:
    """Gathers the losses of all ranks, their memory and whether to stop, in one small collective.

    Gathered and added on the host in double precision: HCCL does not reduce fp64.
    """
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        losses = []  # tensor-parallel ranks all have the same
    total, num_tokens = sum(x.total for x in losses), sum(x.num_tokens for x in losses)
    metrics = [sum(x.metrics[i] for x in losses) for i in range(len(run.metric_names))]
    mean = torch.tensor(total / max(num_tokens, 1)).item()
    memory = run.runtime.peak_memory_bytes() / 2**20
    own = torch.tensor(
        [mean, total - mean * num_tokens, num_tokens, memory, stop_wanted, *metrics],
        dtype=torch.float32,
        device=run.runtime.device,
    )
    rows = [torch.empty_like(own) for _ in range(run.runtime.world_size)]
    torch.distributed.all_gather(rows, own)
    columns = zip(*torch.stack(rows).tolist(), strict=True)
    means, rests, tokens, memories, stops, *sums = columns
    total = sum(m * n + rest for m, rest, n in zip(means, rests, tokens, strict=True))
    return StepTotals(
        loss=total / max(sum(tokens), 1.0),
        num_tokens=round(sum(tokens)),
        peak_memory_bytes=int(max(memories) * 2**20),
        stop_wanted=any(stops),
        metrics=[sum(of_ranks) / max(sum(tokens), 1.0) for of_ranks in sums],
    )


def describe_nonfinite(
    run: TrainingRun, losses: list[MicroBatchLoss], loss: float, grad_norm: float
) -> str:
    """The step and the samples to look at; every rank calls it, as it asks them all."""
    dp_rank, dp_size = data_parallel_place()
    first = run.progress.consumed_samples
    micro_batches = PretrainingBatchSampler(
        num_samples=first + run.global_batch_size,
        consumed_samples=first,
        micro_batch_size=run.settings.batch.micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    own = [
        sample
        for of_batch, samples in zip(losses, micro_batches, strict=False)
        if not optimizers.is_finite(of_batch.total)
        for sample in samples
    ]
    everyones: list[Any] = [None] * run.runtime.world_size
    torch.distributed.all_gather_object(everyones, own)
    found = sorted({sample for samples in everyones for sample in samples})
    if found:
        where = f"in the micro-batches of samples {_ranges(found)}"
    else:
        where = f"with every micro-batch's loss finite (samples {first} to "
        where += f"{first + run.global_batch_size - 1})"
    return (
        f"iteration {run.progress.iteration + 1}: loss {loss}, gradient norm {grad_norm} {where} "
        "of the training data; the weights have not been changed. "
        "--on-nonfinite skip leaves such steps out."
    )


def _ranges(numbers: Sequence[int]) -> str:
    """ "3-5, 9" for 3, 4, 5, 9."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in ranges)
