"""torch_dist folders: read without torch, refused when damaged, loaded by megatron-core."""

import json
import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from format_helpers import fill, random_bytes, stored_bytes, write_layout
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch_dist_worker import CHECKS

from commands import run_python
from distributed.harness import each_check
from qwen2_ascend.checkpoint.formats import torch_dist
from qwen2_ascend.checkpoint.formats.stored import TensorSpec
from qwen2_ascend.checkpoint.formats.torch_dist_layout import CONFIG, ChunkSpec, layout_torch_dist
from qwen2_ascend.errors import UserError

WORKER = Path(__file__).with_name("torch_dist_worker.py")
CHUNKS = {
    "layers.weight": [
        ChunkSpec((2, 4, 6), (layer, 0, column), TensorSpec((1, 4, 3), "bf16"))
        for layer in (1, 0)
        for column in (0, 3)
    ],
    "norm.weight": [ChunkSpec((5,), (0,), TensorSpec((5,), "fp32"))],
    "step": [ChunkSpec((), (), TensorSpec((), "int64"))],
}
COMMON = {"args": Namespace(num_layers=2), "iteration": 3, "content_metadata": {"a": None}}

test_megatron_core = each_check(WORKER, CHECKS)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of CHUNKS over two files, the n-th chunk's bytes drawn from seed n."""
    layout = layout_torch_dist(CHUNKS, COMMON, num_files=2, objects=["rng/shard_0_1"])
    path = tmp_path / "iter_0000003"
    path.mkdir()
    for name, file in layout.files.items():
        write_layout(file, path / name)
    seed = 0
    for key, places in layout.places.items():
        for chunk, place in zip(CHUNKS[key], places, strict=True):
            fill(path / place.file, place.offset, random_bytes(chunk.tensor, seed))
            seed += 1
    return path


def test_what_we_lay_out_is_read(folder):
    result = torch_dist.read(folder)
    assert result.common == COMMON
    assert result.objects == ("rng/shard_0_1",)
    seeds = {
        (k, c.offsets): n for n, (k, c) in enumerate((k, c) for k in CHUNKS for c in CHUNKS[k])
    }
    assert set(result.chunks) == set(CHUNKS)
    for key, chunks in result.chunks.items():
        assert [c.offsets for c in chunks] == sorted(c.offsets for c in CHUNKS[key])
        for chunk in chunks:
            spec = TensorSpec(chunk.tensor.shape, chunk.tensor.dtype)
            assert ChunkSpec(chunk.global_shape, chunk.offsets, spec) in CHUNKS[key]
            assert chunk.tensor.offset % 64 == 0
            assert stored_bytes(chunk.tensor) == random_bytes(spec, seeds[key, chunk.offsets])


