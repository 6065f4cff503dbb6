"""What is to be trained, and one way to cut it over devices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.parallel import ContextParallelAlgorithm, ParallelLayout, padded_vocab_size

Recompute = Literal["none", "selective", "full"]
ALL_LAYERS = 1 << 20
"""More than any model has."""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a weight or an activation."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What a trainer's code holds that another's of the same model does not; ours by default."""

    logit_bytes: int | None = None
    """Bytes of a logit at the loss: 16-bit logits, their fp32 copy, softmax; None is in-place
    fp32."""
    clips: Literal["copy", "in place"] = "copy"
    """Whether clipping copies a gradient at a time, or multiplies it where it is."""
    keeps_gathered_inputs: bool = False
    """Sequence parallelism keeps what linear_qkv and linear_fc1 gathered until backward."""
    has_whole_mask: bool = False
    """The data loader puts a mask of s x s bytes onto the device, and each context-parallel rank
    copies its rows of it."""
    copies_all: bool = True
    """Whether an update makes fp32 copies of all that a rank updates at once (weights joined from
    their halves, 16-bit gradients beside 16-bit moments), or of a tensor at a time."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What does not depend on how it is cut."""

    config: Qwen2Config
    seq_length: int
    """Tokens in a sequence."""
    global_batch_size: int
    """Sequences per optimizer step, over all devices; pairs of them with `pairs`."""
    dtype: str = "bf16"
    """The dtype of weights and activations: bf16, fp16 or fp32."""
    backend: str = "npu"
    """The operators that run, cpu, cuda or npu: they keep different tensors for backward."""
    keeps_scores: bool = False
    """--attention-backend unfused: attention's matrix of scores is in memory."""
    cross_entropy_chunk_size: int | None = None
    """Tokens whose logits exist at once; None keeps all."""
    lora_rank: int | None = None
    """Rank of LoRA adapters on all linear layers; None trains all weights."""
    pairs: bool = False
    """A sample is two sequences, the chosen and the rejected one (DPO)."""
    stack: Stack = Stack()
    """The trainer."""

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.dtype]

    @property
    def tokens_per_sample(self) -> int:
        """Tokens of one of `global_batch_size`."""
        return self.seq_length * (2 if self.pairs else 1)

    @property
    def tokens_per_step(self) -> int:
        return self.tokens_per_sample * self.global_batch_size


@dataclass(frozen=True, kw_only=True)
class Zero:
    """DeepSpeed's ZeRO; names and defaults are those of its zero_optimization."""

    stage: int
    """1, 2 or 3."""
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket_size: int = 500_000_000
    """Elements of a buffer that gradients are collected in; DeepSpeed makes all of it at once."""
    param_persistence_threshold: int = 100_000
    """Elements below which stage 3 keeps a tensor whole."""
    sub_group_size: int = 1_000_000_000
    """Elements that stage 3 updates at once."""
    overlap_comm: bool | None = None
    """Collects in one buffer while another is summed; None is in stage 3 alone."""

    @property
    def buckets(self) -> int:
        """Buffers; stage 3 has one all the same."""
        return 2 if self.overlap_comm and self.stage < 3 else 1


@dataclass(frozen=True, kw_only=True)
class RunLayout:
    """One way to run a Job."""

    job: Job
    tp: int = 1
    pp: int = 1
    dp: int = 1
    layers_per_chunk: int | None = None
    """num_layers_per_virtual_pipeline_stage; None without an interleaved pipeline."""
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: Recompute = "none"
    recomputed_layers: int | None = None
    """Layers of a stage that full `recompute` takes, spread evenly over its chunks; None is all."""
    recompute_activation_function: int = 0
    """The layers of each chunk, after those that are recomputed whole, whose SwiGLU output is
    computed again in backward; ALL_LAYERS is all."""
    recompute_norm: int = 0
    """The layers whose norms' outputs are."""
    swap_attention: bool = False
    """What attention keeps waits in the host's memory."""
    reuse_fp32_param: bool = False
    """fp32 weights are there in the update only; between updates 2 bytes of each are."""
    micro_batch_size: int = 1
    o2_gradient: bool = False
    """Gradients are added up in 16 bits."""
    o2_optimizer: bool = False
    """AdamW keeps its moments in 16 bits."""
    zero: Zero | None = None
    """DeepSpeed trains, and not megatron-core."""
    optimizer_offload_fraction: float = 0.0
    """The share of the fp32 weights and moments that the host keeps and updates; a run rounds it up
    to whole tensors, which is not counted."""
    num_layer_list: tuple[int, ...] | None = None
    """Layers of each stage; None where all have as many."""
    noop_layers: tuple[int, ...] = ()
    """Numbers of layers that do nothing and have no weights, counted among all; the model's
    `num_layers` are the others."""
    cp: int = 1
    """Context-parallel ranks, which share a sequence."""
    ulysses: int = 1
    """The ranks among them that exchange heads; the others pass keys and values round a ring."""
    gathers_keys: bool = False
    """Context-parallel ranks gather all keys and values (kvallgather_cp_algo)."""
    mc2: bool = False
    """Matrix products overlap with the collectives of tensor parallelism (MC2, COC)."""
    coc_parallel_num: int = 1
    """The pieces that COC cuts a product into, with `mc2`; 1 is MC2."""
    overlap_grad_reduce: bool = False

    @property
    def layout(self) -> ParallelLayout:
        return ParallelLayout(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            num_layers_per_virtual_pipeline_stage=self.layers_per_chunk,
            num_layer_list=self.num_layer_list,
            context_parallel_size=self.cp,
            context_parallel_algo=self.context_parallel_algo,
        )

    @property
    def context_parallel_algo(self) -> ContextParallelAlgorithm:
        """How ranks exchange keys and values."""
        if self.gathers_keys:
            return "kvallgather_cp_algo"
        return "ulysses_cp_algo" if self.ulysses > 1 else "megatron_cp_algo"

    @property
    def num_devices(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def replicas(self) -> int:
        """Ranks with the same weights, which share the distributed optimizer's state."""
        return self.dp * self.cp

    @cached_property
    def num_microbatches(self) -> int:
        """Micro-batches of each data-parallel rank in a step."""
        return self.job.global_batch_size // (self.dp * self.micro_batch_size)

    def layers_of(self, stage: int) -> int:
        """Layers of a pipeline stage."""
        if self.num_layer_list is not None:
            return self.num_layer_list[stage]
        if not self.noop_layers:
            return self.job.config.num_layers // self.pp
        return sum(self.chunk_layers(stage))

    def chunk_layers(self, stage: int) -> tuple[int, ...]:
        """Layers of each of a stage's model chunks."""
        if not self.noop_layers:
            return (self.layers_of(stage) // self.num_chunks,) * self.num_chunks
        numbers = self.layout.stages(self._num_places)[stage]
        return tuple(sum(number not in self.noop_layers for number in chunk) for chunk in numbers)

    @property
    def _num_places(self) -> int:
        return self.job.config.num_layers + len(self.noop_layers)

    def recomputed(self, stage: int) -> int:
        """Layers of a stage whose forward runs again in backward."""
        if self.recompute != "full":
            return 0
        return sum(self.recomputed_of_chunks(stage))

    def recomputed_of_chunks(self, stage: int) -> tuple[int, ...]:
        """Layers of each of a stage's chunks whose forward runs again, the first of it."""
        layers, number = self.chunk_layers(stage), self.recomputed_layers
        if self.recompute != "full":
            return (0,) * len(layers)
        if number is None:
            return layers
        shares = (-((chunk - number) // len(layers)) for chunk in range(len(layers)))
        return tuple(max(min(some, n), 0) for some, n in zip(shares, layers, strict=True))

    @cached_property
    def num_chunks(self) -> int:
        """Model chunks of a stage; 1 without an interleaved pipeline."""
        return self.layout.virtual_pipeline_size(self._num_places) or 1

    @cached_property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.micro_batch_size * self.job.tokens_per_sample // self.cp

    @cached_property
    def vocabulary_is_padded(self) -> bool:
        """Whether the vocabulary has to be padded for this tensor parallel size."""
        return self.job.config.vocab_size % self.tp != 0

    @cached_property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding over all tensor-parallel ranks."""
        by = 128 if self.vocabulary_is_padded else None
        return padded_vocab_size(self.job.config, self.tp, divisible_by=by)

    @cached_property
    def heads(self) -> int:
        """Query heads of a rank."""
        return self.job.config.num_attention_heads // self.tp

    @cached_property
    def groups(self) -> int:
        """Key/value heads that a rank attends with."""
        return max(self.job.config.num_query_groups // self.tp, 1)

    @cached_property
    def qkv_rows(self) -> int:
        """Rows of linear_qkv over all ranks."""
        config = self.job.config
        return (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels

    @property
    def shares_groups(self) -> bool:
        """More ranks than key/value heads: each gathers the rows of all."""
        return self.tp > self.job.config.num_query_groups

    def is_last(self, stage: int) -> bool:
        """Whether `stage` holds the output layer."""
        return stage == self.pp - 1

    def label(self) -> str:
        """The name in a table: TP8 PP4 VPP2 DP4."""
        words = [f"TP{self.tp}", f"PP{self.pp}"]
        if self.num_chunks > 1:
            words.append(f"VPP{self.num_chunks}")
        if self.cp > 1:
            words.append(f"CP{self.cp}")
        return " ".join([*words, f"DP{self.dp}"])
