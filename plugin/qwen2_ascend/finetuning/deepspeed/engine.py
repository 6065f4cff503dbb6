"""transformers' Qwen2 in DeepSpeed's engine, as a TrainingRun: what a step and a validation are.

DeepSpeed averages gradients over ranks, however many tokens each has. The loss that is handed to it
is therefore the rank's sum times the number of ranks, divided by the tokens of the global batch:
the mean over ranks of that is the mean over all tokens, in any cut of the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config as HuggingFaceConfig
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from qwen2_ascend.checkpoint.transformers_model import Whole, as_it_is, load_weights, shape_of
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.dtypes import TORCH_DTYPES
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning.deepspeed.attention import register_attention
from qwen2_ascend.finetuning.deepspeed.config import (
    deepspeed_config,
    offloads_optimizer,
    zero_stage,
)
from qwen2_ascend.finetuning.deepspeed.lora import add_adapters, load_adapter
from qwen2_ascend.finetuning.deepspeed.settings import ZeroFinetuneSettings
from qwen2_ascend.runtime import Runtime
from qwen2_ascend.runtime.deepspeed import import_deepspeed
from qwen2_ascend.training.loop import (
    Batch,
    MicroBatchLoss,
    NonFiniteError,
    Progress,
    StepResult,
    StepTotals,
    TrainingRun,
    all_gather_losses,
    describe_nonfinite,
    on_device,
    on_host,
    read_batches,
    take,
)
from qwen2_ascend.training.optimizer import is_finite
from qwen2_ascend.training.plan import RunPlan
from qwen2_ascend.training.schedule import build_schedule, current_lr

logger = logging.getLogger(__name__)

INITIALIZER_RANGE = 0.02


@dataclass(kw_only=True)
class ZeroRun(TrainingRun):
    """A run whose steps are DeepSpeed's; `optimizer` is its ZeRO optimizer."""

    engine: Any
    stage: int
    whole: Whole

    @property
    def model(self) -> Any:
        """transformers' Qwen2ForCausalLM."""
        return self.engine.module

    def batches_of(self, dataset: Any, consumed_samples: int = 0) -> Iterator[Batch | None]:
        """This rank's micro-batches of a dataset."""
        return read_batches(self, dataset, consumed_samples)

    def step(self, batches: Iterator[Batch | None], *, stop_wanted: bool = False) -> StepResult:
        """Does what `TrainingRun.step` does.

        Raises:
            NonFiniteError: loss or gradient norm are not finite, and `on_nonfinite` is "stop".
        """
        lr, engine = current_lr(self.schedule), self.engine
        taken = self._on_device(take(self, batches))
        weight = self.runtime.world_size / max(self._num_tokens(taken), 1)
        reports = []
        for index, batch in enumerate(taken):
            if index:
                engine.step()  # counts micro-batches until the last one's, which is below
            total, _, report = self.objective(self._token_losses(batch), batch)
            engine.backward(total * weight, scale_wrt_gas=False)
            reports.append(report)
        losses = on_host(reports)
        totals = all_gather_losses(self, losses, stop_wanted)
        may_stop = self.settings.precision.on_nonfinite == "stop"
        if not is_finite(totals.loss) and may_stop and not self._can_lower_loss_scale():
            raise NonFiniteError(describe_nonfinite(self, losses, totals.loss, float("nan")))
        return self._update(totals, losses, lr)

    def losses(self, batches: list[Batch | None]) -> list[MicroBatchLoss]:
        """What the objective reports of micro-batches, without backward."""
        taken = self._on_device(batches)
        return on_host([self.objective(self._token_losses(batch), batch)[2] for batch in taken])

    def loss_scale(self) -> float:
        """What the loss is multiplied by before backward."""
        return float(self.optimizer.loss_scale) if self.settings.precision.fp16 else 1.0

    def _on_device(self, batches: list[Batch | None]) -> list[Batch]:
        return [on_device(batch, self.runtime) for batch in batches if batch is not None]

    def _num_tokens(self, batches: Sequence[Batch]) -> int:
        """Tokens that have a loss, in the global batch."""
        own = sum(batch["loss_mask"].sum() for batch in batches)
        count = torch.as_tensor(own, device=self.runtime.device).to(torch.int64)
        torch.distributed.all_reduce(count)
        return int(count)

    def _token_losses(self, batch: Batch) -> torch.Tensor:
        """The loss of every token, `[b, s]`."""
        packed = {"ends": batch["ends"]} if "ends" in batch else {}
        output = self.engine(
            input_ids=batch["tokens"],
            position_ids=batch["position_ids"],
            use_cache=False,
            **packed,
        )
        labels = batch["labels"]
        logits = output.logits.float().flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")
        return losses.view(labels.shape)

    def _can_lower_loss_scale(self) -> bool:
        """Whether an overflow is what a dynamic loss scale expects, and has an answer to."""
        precision = self.settings.precision
        is_dynamic = precision.fp16 and precision.loss_scale is None
        return is_dynamic and self.loss_scale() > precision.min_loss_scale

    def _update(self, totals: StepTotals, losses: list[MicroBatchLoss], lr: float) -> StepResult:
        """DeepSpeed's update, which it leaves out where a gradient is not finite."""
        may_overflow = self._can_lower_loss_scale()
        self.before_update()
        self.engine.step()
        updated = not self.optimizer.overflow
        grad_norm = float(self.engine.get_global_grad_norm()) if updated else float("nan")
        overflow = not updated and may_overflow and is_finite(totals.loss)
        if not updated and not overflow and self.settings.precision.on_nonfinite == "stop":
            raise NonFiniteError(describe_nonfinite(self, losses, totals.loss, grad_norm))
        if updated:
            self.schedule.step(increment=self.global_batch_size)
        return self.finish_step(
            totals, grad_norm=grad_norm, lr=lr, updated=updated, overflow=overflow
        )