def test_the_metadata_of_megatron_core_0_15_is_read(folder, monkeypatch):
    """It is torch's class with a field more, under megatron-core's name."""
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    class MCoreMetadata(Metadata):
        __module__, __qualname__ = strategies.__name__, "MCoreMetadata"

    monkeypatch.setattr(strategies, "MCoreMetadata", MCoreMetadata, raising=False)
    before = torch_dist.read(folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata = MCoreMetadata(**vars(metadata))
    metadata.mcore_data = {"step": {"nd_reformulated_orig_global_shape": (3, 4)}}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert torch_dist.read(folder) == before


def test_only_wanted_keys_are_looked_up(folder):
    layout = layout_torch_dist(CHUNKS, COMMON, num_files=2, objects=["rng/shard_0_1"])
    place = layout.places["layers.weight"][0]
    fill(folder / place.file, place.offset - 128, b"?" * 128)  # the header of its record
    result = torch_dist.read(folder, wanted=lambda key: not key.startswith("layers"))
    assert set(result.chunks) == {"norm.weight", "step"}
    with pytest.raises(UserError, match="contradicts the directory"):
        torch_dist.read(folder)


def test_torchs_own_reader_finds_every_chunk(folder):
    metadata = FileSystemReader(folder).read_metadata()
    assert metadata.state_dict_metadata["layers.weight"].size == torch.Size((2, 4, 6))
    assert metadata.state_dict_metadata["layers.weight"].properties.dtype == torch.bfloat16
    for number, spec in enumerate(CHUNKS["layers.weight"]):
        info = metadata.storage_data[MetadataIndex("layers.weight", spec.offsets)]
        with (folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            (folder / "one.pt").write_bytes(file.read(info.length))
        tensor = torch.load(folder / "one.pt", weights_only=True)
        assert tensor.view(torch.uint8).numpy().tobytes() == random_bytes(spec.tensor, number)


def test_chunks_are_spread_evenly():
    sizes = [100, 1, 1, 1, 97, 50, 50, 100]
    chunks = {str(n): [ChunkSpec((n,), (0,), TensorSpec((n,), "fp32"))] for n in sizes}
    many = {f"{i}": chunks[str(n)] for i, n in enumerate(sizes)}
    layout = layout_torch_dist(many, {}, num_files=4)
    loads: dict[str, int] = {}
    for places, size in zip(layout.places.values(), sizes, strict=True):
        loads[places[0].file] = loads.get(places[0].file, 0) + size
    assert list(loads.values()) == [100, 100, 100, 100]
    assert len(layout_torch_dist(chunks, {}, num_files=50).files) <= len(chunks) + 3


def test_chunks_must_tile_their_tensor():
    chunk = ChunkSpec((4,), (0,), TensorSpec((3,), "fp32"))
    with pytest.raises(AssertionError, match="do not tile"):
        layout_torch_dist({"a": [chunk]}, {})
    with pytest.raises(AssertionError, match="outside"):
        layout_torch_dist({"a": [chunk._replace(offsets=(2,))]}, {})
    with pytest.raises(AssertionError, match="two chunks"):
        layout_torch_dist({"a": [chunk, chunk]}, {})


def edit_metadata(folder: Path, change) -> None:
    """Changes `.metadata` with genuine torch objects."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


class Payload:
    def __reduce__(self):
        return print, ("executed",)


def drop_chunk(metadata):
    del metadata.storage_data[MetadataIndex("norm.weight", (0,))]


def other_dtype(metadata):
    metadata.state_dict_metadata["norm.weight"].properties.dtype = torch.bfloat16


def other_shape(metadata):
    entry = metadata.state_dict_metadata["norm.weight"]
    entry.size, entry.chunks[0].sizes = torch.Size((4,)), torch.Size((4,))


def outside(metadata):
    metadata.state_dict_metadata["norm.weight"].size = torch.Size((4,))


def undescribed(metadata):
    metadata.storage_data[MetadataIndex("norm.weight", (9,))] = _StorageInfo("__0_0.distcp", 0, 1)


def stored_as(path="__0_0.distcp", offset=0, length=1, transforms=None):
    def change(metadata):
        info = _StorageInfo(path, offset, length, transforms)
        metadata.storage_data[MetadataIndex("norm.weight", (0,))] = info

    return change


def payload(metadata):
    metadata.planner_data = Payload()


def no_tensors(metadata):
    metadata.state_dict_metadata = [1]


DAMAGED = {
    "chunk in no file": (drop_chunk, "norm.weight [0] is in no file"),
    "dtype": (other_dtype, "is (5,) fp32; .metadata says (5,) bf16"),
    "shape": (other_shape, "is (5,) fp32; .metadata says (4,) fp32"),
    "outside": (outside, "norm.weight [0] + [5] is outside (4,)"),
    "undescribed": (undescribed, "norm.weight (9,) is stored but not described"),
    "no zip": (stored_as(length=100), "does not end as a zip does"),
    "beyond the file": (stored_as(offset=10**9), "truncated"),
    "other file": (stored_as("__9_0.distcp"), "__9_0.distcp: no such file"),
    "leads out": (stored_as("../x.distcp"), "outside of the folder"),
    "compressed": (stored_as(transforms=["stream.zstd/1"]), "through a transform"),
    "hostile": (payload, "asks for builtins.print; refused, not executed"),
    "no tensors": (no_tensors, "not a torch.distributed.checkpoint metadata"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_metadata_is_named(folder, case, capsys):
    change, words = DAMAGED[case]
    edit_metadata(folder, change)
    with pytest.raises(UserError) as caught:
        torch_dist.read(folder)
    assert words in str(caught.value) and str(folder) in str(caught.value)
    assert "executed" not in capsys.readouterr().out


def test_an_object_where_a_tensor_should_be(folder):
    def change(metadata):
        info = metadata.storage_data[MetadataIndex("rng/shard_0_1")]
        metadata.storage_data[MetadataIndex("norm.weight", (0,))] = info

    edit_metadata(folder, change)
    with pytest.raises(UserError, match=r"norm\.weight: not a tensor"):
        torch_dist.read(folder)


@pytest.mark.parametrize("name", ["__0_0.distcp", "common.pt", ".metadata", "metadata.json"])
def test_missing_and_truncated_files_are_named(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        torch_dist.read(folder)
    path.unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        torch_dist.read(folder)


def test_other_backends_are_refused(folder):
    config = CONFIG | {"sharded_backend": "zarr"}
    (folder / "metadata.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="sharded_backend='zarr'"):
        torch_dist.read(folder)


def test_flips_give_an_error_or_the_same_chunks(folder):
    good = torch_dist.read(folder)
    data = (folder / ".metadata").read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for _ in range(400):
        changed = bytearray(data)
        changed[rng.integers(len(data))] = rng.integers(256)
        (folder / ".metadata").write_bytes(changed)
        try:
            result = torch_dist.read(folder)
        except UserError as error:
            refused += 1
            assert str(folder) in str(error)
        else:
            sizes = [c.tensor.num_bytes for chunks in result.chunks.values() for c in chunks]
            assert len(sizes) <= sum(map(len, good.chunks.values()))
    assert refused > 250


def test_no_torch_is_imported(folder):
    code = f"""
import sys
from qwen2_ascend.checkpoint.formats import torch_dist
from qwen2_ascend.checkpoint.formats.stored import TensorSpec
from qwen2_ascend.checkpoint.formats.torch_dist_layout import ChunkSpec, layout_torch_dist
assert torch_dist.read({str(folder)!r}).chunks
chunk = ChunkSpec((2,), (0,), TensorSpec((2,), "bf16"))
layout_torch_dist({{"a": [chunk]}}, {{}}, objects=["b/shard_0_1"])
assert "torch" not in sys.modules
"""
    run_python("-c", code)
