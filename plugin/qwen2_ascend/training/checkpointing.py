"""Training checkpoints: everything a run needs to go on as if it had not stopped.

    SAVE/iter_0000100/     torch_dist, or Megatron's mp_rank tree (`torch`)

Every rank writes its own slices (`saving`), when and how `checkpointer` says. What a rank writes of
the weights is an equal share of what its data-parallel replicas hold; of the optimizer it is what
it updates, or, without the distributed optimizer, an equal share again. Each slice is a few boxes
of the mapping table's views, so both formats resume at any layout, through the splitter's plan, and
a rank reads its own slices only.
"""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state

from qwen2_ascend.checkpoint.formats import (
    megatron,
    megatron_optimizer,
    torch_dist,
    torch_dist_layout,
    torch_pt,
)
from qwen2_ascend.checkpoint.formats.megatron_optimizer import MAIN
from qwen2_ascend.checkpoint.formats.stored import FileLayout
from qwen2_ascend.checkpoint.load import Slices, checks_of, load_slices, unwrap
from qwen2_ascend.checkpoint.megatron_args import megatron_args
from qwen2_ascend.checkpoint.readers.base import Source
from qwen2_ascend.checkpoint.rules import Rule, TensorSlice, megatron_pieces, qwen2_rules
from qwen2_ascend.checkpoint.slices import parts_of
from qwen2_ascend.checkpoint.source import open_states
from qwen2_ascend.checkpoint.target import is_one_range, rule_of, torch_dist_chunk
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.dtypes import DTYPE_NAMES, TORCH_DTYPES
from qwen2_ascend.errors import DamagedError, UserError
from qwen2_ascend.files import write_file
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.training import megatron_state
from qwen2_ascend.training import optimizer as optimizers
from qwen2_ascend.training.checkpointer import Checkpointer, Pending, gathered, host_group
from qwen2_ascend.training.loop import TrainingRun, gathered_parameters
from qwen2_ascend.training.progress import progress_state, restore_progress, with_tensors
from qwen2_ascend.training.rank_files import RNG, RankFiles, rank_folder
from qwen2_ascend.training.rank_state import RankState, own_replica, own_shard
from qwen2_ascend.training.rng_state import rng_state, set_rng_state
from qwen2_ascend.training.saved_run import SavedRun
from qwen2_ascend.training.saving import RankPart, Store
from qwen2_ascend.training.settings import CheckpointSettings

PLACES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "num_layer_list",
)
"""What of a checkpoint's args says which rank holds what."""


@dataclass(frozen=True, kw_only=True)
class CheckpointIdentity:
    """What a checkpoint says about its model, besides the weights."""

    config: Qwen2Config
    layout: ParallelLayout
    padded_vocab_size: int
    dtype: str
    """bf16, fp16 or fp32."""
    side_files: Mapping[Path, bytes]
    """config.json, tokenizer and chat template files, by their place in the checkpoint folder."""

    @property
    def args(self) -> Namespace:
        """Megatron-LM's arguments of the model."""
        return megatron_args(self.config, self.layout, self.padded_vocab_size, self.dtype)

    @property
    def about(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "layout": asdict(self.layout),
            "padded_vocab_size": self.padded_vocab_size,
            "config": asdict(self.config),
        }


# --- saving --------------------------------------------------------------------------------------


def megatron_checkpointer(
    run: TrainingRun, identity: CheckpointIdentity, log: Callable[[str], None]
) -> Checkpointer:
    """What writes the checkpoints of a run of all weights, by its settings' `checkpoint`."""
    writer = MegatronWriter(run, identity)
    return Checkpointer(
        run,
        lay_out=writer.lay_out,
        about={"format": run.settings.checkpoint.ckpt_format, **identity.about},
        side_files=identity.side_files,
        log=log,
    )


