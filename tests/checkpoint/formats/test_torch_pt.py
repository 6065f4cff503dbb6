"""`.pt` files agree with genuine torch.save and torch.load both ways."""

import random
import signal
from argparse import Namespace
from collections import OrderedDict
from pathlib import PosixPath

import numpy as np
import pytest
import torch
from format_helpers import fill, random_bytes, stored_bytes, write_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import run_python
from qwen2_ascend.checkpoint.formats import torch_pt
from qwen2_ascend.checkpoint.formats.pickles import DType, Inert
from qwen2_ascend.checkpoint.formats.stored import StoredTensor, TensorSpec
from qwen2_ascend.checkpoint.formats.zips import layout_zip
from qwen2_ascend.errors import UserError

shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
specs = st.builds(TensorSpec, shapes, st.sampled_from(sorted(torch_pt.DTYPES)))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.sampled_from([DType("bfloat16"), DType("float32")]),
)
keys = st.text(st.characters(codec="utf-8"), max_size=6)
trees = st.recursive(
    st.one_of(scalars, specs),
    lambda child: st.one_of(
        st.lists(child, max_size=3),
        st.lists(child, max_size=4).map(tuple),
        st.dictionaries(st.one_of(keys, st.integers(0, 9)), child, max_size=4),
        st.dictionaries(keys, child, max_size=3).map(lambda items: Namespace(**items)),
    ),
    max_leaves=12,
)


def tensor_of(spec: TensorSpec, data: bytes) -> torch.Tensor:
    dtype = getattr(torch, torch_pt.DTYPES[spec.dtype])
    if not data:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(spec.shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def mapped(tree, leaf, dtype=lambda name: name):
    """`tree` with `leaf(spec)` for each TensorSpec and `dtype(d)` for each DType, in order."""
    if isinstance(tree, (TensorSpec, StoredTensor)):
        return leaf(tree)
    if isinstance(tree, DType):
        return dtype(tree)
    if isinstance(tree, dict):
        return {key: mapped(value, leaf, dtype) for key, value in tree.items()}
    if isinstance(tree, Namespace):
        return Namespace(**mapped(vars(tree), leaf, dtype))
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(value, leaf, dtype) for value in tree)
    return tree


def with_tensors(tree):
    """The tree as torch has it; the n-th tensor has the random bytes of seed n."""
    seeds = iter(range(1000))
    return mapped(
        tree,
        lambda spec: tensor_of(spec, random_bytes(spec, next(seeds))),
        lambda dtype: getattr(torch, dtype.name),
    )


