"""Training checkpoints that megatron-core's own code writes and loads, without this project's.

What Megatron-LM's training script adds around megatron-core is here: which keys a file has, and in
which order the parts of a run are put back. Model, optimizer and scheduler write and load
themselves. torch and megatron-core are imported by the ranks only.
"""

from __future__ import annotations

import functools
import random
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2_ascend.training.loop import TrainingRun

RANK_FILE, FLAT_FILE = "model_optim_rng.pt", "distrib_optim.pt"


def write(training: TrainingRun, folder: Path, form: str, sharding_type: str, **args: Any) -> None:
    """Saves a run as Megatron-LM does; every rank calls it.

    Args:
        training: the run.
        folder: for the iteration's folder and what Megatron-LM puts beside it.
        form: torch or torch_dist.
        sharding_type: of the distributed optimizer in torch_dist.
        **args: of Megatron-LM's that are not what they would be.
    """
    import torch

    iteration = training.progress.iteration
    target = folder / f"iter_{iteration:07d}"
    if training.runtime.rank == 0:
        target.mkdir(parents=True)
    torch.distributed.barrier()
    if form == "torch":
        _write_torch(training, target, args)
    else:
        _write_torch_dist(training, target, sharding_type, args)
    torch.distributed.barrier()
    if training.runtime.rank == 0:
        tracker = folder / "latest_checkpointed_iteration.txt"
        tracker.write_text(str(iteration), encoding="utf-8")
    torch.distributed.barrier()


def load(training: TrainingRun, folder: Path, form: str) -> None:
    """Puts a run that has just been built where a checkpoint was, as Megatron-LM does."""
    import torch

    tracker = folder / "latest_checkpointed_iteration.txt"
    target = folder / f"iter_{int(tracker.read_text(encoding='utf-8')):07d}"
    if _is_distributed(training):
        _let_torch_count_updates(training)
    state = _load_torch(target) if form == "torch" else _load_torch_dist(training, target)
    for chunk, key in _chunks(training):
        missing = chunk.load_state_dict(state[key], strict=False).missing_keys
        assert all(name.endswith("_extra_state") for name in missing), missing
    with torch.no_grad():
        training.optimizer.load_state_dict(state["optimizer"])
        if form == "torch" and _is_distributed(training):
            training.optimizer.load_parameter_state(str(target / _rank_folder() / FLAT_FILE))
    if _is_distributed(training):
        _part_counts(training)
    training.schedule.load_state_dict(state["opt_param_scheduler"])
    _set_rng_state(state["rng_state"][0])
    training.progress.iteration = state["iteration"]
    training.progress.consumed_samples = state["args"].consumed_train_samples


def _let_torch_count_updates(training: TrainingRun) -> None:
    """Makes megatron-core's distributed optimizer load with torch's Adam, as with FusedAdam.

    It asks for the state before there is one; it copies each parameter's own number of updates,
    which only torch's Adam has, from a file that has it in the groups; and it gives all parameters
    one tensor with that number, to which Adam adds for each of them (`_part_counts`).
    """

    def with_its_step(part: Any, place: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        group, index = part.model_param_group_index_map[parameter]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][index]]
        place(parameter, {**tensors, "step": state["step"]})

    for part in training.optimizer.chained_optimizers:
        if hasattr(part, "_init_optimizer_states_with_dummy_values"):  # not before 0.13
            part._init_optimizer_states_with_dummy_values()
        place = part._set_main_param_and_optimizer_states
        part._set_main_param_and_optimizer_states = functools.partial(with_its_step, part, place)


def _part_counts(training: TrainingRun) -> None:
    for part in training.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _common(training: TrainingRun, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "args": Namespace(**{**vars(_args(training)), **args}),
        "checkpoint_version": 3.0,
        "iteration": training.progress.iteration,
        "opt_param_scheduler": training.schedule.state_dict(),
        "num_floating_point_operations_so_far": 1.5e12,
    }


