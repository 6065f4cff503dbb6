"""Bytes of one rank at the fullest moment of a training step, tensor by tensor.

Every tensor is counted that is alive at once: weights, fp32 gradients, AdamW's state; what the
layers of `model/` and `ops/` keep for backward, of every micro-batch that is under way; and the
temporary results of the moment. Which moment that is differs: the loss, the backward of the newest
layer, the embedding's gradient or the update. Each is computed, and the fullest counts.

Letters: `h` hidden, `f` ffn of this rank, `t` tokens of a micro-batch, `ts` the tokens of it that a
rank has outside attention and MLP (fewer under sequence parallelism), `v` vocabulary of this rank,
`e` bytes of an activation.
"""

from __future__ import annotations

from typing import NamedTuple

from qwen2_ascend.planning.job import RunLayout
from qwen2_ascend.planning.parameters import Parameters, embedding, layer_tensors, parameters

FP32 = 4
HCCL_BYTES = 2 * 200 * 2**20
"""What a communicator takes of an NPU: twice HCCL_BUFFSIZE, 200 MiB unless set (CANN's documents
and HCCL's sources)."""
SOFTMAX_STATISTICS = {"cpu": 4, "cuda": 4, "npu": 2 * 8 * 4}
"""Bytes per token and head: log-sum-exp; torch_npu's largest score and sum, 8 times each."""
_CAUSAL_MASK = 2048 * 2048
"""The mask of npu_fusion_attention, once per device."""


class Memory(NamedTuple):
    """Bytes of one rank at its peak."""

    weights: int
    gradients: int
    """The contiguous fp32 buffer that gradients are added up in."""
    optimizer: int
    """fp32 weights beside 16-bit ones, and both moments."""
    activations: int
    """What backward needs of all micro-batches under way."""
    logits: int
    """Tensors of the vocabulary's size: logits, softmax and their gradient."""
    temporary: int
    """The rest that is alive at the peak: gradients of activations, new ones of weights."""
    buffers: int
    """Tables, and buffers for communication."""
    moment: str
    """Which moment it is: loss, backward, embedding, update."""

    @property
    def total(self) -> int:
        return sum(self[:7])

    @property
    def at_rest(self) -> int:
        """Bytes between steps."""
        return self.weights + self.gradients + self.optimizer


class _Moment(NamedTuple):
    name: str
    activations: int
    logits: int
    temporary: int

    @property
    def total(self) -> int:
        return self.activations + self.logits + self.temporary


def stage_memory(cut: RunLayout, stage: int, *, first_step: bool = False) -> Memory:
    """The peak of a rank of pipeline stage `stage`.

    Args:
        cut: the layout.
        stage: counted from 0.
        first_step: the peak since the run began, once the first update is made: its forward and
            backward ran before the optimizer had moments.
    """
    weights = parameters(cut, stage)
    rest = resting_state(cut, weights)
    moments = _moment_bytes(cut) * sum(weights.buffers) // _share(cut) if first_step else 0

    def all_of(moment: _Moment) -> int:
        return moment.total - (0 if moment.name == "update" else moments)

    peak = max(_moments(cut, stage, weights), key=all_of)
    return Memory(
        *rest[:2],
        optimizer=rest[2] - (0 if peak.name == "update" else moments),
        activations=peak.activations,
        logits=peak.logits,
        temporary=peak.temporary,
        buffers=_buffers(cut, stage),
        moment=peak.name,
    )


def resting_state(cut: RunLayout, weights: Parameters) -> tuple[int, int, int]:
    """Bytes of a rank's weights, gradients and optimizer between two steps."""
    trained = sum(weights.buffers)
    # the distributed optimizer computes with a contiguous copy of the weights, padded as theirs
    held = weights.all + (trained - weights.trained if cut.distributed_optimizer else 0)
    return (
        held * cut.job.element,
        trained * (cut.job.element if cut.o2_gradient else FP32),
        _state_bytes(cut, trained),
    )


