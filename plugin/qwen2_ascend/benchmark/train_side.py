"""One side of the training benchmark: builds a model, and makes some steps for each line it reads.

All sides begin at the same weights and read the same batches, so their losses have to be equal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_ascend.benchmark.device import measured, refuse_simulated, started_runtime
from qwen2_ascend.benchmark.sides import serve
from qwen2_ascend.checkpoint.load import load_checkpoint_weights
from qwen2_ascend.checkpoint.source import open_source
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.pretrained import open_pretrained
from qwen2_ascend.runtime import supported_keywords
from qwen2_ascend.training import settings as s
from qwen2_ascend.training.fusion import FusionSettings
from qwen2_ascend.training.optimizer_settings import OptimizerSettings, PrecisionSettings
from qwen2_ascend.training.plan import make_plan

if TYPE_CHECKING:
    from qwen2_ascend.runtime import Runtime
    from qwen2_ascend.training.loop import TrainingRun
    from qwen2_ascend.training.plan import RunPlan

SEED = 1234


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a side does; everything that the command line of its process says."""

    side: str
    """A key of `BUILDERS`."""
    folder: str
    """Hugging Face folder with the weights."""
    device: str
    dtype: str
    """fp32 or bf16."""
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    """Sequences of a step on the one device."""
    max_steps: int
    """More are never asked for."""
    lr: float = 1e-4
    clip_grad: float = 1.0
    weight_decay: float = 0.01
    use_distributed_optimizer: bool = False
    """Whether all ranks, which are data-parallel, share the optimizer's state."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What each side is reduced to."""

    step: Callable[[], float]
    """One optimizer step; its loss."""
    runtime: Runtime
    model: Any
    optimizer: Any


def main(argument: str) -> None:
    """Serves the standard input, each line a number of steps, until it ends."""
    serve(lambda: partial(_measured, _trainer_of(Work(**json.loads(argument)))))


def _trainer_of(work: Work) -> Trainer:
    trainer = BUILDERS[work.side](work)
    refuse_simulated(trainer.runtime)
    return trainer


def _measured(trainer: Trainer, num_steps: int) -> dict[str, Any]:
    losses, figures = measured(trainer.runtime, lambda: [trainer.step() for _ in range(num_steps)])
    return {**figures, "losses": losses}


def _ours(work: Work, *, plain: bool = False) -> Trainer:
    run, _ = build_ours(work, plain=plain)
    batches = run.batches()
    return Trainer(
        step=lambda: run.step(batches).loss,
        runtime=run.runtime,
        model=run.chunks[0],
        optimizer=run.optimizer,
    )


def build_ours(work: Work, *, plain: bool = False) -> tuple[TrainingRun, RunPlan]:
    """The run that `launch/pretrain_qwen2.py` makes, `plain` without fused kernels; its plan."""
    fusion = FusionSettings()
    if plain:
        fused = ("rmsnorm", "rotary_pos_emb", "swiglu", "adamw")
        off = {f"no_fused_{name}": True for name in fused}
        fusion = FusionSettings(attention_backend="unfused", **off)
    settings = s.PretrainSettings(
        model=s.ModelSettings(load=Path(work.folder)),
        parallel=s.ParallelSettings(use_distributed_optimizer=work.use_distributed_optimizer),
        batch=s.BatchSettings(
            micro_batch_size=work.micro_batch_size,
            global_batch_size=work.global_batch_size,
            seq_length=work.seq_length,
            train_iters=work.max_steps,
        ),
        optimizer=OptimizerSettings(
            lr=work.lr,
            lr_decay_style="constant",
            clip_grad=work.clip_grad,
            weight_decay=work.weight_decay,
        ),
        precision=PrecisionSettings(bf16=work.dtype == "bf16"),
        fusion=fusion,
        data=s.DataSettings(mock_data=True),
        runtime=s.RuntimeSettings(device=work.device, seed=SEED),  # pyright: ignore
    )
    from qwen2_ascend.training.start import start_runtime

    plan = make_plan(settings)
    runtime = start_runtime(plan)
    from qwen2_ascend.training.pretrain import prepare  # megatron-core, after the start

    return prepare(plan, runtime), plan


