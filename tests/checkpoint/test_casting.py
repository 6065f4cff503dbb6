"""Numbers that a narrower dtype cannot hold are refused, or said, wherever weights are cast."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoint import toys
from checkpoint.toys import NUMPY, convert, hugging_face_shapes, make_hugging_face_folder, tp
from logs import logged_lines
from qwen2_ascend.checkpoint.casting import Lost, assign
from qwen2_ascend.errors import UserError
from qwen2_ascend.parallel import ParallelLayout

CONFIG = toys.toy_config(dtype="fp32", tie_word_embeddings=True)
BIAS, UP = "model.layers.0.self_attn.k_proj.bias", "model.layers.1.mlp.up_proj.weight"
NORM, EMBEDDING = "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"


def folder(path: Path, **values: float) -> Path:
    """A model of ones, but for the first numbers of some tensors."""
    weights = {
        name: np.ones(shape, np.float32) for name, shape in hugging_face_shapes(CONFIG).items()
    }
    for name, value in values.items():
        weights[globals()[name]].reshape(-1)[:3] = value
    return make_hugging_face_folder(path, CONFIG, weights=weights)


@pytest.mark.parametrize(
    ("given", "wanted"), [("fp32", "fp16"), ("bf16", "fp16"), ("fp32", "bf16"), ("fp16", "fp32")]
)
def test_each_lost_number_is_counted(given: str, wanted: str) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 8 * NUMPY[given].itemsize, 200_000)
    values = bits.astype(f"u{NUMPY[given].itemsize}").view(NUMPY[given]).reshape(4, -1, 5)[..., :4]
    out = np.empty(values.shape, NUMPY[wanted])
    lost = assign(out, values)
    with np.errstate(all="ignore"):
        exact, found = values.astype(np.float64), out.astype(np.float64)
    assert lost.infinite == np.sum(np.isinf(found) & np.isfinite(exact))
    assert lost.zero == np.sum((found == 0) & (exact != 0))
    assert any(lost) or (given, wanted) == ("fp16", "fp32")


def test_infinities_zeros_and_nans_of_the_source_are_not_lost() -> None:
    values = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 65504.0], ml_dtypes.bfloat16)[:5]
    assert assign(np.empty(5, np.float16), values) == Lost()


@pytest.mark.parametrize("to", ["hf", "mg"])
def test_overflow_is_refused_with_every_tensor_and_nothing_is_left(to: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "hf", BIAS=1e5, NORM=-7e4)
    flags = ["--dtype", "fp16", *(tp(2) if to == "mg" else [])]
    said = convert(source, tmp_path / "new", *flags, to=to).require(2).err
    assert f"{BIAS}: 3 of 32 numbers are too large for fp16" in said
    assert f"{NORM}: 3 of 64 numbers" in said  # a replica on the other rank counts once
    assert "bf16 and fp32 hold them" in said and "--allow-overflow" in said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    convert(source, tmp_path / "new", "--dtype", "bf16", to=to).require()


def test_overflow_is_written_and_said_when_it_is_allowed(tmp_path: Path) -> None:
    source = folder(tmp_path / "hf", BIAS=1e5)
    flags = ["--dtype", "fp16", "--allow-overflow", "--verify"]
    said = convert(source, tmp_path / "new", *flags, to="hf").require().err
    assert said.count("3 numbers became infinite in fp16, in 1 tensors") == 1
    written = load_file(tmp_path / "new/model.safetensors")[BIAS]
    assert np.isinf(written).tolist() == [True] * 3 + [False] * 29


def test_numbers_that_become_zero_are_said_once(tmp_path: Path) -> None:
    source = folder(tmp_path / "hf", EMBEDDING=1e-9, BIAS=-1e-9, UP=6e-8)
    flags = ["--dtype", "fp16", "--verify", *tp(2), "--target-pipeline-parallel-size", 2]
    said = convert(source, tmp_path / "new", *flags).require().err
    assert said.count("became zero") == 1
    assert "cast: 6 numbers became zero in fp16, in 2 tensors" in said


def test_fp32_at_its_end_does_not_fit_bf16(tmp_path: Path) -> None:
    source = folder(tmp_path / "hf", UP=3.402e38)
    said = convert(source, tmp_path / "new", "--dtype", "bf16").require(2).err
    assert "too large for bf16" in said and "; fp32 holds them" in said


def test_a_resumed_conversion_counts_what_the_killed_one_cast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError("killed")

    source = folder(tmp_path / "hf", BIAS=1e5)
    with monkeypatch.context() as patch:
        patch.setattr("qwen2_ascend.checkpoint.convert.encode_manifest", fail)
        flags = ["--dtype", "fp16", "--allow-overflow"]
        convert(source, tmp_path / "new", *flags).require(1)
    said = convert(source, tmp_path / "new", "--dtype", "fp16", "--resume").require(2).err
    assert f"{BIAS}: 3 of 32 numbers" in said
    said = convert(source, tmp_path / "new", *flags, "--resume").require().err
    assert "3 numbers became infinite" in said


def test_an_adapter_that_overflows_the_weights_is_refused(tmp_path: Path) -> None:
    source = folder(tmp_path / "hf")
    convert(source, tmp_path / "half", "--dtype", "fp16", to="hf").require()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    told = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    rows, columns = hugging_face_shapes(CONFIG)[UP]
    matrices = {}
    for layer in range(CONFIG.num_layers):
        name = f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_"
        matrices[f"{name}A.weight"] = np.full((1, columns), 1e4, np.float32)
        matrices[f"{name}B.weight"] = np.zeros((rows, 1), np.float32)
    matrices[f"{name}B.weight"][:2] = 1e2
    toys.save_safetensors(adapter / "adapter_model.safetensors", matrices)
    flags = ["--adapter", adapter]
    said = convert(tmp_path / "half", tmp_path / "new", *flags, to="hf").require(2).err
    assert f"{UP}: {2 * columns} of {rows * columns} numbers are too large for fp16" in said
    convert(tmp_path / "half", tmp_path / "new", *flags, "--dtype", "fp32", to="hf").require()


def test_a_model_in_fp16_is_not_filled_with_infinities(tmp_path: Path) -> None:
    import torch

    from qwen2_ascend.checkpoint.load import load_checkpoint_weights
    from qwen2_ascend.checkpoint.rules import Shard, megatron_pieces

    layout, size = ParallelLayout(), CONFIG.vocab_size
    pieces = megatron_pieces(CONFIG, layout, size)[Shard(0, 0, 0)]

    def load(path: Path, dtype: torch.dtype) -> None:
        tensors = {name: torch.empty(piece.shape, dtype=dtype) for name, piece in pieces.items()}
        model = SimpleNamespace(named_parameters=tensors.items)
        load_checkpoint_weights(
            [model], path, layout, padded_vocab_size=size, tp_rank=0, pp_stage=0
        )

    large = folder(tmp_path / "large", BIAS=1e5)
    with pytest.raises(UserError, match="3 of 32 numbers are too large for fp16"):
        load(large, torch.float16)
    with logged_lines() as lines:
        load(large, torch.bfloat16)
        assert lines == []
        load(folder(tmp_path / "small", BIAS=1e-9), torch.float16)
    assert "weights: 3 numbers became zero in fp16" in lines[0]
