"""The distributed optimizer's state in torch_dist folders that keep it as buckets of parameters."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwen2_ascend.checkpoint.formats import megatron_optimizer
from qwen2_ascend.checkpoint.formats.stored import NUMPY_DTYPES, StoredTensor
from qwen2_ascend.checkpoint.plan import StoredSlice, extent, volume
from qwen2_ascend.checkpoint.readers.base import Source
from qwen2_ascend.checkpoint.rules import TensorSlice, megatron_pieces
from qwen2_ascend.checkpoint.slices import Run, owners, parts_of
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.flags import layer_list
from qwen2_ascend.parallel import ParallelLayout

_UNEVEN = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "noop_layers",
)
"""Megatron-LM's and MindSpeed-LLM's flags for stages that differ."""


def bucket_sources(
    folder: Path, config: Qwen2Config, kinds: Sequence[str], args: Namespace, sharding_type: str
) -> dict[str, Source]:
    """The distributed optimizer's tensors, of which a torch_dist folder has whole buckets."""
    layout = _layout_of_args(folder, args, config)
    pieces = megatron_pieces(config, layout, args.padded_vocab_size)
    segments = megatron_optimizer.read_segments(folder, sharding_type)
    own = owners(pieces)
    held: dict[str, list[StoredSlice]] = {kind: [] for kind in kinds}
    for shard, of_shard in pieces.items():
        names = megatron_optimizer.in_model_order(of_shard, args)
        of_rank = [of for other, of in pieces.items() if other[:2] == shard[:2]]
        num_parameters = sum(volume(piece.box) for of in of_rank for piece in of.values())
        starts, total = megatron_optimizer.flat_starts(
            {name: volume(of_shard[name].box) for name in names},
            alone=megatron_optimizer.own_buckets(args, layout.pp),
            bucket_size=megatron_optimizer.bucket_size(
                args, shard.pp_stage, shard.chunk, num_parameters
            ),
        )
        rank = shard.pp_stage * layout.tp + shard.tp_rank
        for kind in kinds:
            flat = segments.get((rank, shard.chunk, kind), [])
            if (found := megatron_optimizer.total_of(flat)) != total:
                raise UserError(
                    f"{folder}: rank {rank}'s {kind} has {found} elements, not the {total} that "
                    f"{megatron_optimizer.SAID_BY} give its model. --no-load-optim takes the "
                    "weights and begins with new moments."
                )
            for name in own[shard]:
                piece, start = of_shard[name], starts[name]
                for at, stored in megatron_optimizer.cut_out(
                    flat, start, start + volume(piece.box)
                ):
                    run = Run(at, at + stored.shape[0])
                    held[kind] += run_held(name, piece, run, stored)
    return {
        kind: Source(
            kind="mg",
            folder=folder,
            config=config,
            held=tuple(of_kind),
            format="torch_dist",
            padded_vocab_size=args.padded_vocab_size,
        )
        for kind, of_kind in held.items()
    }


def run_held(
    name: str, piece: TensorSlice, run: Run, stored: StoredTensor
) -> Iterator[StoredSlice]:
    """A run of a piece's elements, as boxes."""
    size = NUMPY_DTYPES[stored.dtype].itemsize
    for box, part in parts_of(piece.box, run, joins_blocks=True):
        shape = extent(box)
        offset = stored.offset + (part.start - run.start) * size
        own = stored._replace(offset=offset, shape=shape)
        yield StoredSlice(
            f"{name}[{part.start}:{part.stop}]", TensorSlice(piece.tensor, box, shape), own
        )


def _layout_of_args(folder: Path, args: Namespace, config: Qwen2Config) -> ParallelLayout:
    """How the run that wrote `args` was cut.

    Raises:
        UserError: its stages have layers of their own numbers, in a way that is not implemented.
    """
    odd = [name for name in _UNEVEN if getattr(args, name, None)]
    if odd:
        raise UserError(
            f"{folder}: its optimizer state lies as {', '.join(odd)} cut it, which is not "
            "implemented; save with --ckpt-format torch, or take the weights with --no-load-optim."
        )
    pp = args.pipeline_model_parallel_size
    chunks = getattr(args, "virtual_pipeline_model_parallel_size", None) or 1
    layout = ParallelLayout(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=pp,
        num_layers_per_virtual_pipeline_stage=(
            config.num_layers // (pp * chunks) if chunks > 1 else None
        ),
        num_layer_list=layer_list(getattr(args, "num_layer_list", None) or None),
    )
    layout.check(config, args.padded_vocab_size)
    return layout
