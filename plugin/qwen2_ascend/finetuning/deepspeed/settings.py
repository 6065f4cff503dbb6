"""Every flag of `launch/finetune_qwen2_deepspeed.py`: those of fine-tuning, and ZeRO's.

The groups are `finetuning.settings`'s. What has no meaning here is `Absent`: it keeps its default
and is no flag, so that whoever gives it is told, and all code that reads settings goes on working.
Nothing here imports torch, so `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar

import tyro

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import Faults, raise_if
from qwen2_ascend.finetuning import settings as finetuning
from qwen2_ascend.finetuning.deepspeed.config import (
    ZeroSettings,
    deepspeed_config,
    offloads_optimizer,
    zero_stage,
)
from qwen2_ascend.finetuning.settings import FinetuneSettings, TuningSettings
from qwen2_ascend.flags import Flag
from qwen2_ascend.parallel import ContextParallelAlgorithm
from qwen2_ascend.planning.job import Zero
from qwen2_ascend.training.fusion import FusionSettings
from qwen2_ascend.training.length import RunLength
from qwen2_ascend.training.megatron_flags import parse_training_flags
from qwen2_ascend.training.optimizer_settings import OptimizerSettings, PrecisionSettings
from qwen2_ascend.training.overlap import OverlapSettings
from qwen2_ascend.training.recompute_settings import RecomputeSettings
from qwen2_ascend.training.settings import (
    CheckpointSettings,
    ModelSettings,
    ParallelSettings,
    RuntimeSettings,
)

T = TypeVar("T")
Absent = tyro.conf.Fixed[tyro.conf.Suppress[T]]
"""A setting that is no flag."""


@dataclass(frozen=True, kw_only=True)
class ZeroModelSettings(ModelSettings):
    """Which model, and where its weights come from."""

    padded_vocab_size: Absent[int | None] = None
    make_vocab_size_divisible_by: Absent[int | None] = None


@dataclass(frozen=True, kw_only=True)
class ZeroParallelSettings(ParallelSettings):
    """Every rank computes whole sequences: all ranks are data parallel."""

    tensor_model_parallel_size: Absent[int] = 1
    pipeline_model_parallel_size: Absent[int] = 1
    num_layers_per_virtual_pipeline_stage: Absent[int | None] = None
    num_layer_list: Absent[str | None] = None
    sequence_parallel: Absent[bool] = False
    context_parallel_size: Absent[int] = 1
    context_parallel_algo: Absent[ContextParallelAlgorithm] = "megatron_cp_algo"
    use_distributed_optimizer: Absent[bool] = False
    overlap_grad_reduce: Absent[bool] = False
    overlap_param_gather: Absent[bool] = False


@dataclass(frozen=True, kw_only=True)
class ZeroOverlapSettings(OverlapSettings):
    """There is no tensor parallelism."""

    use_ascend_mc2: Absent[bool] = False
    use_ascend_coc: Absent[bool] = False
    coc_parallel_num: Absent[int] = 1
    coc_fused_kernel: Absent[bool] = False


@dataclass(frozen=True, kw_only=True)
class ZeroRecomputeSettings(RecomputeSettings):
    """Activations that are computed again in backward rather than kept."""

    recompute_granularity: Literal["full"] | None = None
    """full: keep the inputs of layers only."""
    recompute_method: Literal["uniform"] | None = None
    """The method of full recomputing: uniform, for every layer."""
    recompute_num_layers: Literal[1] | None = None
    """The layers of a unit of full recomputing: 1."""
    recompute_activation_function: Absent[bool] = False
    recompute_activation_function_num_layers: Absent[int | None] = None
    recompute_norm: Absent[bool] = False
    recompute_norm_num_layers: Absent[int | None] = None
    swap_attention: Absent[bool] = False
    cross_entropy_chunk_size: Absent[int | None] = None


@dataclass(frozen=True, kw_only=True)
class ZeroOptimizerSettings(OptimizerSettings):
    """AdamW and its learning rate; norms and biases have no weight decay."""

    optimizer_cpu_offload: Absent[bool] = False
    optimizer_offload_fraction: Absent[float] = 1.0


@dataclass(frozen=True, kw_only=True)
class ZeroPrecisionSettings(PrecisionSettings):
    """Number formats, and what happens when numbers run out."""

    reuse_fp32_param: Absent[bool] = False
    o2_gradient: Absent[bool] = False
    o2_optimizer: Absent[bool] = False


@dataclass(frozen=True, kw_only=True)
class ZeroFusionSettings(FusionSettings):
    """Fused kernels: attention, on an npu. The other layers are transformers' own."""

    use_fused_rmsnorm: Absent[bool] = False
    use_fused_rotary_pos_emb: Absent[bool] = False
    use_fused_swiglu: Absent[bool] = False
    use_fused_adamw: Absent[bool] = False
    no_fused_rmsnorm: Absent[bool] = True
    no_fused_rotary_pos_emb: Absent[bool] = True
    no_fused_swiglu: Absent[bool] = True
    no_fused_adamw: Absent[bool] = True


@dataclass(frozen=True, kw_only=True)
class ZeroCheckpointSettings(CheckpointSettings):
    """What is written, and what of a checkpoint is read."""

    ckpt_format: Absent[Literal["torch_dist", "torch"]] = "torch_dist"
    no_save_optim: Flag = False
    """Write the Hugging Face folder alone: smaller, but the run cannot be resumed exactly."""


