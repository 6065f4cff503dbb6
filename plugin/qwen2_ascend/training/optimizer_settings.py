"""OptimizerSettings and PrecisionSettings: flags of every launcher that trains.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen2_ascend.flags import Flag, flag_of, given_flags, number_faults


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its learning rate; norms and biases have no weight decay."""

    lr: float
    """Highest learning rate."""
    min_lr: float = 0.0
    """Lowest learning rate."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """How the learning rate falls."""
    lr_decay_iters: int | None = None
    """Steps until it has fallen; by default all."""
    lr_warmup_iters: int = 0
    """Steps in which it rises linearly."""
    lr_warmup_fraction: float | None = None
    """The same as a part of the decay steps."""
    lr_warmup_init: float = 0.0
    """Where it rises from."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """How WSD falls in its last phase."""
    lr_wsd_decay_iters: int | None = None
    """Steps of that last phase."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay rate of the running mean of gradients."""
    adam_beta2: float = 0.999
    """Decay rate of the running mean of squared gradients."""
    adam_eps: float = 1e-8
    """Keeps the division by the second mean finite."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    optimizer_cpu_offload: Flag = False
    """Keep fp32 weights and moments in the host's memory and update them there; needs
    --use-distributed-optimizer and --bf16 or --fp16. On a CPU it changes nothing."""
    optimizer_offload_fraction: float = 1.0
    """How much of them; whole tensors are kept there until they are at least so much."""

    def faults(self, precision: PrecisionSettings, use_distributed_optimizer: bool) -> list[str]:
        """What contradicts itself, the precision or the distributed optimizer."""
        betas = {"--adam-beta1": self.adam_beta1, "--adam-beta2": self.adam_beta2}
        faults = number_faults(
            self,
            at_least_one=("lr_decay_iters", "lr_wsd_decay_iters"),
            not_negative=(
                "lr_warmup_iters",
                "lr_warmup_init",
                "min_lr",
                "weight_decay",
                "clip_grad",
            ),
            above_zero=("lr", "adam_eps"),
        )
        faults += [
            f"{k} {v} must be from 0 to below 1." for k, v in betas.items() if not 0 <= v < 1
        ]
        faults += self._unscheduled_faults()
        return faults + self._offload_faults(precision, use_distributed_optimizer)

    def schedule_faults(self, train_iters: int) -> list[str]:
        """What is wrong with the learning rate's way through a run of so many steps."""
        faults = []
        if self.min_lr > self.lr:
            faults.append(f"--min-lr {self.min_lr} is above --lr {self.lr}.")
        if self.lr_warmup_init > self.lr:
            faults.append(f"--lr-warmup-init {self.lr_warmup_init} is above --lr {self.lr}.")
        if (fraction := self.lr_warmup_fraction) is not None:
            if not 0 <= fraction < 1:
                faults.append(f"--lr-warmup-fraction {fraction} must be from 0 to below 1.")
            if self.lr_warmup_iters:
                faults.append("--lr-warmup-iters and --lr-warmup-fraction: give one of them.")
        if faults:
            return faults
        decay, last = self.lr_decay_iters or train_iters, self.lr_wsd_decay_iters
        if 0 < decay <= self.lr_warmup_iters:
            faults.append(
                f"--lr-warmup-iters {self.lr_warmup_iters} must be below the {decay} steps in "
                "which the learning rate falls."
            )
        if self.lr_decay_style == "WSD":
            if last is None:
                faults.append("--lr-decay-style WSD needs --lr-wsd-decay-iters.")
            elif 0 < decay < last:
                faults.append(
                    f"--lr-wsd-decay-iters {last} is above the {decay} steps of the decay."
                )
        return faults

    def _unscheduled_faults(self) -> list[str]:
        """Flags about a part of the learning rate's way that it does not have."""
        faults = []
        if self.lr_decay_style != "WSD":
            given = given_flags(self, ("lr_wsd_decay_style", "lr_wsd_decay_iters"))
            faults += [f"{flag} needs --lr-decay-style WSD." for flag in given]
        if self.lr_warmup_init and not (self.lr_warmup_iters or self.lr_warmup_fraction):
            faults.append(
                f"--lr-warmup-init {self.lr_warmup_init} needs --lr-warmup-iters or "
                "--lr-warmup-fraction."
            )
        return faults

    def _offload_faults(
        self, precision: PrecisionSettings, use_distributed_optimizer: bool
    ) -> list[str]:
        """What --optimizer-cpu-offload needs and excludes."""
        flag, fraction = "--optimizer-cpu-offload", self.optimizer_offload_fraction
        if not 0 < fraction <= 1:
            return [
                f"--optimizer-offload-fraction {fraction:g} must be above 0 and at most 1; to "
                f"offload nothing, leave {flag} out."
            ]
        if not self.optimizer_cpu_offload:
            return [] if fraction == 1 else [f"--optimizer-offload-fraction needs {flag}."]
        faults = [
            f"{flag} and {flag_of(name)}: give one of them; both change what the optimizer keeps."
            for name in ("reuse_fp32_param", "o2_optimizer")
            if getattr(precision, name)
        ]
        if not use_distributed_optimizer:
            faults.append(f"{flag} needs --use-distributed-optimizer, as in Megatron-LM.")
        if not (precision.bf16 or precision.fp16):
            faults.append(
                f"{flag} needs --bf16 or --fp16: megatron-core's hybrid optimizer cannot take "
                "slices of fp32 weights."
            )
        return faults


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings:
    """Number formats, and what happens when numbers run out."""

    bf16: Flag = False
    """Compute in bf16 with fp32 main weights; neither flag means fp32 throughout."""
    fp16: Flag = False
    """Compute in fp16 with fp32 main weights and loss scaling."""
    reuse_fp32_param: Flag = False
    """With --bf16: between updates keep of the fp32 weights only what the bf16 ones lack, 2 bytes
    each instead of 4; nothing else changes."""
    o2_gradient: Flag = False
    """With --bf16: add up and reduce gradients in bf16, which takes 2 bytes each instead of 4 and
    costs precision."""
    o2_optimizer: Flag = False
    """With --bf16: keep Adam's two moments in bf16, which takes 2 bytes each instead of 4 and costs
    precision, most of it where --adam-beta2 is above 0.998."""
    loss_scale: float | None = None
    """A fixed loss scale; by default fp16 finds it."""
    initial_loss_scale: float = 2.0**32
    """First loss scale that is tried."""
    min_loss_scale: float = 1.0
    """Lowest loss scale."""
    loss_scale_window: int = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: int = 2
    """Overflows until the scale is halved."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When the loss or the gradient norm is not finite: end the run, or go on without that update.
    The weights are not touched either way."""

    def notes(self, optimizer: OptimizerSettings) -> list[str]:
        """What a log says of the precision that these flags cost."""
        notes = []
        if self.o2_gradient:
            notes.append("--o2-gradient: gradients are added up and reduced in bf16")
        if self.o2_optimizer:
            notes.append("--o2-optimizer: Adam's moments are in bf16")
            if 1 - optimizer.adam_beta2 < 2**-9:
                notes.append(
                    f"--o2-optimizer: with --adam-beta2 {optimizer.adam_beta2:g} second moments "
                    "never fall, as a step lowers them by less than bf16 resolves; use 0.95, as "
                    "MindSpeed-LLM's scripts do"
                )
        return notes

    def faults(self) -> list[str]:
        """What contradicts itself."""
        faults = number_faults(
            self,
            at_least_one=("loss_scale_window", "hysteresis"),
            above_zero=("loss_scale", "initial_loss_scale", "min_loss_scale"),
        )
        if self.bf16 and self.fp16:
            faults.append("--bf16 and --fp16: give one of them.")
        faults += self._scale_faults()
        if self.reuse_fp32_param and not self.bf16:
            faults.append(
                "--reuse-fp32-param needs --bf16: other weights are no halves of fp32 ones."
            )
        faults += [
            f"{flag_of(name)} needs --bf16, as in MindSpeed-LLM."
            for name in ("o2_gradient", "o2_optimizer")
            if getattr(self, name) and not self.bf16
        ]
        return faults

    def _scale_faults(self) -> list[str]:
        """What would not scale the loss.

        Published scripts give --initial-loss-scale with --bf16, which never scales; that may stay.
        """
        if self.loss_scale is None:
            return []
        if not (self.bf16 or self.fp16):
            return ["--loss-scale needs --fp16 or --bf16; in fp32 nothing is scaled."]
        dynamic = ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
        found = given_flags(self, dynamic)
        if not (found and self.fp16):
            return []
        return [
            f"--loss-scale {self.loss_scale:g} is fixed, so {', '.join(found)} would have no "
            "effect; leave one out."
        ]
