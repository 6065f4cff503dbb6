"""Genuine megatron-core saves what we read, and loads what we lay out (distributed/harness.py)."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

import numpy as np
from format_helpers import fill, stored_bytes, write_layout

from distributed.harness import Checks, Run, main
from helpers import tiny_config
from qwen2_ascend.checkpoint.formats import torch_dist
from qwen2_ascend.checkpoint.formats.stored import NUMPY_DTYPES, TensorSpec
from qwen2_ascend.checkpoint.formats.torch_dist_layout import (
    ChunkSpec,
    extra_states,
    layout_torch_dist,
)
from qwen2_ascend.parallel import ParallelLayout

if TYPE_CHECKING:
    from pathlib import Path

CHECKS = Checks()
LAYOUT = ParallelLayout(tensor_model_parallel_size=2)
BF16 = NUMPY_DTYPES["bf16"]
OF_TRANSFORMER_ENGINE = {
    "decoder.final_layernorm._extra_state/shard_0_1",
    *(f"decoder.layers.self_attention.core_attention._extra_state/shard_{i}_4" for i in range(4)),
}
"""Objects that megatron-core's other layer spec asks for, on NVIDIA's cards."""


def gpt_model(run: Run, *, tied: bool, spec: str = "ours", padded_vocab_size: int = 256):
    """This rank's half of a toy model with random weights, of our layer spec or megatron-core's."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from qwen2_ascend import runtime
    from qwen2_ascend.model.build import build_model, transformer_config
    from qwen2_ascend.runtime.megatron_compat import prepare_torch_dist

    prepare_torch_dist()
    config = tiny_config(tie_word_embeddings=tied)
    runtime.initialize_model_parallel(LAYOUT, config.num_layers)
    run.runtime.seed_all(1)
    if spec == "ours":
        options: dict[str, Any] = {"padded_vocab_size": padded_vocab_size, "dtype": "bf16"}
        model = build_model(config, LAYOUT, **options)[0]
    else:
        model = GPTModel(
            transformer_config(config, LAYOUT, dtype="bf16"),
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=padded_vocab_size,
            max_sequence_length=128,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=tied,
        ).bfloat16()
    own, common = (torch.Generator().manual_seed(seed) for seed in (run.runtime.rank, 7))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            generator = common if "layernorm" in name else own
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def own_shards(model) -> list[Any]:
    """megatron-core's ShardedTensors of this rank, fused ones taken apart."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


def box_of(shard) -> tuple[slice, ...]:
    shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    return tuple(slice(o, o + n) for o, n in zip(shard.global_offset, shape, strict=True))


def assert_equal(shards, whole: dict[str, np.ndarray]) -> None:
    """Every shard's bytes are those of its box of the whole tensor."""
    import torch

    for shard in shards:
        box = whole[shard.key][box_of(shard)]
        ours = shard.data.detach().contiguous().view(torch.int16).numpy()
        assert ours.tobytes() == box.tobytes(), f"{shard.key} at {shard.global_offset}"


def save_and_read(tied: bool, run: Run) -> str:
    import torch
    from megatron.core import dist_checkpointing

    model = gpt_model(run, tied=tied)
    folder = run.folder / f"saved-{tied}"
    if run.runtime.rank == 0:
        folder.mkdir()
    torch.distributed.barrier()
    state = {"args": Namespace(tensor_model_parallel_size=2), "iteration": 7}
    state["model"] = model.sharded_state_dict()
    dist_checkpointing.save(state, str(folder), ("torch_dist", 1))
    found = torch_dist.read(folder)
    assert found.common == {"args": Namespace(tensor_model_parallel_size=2), "iteration": 7}
    assert set(found.objects) == set(extra_states(4)) - OF_TRANSFORMER_ENGINE
    shards = own_shards(model)
    assert set(found.chunks) == {shard.key for shard in shards}
    assert ("output_layer.weight" in found.chunks) is not tied
    whole = {}
    for key, chunks in found.chunks.items():
        whole[key] = np.zeros(chunks[0].global_shape, BF16)
        filled = np.zeros(chunks[0].global_shape, np.int8)
        for chunk in chunks:
            box = tuple(slice(*pair) for pair in ends(chunk.offsets, chunk.tensor.shape))
            data = np.frombuffer(stored_bytes(chunk.tensor), BF16)
            whole[key][box] = data.reshape(chunk.tensor.shape)
            filled[box] += 1
        assert (filled == 1).all(), key
    assert_equal(shards, whole)
    return f"{sum(map(len, found.chunks.values()))} chunks of {len(whole)} tensors"


