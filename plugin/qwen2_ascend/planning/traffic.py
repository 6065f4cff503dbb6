"""The collectives of one training step, as this package's layers and megatron-core 0.16 issue them.

Each is told with the bytes of its whole tensor: of an all-gather what is gathered, of a
reduce-scatter what is scattered. `sent_bytes` is what a rank sends when the collective is a ring.
Left out is what does not grow with the model: the loss, the number of tokens and the gradient's
norm that ranks tell each other, less than 1 kB per rank and peer.

Letters: `t` tokens of a micro-batch, `h` hidden, `e` bytes of an activation, `n` micro-batches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

from qwen2_ascend.planning.job import RunLayout
from qwen2_ascend.planning.parameters import embedding, parameters

Kind = Literal["TP", "SP", "CP", "PP", "DP"]
KINDS: tuple[Kind, ...] = ("TP", "SP", "CP", "PP", "DP")
FP32 = 4


class Collective(NamedTuple):
    """Equal calls in a step."""

    kind: Kind
    """What causes it; the gradient of tied embeddings on two stages counts as PP."""
    op: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]
    num_ranks: int
    num_bytes: int
    num_calls: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that one rank sends in all calls."""
        return sent_bytes(self.op, self.num_ranks, self.num_bytes) * self.num_calls


def sent_bytes(op: str, num_ranks: int, num_bytes: float) -> float:
    """What a rank sends in a ring: 2 (n - 1) / n of what is reduced, (n - 1) / n of the others."""
    if op == "send":
        return num_bytes
    return (2 if op == "all_reduce" else 1) * (num_ranks - 1) / num_ranks * num_bytes


def step_traffic(cut: RunLayout) -> dict[Kind, float]:
    """Bytes that all devices together send in a step, by kind."""
    total: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
    for stage in range(cut.pp):
        for kind, sent in _sent(collectives(cut, stage)).items():
            total[kind] += sent * cut.tp * cut.replicas
    return total


def micro_batches_traffic(cut: RunLayout, stage: int) -> dict[Kind, float]:
    """Bytes that one rank of `stage` sends in a step for its micro-batches, by kind."""
    return _sent(_of_micro_batches(cut, stage))


def update_traffic(cut: RunLayout, stage: int) -> float:
    """Bytes that one rank of `stage` sends in a step for the update."""
    return _sent(_data_parallel(cut, stage))["DP"] if cut.replicas > 1 else 0.0


def _sent(calls: Iterator[Collective]) -> dict[Kind, float]:
    sent: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
    for collective in calls:
        sent[collective.kind] += collective.sent_bytes
    return sent


def collectives(cut: RunLayout, stage: int) -> Iterator[Collective]:
    """Those of a rank of pipeline stage `stage`; counts may be zero."""
    yield from _of_micro_batches(cut, stage)
    if cut.replicas > 1:
        yield from _data_parallel(cut, stage)


def _of_micro_batches(cut: RunLayout, stage: int) -> Iterator[Collective]:
    if cut.tp > 1:
        yield from _tensor_parallel(cut, stage)
    if cut.cp > 1:
        yield from context_parallel(cut, stage)
    if cut.pp > 1:
        yield from _pipeline(cut, stage)


def _tensor_parallel(cut: RunLayout, stage: int) -> Iterator[Collective]:
    job, n, layers = cut.job, cut.num_microbatches, cut.layers_of(stage)
    first, last = stage == 0, cut.is_last(stage)
    forwards = layers + cut.recomputed(stage)
    hidden = cut.tokens * job.config.hidden_size * job.element
    chunked = job.cross_entropy_chunk_size is not None
    if cut.sequence_parallel:
        # Each sum over ranks is a scatter, and the next linear layer gathers. Backward is the
        # mirror image, and for the weights' gradients gathers the inputs of linear_qkv, linear_fc1
        # and the output layer anew.
        scatters = 2 * forwards + 2 * layers + first + last
        gathers = 2 * forwards + 2 * layers + last
        if job.lora_rank is None:
            gathers += 2 * layers + first + (last and not chunked)
        yield Collective("SP", "reduce_scatter", cut.tp, hidden, n * scatters)
        yield Collective("SP", "all_gather", cut.tp, hidden, n * gathers)
        if job.lora_rank is None:
            norms = (2 * layers + last) * job.config.hidden_size * FP32
            yield Collective("SP", "all_reduce", cut.tp, norms, 1)
    else:
        # outputs of attention and MLP; gradients of their inputs; the embedding; the output layer's
        sums = 2 * forwards + 2 * layers + first + last
        yield Collective("TP", "all_reduce", cut.tp, hidden, n * sums)
    if last:
        # per token the largest logit, the sum of exponentials and the label's own
        token = cut.tokens * FP32
        yield Collective("TP", "all_reduce", cut.tp, token, n * (1 if chunked else 3))
        yield Collective("TP", "all_reduce", cut.tp, 2 * token, n * chunked)
    if job.lora_rank is not None:
        yield from _adapters(cut, layers, forwards)
    if cut.shares_groups:
        rows = cut.tokens * cut.qkv_rows * job.element
        again = layers if cut.recompute == "selective" else cut.recomputed(stage)
        yield Collective("TP", "all_gather", cut.tp, rows, n * (layers + again))
        yield Collective("TP", "reduce_scatter", cut.tp, rows, n * layers)


