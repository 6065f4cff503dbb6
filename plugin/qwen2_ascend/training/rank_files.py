"""Files of Megatron's mp_rank tree: a tensor/pipeline rank's, which all its replicas fill."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch

from qwen2_ascend.checkpoint.formats import megatron, megatron_optimizer, torch_pt
from qwen2_ascend.checkpoint.formats.stored import FileLayout, TensorSpec
from qwen2_ascend.checkpoint.plan import volume
from qwen2_ascend.dtypes import DTYPE_NAMES
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.training import megatron_state
from qwen2_ascend.training.checkpointer import Pending
from qwen2_ascend.training.loop import TrainingRun
from qwen2_ascend.training.megatron_state import InFile
from qwen2_ascend.training.rank_state import Named, Owned, RankState, own_replica, own_shard
from qwen2_ascend.training.saving import RankPart, Store

RNG = "rng_state"


class RankFiles:
    """Lays out the files of this tensor/pipeline rank.

    Args:
        run: the weights' run.
        state: what this rank has of it, and what it writes.
        optimizer: whose state is saved, if it is.
        layout: how the model is cut.
        group: as `host_group` has it.
    """

    def __init__(
        self,
        run: TrainingRun,
        state: RankState,
        optimizer: Any,
        layout: ParallelLayout,
        group: Any,
    ) -> None:
        self._run, self._state, self._optimizer, self._group = run, state, optimizer, group
        self._names = [
            megatron.model_key(index, len(run.chunks)) for index in range(len(run.chunks))
        ]
        self._folder = rank_folder(layout)

    def lay_out(self, state: dict[str, Any], tensors: list[torch.Tensor], rng: Any) -> Pending:
        """This rank's part of the files; every rank calls it.

        Args:
            state: what every rank has alike; the rest is added.
            tensors: those of what this rank owns.
            rng: the states of its random number generators, if they are saved.
        """
        optimizer, key = self._optimizer, megatron_optimizer.KEY
        small: dict[torch_pt.KeyPath, torch.Tensor] = {}
        flat = None
        if optimizer is not None:
            state[key], _, flat = megatron_state.laid_state(optimizer)
            scale = megatron_state.scale_tensors(optimizer)
            small |= {(key, *path): tensor for path, tensor in scale.items()}
        for (index, name), parameter in self._state.parameters.items():
            model = state.setdefault(self._names[index], OrderedDict())
            model[name] = TensorSpec(tuple(parameter.shape), DTYPE_NAMES[parameter.dtype])
        if rng is not None:
            state[RNG] = _with_specs([rng])
            small |= _tensors_in([rng], (RNG,))
        layouts = {megatron.PT_FILE: torch_pt.layout_pt(state, name="model_optim_rng")}
        if flat is not None:
            file = megatron_optimizer.FLAT_FILE
            layouts[file] = torch_pt.layout_pt(flat, name="distrib_optim")
        return Pending(part=self._part(layouts, tensors, small))

    @cached_property
    def _places(self) -> dict[tuple[Named, str], InFile]:
        """Where the file, or two, have the tensors of every kind of each parameter."""
        places = {
            ((index, name), ""): InFile(megatron.PT_FILE, (self._names[index], name))
            for index, name in self._state.parameters
        }
        if self._optimizer is None:
            return places
        laid = megatron_state.laid_state(self._optimizer).places
        for named, parameter in self._state.parameters.items():
            places |= {(named, kind): laid[parameter, kind] for kind in self._state.kinds}
        return places

    def _part(
        self,
        layouts: Mapping[str, torch_pt.PtLayout],
        tensors: list[torch.Tensor],
        small: Mapping[torch_pt.KeyPath, torch.Tensor],
    ) -> RankPart:
        """What this rank writes of the files.

        Args:
            layouts: by the files' names. The first replica's are written, as the text of its random
                number generators has its own length.
            tensors: those of what it owns.
            small: tensors that only the first replica writes, by their paths in the first file.
        """
        replica, folder = own_replica()[0], self._folder
        told = {file: (layout.total_bytes, layout.offsets) for file, layout in layouts.items()}
        told = self._of_first_replica(told)
        stores = [
            self._store(owned, tensor, told)
            for owned, tensor in zip(self._state.owned, tensors, strict=True)
        ]
        if replica == 0:
            offsets = told[megatron.PT_FILE][1]
            file = f"{folder}/{megatron.PT_FILE}"
            stores += (
                Store("/".join(map(str, path)), file, offsets[path], tuple(t.shape), t)
                for path, t in small.items()
            )
        files = {
            f"{folder}/{file}": FileLayout(
                total_bytes=told[file][0], segments=layout.segments if replica == 0 else ()
            )
            for file, layout in layouts.items()
        }
        return RankPart(files=files, stores=stores)

    def _store(
        self, owned: Owned, tensor: torch.Tensor, told: Mapping[str, tuple[int, Mapping]]
    ) -> Store:
        """Where a tensor of what this rank owns goes; `told` has each file's length and offsets."""
        model, dtype = self._names[owned.chunk], owned.written_dtype(tensor)
        file, path, start = self._places[(owned.chunk, owned.name), owned.kind]
        offset = told[file][1][path] + (start + owned.run.start) * dtype.itemsize
        name = f"{model}/{owned.name}" if len(self._names) > 1 else owned.name
        if owned.kind:
            name = f"{megatron_optimizer.KEY}/{model}/{owned.name}/{owned.kind}"
        shape = owned.piece.shape
        if tensor.numel() < volume(owned.piece.box):
            name, shape = f"{name}[{owned.run.start}:{owned.run.stop}]", tuple(tensor.shape)
        return Store(name, f"{self._folder}/{file}", offset, shape, tensor, dtype)

    def _of_first_replica(self, value: Any) -> Any:
        """What the first of this rank's data-parallel replicas calls with."""
        values: list[Any] = [None] * self._run.runtime.world_size
        torch.distributed.all_gather_object(
            values, (own_shard(0), value) if own_replica()[0] == 0 else None, group=self._group
        )
        return next(
            own for told in values if told for shard, own in [told] if shard == own_shard(0)
        )


def rank_folder(layout: ParallelLayout) -> str:
    """The folder, in an iteration's, of this tensor/pipeline rank."""
    tp_rank, pp_stage, _ = own_shard(0)
    return megatron.rank_folder_name(tp_rank, pp_stage, layout.pp)


def _with_specs(tree: Any) -> Any:
    """The same containers with a TensorSpec for every tensor."""
    if isinstance(tree, torch.Tensor):
        return TensorSpec(tuple(tree.shape), DTYPE_NAMES[tree.dtype])
    if isinstance(tree, Mapping):
        return {key: _with_specs(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_with_specs(value) for value in tree)
    return tree


def _tensors_in(tree: Any, path: torch_pt.KeyPath) -> dict[torch_pt.KeyPath, torch.Tensor]:
    """Every tensor by its path."""
    if isinstance(tree, torch.Tensor):
        return {path: tree.contiguous()}
    if isinstance(tree, Mapping):
        items: Iterable[tuple[Any, Any]] = tree.items()
    else:
        items = enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    found = {}
    for key, value in items:
        found |= _tensors_in(value, (*path, key))
    return found