@CHECKS.add(world_size=2)
def common_state_of_0_19(run: Run) -> str:
    """Newer releases write no common.pt; any release can write the object that takes its place."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    model = gpt_model(run, tied=True)
    folder = run.folder / "common-object"
    if run.runtime.rank == 0:
        folder.mkdir()
    torch.distributed.barrier()
    common = {"args": Namespace(tensor_model_parallel_size=2), "iteration": 7}
    state: dict[str, Any] = {"model": model.sharded_state_dict()}
    if _writes_common_object():
        state |= common
    else:
        replica = run.runtime.rank
        state["common"] = ShardedObject("common_state", common, (1,), (0,), replica_id=replica)
    dist_checkpointing.save(state, str(folder), ("torch_dist", 1))
    torch.distributed.barrier()
    if run.runtime.rank == 0:
        (folder / "common.pt").unlink(missing_ok=True)
    torch.distributed.barrier()
    found = torch_dist.read(folder, wanted=lambda key: False)
    assert found.common == torch_dist.read_common(folder) == common
    assert set(found.objects) == set(extra_states(4)) - OF_TRANSFORMER_ENGINE
    return str(found.common)


def _writes_common_object() -> bool:
    import inspect

    from megatron.core.dist_checkpointing import serialization

    return '"common_state"' in inspect.getsource(serialization)


def ends(offsets, shape) -> list[tuple[int, int]]:
    return [(start, start + n) for start, n in zip(offsets, shape, strict=True)]


def lay_out_and_load(spec: str, tied: bool, cut: str, padded_vocab_size: int, run: Run) -> str:
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    model = gpt_model(run, tied=tied, spec=spec, padded_vocab_size=padded_vocab_size)
    shards = own_shards(model)
    folder = run.folder / f"laid-out-{spec}-{tied}-{cut}-{padded_vocab_size}"
    whole = random_tensors(shards)
    # our layer spec and megatron-core's own give the norms the same key
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in whole
    if run.runtime.rank == 0:
        write_folder(folder, whole, cut)
    torch.distributed.barrier()
    loaded, not_asked_for, absent = dist_checkpointing.load(
        {"model": model.sharded_state_dict()}, str(folder), strict=StrictHandling.RETURN_ALL
    )
    assert not absent
    assert set(not_asked_for) == {key.partition("/")[0] for key in OF_TRANSFORMER_ENGINE}
    assert loaded["args"] == Namespace(num_layers=4) and loaded["iteration"] == 5
    model.load_state_dict(loaded["model"])
    for key in [key for key in whole if "embedding" in key or "output" in key]:
        # megatron-core fills the rows that the folder does not have with zeros
        padding = np.zeros((padded_vocab_size - len(whole[key]), 64), BF16)
        whole[key] = np.concatenate([whole[key], padding])
    assert_equal(own_shards(model), whole)
    return f"{len(whole)} tensors"


def random_tensors(shards) -> dict[str, np.ndarray]:
    """A whole tensor for each key, the same on every rank; vocabularies of 256 rows."""
    whole = {}
    for number, key in enumerate(sorted({shard.key for shard in shards})):
        shape = next(shard.global_shape for shard in shards if shard.key == key)
        if "embedding" in key or "output" in key:
            shape = (256, *shape[1:])
        whole[key] = np.random.default_rng(number).normal(size=shape).astype(BF16)
    return whole


def write_folder(folder: Path, whole: dict[str, np.ndarray], cut: str) -> None:
    boxes = {key: list(cuts(array.shape, cut)) for key, array in whole.items()}
    chunks = {
        key: [
            ChunkSpec(
                whole[key].shape,
                tuple(start for start, _ in box),
                TensorSpec(tuple(stop - start for start, stop in box), "bf16"),
            )
            for box in boxes[key]
        ]
        for key in whole
    }
    common = {"args": Namespace(num_layers=4), "iteration": 5}
    objects = extra_states(4)
    layout = layout_torch_dist(chunks, common, num_files=3, objects=objects)
    folder.mkdir()
    for name, file in layout.files.items():
        write_layout(file, folder / name)
    for key, places in layout.places.items():
        for box, place in zip(boxes[key], places, strict=True):
            data = whole[key][tuple(slice(*pair) for pair in box)].tobytes()
            fill(folder / place.file, place.offset, data)


def cuts(shape: tuple[int, ...], cut: str):
    """Boxes that tile `shape`: whole, by the first axis, or unevenly by the last."""
    whole = [(0, n) for n in shape]
    if cut == "whole":
        yield tuple(whole)
    elif cut == "first axis":
        for i in range(shape[0]) if shape[0] <= 4 else ():
            yield ((i, i + 1), *whole[1:])
        if shape[0] > 4:
            half = shape[0] // 2
            yield from (((0, half), *whole[1:]), ((half, shape[0]), *whole[1:]))
    else:
        last = shape[-1]
        for start, stop in ((0, 5), (5, last // 2 + 3), (last // 2 + 3, last)):
            yield (*whole[:-1], (start, stop))


CHECKS.case("reads-untied", 2, save_and_read, False)
CHECKS.case("reads-tied", 2, save_and_read, True)
for _cut in ("whole", "first axis", "uneven"):
    CHECKS.case(f"loads-untied-{_cut}", 2, lay_out_and_load, "ours", False, _cut, 256)
CHECKS.case("loads-tied", 2, lay_out_and_load, "ours", True, "whole", 256)
CHECKS.case("loads-more-padding", 2, lay_out_and_load, "ours", False, "whole", 384)
CHECKS.case("loads-megatron-spec", 2, lay_out_and_load, "megatron", False, "first axis", 256)

if __name__ == "__main__":
    main(CHECKS)
