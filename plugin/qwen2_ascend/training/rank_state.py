"""What one rank writes and reads of a training state: weights or adapters, and their optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state

from qwen2_ascend.checkpoint.formats.megatron_optimizer import MAIN, MOMENTS
from qwen2_ascend.checkpoint.plan import volume
from qwen2_ascend.checkpoint.rules import Shard, TensorSlice
from qwen2_ascend.checkpoint.slices import Run, owners, share_of
from qwen2_ascend.training import optimizer as optimizers

Named = tuple[int, str]
"""A parameter: its chunk on this rank, and its name there."""


class Owned(NamedTuple):
    """Elements of one tensor of this rank that this rank writes."""

    chunk: int
    name: str
    """The parameter's."""
    kind: str
    """The kind of the optimizer's tensor; "" is the parameter itself."""
    piece: TensorSlice
    """The box of the whole parameter."""
    run: Run

    def written_dtype(self, tensor: torch.Tensor) -> torch.dtype:
        """The optimizer's tensors are fp32 in a checkpoint, whatever the optimizer keeps."""
        return torch.float32 if self.kind else tensor.dtype


class RankState:
    """The trained parameters of this rank and the optimizer's tensors of those it updates."""

    def __init__(
        self,
        parameters: Sequence[Mapping[str, torch.nn.Parameter]],
        pieces: Mapping[Shard, Mapping[str, TensorSlice]],
        optimizer: Any = None,
        *,
        is_stored_once: bool = True,
        with_main: bool = False,
    ) -> None:
        """Nothing is copied.

        Args:
            parameters: each chunk's parameters, by name.
            pieces: the pieces of all ranks.
            optimizer: None leaves its tensors out of what is written.
            is_stored_once: whether of the ranks that have equal tensors one writes them; else each
                tensor/pipeline rank writes all that it has.
            with_main: whether of fp32 weights the distributed optimizer's main weights are written
                too, as megatron-core does.
        """
        self.parameters = {
            (index, name): parameter
            for index, chunk in enumerate(parameters)
            for name, parameter in chunk.items()
        }
        self._pieces, self._optimizer, self._is_once = pieces, optimizer, is_stored_once
        self._with_main = with_main

    @property
    def kinds(self) -> tuple[str, ...]:
        """The optimizer's tensors that are written of each parameter."""
        if self._optimizer is None:
            return ()
        kinds = optimizers.kinds_of(next(iter(self.parameters.values())))
        if self._with_main and optimizers.is_distributed(self._optimizer):
            kinds = (*MOMENTS, MAIN)
        return kinds

    def piece(self, named: Named) -> TensorSlice:
        """Which box of the whole model a parameter is."""
        return self._pieces[own_shard(named[0])][named[1]]

    @cached_property
    def owned(self) -> list[Owned]:
        """What this rank writes, the same at every save.

        Of the parameters an equal share of what its replicas have; of the optimizer what it
        updates, or an equal share again.
        """
        own = owners(self._pieces) if self._is_once else None
        pieces = {
            named: self.piece(named)
            for named in self.parameters
            if own is None or named[1] in own[own_shard(named[0])]
        }
        sizes = {named: volume(piece.box) for named, piece in pieces.items()}
        share = share_of(sizes, *own_replica())
        owned = [Owned(*named, "", pieces[named], run) for named, run in share.items()]
        if self._optimizer is not None:
            runs = self._updated() if optimizers.is_distributed(self._optimizer) else share
            owned += [
                Owned(*named, kind, pieces[named], run)
                for named, run in runs.items()
                if named in pieces
                for kind in self.kinds
            ]
        return owned

    def _updated(self) -> dict[Named, Run]:
        states = optimizers.state_slices(self._optimizer)
        return {
            named: Run(states[parameter].start, states[parameter].stop)
            for named, parameter in self.parameters.items()
            if parameter in states
        }

    def tensors(self) -> list[torch.Tensor]:
        """The elements of `owned`, flat, where they lie now."""
        states = {} if self._optimizer is None else optimizers.state_slices(self._optimizer)
        tensors = []
        for chunk, name, kind, _, run in self.owned:
            parameter = self.parameters[chunk, name]
            start, tensor = 0, parameter.detach()
            if kind:
                start, tensor = states[parameter].start, states[parameter].tensors[kind]
            tensors.append(tensor.reshape(-1)[run.start - start : run.stop - start])
        return tensors

    def whole(self) -> list[tuple[TensorSlice, Run, torch.Tensor]]:
        """The parameters, to be filled in place, as `load_slices` takes them."""
        return [
            (self.piece(named), Run(0, parameter.numel()), parameter.detach())
            for named, parameter in self.parameters.items()
        ]

    def emptied(self, num_updates: int) -> dict[str, list[tuple[TensorSlice, Run, torch.Tensor]]]:
        """Begins the optimizer's state anew, to be filled in place.

        The parameters must have been loaded before.

        Args:
            num_updates: updates that had been made when the state was saved.

        Returns:
            By kind, of every parameter that this rank updates: its piece, which run of its
            elements, and the tensor that takes them.
        """
        states = optimizers.new_state(self._optimizer, num_updates)
        return {
            kind: [
                (self.piece(named), Run(own.start, own.stop), own.tensors[kind])
                for named, parameter in self.parameters.items()
                if (own := states.get(parameter)) is not None
            ]
            for kind in self.kinds
        }


def own_shard(chunk: int) -> Shard:
    """Which shard of the model one of this rank's chunks is."""
    return Shard(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        chunk,
    )


def own_replica() -> tuple[int, int]:
    """Which of the ranks that hold the same weights this is, and how many there are."""
    return (
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )
