"""Seconds of a training step, predicted from what it has to compute, move and send.

A rank's micro-batch takes its products over a share of the device's peak, attention's core over
another, the bytes of everything else over a share of the memory's bandwidth, the bytes it sends
over a share of its links, and what the host adds for each layer. `devices.Rates` has the shares;
docs/planning.md has the formulas, where the constants are from, and how far they are off.
"""

from __future__ import annotations

from typing import NamedTuple

from qwen2_ascend.planning.devices import MC2_SHARE, Device, Rates
from qwen2_ascend.planning.flops import attention_flops, layer_products, output_products
from qwen2_ascend.planning.job import RunLayout
from qwen2_ascend.planning.parameters import embedding, layer_tensors, parameters
from qwen2_ascend.planning.traffic import context_parallel, micro_batches_traffic, update_traffic


class Work(NamedTuple):
    """What one rank does: seconds at the peaks, and layers. `Work.seconds` takes it to `Rates`."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    links: float = 0.0
    layers: float = 0.0
    steps: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """How long it takes."""
        return (
            self.products / rates.products
            + self.attention / rates.attention
            + self.memory / rates.memory
            + self.links / rates.links
            + self.layers * rates.layer_seconds
            + self.steps * rates.step_seconds
        )

    def plus(self, other: Work, times: float = 1.0) -> Work:
        """The sum with `times` the other."""
        return Work(*(a + times * b for a, b in zip(self, other, strict=True)))


class StepTime(NamedTuple):
    """Seconds of a step, by what they are spent on."""

    products: float
    attention: float
    memory: float
    """Norms, activations, the loss, gradients added up, the update: what moves bytes."""
    links: float
    """Collectives and sends that are not hidden."""
    host: float
    bubble: float
    """Waiting for the pipeline to fill and to empty."""

    @property
    def total(self) -> float:
        return sum(self)


def step_time(
    cut: RunLayout,
    device: Device,
    rates: Rates,
    *,
    devices_per_node: int,
) -> StepTime:
    """The slowest stage's time, and the others' part of the bubble."""
    work, busy = step_work(cut, device, rates, devices_per_node)
    return StepTime(
        products=busy.products / rates.products,
        attention=busy.attention / rates.attention,
        memory=busy.memory / rates.memory,
        links=busy.links / rates.links,
        host=busy.layers * rates.layer_seconds + busy.steps * rates.step_seconds,
        bubble=work.seconds(rates) - busy.seconds(rates),
    )


def step_work(
    cut: RunLayout,
    device: Device,
    rates: Rates,
    devices_per_node: int,
) -> tuple[Work, Work]:
    """(all that a step waits for, the slowest stage's own part of it).

    The slowest stage works on all micro-batches; before its first and after its last one it waits
    for those of all other stages, divided by the number of chunks (Narayanan et al. 2021,
    arXiv:2104.04473). Which stage is the slowest is judged by `rates`.
    """
    alike = _alike(cut)
    works = {stage: micro_batch_work(cut, stage, device, devices_per_node) for stage in alike}
    slowest = max(works, key=lambda stage: works[stage].seconds(rates))
    once = _update_work(cut, slowest, device, devices_per_node)
    busy = once.plus(works[slowest], cut.num_microbatches)
    waiting = Work()
    for stage, number in alike.items():
        waiting = waiting.plus(works[stage], number - (stage == slowest))
    return busy.plus(waiting, 1 / cut.num_chunks), busy


def _alike(cut: RunLayout) -> dict[int, int]:
    """A stage of each kind, and how many are of it."""
    if cut.num_layer_list is not None or cut.pp < 3:
        return dict.fromkeys(range(cut.pp), 1)
    return {0: 1, 1: cut.pp - 2, cut.pp - 1: 1}


def bubble_fraction(cut: RunLayout) -> float:
    """Share of a step that a stage waits: (p - 1) / v over that and the micro-batches' own time
    (Narayanan et al. 2021, arXiv:2104.04473)."""
    wait = (cut.pp - 1) / cut.num_chunks
    return wait / (cut.num_microbatches + wait)


# --- a micro-batch --------------------------------------------------------------------------------


def micro_batch_work(cut: RunLayout, stage: int, device: Device, devices_per_node: int) -> Work:
    """Forward and backward of one micro-batch on one rank of a stage."""
    return Work(
        products=stage_products(cut, stage) / device.peak_flops,
        attention=stage_attention(cut, stage) / device.peak_flops,
        memory=stage_bytes(cut, stage) / device.memory_bandwidth,
        links=_exchange_seconds(cut, stage, device, devices_per_node),
        layers=cut.layers_of(stage) + cut.recomputed(stage) / 3,
    )


def stage_products(cut: RunLayout, stage: int) -> float:
    """FLOPs of one micro-batch's matrix products on one rank: forward, backward and what is
    recomputed.

    Without recomputation these and `stage_attention`'s are, over all stages,
    `flops.train_flops_per_token` of the tokens.
    """
    job, config = cut.job, cut.job.config
    # frozen weights have no gradient: backward is once forward, and the adapters are small
    times = 3 if job.lora_rank is None else 2
    total = (times * cut.layers_of(stage) + cut.recomputed(stage)) * layer_products(config)
    if cut.is_last(stage):
        # a chunked loss computes its logits again
        again = job.cross_entropy_chunk_size is not None
        total += (times + again) * output_products(config, cut.padded_vocab_size)
    return total * cut.tokens / cut.tp


def stage_attention(cut: RunLayout, stage: int) -> float:
    """FLOPs of attention's core, counted likewise."""
    config = cut.job.config
    layers = cut.layers_of(stage)
    core = attention_flops(cut.job.seq_length, config.num_attention_heads, config.kv_channels)
    again = layers if cut.recompute == "selective" else cut.recomputed(stage)
    return (3 * layers + again) * core * cut.tokens / cut.tp


def stage_bytes(cut: RunLayout, stage: int) -> float:
    """Bytes that norms, residuals, rotary, SwiGLU, the loss and sums of gradients read and
    write."""
    config, e = cut.job.config, cut.job.element
    h = config.hidden_size / (cut.tp if cut.sequence_parallel else 1)
    # two norms read and write h, two residuals read 2 h and write h; rotary reads and writes its
    # heads; SwiGLU reads 2 f and writes f; backward is twice forward
    rotary = 2 * (cut.heads + cut.groups) * config.kv_channels
    layer = 10 * h + rotary + 3 * config.ffn_hidden_size / cut.tp
    total = (3 * cut.layers_of(stage) + cut.recomputed(stage)) * layer * e
    # outputs that are computed again: SwiGLU's, both norms'
    swiglu, norms = single_outputs(cut, stage)
    total += (swiglu * 3 * config.ffn_hidden_size / cut.tp + norms * 4 * h) * e
    if cut.is_last(stage):
        # logits are read in 16 bits and handled in fp32: maximum, exponential, sum, gradient
        total += 6 * 4 * cut.padded_vocab_size / cut.tp
    # each new gradient is read and added to one in fp32
    return total * cut.tokens + (e + 8) * _trained(cut, stage)


def single_outputs(cut: RunLayout, stage: int) -> tuple[int, int]:
    """Layers of a stage in which SwiGLU's output is computed again, and both norms'."""
    pairs = zip(cut.chunk_layers(stage), cut.recomputed_of_chunks(stage), strict=True)
    others = [layers - whole for layers, whole in pairs]
    asked = (cut.recompute_activation_function, cut.recompute_norm)
    swiglu, norms = (sum(min(number, n) for n in others) for number in asked)
    return swiglu, norms


def _trained(cut: RunLayout, stage: int) -> int:
    """Weights of a rank that get a gradient; a tied embedding on one stage gets two."""
    if cut.job.lora_rank is not None:
        return parameters(cut, stage).trained
    ends = (stage == 0) + cut.is_last(stage)
    return cut.layers_of(stage) * sum(layer_tensors(cut)) + ends * embedding(cut)


def _exchange_seconds(cut: RunLayout, stage: int, device: Device, devices_per_node: int) -> float:
    """Seconds of what ranks send each other for a micro-batch, at the links' bandwidth.

    Ranks are numbered TP first, then CP, then DP, then PP.
    """

    def link(num_ranks: int, span: int) -> float:
        return device.link(num_ranks, span, devices_per_node)

    sent, n = micro_batches_traffic(cut, stage), cut.num_microbatches
    seconds = 0.0
    if cut.tp > 1:
        share = MC2_SHARE if cut.mc2 else 1.0
        seconds += share * (sent["TP"] + sent["SP"]) / n / link(cut.tp, cut.tp)
    if cut.pp > 1:
        seconds += sent["PP"] / n / link(2, cut.num_devices)
    if cut.cp > 1:
        span = cut.tp * cut.cp
        for call in context_parallel(cut, stage):
            if call.sent_bytes:
                seconds += call.sent_bytes / n / link(call.num_ranks, span)
    return seconds


def _update_work(cut: RunLayout, stage: int, device: Device, devices_per_node: int) -> Work:
    """What a step does once: summing gradients over data-parallel ranks, and AdamW."""
    share = cut.replicas if cut.distributed_optimizer or cut.zero is not None else 1
    # AdamW reads a gradient, reads and writes a weight and two moments in fp32, writes a 16-bit one
    num_bytes = sum(parameters(cut, stage).buffers) / share * (28 + cut.job.element)
    links = 0.0
    if cut.replicas > 1 and not cut.overlap_grad_reduce:
        span = cut.tp * cut.replicas
        link = device.link(cut.replicas, span, devices_per_node)
        links = update_traffic(cut, stage) / link
    return Work(memory=num_bytes / device.memory_bandwidth, links=links, steps=1)
