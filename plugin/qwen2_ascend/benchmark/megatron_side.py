"""What the benchmarks measure of plain megatron-core: it trains, and dist_checkpointing saves that.

It is imported when the runtime has started.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from qwen2_ascend.benchmark.work import SEED, State, Trainer, Work, batches, optimized
from qwen2_ascend.checkpoint.load import load_checkpoint_weights
from qwen2_ascend.checkpoint.source import open_source
from qwen2_ascend.model.build import transformer_config
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.runtime import Runtime, initialize_model_parallel, supported_keywords
from qwen2_ascend.runtime.megatron_compat import prepare_torch_dist


def trainer(work: Work, runtime: Runtime) -> Trainer:
    """megatron-core's GPTModel with its own local layer spec, its data parallelism and optimizer.

    Its kernels of Megatron-LM's CUDA extensions are off: the package does not have them.
    """
    model, config = _model(work, runtime)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=work.use_distributed_optimizer
    )
    config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(config, ddp_config, model)
    optimizer = _optimizer(work, wrapped, config.params_dtype)
    config.grad_scale_func = optimizer.scale_loss
    ones = torch.ones(1, 1, work.seq_length, work.seq_length, dtype=torch.bool)
    mask = ones.triu_(1).to(runtime.device)  # what is not seen, as Megatron-LM's data loader has it
    read = batches(work, runtime)
    forward_backward = get_forward_backward_func()
    num_microbatches = work.global_batch_size // work.micro_batch_size

    def step() -> float:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        losses = forward_backward(
            forward_step_func=partial(_forward, mask),
            data_iterator=read,
            model=[wrapped],
            num_microbatches=num_microbatches,
            seq_length=work.seq_length,
            micro_batch_size=work.micro_batch_size,
            forward_only=False,
        )
        optimizer.step()
        return float(sum(losses)) / num_microbatches

    return Trainer(step=step, runtime=runtime, model=model, optimizer=optimizer)


def _model(work: Work, runtime: Any) -> tuple[Any, Any]:
    """The model with its weights, and its TransformerConfig."""
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


def _optimizer(work: Work, wrapped: Any, params_dtype: Any) -> Any:
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


def _forward(mask: Any, batches: Iterator[Any], model: Any) -> Any:
    batch = next(batches)
    losses = model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"])

    def mean(losses: Any) -> Any:
        loss = losses.float().mean()
        return loss, loss.detach().clone()  # the schedule divides the returned one in place

    return losses, mean


def state(work: Work, runtime: Runtime) -> State:
    """megatron-core's own, as its documentation has it: sharded_state_dict, save, load.

    On several ranks they share the writing as Megatron-LM's --ckpt-fully-parallel-save has it.
    """
    made = trainer(work, runtime)
    made.step()
    prepare_torch_dist()

    is_ranked = work.use_distributed_optimizer
    group: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {
        "distrib_optim_sharding_type": "dp_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": group,
    }
    keywords = {"metadata": metadata} if is_ranked else {}

    def sharded(*, is_loading: bool) -> dict[str, Any]:
        model = made.model.sharded_state_dict(**keywords)
        optimizer = made.optimizer.sharded_state_dict(model, is_loading=is_loading, **keywords)
        return {"model": model, "optimizer": optimizer}

    def save(folder: Path) -> None:
        if torch.distributed.get_rank() == 0:
            folder.mkdir()
        torch.distributed.barrier()
        strategy: Any = TorchDistSaveShardedStrategy("torch_dist", 1)
        if is_ranked:
            strategy = FullyParallelSaveStrategyWrapper(strategy, group)
        dist_checkpointing.save(sharded(is_loading=False), str(folder), strategy)

    def load(folder: Path) -> None:
        # its fully parallel loading broadcasts between devices only
        state: Any = dist_checkpointing.load(sharded(is_loading=True), str(folder))
        made.model.load_state_dict(state["model"])
        with torch.no_grad():
            made.optimizer.load_state_dict(state["optimizer"])

    return State(save=save, load=load, tensors=lambda: optimized(made.optimizer, made.model))