class MegatronWriter:
    """Lays out the checkpoints of a run of all weights, in either format."""

    def __init__(self, run: TrainingRun, identity: CheckpointIdentity) -> None:
        self._run, self._identity = run, identity
        self._settings = run.settings.checkpoint
        self._group = host_group(run.runtime)

    def lay_out(self, folder: Path) -> Pending:
        """This rank's part of the state as it is now; every rank calls it."""
        with gathered_parameters(self._run.chunks):
            tensors = self._state.tensors()
        rng = None if self._settings.no_save_rng else rng_state(self._run.runtime)
        if self._settings.ckpt_format == "torch_dist":
            return self._lay_out_torch_dist(tensors, rng)
        return self._rank_files.lay_out(self._common_state(), tensors, rng)

    @property
    def _optimizer(self) -> Any:
        """The optimizer whose state is saved; None with --no-save-optim."""
        return None if self._settings.no_save_optim else self._run.optimizer

    @cached_property
    def _rank_files(self) -> RankFiles:
        layout = self._identity.layout
        return RankFiles(self._run, self._state, self._optimizer, layout, self._group)

    @cached_property
    def _state(self) -> RankState:
        is_once = self._settings.ckpt_format == "torch_dist"
        options = {"is_stored_once": is_once, "with_main": True}
        return _rank_state(self._run, self._identity, self._optimizer, **options)

    @cached_property
    def _rules(self) -> dict[str, Rule]:
        identity = self._identity
        rules = qwen2_rules(identity.config, identity.padded_vocab_size)
        return {rule.megatron: rule for rule in rules}

    @property
    def _sharding_type(self) -> str | None:
        is_distributed = optimizers.is_distributed(self._run.optimizer)
        return megatron_optimizer.FULLY_RESHARDABLE if is_distributed else None

    def _common_state(self) -> dict[str, Any]:
        """What is the same on every rank, in plain values."""
        run, args = self._run, self._identity.args
        vars(args).update(
            iteration=run.progress.iteration,
            consumed_train_samples=run.progress.consumed_samples,
            seq_length=run.settings.batch.seq_length,
            micro_batch_size=run.settings.batch.micro_batch_size,
            global_batch_size=run.global_batch_size,
            use_distributed_optimizer=run.settings.parallel.use_distributed_optimizer,
            overlap_grad_reduce=run.settings.parallel.overlap_grad_reduce,
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            context_parallel_size=parallel_state.get_context_parallel_world_size(),
            sequence_parallel=run.settings.parallel.sequence_parallel,
            seed=run.settings.runtime.seed,
            world_size=run.runtime.world_size,
            ckpt_format=self._settings.ckpt_format,
            no_save_optim=self._settings.no_save_optim,
            no_save_rng=self._settings.no_save_rng,
        )
        return {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": run.progress.iteration,
            **progress_state(run),
            "optimizer_updates": optimizers.num_updates(run.optimizer),
            "loss_scaler": optimizers.scaler_state(run.optimizer),
            "contents": {
                "optimizer": list(self._state.kinds),
                "rng": not self._settings.no_save_rng,
            },
        }

    # torch_dist: a file for each rank

    @cached_property
    def _chunks(self) -> _Chunks:
        """Where this rank's slices lie in its file, the same at every save."""
        state, rank, config = self._state, self._run.runtime.rank, self._identity.config
        file, places = torch_dist_layout.RankFile(f"__{rank}_0.distcp"), []
        for index, (owned, tensor) in enumerate(zip(state.owned, state.tensors(), strict=True)):
            rule, _ = rule_of(owned.piece, self._rules)
            for box, run in parts_of(owned.piece.box, owned.run, joins_blocks=is_one_range(rule)):
                piece = TensorSlice(owned.piece.tensor, box, rule.shape(box))
                dtype = DTYPE_NAMES[owned.written_dtype(tensor)]
                key, chunk = torch_dist_chunk(piece, self._rules, config.num_layers, dtype)
                key = _state_key(owned.kind, key, self._sharding_type)
                place = file.append_tensor(key, chunk)
                name = f"{key}[{','.join(map(str, chunk.offsets))}]"
                within = slice(run.start - owned.run.start, run.stop - owned.run.start)
                places.append(_Place(index, within, name, place.offset, piece.shape))
        entries = gathered(file.entries, self._run.runtime, self._group)
        return _Chunks(file.name, file.layout(), places, [e for rank in entries for e in rank])

    def _lay_out_torch_dist(self, tensors: list[torch.Tensor], rng: Any) -> Pending:
        chunks, objects = self._chunks, self._objects(rng)
        stores = [
            Store(
                place.name,
                chunks.file,
                place.offset,
                place.shape,
                tensors[place.owned][place.within],
                self._state.owned[place.owned].written_dtype(tensors[place.owned]),
            )
            for place in chunks.places
        ]
        files = {
            file: layout
            for file, layout in ((chunks.file, chunks.layout), (objects.name, objects.layout()))
            if layout.total_bytes
        }
        common, scale = self._common_state(), {}
        if (optimizer := self._optimizer) is not None:
            common[megatron_optimizer.KEY] = megatron_state.small_state(optimizer)
            scale = {
                (megatron_optimizer.KEY, *path): tensor.detach().cpu().numpy().tobytes()
                for path, tensor in megatron_state.scale_tensors(optimizer).items()
            }
        common["content_metadata"] = megatron_state.content_metadata(self._run.optimizer)
        entries = gathered(objects.entries, self._run.runtime, self._group)
        entries = [*chunks.entries, *(entry for rank in entries for entry in rank)]

        def finish(folder: Path) -> None:
            for name, data in torch_dist_layout.small_files(entries, common, scale).items():
                write_file(folder / name, data)

        return Pending(part=RankPart(files=files, stores=stores), finish=finish)

    def _objects(self, rng: Any) -> torch_dist_layout.RankFile:
        """What is no tensor: a rank's random number generators, and what Megatron-LM asks for."""
        runtime = self._run.runtime
        file = torch_dist_layout.RankFile(f"__{runtime.rank}_1.distcp")
        if rng is not None and own_replica()[0] == 0:
            data = io.BytesIO()
            torch.save([[rng]], data)
            file.append_object(_rng_key(), data.getvalue())
        if runtime.rank == 0:
            for key in torch_dist_layout.extra_states(self._identity.config.num_layers):
                file.append_object(key)
        return file