def build_transformers(work: Work) -> Trainer:
    """transformers with SDPA, and what its Trainer does by default: autocast, fused AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    runtime = started_runtime(work.device)
    model: Any = open_pretrained(
        AutoModelForCausalLM, work.folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.to(runtime.device).train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": work.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=work.lr, fused=True)
    batches = _batches(work, runtime)
    num_microbatches = work.global_batch_size // work.micro_batch_size
    in_bf16 = torch.autocast(runtime.name, torch.bfloat16, enabled=work.dtype == "bf16")

    def step() -> float:
        total = 0.0
        for batch in islice(batches, num_microbatches):
            labels = batch["labels"]
            with in_bf16:
                output = model(batch["tokens"], labels=labels, shift_labels=labels, use_cache=False)
            loss = output.loss / num_microbatches
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, work.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return Trainer(step=step, runtime=runtime, model=model, optimizer=optimizer)


def build_megatron_core(work: Work) -> Trainer:
    """megatron-core's GPTModel with its own local layer spec, its data parallelism and optimizer.

    Its kernels of Megatron-LM's CUDA extensions are off: the package does not have them.
    """
    runtime = started_runtime(work.device, for_megatron=True)

    import torch
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model, config = _megatron_model(work, runtime)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=work.use_distributed_optimizer
    )
    config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(config, ddp_config, model)
    optimizer = _megatron_optimizer(work, wrapped, config.params_dtype)
    config.grad_scale_func = optimizer.scale_loss
    ones = torch.ones(1, 1, work.seq_length, work.seq_length, dtype=torch.bool)
    mask = ones.triu_(1).to(runtime.device)  # what is not seen, as Megatron-LM's data loader has it
    batches = _batches(work, runtime)
    forward_backward = get_forward_backward_func()
    num_microbatches = work.global_batch_size // work.micro_batch_size

    def step() -> float:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        losses = forward_backward(
            forward_step_func=partial(_megatron_forward, mask),
            data_iterator=batches,
            model=[wrapped],
            num_microbatches=num_microbatches,
            seq_length=work.seq_length,
            micro_batch_size=work.micro_batch_size,
            forward_only=False,
        )
        optimizer.step()
        return float(sum(losses)) / num_microbatches

    return Trainer(step=step, runtime=runtime, model=model, optimizer=optimizer)


def _megatron_model(work: Work, runtime: Any) -> tuple[Any, Any]:
    """The model with its weights, and its TransformerConfig."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from qwen2_ascend.model.build import transformer_config
    from qwen2_ascend.runtime import initialize_model_parallel

    source, layout = open_source(Path(work.folder)), ParallelLayout()
    initialize_model_parallel(layout, source.config.num_layers)
    runtime.seed_all(SEED)
    config = transformer_config(
        source.config, layout, dtype=work.dtype, masked_softmax_fusion=False
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=source.config.vocab_size,
        max_sequence_length=source.config.max_position_embeddings,
        share_embeddings_and_output_weights=source.config.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=int(source.config.rotary_base),
    )
    vocab_size = source.config.vocab_size
    load_checkpoint_weights(
        [model], source, layout, padded_vocab_size=vocab_size, tp_rank=0, pp_stage=0
    )
    return model.to(runtime.device), config


def _megatron_optimizer(work: Work, wrapped: Any, params_dtype: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    keywords = dict(
        optimizer="adam",
        lr=work.lr,
        min_lr=work.lr,
        weight_decay=work.weight_decay,
        clip_grad=work.clip_grad,
        bf16=work.dtype == "bf16",
        params_dtype=params_dtype,
        use_distributed_optimizer=work.use_distributed_optimizer,
    )
    settings = OptimizerConfig(**supported_keywords(OptimizerConfig, **keywords))
    return get_megatron_optimizer(settings, [wrapped])


def _megatron_forward(mask: Any, batches: Iterator[Any], model: Any) -> Any:
    batch = next(batches)
    losses = model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"])

    def mean(losses: Any) -> Any:
        loss = losses.float().mean()
        return loss, loss.detach().clone()  # the schedule divides the returned one in place

    return losses, mean


def _batches(work: Work, runtime: Any) -> Iterator[dict[str, Any]]:
    """The micro-batches that `_ours` reads, in its order."""
    from torch.utils.data import default_collate

    from qwen2_ascend.training.mock_data import MockDataset

    vocab_size = Qwen2Config.from_pretrained(work.folder).vocab_size
    num_samples = work.max_steps * work.global_batch_size
    data = MockDataset(num_samples, work.seq_length, vocab_size, seed=SEED)
    for start in range(0, num_samples, work.micro_batch_size):
        batch = default_collate([data[start + i] for i in range(work.micro_batch_size)])
        yield {name: value.to(runtime.device) for name, value in batch.items()}


BUILDERS: dict[str, Callable[[Work], Trainer]] = {
    "ours": _ours,
    "ours-plain": partial(_ours, plain=True),
    "transformers": build_transformers,
    "megatron-core": build_megatron_core,
}

if __name__ == "__main__":
    main(sys.argv[1])
