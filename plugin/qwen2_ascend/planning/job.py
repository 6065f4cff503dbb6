"""What is to be trained, and one way to cut it over devices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.parallel import ParallelLayout, padded_vocab_size

Recompute = Literal["none", "selective", "full"]
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Of a weight or an activation."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What does not depend on how it is cut."""

    config: Qwen2Config
    seq_length: int
    """Tokens in a sequence."""
    global_batch_size: int
    """Sequences per optimizer step, over all devices."""
    dtype: str = "bf16"
    """Of weights and activations: bf16, fp16 or fp32."""
    backend: str = "npu"
    """Whose operators run, cpu, cuda or npu: they keep different tensors for backward."""
    keeps_scores: bool = False
    """--attention-backend unfused: attention's matrix of scores is in memory."""
    cross_entropy_chunk_size: int | None = None
    """Tokens whose logits exist at once; None keeps all."""
    lora_rank: int | None = None
    """Rank of LoRA adapters on all linear layers; None trains all weights."""

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.dtype]

    @property
    def tokens_per_step(self) -> int:
        return self.seq_length * self.global_batch_size


@dataclass(frozen=True, kw_only=True)
class Cut:
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
    """Of a stage, where `recompute` is full; None is all of them."""
    recompute_activation_function: bool = False
    """SwiGLU's output is computed again in backward."""
    recompute_norm: bool = False
    """So are the norms' outputs."""
    reuse_fp32_param: bool = False
    """fp32 weights are there in the update only; between updates 2 bytes of each are."""
    micro_batch_size: int = 1
    num_layer_list: tuple[int, ...] | None = None
    """Layers of each stage; None where all have as many."""
    cp: int = 1
    """Context-parallel ranks, which share a sequence."""
    ulysses: int = 1
    """Of those, the ranks that exchange heads; the others pass keys and values round a ring."""
    mc2: bool = False
    """Matrix products overlap with the collectives of tensor parallelism (MC2, COC)."""
    overlap_grad_reduce: bool = False

    @property
    def layout(self) -> ParallelLayout:
        return ParallelLayout(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            num_layers_per_virtual_pipeline_stage=self.layers_per_chunk,
            num_layer_list=self.num_layer_list,
        )

    @property
    def num_devices(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def replicas(self) -> int:
        """Ranks with the same weights, which share the distributed optimizer's state."""
        return self.dp * self.cp

    @cached_property
    def num_microbatches(self) -> int:
        """Of each data-parallel rank in a step."""
        return self.job.global_batch_size // (self.dp * self.micro_batch_size)

    def layers_of(self, stage: int) -> int:
        """Layers of a pipeline stage."""
        if self.num_layer_list is not None:
            return self.num_layer_list[stage]
        return self.job.config.num_layers // self.pp

    def recomputed(self, stage: int) -> int:
        """Layers of a stage whose forward runs again in backward."""
        if self.recompute != "full":
            return 0
        layers = self.layers_of(stage)
        return layers if self.recomputed_layers is None else min(self.recomputed_layers, layers)

    @cached_property
    def num_chunks(self) -> int:
        """Model chunks of a stage; 1 without an interleaved pipeline."""
        return self.layers_of(0) // (self.layers_per_chunk or self.layers_of(0))

    @cached_property
    def tokens(self) -> int:
        """Of a micro-batch on one rank."""
        return self.micro_batch_size * self.job.seq_length // self.cp

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
        """As in a table: TP8 PP4 VPP2 DP4."""
        words = [f"TP{self.tp}", f"PP{self.pp}"]
        if self.num_chunks > 1:
            words.append(f"VPP{self.num_chunks}")
        if self.cp > 1:
            words.append(f"CP{self.cp}")
        return " ".join([*words, f"DP{self.dp}"])
