"""Every valid way to cut a job over a number of devices, ranked; and how many devices it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.parallel import tensor_parallel_sizes
from qwen2_ascend.planning.devices import Device, Rates
from qwen2_ascend.planning.job import Cut, Job, Recompute
from qwen2_ascend.planning.memory import Memory, fullest_stage
from qwen2_ascend.planning.parameters import Parameters, parameters
from qwen2_ascend.planning.roofline import StepTime, step_time

MICRO_BATCH_SIZES = (1, 2, 4, 8)
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

    cut: Cut
    stage: int
    """The fullest one."""
    memory: Memory
    """Of a rank of that stage."""
    time: StepTime
    fits: bool
    has_headroom: bool

    @property
    def rank_key(self) -> tuple:
        """What fits with headroom comes first, then what fits; of those the faster, the smaller."""
        seconds = self.time.total if self.fits else 0.0
        return (not self.fits, not self.has_headroom, seconds, self.memory.total)


def find_plans(
    job: Job, machine: Machine, *, micro_batch_sizes: tuple[int, ...] = MICRO_BATCH_SIZES
) -> list[Plan]:
    """All valid cuts, the best first.

    Raises:
        UserError: there is none, whatever the memory.
    """
    check_job(job)
    plans = [
        plan
        for tp, pp, dp in _sizes(job, machine.num_devices)
        for plan in _plans(job, machine, tp, pp, dp, micro_batch_sizes, RECOMPUTE)
    ]
    if not plans:
        raise UserError(
            f"{machine.num_devices} devices cannot share --global-batch-size "
            f"{job.global_batch_size} and {job.config.num_layers} layers evenly: tensor parallel "
            f"sizes are {', '.join(map(str, tensor_parallel_sizes(job.config)))}, the pipeline's "
            "divide the layers, and what is left over has to divide the batch."
        )
    return sorted(plans, key=lambda plan: plan.rank_key)


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


def fewest_devices(job: Job, machine: Machine, *, limit: int = 65536) -> Plan | None:
    """The best frugal cut on the fewest devices that the job fits on, or None up to `limit`.

    Frugal is full recompute at micro-batches of one sequence. Numbers tried are powers of two and
    three times those, in whole nodes where there are several.
    """
    per_node = machine.devices_per_node
    inside = [n for n in range(1, per_node + 1) if n & (n - 1) == 0 or n == per_node]
    nodes = [2**i * per_node for i in range(1, 20)] + [3 * 2**i * per_node for i in range(20)]
    for number in sorted({*inside, *nodes}):
        if number > limit:
            return None
        plans = [
            plan
            for tp, pp, dp in _sizes(job, number)
            for plan in _plans(
                job, replace(machine, num_devices=number), tp, pp, dp, (1,), ("full",)
            )
        ]
        best = min(plans, key=lambda plan: plan.rank_key, default=None)
        if best is not None and best.fits:
            return best
    return None


# --- what there is to try -------------------------------------------------------------------------


def _sizes(job: Job, num_devices: int) -> Iterator[tuple[int, int, int]]:
    """(tp, pp, dp) that the model can be cut by and that divide devices and batch."""
    layers = job.config.num_layers
    stages = [n for n in range(1, layers + 1) if layers % n == 0]
    for tp, pp in product(tensor_parallel_sizes(job.config), stages):
        if num_devices % (tp * pp) == 0:
            dp = num_devices // (tp * pp)
            if job.global_batch_size % dp == 0:
                yield tp, pp, dp


def _plans(
    job: Job,
    machine: Machine,
    tp: int,
    pp: int,
    dp: int,
    micro_batch_sizes: tuple[int, ...],
    recompute: tuple[Recompute, ...],
) -> Iterator[Plan]:
    per_rank = job.global_batch_size // dp
    sequence_parallel = (True, False) if tp > 1 and job.seq_length % tp == 0 else (False,)
    for chunk, distributed in product(_chunks(job, pp), (True, False) if dp > 1 else (False,)):
        shape = Cut(
            job=job,
            tp=tp,
            pp=pp,
            dp=dp,
            layers_per_chunk=chunk,
            distributed_optimizer=distributed,
        )
        weights = {stage: parameters(shape, stage) for stage in {0, pp - 1}}
        for size, in_sequence, kind in product(micro_batch_sizes, sequence_parallel, recompute):
            if per_rank % size or (chunk is not None and per_rank // size % pp):
                continue
            cut = replace(
                shape, micro_batch_size=size, sequence_parallel=in_sequence, recompute=kind
            )
            yield plan_of(cut, machine, weights)


def _chunks(job: Job, pp: int) -> list[int | None]:
    """Layers of a chunk: None without an interleaved pipeline, and what divides a stage."""
    per_stage = job.config.num_layers // pp
    if pp == 1:
        return [None]
    return [None, *(n for n in range(1, per_stage) if per_stage % n == 0)]


def plan_of(cut: Cut, machine: Machine, weights: dict[int, Parameters] | None = None) -> Plan:
    """What is predicted of a cut.

    Args:
        cut: on as many devices as the machine has.
        machine: where it runs.
        weights: of its first and its last stage, where the caller has them already.
    """
    stage, memory = fullest_stage(cut, weights)
    time = step_time(
        cut,
        machine.device,
        machine.rates or machine.device.rates,
        devices_per_node=machine.devices_per_node,
        weights=weights,
    )
    fits = memory.total <= machine.usable_memory
    return Plan(cut, stage, memory, time, fits, memory.total <= machine.comfortable_memory)