def _state_bytes(cut: RunLayout, trained: int) -> int:
    """Bytes of a rank's optimizer on the device: fp32 weights and moments, less the host's
    share."""
    kept = 1 - (cut.optimizer_offload_fraction if cut.job.backend != "cpu" else 0)
    return int((_moment_bytes(cut) + _main_bytes(cut)) * trained * kept) // _share(cut)


def gradient_copy(cut: RunLayout, weights: Parameters) -> int:
    """Bytes of the fp32 copy that an update makes of 16-bit gradients. megatron-core drops it when
    the next step begins, this package when the update ends."""
    if not cut.o2_gradient or cut.job.element == FP32:
        return 0
    if cut.o2_optimizer and not cut.job.stack.copies_all:
        return 0  # a tensor at a time
    return sum(weights.buffers) * FP32 // _share(cut)


def _share(cut: RunLayout) -> int:
    """Ranks that the optimizer's state is divided over."""
    return cut.replicas if cut.distributed_optimizer else 1


def _moment_bytes(cut: RunLayout) -> int:
    """Bytes of AdamW's two moments of a weight."""
    return 2 * (cut.job.element if cut.o2_optimizer else FP32)


def _main_bytes(cut: RunLayout) -> int:
    """Bytes of an fp32 weight that the optimizer keeps besides its moments, between two updates."""
    if cut.job.element == FP32:
        return 0
    return 2 if cut.reuse_fp32_param else FP32


def fullest_stage(cut: RunLayout) -> tuple[int, Memory]:
    """(stage, memory) of the fullest rank: the first stage, or the last with the logits.

    Between them a stage holds no embedding and has fewer micro-batches under way than the first;
    where stages have unequal numbers of layers, any may be the fullest.
    """
    stages = {0, cut.pp - 1} if cut.num_layer_list is None else set(range(cut.pp))
    found = {stage: stage_memory(cut, stage) for stage in stages}
    return max(found.items(), key=lambda item: item[1].total)


def chunks_under_way(cut: RunLayout, stage: int) -> int:
    """Forward passes of a model chunk that wait for their backward at most.

    1F1B lets pp - stage micro-batches in; the interleaved schedule 2 (pp - stage - 1) + 1, and
    another pp for each further chunk (Narayanan et al. 2021, arXiv:2104.04473).
    """
    total = cut.num_microbatches * cut.num_chunks
    before = cut.pp - stage - 1
    if cut.num_chunks > 1:
        before = 2 * before + (cut.num_chunks - 1) * cut.pp
    return min(before + 1, total)


def passes_under_way(cut: RunLayout, stage: int) -> list[int]:
    """Each chunk's share of `chunks_under_way`: pp micro-batches go through one, then the next."""
    rounds, rest = divmod(chunks_under_way(cut, stage), cut.pp * cut.num_chunks)
    return [
        (rounds * cut.pp) + min(max(rest - chunk * cut.pp, 0), cut.pp)
        for chunk in range(cut.num_chunks)
    ]


# --- the moments ----------------------------------------------------------------------------------


def _moments(cut: RunLayout, stage: int, weights: Parameters) -> list[_Moment]:
    """What is alive besides what lasts, at each moment that may be the fullest."""
    hidden = _hidden(cut)
    first, last = stage == 0, cut.is_last(stage)
    # the schedule keeps what a chunk hands on until its backward
    kept = [bytes_of + hidden for bytes_of in chunk_activations(cut, stage)]
    head_kept = 0
    if last:
        # of the last chunk: the last layer's output and its norm, instead of what is handed on
        head_kept = hidden + _row_numbers(cut)
    passes = passes_under_way(cut, stage)
    activations = sum(number * some for number, some in zip(passes, kept, strict=True)) + head_kept
    full = cut.job.lora_rank is None
    tied = full and cut.job.config.tie_word_embeddings and cut.pp == 1
    wgrad = embedding(cut) * cut.job.element if full else 0
    held = wgrad if tied else 0  # the output layer's part waits for the embedding's
    workspace = layer_workspace(cut, stage)
    moments = [_Moment("backward", activations - head_kept, 0, held + workspace)]
    if last:
        moments += _loss_moments(cut, activations, wgrad)
    if first:
        rest = activations - head_kept - kept[0]
        # what waited, what is new, and their sum
        moments.append(_Moment("embedding", rest, 0, hidden + 2 * held + wgrad))
    return [*moments, _Moment("update", 0, 0, _update_temporary(cut, weights))]


