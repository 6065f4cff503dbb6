"""Bytes of one rank that DeepSpeed's ZeRO trains, at the fullest moment of a step.

The model is transformers' and every rank computes whole sequences. What DeepSpeed keeps is read
from its sources (0.19, runtime/zero/stage_1_and_2.py and stage3.py); the formulas of the paper
(Rajbhandari et al. 2020, arXiv:1910.02054, section 3) leave out its buckets and what stage 3 holds
whole.

Letters: as in memory.py, and `d` the ranks.
"""

from __future__ import annotations

from math import prod

from qwen2_ascend.checkpoint.rules import qwen2_rules
from qwen2_ascend.planning.job import RunLayout, Zero
from qwen2_ascend.planning.memory import (
    FP32,
    HCCL_BYTES,
    SOFTMAX_STATISTICS,
    Memory,
    communicators,
    fullest_stage,
)
from qwen2_ascend.planning.parameters import embedding, layer_tensors, parameters


def fullest_rank(cut: RunLayout) -> tuple[int, Memory]:
    """(stage, memory) of the fullest rank, whoever trains; with ZeRO all are of stage 0."""
    return fullest_stage(cut) if cut.zero is None else (0, zero_memory(cut))


def zero_memory(cut: RunLayout) -> Memory:
    """The peak of a rank; all ranks hold as much."""
    weights, gradients, optimizer = zero_at_rest(cut)
    activations, logits, temporary, moment = max(_moments(cut), key=lambda found: sum(found[:3]))
    held = _gradients_of_micro_batches(cut) if moment != "update" else 0
    return Memory(
        weights=weights,
        gradients=gradients + held,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        temporary=temporary,
        buffers=_buffers(cut),
        moment=moment,
    )