def as_bytes(tree):
    """A loaded tree with (shape, dtype, bytes) for each tensor, to compare by equality."""
    if isinstance(tree, torch.Tensor):
        assert tree.is_contiguous() and not tree.requires_grad
        return tuple(tree.shape), tree.dtype, bytes_of(tree)
    if isinstance(tree, StoredTensor):
        dtype = getattr(torch, torch_pt.DTYPES[tree.dtype])
        return tree.shape, dtype, stored_bytes(tree)
    if isinstance(tree, (torch.dtype, DType)):
        return getattr(tree, "name", str(tree).removeprefix("torch."))
    if isinstance(tree, dict):
        return {key: as_bytes(value) for key, value in tree.items()}
    if isinstance(tree, Namespace):
        return "Namespace", as_bytes(vars(tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(as_bytes, tree))
    return tree


@settings(max_examples=150, deadline=None)
@given(trees, st.sampled_from([2, 3, 4, 5]))
def test_what_torch_saves_is_read(tmp_path_factory, tree, protocol):
    path = tmp_path_factory.mktemp("theirs") / "model.pt"
    expected = with_tensors(tree)
    torch.save(expected, path, pickle_protocol=protocol)
    assert as_bytes(torch_pt.read(path)) == as_bytes(expected)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_torch_loads_what_we_lay_out(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("ours") / "model_optim_rng.pt"
    expected = with_tensors(tree)
    layout = torch_pt.layout_pt(tree, "model_optim_rng")
    write_layout(layout, path)
    leaves = torch_pt._tensor_leaves(tree, ())
    for seed, ((_, spec), offset) in enumerate(zip(leaves, layout.offsets.values(), strict=True)):
        assert offset % 64 == 0
        fill(path, offset, random_bytes(spec, seed))
    with torch.serialization.safe_globals([Namespace]):
        for mmap in (False, True):
            loaded = torch.load(path, weights_only=True, mmap=mmap)
            assert as_bytes(loaded) == as_bytes(expected)
    assert as_bytes(torch.load(path, weights_only=False)) == as_bytes(expected)
    assert as_bytes(torch_pt.read(path)) == as_bytes(expected)


def test_a_tensors_bytes_go_where_its_path_says(tmp_path):
    spec = TensorSpec((2, 3), "fp32")
    tree = {"args": Namespace(scale=spec), "model": {"a.weight": spec, "b": [1, spec]}}
    layout = torch_pt.layout_pt(tree)
    assert list(layout.offsets) == [("args", "scale"), ("model", "a.weight"), ("model", "b", 1)]
    path = write_layout(layout, tmp_path / "x.pt")
    fill(path, layout.offsets["model", "b", 1], np.arange(6, dtype=np.float32).tobytes())
    with torch.serialization.safe_globals([Namespace]):
        loaded = torch.load(path)
    assert torch.equal(loaded["model"]["b"][1], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(loaded["model"]["a.weight"], torch.zeros(2, 3))


def test_the_layout_is_the_one_torch_computes(tmp_path, monkeypatch):
    """torch can find storages by arithmetic instead of reading headers, and checks it here."""
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    tree = [TensorSpec((n,), "bf16") for n in (1, 0, 33, 4096, 5)]
    path = write_layout(torch_pt.layout_pt(tree), tmp_path / "x.pt")
    assert [len(t) for t in torch.load(path, weights_only=True)] == [1, 0, 33, 4096, 5]


def test_files_above_4_gib(tmp_path):
    """Sparse: three tensors whose records and offsets need zip64."""
    sizes = {"a": 2**32 + 24, "b": 2**31, "c": 3}
    tree = {"model": {name: TensorSpec((n,), "uint8") for name, n in sizes.items()}}
    layout = torch_pt.layout_pt(tree)
    path = write_layout(layout, tmp_path / "big.pt")
    for name, n in sizes.items():
        fill(path, layout.offsets["model", name] + n - 1, name.encode())
    assert path.stat().st_blocks * 512 < 2**20
    loaded = torch.load(path, weights_only=True, mmap=True)["model"]
    for name, n in sizes.items():
        assert (loaded[name].shape, int(loaded[name][-1])) == ((n,), ord(name))
    read = torch_pt.read(path)["model"]
    assert {name: t.offset for name, t in read.items()} == {
        name: layout.offsets["model", name] for name in sizes
    }


def test_views_of_one_storage_are_found_at_their_offsets(tmp_path):
    base = torch.arange(24, dtype=torch.int32)
    views = {"middle": base[4:10], "matrix": base.view(4, 6)[1:3], "all": base, "one": base[5]}
    torch.save(views, tmp_path / "views.pt")
    assert as_bytes(torch_pt.read(tmp_path / "views.pt")) == as_bytes(views)


def test_strides_and_dtypes_that_are_not_read_are_all_named(tmp_path):
    tree = {
        "model": {
            "fine": torch.ones(2, 2),
            "one row": torch.ones(1, 4).T.contiguous().T,
            "transposed": torch.ones(2, 3).T,
            "expanded": [torch.ones(1).expand(4)],
            "float8": torch.ones(2).to(torch.float8_e4m3fn),
            "complex": torch.ones(2, dtype=torch.complex64),
        }
    }
    torch.save(tree, tmp_path / "x.pt")
    with pytest.raises(UserError) as caught:
        torch_pt.read(tmp_path / "x.pt")
    names = ["transposed", "expanded.0", "float8", "complex"]
    assert len(caught.value.faults) == len(names)
    for name in names:
        assert any(f"tensor model.{name}: " in fault for fault in caught.value.faults)
    assert "save it after .contiguous()" in str(caught.value)


def test_parameters_attributes_and_state_dicts(tmp_path):
    tagged = torch.ones(2)
    tagged.tensor_model_parallel = True
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.sequence_parallel = True
    state = torch.nn.Linear(2, 2).state_dict()
    tree = {"tagged": tagged, "p": parameter, "plain": torch.nn.Parameter(tagged), "state": state}
    torch.save(tree, tmp_path / "x.pt")
    result = torch_pt.read(tmp_path / "x.pt")
    assert type(result["state"]) is dict and isinstance(state, OrderedDict)
    expected = {
        "tagged": tagged,
        "p": parameter.detach(),
        "plain": tagged,
        "state": dict(state),
    }
    assert as_bytes(result) == as_bytes(expected)


def test_what_genuine_checkpoints_carry_comes_back_inert(tmp_path):
    enums = pytest.importorskip("megatron.core.transformer.enums")
    from megatron.core.rerun_state_machine import RerunMode

    args = Namespace(
        params_dtype=torch.bfloat16,
        attention_backend=enums.AttnBackend.flash,
        model_type=enums.ModelType.encoder_or_decoder,
        save=PosixPath("/x/y"),
        exit_signal=signal.SIGTERM,
        device=torch.device("cpu"),
        names={"a", "b"},
        part=slice(1, 3),
        iteration=np.int64(3),
    )
    rng = [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
        }
    ]
    for protocol in (2, 4):
        path = tmp_path / "x.pt"
        state = {"args": args, "rng_state": rng, "mode": RerunMode.DISABLED, "raw": b"\0\xff"}
        torch.save(state, path, pickle_protocol=protocol)
        result = torch_pt.read(path)
        read = result["args"]
        assert read.params_dtype == DType("bfloat16")
        assert read.attention_backend == Inert(
            "megatron.core.transformer.enums.AttnBackend", (enums.AttnBackend.flash.value,)
        )
        assert read.model_type.type_name.endswith(".ModelType")
        assert (read.save.type_name, read.save.args) == ("pathlib.PosixPath", ("/", "x", "y"))
        assert read.exit_signal == Inert("signal.Signals", (15,))
        assert read.device == Inert("torch.device", ("cpu",))
        assert read.names == {"a", "b"}
        assert read.part == Inert("builtins.slice", (1, 3, None))
        assert read.iteration.type_name.endswith("multiarray.scalar")
        assert result["rng_state"][0]["random_rng_state"] == random.getstate()
        assert result["rng_state"][0]["torch_rng_state"].dtype == "uint8"
        assert isinstance(result["rng_state"][0]["np_rng_state"][1], Inert)
        assert result["mode"].type_name.endswith(".RerunMode")
        assert result["raw"] == b"\0\xff"


def test_files_that_are_no_zip_of_torch_save(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before 1\.6"):
        torch_pt.read(path)
    path.write_bytes(b"hello, world")
    with pytest.raises(UserError, match=r"not a \.pt file"):
        torch_pt.read(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        torch_pt.read(path)
    with pytest.raises(UserError, match="No such file"):
        torch_pt.read(tmp_path / "absent.pt")
    write_layout(layout_zip({"archive/data.pkl": b"", "archive/constants.pkl": b""}), path)
    with pytest.raises(UserError, match="TorchScript"):
        torch_pt.read(path)


def test_layout_refuses_what_it_cannot_write():
    with pytest.raises(TypeError, match="cannot pickle a object"):
        torch_pt.layout_pt({"args": object()})


def test_reading_and_laying_out_import_no_torch(tmp_path):
    torch.save({"args": Namespace(dtype=torch.bfloat16), "w": torch.ones(2)}, tmp_path / "x.pt")
    code = f"""
import sys
from qwen2_ascend.checkpoint.formats import safetensors, torch_pt
from qwen2_ascend.checkpoint.formats.stored import TensorSpec
torch_pt.read({str(tmp_path / "x.pt")!r})
torch_pt.layout_pt({{"a": TensorSpec((2,), "bf16")}})
safetensors.encode_header({{"a": TensorSpec((2,), "bf16")}})
assert "torch" not in sys.modules
"""
    run_python("-c", code)