class _Place(NamedTuple):
    """Where a part of one of `_owned` lies."""

    owned: int
    within: slice
    name: str
    offset: int
    shape: tuple[int, ...]


class _Chunks(NamedTuple):
    """A rank's file of tensors in torch_dist."""

    file: str
    layout: FileLayout
    places: list[_Place]
    entries: list[torch_dist_layout.Entry]
    """The entries of all ranks; on rank 0."""


def _rank_state(
    run: TrainingRun, identity: CheckpointIdentity, optimizer: Any, **options: bool
) -> RankState:
    """What this rank has of all weights and of their optimizer; `options` are RankState's."""
    parameters = [dict(unwrap(chunk).named_parameters()) for chunk in run.chunks]
    pieces = megatron_pieces(identity.config, identity.layout, identity.padded_vocab_size)
    return RankState(parameters, pieces, optimizer, **options)


def _state_key(kind: str, key: str, sharding_type: str | None) -> str:
    """The key in torch_dist of a weight, or of the optimizer's tensor of it of some kind."""
    if kind == MAIN and sharding_type == megatron_optimizer.FULLY_RESHARDABLE:
        kind = "param"
    return f"optimizer.state.{kind}.{key}" if kind else key


def _rng_key() -> str:
    """One state per tensor/pipeline rank; data-parallel ranks draw alike."""
    tp_rank, pp_stage, _ = own_shard(0)
    sizes = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    return f"{RNG}/shard_{pp_stage}.{tp_rank}_{sizes[0]}.{sizes[1]}"


# --- resuming ------------------------------------------------------------------------------------


def resume(
    run: TrainingRun,
    saved: SavedRun,
    identity: CheckpointIdentity,
    settings: CheckpointSettings,
) -> list[str]:
    """Puts the run where `saved` was; the weights have been loaded already.

    Returns:
        What is not as it was, in words for the log.

    Raises:
        UserError: the checkpoint's optimizer does not fit the model.
    """
    common = saved.common
    # as Megatron-LM: the schedule is the optimizer's
    notes = restore_progress(run, common, with_schedule=not settings.no_load_optim)
    wants_optimizer = not settings.no_load_optim and saved.has_optimizer
    wants_rng = not settings.no_load_rng and common["contents"]["rng"]
    if wants_optimizer and saved.padded_vocab_size != identity.padded_vocab_size:
        raise UserError(
            f"{saved.folder}: its optimizer state has {saved.padded_vocab_size} vocabulary rows, "
            f"not {identity.padded_vocab_size}; leave the padding flags out, or take the weights "
            "alone with --no-load-optim."
        )
    if wants_optimizer:
        _load_optimizer(run, saved, identity)
    elif not settings.no_load_optim:
        notes.append("the checkpoint has no optimizer state: Adam's moments start at zero")
    if wants_rng and _is_same_layout(common["args"], identity):
        set_rng_state(run.runtime, with_tensors(_read_rng(saved, identity)))
    elif wants_rng:
        notes.append("another layout: the random number generators are seeded anew")
    return notes


