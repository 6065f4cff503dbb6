"""Every valid way to cut a job over a number of devices, ranked; and how many devices it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.parallel import sequence_faults, tensor_parallel_sizes
from qwen2_ascend.planning.devices import Device, Rates
from qwen2_ascend.planning.job import ALL_LAYERS, Job, Recompute, RunLayout, Zero
from qwen2_ascend.planning.memory import Memory, fullest_stage
from qwen2_ascend.planning.roofline import StepTime, step_time
from qwen2_ascend.planning.zero import fullest_rank

MICRO_BATCH_SIZES = (1, 2, 4, 8)
LEAST_TOKENS = 4096
"""The fewest tokens of a sequence that the search leaves a context-parallel rank."""
MOST_CONTEXT_PARALLEL = 16
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the job is to run."""

    device: Device
    num_devices: int
    devices_per_node: int
    memory_fraction: float = 0.9
    """Share of a device's memory that tensors may take; the rest is for its driver and for what
    the allocator cannot use."""
    rates: Rates | None = None
    """What training reaches of the device's peaks; None is what is known of its kind."""

    headroom: float = 0.05
    """Share of a device's memory that a layout should leave of that, for the workspaces of kernels
    and for fragmentation, which are not counted."""

    @property
    def usable_memory(self) -> int:
        """Bytes."""
        return int(self.device.memory * self.memory_fraction)

    @property
    def comfortable_memory(self) -> int:
        """Bytes that leave the headroom."""
        return int(self.device.memory * (self.memory_fraction - self.headroom))


class Plan(NamedTuple):
    """One cut, with what is predicted of it."""

    cut: RunLayout
    stage: int
    """The fullest one."""
    memory: Memory
    """The memory of a rank of that stage."""
    time: StepTime
    fits: bool
    has_headroom: bool

    @property
    def rank_key(self) -> tuple:
        """What fits with headroom comes first, then what fits; of those the faster, the smaller."""
        seconds = self.time.total if self.fits else 0.0
        return (not self.fits, not self.has_headroom, seconds, self.memory.total)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is asked of a layout, by the launchers' flags; None leaves it to the search."""

    tensor_model_parallel_size: int | None = None
    pipeline_model_parallel_size: int | None = None
    num_layers_per_virtual_pipeline_stage: int | None = None
    num_layer_list: tuple[int, ...] | None = None
    """Layers of each stage; only stages of equal numbers are tried by themselves."""
    context_parallel_size: int | None = None
    """The search tries 1, and powers of two that leave a rank LEAST_TOKENS of a sequence."""
    context_parallel_algo: str = "megatron_cp_algo"
    sequence_parallel: bool | None = None
    use_distributed_optimizer: bool | None = None
    micro_batch_sizes: tuple[int, ...] = MICRO_BATCH_SIZES
    recompute: tuple[Recompute, ...] = RECOMPUTE
    recomputed_layers: int | None = None
    """The layers of each chunk that full `recompute` computes again; None is all, and where all are
    more than it takes, also the fewest that leave headroom."""
    recompute_activation_function: int | None = None
    recompute_norm: int | None = None
    """The search tries both in all layers where a layout does not fit without."""
    reuse_fp32_param: bool | None = None
    """The search tries it where no layout fits without."""
    swap_attention: bool = False
    o2_gradient: bool = False
    o2_optimizer: bool = False
    mc2: bool = False
    is_fused: bool = False
    """Whether `mc2` is --use-ascend-mc2, which needs sequence parallelism."""
    coc_parallel_num: int = 1
    optimizer_offload_fraction: float = 0.0
    """Needs the distributed optimizer and 16-bit weights; other layouts are not tried then."""
    overlap_grad_reduce: bool = False
    zero: Zero | None = None
    """DeepSpeed trains, with data-parallel ranks alone."""


def find_plans(job: Job, machine: Machine, choices: Choices | None = None) -> list[Plan]:
    """All valid cuts of the kind that is asked for, the best first.

    Raises:
        UserError: there is none, whatever the memory.
    """
    check_job(job)
    choices = choices or Choices()
    plans = _all_plans(job, machine, choices)
    can_reuse = job.dtype == "bf16" and job.lora_rank is None and choices.zero is None
    can_reuse = can_reuse and not choices.optimizer_offload_fraction
    if choices.reuse_fp32_param is None and can_reuse and not any(plan.fits for plan in plans):
        plans += _all_plans(job, machine, replace(choices, reuse_fp32_param=True))
    if not plans:
        raise UserError(
            f"{machine.num_devices} devices cannot share --global-batch-size "
            f"{job.global_batch_size} and {job.config.num_layers} layers evenly: tensor parallel "
            f"sizes are {', '.join(map(str, tensor_parallel_sizes(job.config)))}, the pipeline's "
            "divide the layers, and what is left over has to divide the batch. Leave out some of "
            "the flags that name a layout, if you gave any."
        )
    return sorted(plans, key=lambda plan: plan.rank_key)