def _loss_moments(cut: RunLayout, activations: int, wgrad: int) -> list[_Moment]:
    """The loss forward, and the output layer's backward."""
    job, t, e = cut.job, cut.tokens, cut.job.element
    full_hidden = t * job.config.hidden_size * e
    vocabulary = cut.padded_vocab_size // cut.tp
    # fp32 logits are turned into the softmax in place, of 16-bit ones there is an fp32 copy
    widened = job.stack.logit_bytes or (FP32 if e == FP32 else e + FP32)
    if (chunk := job.cross_entropy_chunk_size) is not None:
        held = activations + (full_hidden if cut.sequence_parallel else 0)
        some = min(chunk, t) * vocabulary
        grad_hidden = t * job.config.hidden_size * FP32
        return [
            _Moment("loss", held, some * widened, 0),
            _Moment("loss", held, some * widened, grad_hidden + wgrad),
            _Moment("loss", held, some * e, grad_hidden + wgrad + full_hidden),
        ]
    return [
        _Moment("loss", activations, t * vocabulary * widened, 0),
        _Moment("loss", activations, t * vocabulary * e, full_hidden + wgrad),
    ]


def _update_temporary(cut: RunLayout, weights: Parameters) -> int:
    """What summing the gradients, clipping and AdamW make besides the state."""
    return (
        gradient_copy(cut, weights)
        + _joined_weights(cut, weights)
        + _summed_and_clipped(cut, weights)
    )


def _joined_weights(cut: RunLayout, weights: Parameters) -> int:
    """fp32 weights that are made for the update, beside the halves that they are made of."""
    if not cut.reuse_fp32_param or not cut.job.stack.copies_all:
        return 0
    return weights.trained * FP32 // _share(cut)