def _is_same_layout(args: Namespace, identity: CheckpointIdentity) -> bool:
    own = identity.args
    return all(getattr(args, name, None) == getattr(own, name) for name in PLACES)


def _read_rng(saved: SavedRun, identity: CheckpointIdentity) -> Any:
    if megatron.is_torch_dist(saved.folder):
        states = torch_dist.read_object(saved.folder, _rng_key())
    else:
        path = saved.folder / rank_folder(identity.layout) / megatron.PT_FILE
        states = torch_pt.read(path)[RNG]
    if type(states) is not list or not states:
        raise UserError(
            f"{saved.folder}: its {RNG} is not as Megatron-LM writes it; --no-load-rng leaves it "
            "out."
        )
    # Megatron-LM's --data-parallel-random-init has one for each replica
    return states[own_replica()[0] % len(states)]


def _load_optimizer(run: TrainingRun, saved: SavedRun, identity: CheckpointIdentity) -> None:
    """Reads this rank's slices of the optimizer's tensors, in place."""
    sources = _open_states(saved, identity)
    state = _rank_state(run, identity, run.optimizer)

    def load(kind: str, slices: Slices) -> None:
        source = sources[kind]
        checks = checks_of(source, is_whole=False)
        load_slices(slices, source.held, source.config.vocab_size, checks=checks)

    gathered_from_buckets = (*megatron_optimizer.BY_BUCKETS, megatron_optimizer.FULLY_RESHARDABLE)
    if saved.is_foreign and saved.sharding_type in gathered_from_buckets:
        _check_places(saved.folder, state, sources)
    if MAIN in sources and MAIN not in state.kinds:
        load(MAIN, state.whole())  # fp32 after 16 bits goes on from the fp32 weights
    for kind, slices in state.emptied(int(saved.common["optimizer_updates"])).items():
        load(kind if kind in sources else "", slices)  # fp32 weights are their own main weights
    optimizers.load_scaler_state(run.optimizer, saved.common["loss_scaler"])


def _check_places(folder: Path, state: RankState, sources: Mapping[str, Source]) -> None:
    """Each fp32 weight in a bucket, rounded, must be the weight: else they lie otherwise.

    Raises:
        DamagedError: one is not.
    """
    weights, mains = sources[""], sources[MAIN].held
    (dtype,) = {TORCH_DTYPES[name] for name in weights.dtypes}
    for piece, run, weight in state.whole():
        main = torch.empty(weight.shape)
        own = [held for held in mains if held.piece.tensor == piece.tensor]
        load_slices([(piece, run, main)], own, weights.config.vocab_size)
        if not torch.equal(main.to(dtype).to(weight.dtype), weight.cpu()):
            raise DamagedError(
                [
                    f"{folder}: the distributed optimizer's fp32 weights of {piece.tensor} are not "
                    "its weights, so its moments are not its own either; save with --ckpt-format "
                    "torch, or take the weights with --no-load-optim."
                ]
            )


def _open_states(saved: SavedRun, identity: CheckpointIdentity) -> dict[str, Source]:
    """A source for each kind of the optimizer's tensors, and for "", the weights."""
    # padding has moments too: here its rows count as the vocabulary's
    config = replace(identity.config, vocab_size=identity.padded_vocab_size)
    kinds = ["", *saved.common["contents"]["optimizer"]]
    prefixes = {kind: _state_key(kind, "", saved.sharding_type) for kind in kinds}
    return open_states(
        saved.folder,
        config,
        prefixes,
        args=saved.common["args"],
        sharding_type=saved.sharding_type,
    )