@dataclass(frozen=True, kw_only=True)
class ZeroRuntimeSettings(RuntimeSettings):
    """The machine."""

    mindspeed: Absent[bool] = False
    no_mindspeed: Absent[bool] = True


@dataclass(frozen=True, kw_only=True)
class ZeroTuningSettings(TuningSettings):
    """How long is learnt from the data."""

    stage: Absent[Literal["sft", "dpo"]] = "sft"
    dpo_beta: Absent[float] = 0.1
    dpo_loss_type: Absent[Literal["sigmoid", "hinge", "ipo"]] = "sigmoid"
    dpo_label_smoothing: Absent[float] = 0.0
    pref_ftx: Absent[float] = 0.0


@dataclass(frozen=True, kw_only=True)
class ZeroFinetuneSettings(FinetuneSettings):
    """Fine-tune Qwen2 / Qwen2.5 on chats by DeepSpeed ZeRO: all weights or LoRA.

    torchrun --nproc-per-node 4 launch/finetune_qwen2_deepspeed.py --load Qwen2.5-0.5B --zero-stage
    3 --data-path chats.jsonl --seq-length 1024 --pack --global-batch-size 16 --num-train-epochs 3
    --lr 1e-5 --bf16 --save out --save-hf tuned

    launch/finetune_qwen2.py has the rest: tensor and pipeline parallelism, and DPO.
    """

    by_deepspeed: ClassVar[bool] = True

    zero: ZeroSettings = field(default_factory=ZeroSettings)
    model: ZeroModelSettings = field(default_factory=ZeroModelSettings)
    parallel: ZeroParallelSettings = field(default_factory=ZeroParallelSettings)
    overlap: ZeroOverlapSettings = field(default_factory=ZeroOverlapSettings)
    optimizer: ZeroOptimizerSettings
    precision: ZeroPrecisionSettings = field(default_factory=ZeroPrecisionSettings)
    recompute: ZeroRecomputeSettings = field(default_factory=ZeroRecomputeSettings)
    fusion: ZeroFusionSettings = field(default_factory=ZeroFusionSettings)
    checkpoint: ZeroCheckpointSettings = field(default_factory=ZeroCheckpointSettings)
    runtime: ZeroRuntimeSettings = field(default_factory=ZeroRuntimeSettings)
    tuning: ZeroTuningSettings = field(default_factory=ZeroTuningSettings)

    @property
    def unplanned(self) -> list[str]:
        unknown = {
            "LoRA by DeepSpeed": self.lora.is_on,
            "--attention-backend unfused by DeepSpeed": self.fusion.attention_backend
            in ("unfused", "local"),
        }
        return [*(name for name, is_given in unknown.items() if is_given), *super().unplanned]

    def planned_zero(self, world_size: int, device: str) -> Zero:
        """What the planner has to know of DeepSpeed's configuration.

        Raises:
            UserError: its file cannot be read, or contradicts the flags.
        """
        config = deepspeed_config(self.zero, self, world_size, device)
        said = config["zero_optimization"]
        # DeepSpeed's older names of stage 3's settings
        threshold = said.get("stage3_param_persistence_threshold")
        given = {**said, "param_persistence_threshold": threshold}
        known = ("reduce_bucket_size", "sub_group_size", "param_persistence_threshold")
        return Zero(
            stage=zero_stage(config),
            offload_optimizer=offloads_optimizer(config),
            offload_param=said.get("offload_param", {}).get("device", "none") != "none",
            overlap_comm=said.get("overlap_comm"),
            **{name: int(given[name]) for name in known if given.get(name) is not None},
        )


def parse(arguments: Sequence[str] | None = None) -> ZeroFinetuneSettings:
    """The command line; on a fault it prints and exits with 2, printing on rank 0 only."""
    return parse_training_flags(ZeroFinetuneSettings, "finetune_qwen2_deepspeed.py", arguments)


def validate(
    settings: ZeroFinetuneSettings,
    config: Qwen2Config,
    world_size: int,
    made: RunLength | None = None,
) -> None:
    """Checks everything that can be checked before any process group exists.

    The arguments are those of `training.settings.validate`.

    Raises:
        UserError: all faults at once.
    """
    faults = Faults()
    faults.collect(lambda: finetuning.validate(settings, config, world_size, made))
    faults.collect(
        lambda: deepspeed_config(settings.zero, settings, world_size, settings.runtime.device)
    )
    raise_if(faults + _saving_faults(settings))


def _saving_faults(settings: ZeroFinetuneSettings) -> list[str]:
    """What cannot be asked of the files of all weights, which DeepSpeed writes itself."""
    if settings.lora.is_on:
        return []
    checkpoint, faults = settings.checkpoint, []
    if checkpoint.async_save:
        faults.append(
            "--async-save: DeepSpeed writes all weights while training waits; leave it out, or "
            "tune adapters: --lora-r."
        )
    if checkpoint.on_save_failure == "continue":
        faults.append(
            "--on-save-failure continue: where DeepSpeed cannot write all weights the run ends; "
            "leave it out, or tune adapters: --lora-r."
        )
    return faults