def _all_plans(job: Job, machine: Machine, choices: Choices) -> list[Plan]:
    return [
        plan
        for shape in _shapes(job, machine.num_devices, choices)
        for cut in _settings(shape, choices)
        for plan in _plans(cut, machine, choices)
    ]


def check_job(job: Job) -> None:
    """Raises UserError for what no cut can mend."""
    longest = job.config.max_position_embeddings
    at_least_one = {
        "--seq-length": job.seq_length,
        "--global-batch-size": job.global_batch_size,
        "--cross-entropy-chunk-size": job.cross_entropy_chunk_size,
        "--lora-r": job.lora_rank,
    }
    faults = [
        f"{flag} {value} must be at least 1."
        for flag, value in at_least_one.items()
        if value is not None and value < 1
    ]
    if job.seq_length > longest:
        faults.append(
            f"--seq-length {job.seq_length} is above the model's max_position_embeddings="
            f"{longest}; raise that in the config, with YaRN rope scaling."
        )
    raise_if(faults)


def fewest_devices(
    job: Job, machine: Machine, choices: Choices | None = None, *, limit: int = 65536
) -> Plan | None:
    """The best frugal cut on the fewest devices that the job fits on, or None up to `limit`.

    Frugal is full recompute at micro-batches of one sequence. Numbers tried are powers of two and
    three times those, in whole nodes where there are several.
    """
    per_node = machine.devices_per_node
    inside = [n for n in range(1, per_node + 1) if n & (n - 1) == 0 or n == per_node]
    nodes = [2**i * per_node for i in range(1, 20)] + [3 * 2**i * per_node for i in range(20)]
    frugal = replace(choices or Choices(), micro_batch_sizes=(1,), recompute=("full",))
    for number in sorted({*inside, *nodes}):
        if number > limit:
            return None
        with suppress(UserError):
            best = find_plans(job, replace(machine, num_devices=number), frugal)[0]
            if best.fits:
                return best
    return None


# --- what there is to try -------------------------------------------------------------------------