def _args(training: TrainingRun) -> Namespace:
    """The few of Megatron-LM's thousand fields that say how a checkpoint is laid out."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType

    parallel, config = training.settings.parallel, training.chunks[0].config
    is_tied = training.chunks[0].module.share_embeddings_and_output_weights
    return Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=None if len(training.chunks) == 1 else 2,
        num_layers_per_virtual_pipeline_stage=parallel.num_layers_per_virtual_pipeline_stage,
        context_parallel_size=1,
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        world_size=training.runtime.world_size,
        untie_embeddings_and_output_weights=not is_tied,
        padded_vocab_size=256,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        ddp_bucket_size=None,
        ddp_num_buckets=None,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        ckpt_fully_parallel_save=True,
        transformer_impl="local",
        params_dtype=torch.bfloat16 if training.settings.precision.bf16 else torch.float32,
        model_type=ModelType.encoder_or_decoder,
        consumed_train_samples=training.progress.consumed_samples,
        consumed_valid_samples=0,
    )


def _chunks(training: TrainingRun) -> list[tuple[Any, str]]:
    from qwen2_ascend.checkpoint.load import unwrap

    chunks = [unwrap(chunk) for chunk in training.chunks]
    return [(c, "model" if len(chunks) == 1 else f"model{i}") for i, c in enumerate(chunks)]


def _is_distributed(training: TrainingRun) -> bool:
    return training.settings.parallel.use_distributed_optimizer


def _rank_folder() -> str:
    from megatron.core import parallel_state

    tp = parallel_state.get_tensor_model_parallel_rank()
    pp = parallel_state.get_pipeline_model_parallel_rank()
    has_stages = parallel_state.get_pipeline_model_parallel_world_size() > 1
    return f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if has_stages else "")


# --- mp_rank trees -------------------------------------------------------------------------------


def _write_torch(training: TrainingRun, target: Path, args: dict[str, Any]) -> None:
    import torch
    from megatron.core import parallel_state

    folder = target / _rank_folder()
    folder.mkdir(exist_ok=True)
    if _is_distributed(training):
        training.optimizer.save_parameter_state(str(folder / FLAT_FILE))
    if parallel_state.get_data_parallel_rank() == 0:
        models = {key: c.state_dict_for_save_checkpoint() for c, key in _chunks(training)}
        optimizer = {"optimizer": training.optimizer.state_dict(), "rng_state": [_rng_state()]}
        torch.save({**_common(training, args), **models, **optimizer}, folder / RANK_FILE)


def _load_torch(target: Path) -> dict[str, Any]:
    import torch

    return torch.load(target / _rank_folder() / RANK_FILE, weights_only=False)


# --- torch_dist ----------------------------------------------------------------------------------


def _write_torch_dist(
    training: TrainingRun, target: Path, sharding_type: str, args: dict[str, Any]
) -> None:
    import numpy as np
    from megatron.core import dist_checkpointing

    from qwen2_ascend.runtime import supported_keywords
    from qwen2_ascend.runtime.megatron_compat import prepare_torch_dist

    prepare_torch_dist()
    if not hasattr(np, "product"):
        np.product = np.prod  # numpy 2 has no more what megatron-core 0.12 calls
    metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if _is_distributed(training):
        metadata["distrib_optim_sharding_type"] = sharding_type
    state = {**_common(training, args), **_sharded(training, metadata, is_loading=False)}
    keywords = supported_keywords(dist_checkpointing.save, content_metadata=metadata)
    dist_checkpointing.save(state, str(target), **keywords)


def _load_torch_dist(training: TrainingRun, target: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    common = dist_checkpointing.load_common_state_dict(str(target))
    metadata = {"distrib_optim_sharding_type": "fully_sharded_model_space"}
    if hasattr(dist_checkpointing, "load_content_metadata"):
        metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    wanted = _sharded(training, metadata, is_loading=True)
    return dist_checkpointing.load(wanted, str(target))


def _sharded(training: TrainingRun, metadata: dict[str, Any], *, is_loading: bool) -> Any:
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from qwen2_ascend.runtime.megatron_compat import megatron_release, virtual_stage

    state: dict[str, Any] = {}
    for index, (chunk, key) in enumerate(_chunks(training)):
        with virtual_stage(index if len(training.chunks) > 1 else None):
            state[key] = chunk.sharded_state_dict(prefix="", metadata=metadata)
    keywords: dict[str, Any] = {"metadata": metadata}
    if megatron_release() < (0, 13):
        keywords = {}
        if _is_distributed(training):
            keywords = {"sharding_type": metadata["distrib_optim_sharding_type"]}
    state["optimizer"] = training.optimizer.sharded_state_dict(
        state, is_loading=is_loading, **keywords
    )
    sizes = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    replica = parallel_state.get_data_parallel_rank()
    state["rng_state"] = ShardedObject("rng_state", [_rng_state()], sizes, place, replica)
    return state


# --- random number generators --------------------------------------------------------------------


def _rng_state() -> dict[str, Any]:
    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    assert torch.is_tensor(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])