def zero_at_rest(cut: RunLayout) -> tuple[int, int, int]:
    """Bytes of a rank's weights, gradients and optimizer between two steps.

    Stages 1 and 2 drop the gradients after an update; stage 3 has a buffer for a rank's own.
    """
    zero, element, d = _zero(cut), cut.job.element, cut.replicas
    counted = parameters(cut, 0)
    trained, frozen = counted.trained, counted.all - counted.trained
    own = -(-trained // d)
    optimizer = 0 if zero.offload_optimizer else 3 * FP32 * own
    if zero.stage < 3:
        # CPU ranks of DeepSpeed 0.19 hold the weights a second time, beside the flat buffer; nobody
        # has seen whether a card's do
        times = 2 if cut.job.backend == "cpu" else 1
        return times * (trained + frozen) * element, 0, optimizer
    weights = 0 if zero.offload_param else -(-counted.all // d) * element
    gradients = 0 if zero.offload_optimizer else own * element
    return weights + _persistent(cut) * element, gradients, optimizer


def _persistent(cut: RunLayout) -> int:
    """Elements of transformers' weights that stage 3 gathers once and keeps whole, being small."""
    config, limit = cut.job.config, _zero(cut).param_persistence_threshold
    weights = [
        (rule, prod(rule.shape(box))) for rule in qwen2_rules(config) for _, box in rule.parts
    ]
    return sum(n * (config.num_layers if r.is_of_layer else 1) for r, n in weights if n < limit)


def _gradients_of_micro_batches(cut: RunLayout) -> int:
    """Bytes that earlier micro-batches left in stages 1 (all) and 2 (the rank's share)."""
    zero, trained = _zero(cut), parameters(cut, 0).trained
    if zero.stage == 3 or cut.num_microbatches == 1:
        return 0
    if zero.offload_optimizer and zero.stage == 2:
        return 0  # added up on the host
    return (trained if zero.stage == 1 else -(-trained // cut.replicas)) * cut.job.element


def _moments(cut: RunLayout) -> list[tuple[int, int, int, str]]:
    """(activations, logits, temporary, which) of each moment that may be the fullest."""
    config, t, e = cut.job.config, cut.tokens, cut.job.element
    trained, logits = parameters(cut, 0).trained, t * config.vocab_size
    wgrad = embedding(cut) * e
    gathered = _gathered(cut)
    layers = config.num_layers
    is_full = cut.recompute == "full"
    of_layer = _layer_activations(cut)
    hidden = t * config.hidden_size * e
    kept = layers * (hidden if is_full else of_layer) + _norm(cut)
    own = -(-trained // cut.replicas)
    moments = [
        # the loss forward: logits, their fp32 copy, log-softmax; its backward: log-softmax and two
        # gradients of it
        (kept, logits * max(3 * FP32, 2 * FP32 + (e if e < FP32 else 0)), gathered, "loss"),
        (kept, logits * e, wgrad + hidden + gathered, "loss"),
        (
            layers * (hidden if is_full else of_layer) + (of_layer if is_full else 0),
            0,
            2 * t * config.ffn_hidden_size * e + hidden + wgrad + _bucket(cut) + gathered,
            "backward",
        ),
        (0, 0, wgrad + hidden + _bucket(cut) + _last_gradients(cut), "embedding"),
    ]
    if not _zero(cut).offload_optimizer:
        # the summed gradient, its fp32 copy, and AdamW's root of the second moment and its quotient
        share = own if _zero(cut).stage < 3 else min(own, _zero(cut).sub_group_size)
        first = own * e if _zero(cut).stage < 3 else 0
        moments.append((0, 0, first + 3 * FP32 * share, "update"))
    return moments


def _zero(cut: RunLayout) -> Zero:
    assert cut.zero is not None
    return cut.zero


def _gathered(cut: RunLayout) -> int:
    """Bytes of the whole weights that stage 3 has at once: those of a layer and of the next, or of
    the output layer."""
    zero = _zero(cut)
    if zero.stage < 3:
        return 0
    large = [n for n in layer_tensors(cut) if n >= zero.param_persistence_threshold]
    return max(2 * sum(large), embedding(cut)) * cut.job.element


def _bucket(cut: RunLayout) -> int:
    """Bytes of the buffers that stages 1 and 2 collect gradients in, while backward runs."""
    zero = _zero(cut)
    return 0 if zero.stage == 3 else zero.buckets * zero.reduce_bucket_size * cut.job.element


def _last_gradients(cut: RunLayout) -> int:
    """Bytes of the last micro-batch's gradients in stage 2, until they are added to the others; in
    stage 1 of the rank's share of all, besides those of a single micro-batch."""
    zero, trained = _zero(cut), parameters(cut, 0).trained
    if zero.stage == 3:
        return 0
    only = trained if zero.stage == 1 and cut.num_microbatches == 1 else 0
    return (only + -(-trained // cut.replicas)) * cut.job.element


def _norm(cut: RunLayout) -> int:
    """Bytes that a norm of transformers' keeps: its input in fp32, that divided by the root, its
    output, and a root per token."""
    return cut.tokens * (cut.job.config.hidden_size * (FP32 + 2 * cut.job.element) + FP32)


def _layer_activations(cut: RunLayout) -> int:
    """Bytes that a layer of transformers' keeps: two norms; rotated q and k, v and the context;
    gate, silu(gate), up and their product."""
    config, e = cut.job.config, cut.job.element
    heads, groups = config.num_attention_heads, config.num_query_groups
    attention = (2 * heads + 2 * groups) * config.kv_channels * e
    attention += heads * SOFTMAX_STATISTICS[cut.job.backend]
    return 2 * _norm(cut) + cut.tokens * (attention + 4 * config.ffn_hidden_size * e)


def _buffers(cut: RunLayout) -> int:
    """Stage 3's bucket of gradients, cosines and sines, and the communicator's own memory."""
    zero, e = _zero(cut), cut.job.element
    held = 2 * cut.tokens * cut.job.config.kv_channels * e
    if zero.stage == 3:
        held += zero.buckets * zero.reduce_bucket_size * e
    return held + (communicators(cut) * HCCL_BYTES if cut.job.backend == "npu" else 0)