def _summed_and_clipped(cut: RunLayout, weights: Parameters) -> int:
    # a tensor, or a rank's piece of one
    largest = min(weights.largest, max(weights.buffers) // _share(cut)) * FP32
    widened = 0
    if cut.o2_optimizer:
        # both moments of a tensor in fp32, and its gradient where that is of 16 bits
        widened = (2 + (cut.o2_gradient and not cut.job.stack.copies_all)) * largest
    if cut.job.stack.clips == "in place":
        return widened
    if cut.job.backend == "cuda":
        return weights.trained * FP32 // _share(cut)  # the roots of all second moments at once
    if cut.job.backend == "npu":
        return max(widened, largest)  # the clipped gradient; AdamW works in place
    # torch's fused AdamW clips as it reads; gloo scatters sums out of a copy of all gradients
    scattered = max(weights.buffers) * FP32 if _share(cut) > 1 else 0
    return max(widened, scattered)


def _buffers(cut: RunLayout, stage: int) -> int:
    """Rotary tables, the pipeline's last input and its gradient, megatron-core's gathered input,
    and the communicators' own memory."""
    job = cut.job
    tables = cut.num_chunks * 2 * job.seq_length * job.config.kv_channels * job.element
    # each chunk keeps what it was handed last until it is handed more
    received = 2 * _hidden(cut) * (cut.num_chunks - (stage == 0))
    gathered = 0
    if cut.sequence_parallel and job.lora_rank is None:
        gathered = cut.tokens * job.config.hidden_size * job.element
    # which target each row of an adapter's B belongs to
    owners = _adapter_rows(cut) * job.element * cut.layers_of(stage) if job.lora_rank else 0
    mask = 0
    if job.stack.has_whole_mask:
        mask = job.seq_length**2 + (job.seq_length**2 // cut.cp if cut.cp > 1 else 0)
    held = tables + received + gathered + owners + mask
    if job.backend != "npu":
        return held
    return held + _CAUSAL_MASK + communicators(cut) * HCCL_BYTES


def communicators(cut: RunLayout) -> int:
    """Groups of several ranks that a rank takes part in: world, TP, DP, model parallel (for the
    gradient's norm), the pipeline with each neighbour, and tied embeddings'."""
    groups = [cut.num_devices > 1, cut.tp > 1, cut.replicas > 1, cut.tp * cut.pp > 1, cut.cp > 1]
    pipeline = 0
    if cut.pp > 1:
        pipeline = 1 + min(2, cut.pp - 1) + cut.job.config.tie_word_embeddings
    return sum(groups) + pipeline


# --- a layer --------------------------------------------------------------------------------------


def _hidden(cut: RunLayout) -> int:
    """Bytes of a rank's hidden states of one micro-batch."""
    share = cut.tp if cut.sequence_parallel else 1
    return cut.tokens // share * cut.job.config.hidden_size * cut.job.element


def _row_numbers(cut: RunLayout) -> int:
    """Bytes of what a norm keeps: one fp32 number per token."""
    return cut.tokens // (cut.tp if cut.sequence_parallel else 1) * FP32


def chunk_activations(cut: RunLayout, stage: int) -> list[int]:
    """Bytes that the layers of each of a stage's chunks keep for backward, of one micro-batch."""
    pairs = list(zip(cut.chunk_layers(stage), cut.recomputed_of_chunks(stage), strict=True))
    kept = {pair: _kept_by(cut, *pair) for pair in set(pairs)}
    return [kept[pair] for pair in pairs]


def _kept_by(cut: RunLayout, layers: int, whole: int) -> int:
    """Bytes that so many layers keep, `whole` of which are recomputed."""
    others = layers - whole
    return (
        whole * _hidden(cut)
        + others * _layer_activations(cut, selective=cut.recompute == "selective")
        - min(cut.recompute_activation_function, others) * _activation_function(cut)
        - min(cut.recompute_norm, others) * 2 * _hidden(cut)
        - others * swapped(cut)
    )


def swapped(cut: RunLayout) -> int:
    """Bytes of what a layer's attention keeps that wait in the host's memory: all but its output,
    which linear_proj keeps too. A CPU's tensors are there anyway."""
    if not cut.swap_attention or cut.job.backend == "cpu":
        return 0
    kept = _selective_attention(cut) if cut.recompute == "selective" else _attention(cut)
    context = cut.heads * cut.job.config.kv_channels * cut.job.element
    return cut.tokens * (kept - context)


def _activation_function(cut: RunLayout) -> int:
    """Bytes of SwiGLU's output."""
    return cut.tokens * (cut.job.config.ffn_hidden_size // cut.tp) * cut.job.element


def _layer_activations(cut: RunLayout, *, selective: bool = False) -> int:
    """Bytes that a layer keeps without recomputing, or without what attention's core keeps.

    Twice h: the inputs of both norms; twice h: their outputs, which the matrix products keep; what
    attention keeps; gate and up, SwiGLU's output and in plain torch silu(gate).
    """
    job, t = cut.job, cut.tokens
    kept = 4 * _hidden(cut) + 2 * _row_numbers(cut) + _kept_of_mlp(cut) * _activation_function(cut)
    kept += t * (_selective_attention(cut) if selective else _attention(cut))
    if job.stack.keeps_gathered_inputs and cut.sequence_parallel:
        kept += 2 * (t * job.config.hidden_size * job.element)
    if job.lora_rank is not None:
        # what each adapter's A gives, of 5 + 2 targets, and B spread out under all of them
        kept += (7 * t + _adapter_rows(cut)) * job.lora_rank * job.element
    return kept


def _kept_of_mlp(cut: RunLayout) -> int:
    """Times ffn: gate, up, the output, and in plain torch silu(gate)."""
    return 3 if cut.job.backend == "npu" else 4


def _adapter_rows(cut: RunLayout) -> int:
    """Rows times targets of the modules that have several: linear_qkv and linear_fc1."""
    return (3 * cut.qkv_rows + 2 * 2 * cut.job.config.ffn_hidden_size) // cut.tp


def _attention(cut: RunLayout) -> int:
    """Bytes per token that attention keeps: its inputs, its output and the softmax's statistics.

    v is a view of linear_qkv's output in plain torch, and so keeps it all; torch_npu gets a copy.
    """
    width, e = cut.job.config.kv_channels, cut.job.element
    rotated, context = cut.heads + cut.groups, cut.heads
    statistics = cut.heads * SOFTMAX_STATISTICS[cut.job.backend]
    if cut.job.keeps_scores:
        # and a byte per score for all heads, which of them are hidden
        statistics = _scores(cut) * (FP32 + e) + cut.job.seq_length // cut.micro_batch_size
    elif cut.job.backend == "npu":
        return (rotated + cut.groups + context) * width * e + statistics
    qkv = cut.qkv_rows if cut.shares_groups else cut.qkv_rows // cut.tp
    return (qkv + (rotated + context) * width) * e + statistics


def _scores(cut: RunLayout) -> int:
    """Scores of a token in all heads of a rank; each softmax is kept in fp32 and as it is used."""
    return cut.heads * cut.job.seq_length


def _selective_attention(cut: RunLayout) -> int:
    """linear_qkv's output, from which the rest is computed again, and attention's."""
    return (cut.qkv_rows // cut.tp + cut.heads * cut.job.config.kv_channels) * cut.job.element


def layer_workspace(cut: RunLayout, stage: int) -> int:
    """Bytes that the backward of one layer needs above what all layers keep, at its fullest.

    The layer is the newest of a micro-batch. On its way backward frees what the layer kept, so only
    its beginning, the MLP, can be fuller than all that came before.
    """
    layers, whole = max(cut.chunk_layers(stage)), max(cut.recomputed_of_chunks(stage))
    job, t, e = cut.job, cut.tokens, cut.job.element
    hidden, full_hidden = _hidden(cut), cut.tokens * job.config.hidden_size * job.element
    ffn = _activation_function(cut)
    tensors = layer_tensors(cut)
    train = e if job.lora_rank is None else 0
    gathered = full_hidden if cut.sequence_parallel else 0
    anew = layers > whole and cut.recompute_activation_function >= layers - whole
    # linear_fc2: its input's gradient, its weight's, and its input where that is computed again
    second = gathered + ffn + tensors[6] * train + ffn * anew
    swiglu = 2 * ffn  # gradients of both factors, while they are still kept
    freed = (_kept_of_mlp(cut) - anew) * ffn
    again = hidden * (layers > whole and cut.recompute_norm >= layers - whole)
    first = 2 * ffn + full_hidden + tensors[5] * train - freed + again  # linear_fc1
    norm = hidden + (2 * e + 8) * hidden // e - freed - full_hidden
    if e == FP32:
        norm -= hidden
    moments = [second, swiglu, first, norm]
    if job.keeps_scores:
        # a softmax with its gradient and result, in fp32; the MLP's part is gone or not yet there
        kept_anew = 0 if cut.recompute == "selective" else (FP32 + e)
        moments.append(t * _scores(cut) * (3 * FP32 - kept_anew) - freed - hidden)
    workspace = hidden + max(moments)
    if layers > whole:
        workspace += 2 * swapped(cut)  # what is back of this layer, and of the one before
    if layers == whole:
        # the layer anew, whose input is what was kept, and its output
        workspace += _layer_activations(cut)
    return workspace