def _adapters(cut: RunLayout, layers: int, forwards: int) -> Iterator[Collective]:
    """Ranks exchange what the adapters' A give: 3 targets of linear_qkv, 2 of linear_fc1, and one
    each of the row-parallel layers; `forwards` counts layers that run again twice."""
    rank = cut.job.lora_rank or 0
    calls, again = (number * cut.num_microbatches for number in (layers, forwards))
    one = cut.tokens * rank * cut.job.element
    if not cut.sequence_parallel:
        yield Collective("TP", "all_reduce", cut.tp, 3 * one, calls)
        yield Collective("TP", "all_reduce", cut.tp, 2 * one, calls)
        yield Collective("TP", "all_reduce", cut.tp, one, 2 * again)
        return
    for targets in (3, 2):
        yield Collective("SP", "all_gather", cut.tp, targets * one, again)
        yield Collective("SP", "reduce_scatter", cut.tp, targets * one, calls)
    yield Collective("SP", "reduce_scatter", cut.tp, one, 2 * again)
    yield Collective("SP", "all_gather", cut.tp, one, 2 * calls)
    # of the matrices that every rank has whole: 5 A and 2 B
    whole = 7 * rank * cut.job.config.hidden_size * layers
    yield Collective("SP", "all_reduce", cut.tp, whole * FP32, 1)


def context_parallel(cut: RunLayout, stage: int) -> Iterator[Collective]:
    """What attention exchanges: heads for tokens and back (Ulysses: q, k, v and the output, forward
    and backward; keys are repeated where ranks outnumber query groups), and round the ring k and v
    forward, and in backward again with their gradients. Or all are gathered, in backward anew, and
    their gradients scattered."""
    layers, n = cut.layers_of(stage), cut.num_microbatches
    # what is recomputed exchanges once more
    again = layers if cut.recompute == "selective" else cut.recomputed(stage)
    one_head = cut.tokens * cut.job.config.kv_channels * cut.job.element
    keys = 2 * cut.groups * one_head
    repeats = cut.ulysses // math.gcd(cut.groups, cut.ulysses)
    exchanged = 2 * cut.heads * one_head + repeats * keys
    yield Collective("CP", "all_to_all", cut.ulysses, exchanged, n * (2 * layers + again))
    if cut.gathers_keys:
        yield Collective("CP", "all_gather", cut.cp, keys * cut.cp, n * (2 * layers + again))
        yield Collective("CP", "reduce_scatter", cut.cp, keys * cut.cp, n * layers)
        return
    turns = cut.cp // cut.ulysses - 1
    yield Collective("CP", "send", 2, keys, n * turns * (3 * layers + again))


def _pipeline(cut: RunLayout, stage: int) -> Iterator[Collective]:
    config, n, chunks = cut.job.config, cut.num_microbatches, cut.num_chunks
    share = cut.tp if cut.sequence_parallel else 1
    hidden = cut.tokens // share * config.hidden_size * cut.job.element
    onwards, back = chunks - cut.is_last(stage), chunks - (stage == 0)
    yield Collective("PP", "send", 2, hidden, n * (onwards + back))
    if config.tie_word_embeddings and cut.job.lora_rank is None:
        ends = stage in (0, cut.pp - 1)
        yield Collective("PP", "all_reduce", 2, embedding(cut) * FP32, int(ends))


def _data_parallel(cut: RunLayout, stage: int) -> Iterator[Collective]:
    if cut.zero is not None:
        yield from _zero(cut, cut.zero.stage)
        return
    gradient = cut.job.element if cut.o2_gradient else FP32
    for elements, chunks in Counter(parameters(cut, stage).buffers).items():
        if not cut.distributed_optimizer:
            yield Collective("DP", "all_reduce", cut.replicas, elements * gradient, chunks)
            continue
        yield Collective("DP", "reduce_scatter", cut.replicas, elements * gradient, chunks)
        yield Collective("DP", "all_gather", cut.replicas, elements * cut.job.element, chunks)


def _zero(cut: RunLayout, zero_stage: int) -> Iterator[Collective]:
    """The collectives that Rajbhandari et al. 2020 (arXiv:1910.02054, section 7) count: stage 1
    scatters sums of gradients once, the others after each micro-batch; weights are gathered after
    the update, in stage 3 before each forward and each backward."""
    num_bytes = sum(parameters(cut, 0).buffers) * cut.job.element
    n = cut.num_microbatches
    gathers = 2 * n if zero_stage == 3 else 1
    yield Collective("DP", "reduce_scatter", cut.replicas, num_bytes, 1 if zero_stage == 1 else n)
    yield Collective("DP", "all_gather", cut.replicas, num_bytes, gathers)