def build_zero_run(
    plan: RunPlan[ZeroFinetuneSettings],
    runtime: Runtime,
    *,
    train_data: Any,
    valid_data: Any = None,
    adapter: Path | None = None,
) -> ZeroRun:
    """Model, weights, optimizer, engine and schedule, at iteration 0.

    Args:
        train_data: as long as the run.
        valid_data: None where its loss is not asked for.
        adapter: a PEFT folder with their values, else they change nothing at first.

    Raises:
        UserError: DeepSpeed is not there, its configuration contradicts the flags, or the weights
            do not fit.
    """
    settings, source, lora = plan.settings, plan.source, plan.lora
    deepspeed = import_deepspeed(runtime)
    if settings.precision.fp16 and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        raise UserError(f"--fp16: DeepSpeed does not compute in fp16 on a {runtime.name}; --bf16.")
    config = deepspeed_config(settings.zero, settings, runtime.world_size, runtime.name)
    stage = zero_stage(config)
    logger.info(f"DeepSpeed {deepspeed.__version__}, ZeRO stage {stage}{_offloads(config)}")
    whole: Whole = deepspeed.zero.GatheredParameters if stage == 3 else as_it_is
    model = _build_model(deepspeed, settings, plan.config, runtime, config)
    if source is not None:
        load_weights(model, source, whole, reads=stage < 3 or runtime.rank == 0)
        logger.info(f"weights: {source.describe()}")
    else:
        _initialize_weights(model, whole, seed=settings.runtime.seed)
        logger.info(f"weights: random, seed {settings.runtime.seed}")
    if lora is not None:
        dtype = TORCH_DTYPES[settings.precision_name()]
        like = {"dtype": dtype, "device": runtime.device}
        add_adapters(model, lora, seed=settings.runtime.seed, **like)
        if adapter is not None:
            load_adapter(model, plan.config, lora, adapter)
        logger.info(lora.describe(adapter))
    adam = _build_adam(model, settings, config)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=adam, config=config)
    engine.train()
    return ZeroRun(
        settings=settings,
        runtime=runtime,
        chunks=[engine],
        optimizer=optimizer,
        schedule=build_schedule(optimizer, settings.optimizer, plan.length),
        length=plan.length,
        train_data=train_data,
        valid_data=valid_data,
        progress=Progress(),
        engine=engine,
        stage=stage,
        whole=whole,
    )


def _build_model(
    deepspeed: Any,
    settings: ZeroFinetuneSettings,
    config: Qwen2Config,
    runtime: Runtime,
    ds_config: dict[str, Any],
) -> torch.nn.Module:
    """transformers' model on the device, with any weights; with ZeRO-3 each rank has its part."""
    fusion = settings.fusion
    hf_config = HuggingFaceConfig(**config.to_hugging_face())
    hf_config._attn_implementation = register_attention(
        fusion.backend(runtime.name), plain=set(fusion.plain) & {"attention"}
    )
    if zero_stage(ds_config) == 3:
        # its own argument dtype turns fp32 into bf16 where fp16 is not supported, as on a CPU
        with deepspeed.zero.Init(config_dict_or_path=ds_config):
            model = Qwen2ForCausalLM(hf_config)
        # zero.Init makes every new tensor of the weights' dtype: too coarse for the angles
        for name, buffer in Qwen2RotaryEmbedding(hf_config).named_buffers():
            setattr(model.model.rotary_emb, name, buffer.to(runtime.device))
    else:
        model = Qwen2ForCausalLM(hf_config)
        model.to(runtime.device)  # pyright: ignore[reportArgumentType]  # a decorator hides `to`
        for parameter in model.parameters():
            parameter.data = parameter.data.to(TORCH_DTYPES[settings.precision_name()])
    if settings.recompute.recompute_granularity == "full":
        # the name of transformers 5, and that of 4
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": True})
    return model


def _initialize_weights(model: torch.nn.Module, whole: Whole, *, seed: int) -> None:
    """Random weights, the same on every rank: normal matrices, zero biases, unit norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with whole([parameter], modifier_rank=0), torch.no_grad():
            if parameter.dim() > 1:
                drawn = torch.empty(parameter.shape).normal_(generator=generator)
                parameter.copy_(drawn * INITIALIZER_RANGE)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _build_adam(
    model: torch.nn.Module, settings: ZeroFinetuneSettings, config: dict[str, Any]
) -> torch.optim.Optimizer:
    """AdamW with Megatron's groups: norms and biases have no weight decay."""
    ours = settings.optimizer
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if len(shape_of(p)) > 1], "wd_mult": 1.0},
        {"params": [p for p in parameters if len(shape_of(p)) == 1], "wd_mult": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    keywords: dict[str, Any] = {
        "lr": ours.lr,
        "betas": (ours.adam_beta1, ours.adam_beta2),
        "eps": ours.adam_eps,
        "weight_decay": ours.weight_decay,
    }
    if offloads_optimizer(config) and config.get("zero_force_ds_cpu_optimizer", True):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **keywords)
    return torch.optim.AdamW(groups, **keywords)


def _offloads(config: dict[str, Any]) -> str:
    zero = config["zero_optimization"]
    devices = {
        name: zero.get(f"offload_{name}", {}).get("device") for name in ("optimizer", "param")
    }
    return "".join(f", {name} on {device}" for name, device in devices.items() if device)