def _shapes(job: Job, num_devices: int, choices: Choices) -> Iterator[RunLayout]:
    """Cuts by sizes alone, which the model can be cut by and that divide devices and batch."""
    for tp, pp, cp in product(_tp_sizes(job, choices), _pp_sizes(job, choices), _cp(job, choices)):
        ranks = tp * pp * cp
        if choices.zero is not None and ranks > 1:
            continue
        if num_devices % ranks or job.global_batch_size % (num_devices // ranks):
            continue
        for chunk in _chunks(job, pp, choices):
            yield RunLayout(
                job=job,
                tp=tp,
                pp=pp,
                cp=cp,
                dp=num_devices // ranks,
                ulysses=cp if choices.context_parallel_algo == "ulysses_cp_algo" else 1,
                layers_per_chunk=chunk,
                num_layer_list=choices.num_layer_list,
                recompute_activation_function=choices.recompute_activation_function or 0,
                recompute_norm=choices.recompute_norm or 0,
                reuse_fp32_param=choices.reuse_fp32_param or False,
                swap_attention=choices.swap_attention,
                o2_gradient=choices.o2_gradient,
                o2_optimizer=choices.o2_optimizer,
                gathers_keys=cp > 1 and choices.context_parallel_algo == "kvallgather_cp_algo",
                mc2=choices.mc2 and tp > 1,
                coc_parallel_num=choices.coc_parallel_num if tp > 1 else 1,
                optimizer_offload_fraction=choices.optimizer_offload_fraction,
                overlap_grad_reduce=choices.overlap_grad_reduce,
                zero=choices.zero,
            )


def _tp_sizes(job: Job, choices: Choices) -> list[int]:
    asked = choices.tensor_model_parallel_size
    return [n for n in tensor_parallel_sizes(job.config) if asked in (None, n)]


def _pp_sizes(job: Job, choices: Choices) -> list[int]:
    asked, layers = choices.pipeline_model_parallel_size, job.config.num_layers
    if (uneven := choices.num_layer_list) is not None:
        found = [len(uneven)] if sum(uneven) == layers and min(uneven) > 0 else []
    else:
        found = [n for n in range(1, layers + 1) if layers % n == 0]
    return [n for n in found if asked in (None, n)]


def _cp(job: Job, choices: Choices) -> list[int]:
    """Context-parallel sizes."""
    if choices.context_parallel_size is not None:
        return [choices.context_parallel_size]
    sizes = [1]
    while job.seq_length >= 2 * sizes[-1] * LEAST_TOKENS and 2 * sizes[-1] <= MOST_CONTEXT_PARALLEL:
        sizes.append(2 * sizes[-1])
    return sizes


def _chunks(job: Job, pp: int, choices: Choices) -> list[int | None]:
    """Layers of a chunk: None without an interleaved pipeline, and what divides a stage."""
    asked = choices.num_layers_per_virtual_pipeline_stage
    per_stage = job.config.num_layers // pp
    found: list[int | None] = [None]
    if pp > 1 and choices.num_layer_list is None:
        found += [n for n in range(1, per_stage) if per_stage % n == 0]
    return [n for n in found if asked in (None, n)]


def _settings(shape: RunLayout, choices: Choices) -> Iterator[RunLayout]:
    """A shape with each optimizer, micro-batch size, with and without sequence parallelism."""
    per_rank = shape.job.global_batch_size // shape.dp
    sizes = [size for size in choices.micro_batch_sizes if per_rank % size == 0]
    if shape.layers_per_chunk is not None:
        sizes = [size for size in sizes if per_rank // size % shape.pp == 0]
    distributed = (True, False) if shape.replicas > 1 and shape.zero is None else (False,)
    if shape.optimizer_offload_fraction:
        distributed = (True,)  # which the host's optimizer needs
    for is_distributed, size, in_sequence in product(distributed, sizes, (True, False)):
        cut = replace(
            shape,
            micro_batch_size=size,
            sequence_parallel=in_sequence,
            distributed_optimizer=is_distributed,
        )
        is_asked = choices.use_distributed_optimizer in (None, is_distributed)
        is_asked = is_asked and choices.sequence_parallel in (None, in_sequence)
        if choices.is_fused and shape.tp > 1 and not in_sequence:
            continue
        if is_asked and _divides_sequences(cut):
            yield cut


def _divides_sequences(cut: RunLayout) -> bool:
    """Whether its ranks can share a sequence."""
    if cut.sequence_parallel and (cut.tp == 1 or cut.job.seq_length % cut.tp):
        return False
    return cut.cp == 1 or not sequence_faults(
        cut.layout, cut.job.config, cut.job.seq_length, sequence_parallel=cut.sequence_parallel
    )


def _plans(cut: RunLayout, machine: Machine, choices: Choices) -> Iterator[Plan]:
    """A cut with each way to recompute; by parts of layers only where keeping all is too much and
    recomputing all is enough."""
    # transformers' layers are recomputed whole
    kinds: list[Recompute] = [
        one for one in choices.recompute if cut.zero is None or one != "selective"
    ]
    plans = {kind: plan_of(_recomputing(cut, kind, choices), machine) for kind in kinds}
    yield from plans.values()
    if cut.zero is not None:
        return
    none, full = plans.get("none"), plans.get("full")
    if none is None or full is None or none.has_headroom or not full.has_headroom:
        return
    if (choices.recompute_activation_function, choices.recompute_norm) == (None, None):
        single = replace(cut, recompute_activation_function=ALL_LAYERS, recompute_norm=ALL_LAYERS)
        if (plan := plan_of(single, machine)).has_headroom:
            yield plan
    if choices.recomputed_layers is None:
        yield from _fewest_recomputed(cut, machine)


def _recomputing(cut: RunLayout, kind: Recompute, choices: Choices) -> RunLayout:
    if kind != "full":
        return replace(cut, recompute=kind)
    if choices.recomputed_layers is not None:
        # of each chunk; the cut counts them by stage
        layers = choices.recomputed_layers * cut.num_chunks
        return replace(cut, recompute=kind, recomputed_layers=layers)
    # whole layers have no single outputs to recompute, and keep nothing of attention to swap
    whole = replace(cut, recompute=kind, swap_attention=False)
    return replace(whole, recompute_activation_function=0, recompute_norm=0)


def _fewest_recomputed(cut: RunLayout, machine: Machine) -> Iterator[Plan]:
    """The block that recomputes the fewest layers of each chunk and leaves headroom."""
    low, high = 0, max(max(cut.chunk_layers(stage)) for stage in range(cut.pp))
    while high - low > 1:
        middle = (low + high) // 2
        block = replace(cut, recompute="full", recomputed_layers=middle * cut.num_chunks)
        if fullest_stage(block)[1].total <= machine.comfortable_memory:
            high = middle
        else:
            low = middle
    if high < max(cut.chunk_layers(0)):
        layers = high * cut.num_chunks
        yield plan_of(replace(cut, recompute="full", recomputed_layers=layers), machine)


def plan_of(cut: RunLayout, machine: Machine) -> Plan:
    """What is predicted of a cut on as many devices as the machine has."""
    stage, memory = fullest_rank(cut)
    time = step_time(
        cut,
        machine.device,
        machine.rates or machine.device.rates,
        devices_per_node=machine.devices_per_node,
    )
    fits = memory.total <= machine.usable_memory
    return Plan(cut, stage, memory, time, fits, memory.total <= machine.comfortable_memory)
