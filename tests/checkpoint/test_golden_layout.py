"""The `.pt` shards are those that Megatron-LM and MindSpeed-LLM read, key for key, on each rank."""

from __future__ import annotations

import argparse
import pickletools
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint.reference import reference_models
from checkpoint.toys import (
    convert,
    load_folder,
    make_hugging_face_folder,
    pp,
    random_weights,
    toy_config,
    tp,
)
from qwen2_ascend.config import Qwen2Config

LOCAL_NORMS = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
FUSED_NORMS = (
    "self_attention.linear_qkv.layer_norm_weight",
    "mlp.linear_fc1.layer_norm_weight",
)


# -- the reference


def to_torch(array: np.ndarray) -> torch.Tensor:
    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return torch.frombuffer(bytearray(array.tobytes()), dtype=kinds[array.dtype.name]).reshape(
        array.shape
    )


def reference_shards(config: Qwen2Config, **layout) -> dict[str, dict[str, dict]]:
    """Folder name -> model key -> tensor name -> tensor, of `random_weights`."""
    shards: dict = {}
    models = reference_models(random_weights(config), config, **layout)
    for (rank, stage, chunk), model in models.items():
        folder = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if layout.get("stages", 1) > 1 else "")
        key = "model" if layout.get("per_chunk") is None else f"model{chunk}"
        shards.setdefault(folder, {})[key] = {n: to_torch(array) for n, array in model.items()}
    return shards


# -- comparing


def genuine_load(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_equal_models(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


CASES = {
    "one rank, tied": ({"tie_word_embeddings": True}, {}, []),
    "one rank, untied": ({}, {}, []),
    "TP2": ({}, {"tensor_parallel": 2}, []),
    "TP2 tied": ({"tie_word_embeddings": True}, {"tensor_parallel": 2}, []),
    "TP4 of 2 groups": ({"num_query_groups": 2}, {"tensor_parallel": 4}, []),
    "TP8 of 2 groups": ({"num_query_groups": 2}, {"tensor_parallel": 8}, []),
    "TP2 of 1 group": ({"num_query_groups": 1}, {"tensor_parallel": 2}, []),
    "as many groups as heads": ({"num_query_groups": 8}, {"tensor_parallel": 2}, []),
    "wide heads": ({"kv_channels": 16}, {"tensor_parallel": 2}, []),
    "PP2 tied": ({"tie_word_embeddings": True}, {"stages": 2}, []),
    "TP2 PP2": ({"num_layers": 4}, {"tensor_parallel": 2, "stages": 2}, []),
    "uneven": (
        {"num_layers": 5},
        {"tensor_parallel": 2, "stages": 3, "uneven": [1, 3, 1]},
        ["--num-layer-list", "1,3,1"],
    ),
    "VPP": (
        {"num_layers": 8},
        {"tensor_parallel": 2, "stages": 2, "per_chunk": 2},
        ["--num-layers-per-virtual-pipeline-stage", 2],
    ),
    "VPP of single layers, tied": (
        {"num_layers": 6, "tie_word_embeddings": True},
        {"stages": 2, "per_chunk": 1},
        ["--num-layers-per-virtual-pipeline-stage", 1],
    ),
    "padded to a size": (
        {"vocab_size": 93},
        {"tensor_parallel": 2, "padded": 100},
        ["--padded-vocab-size", 100],
    ),
    "padded by Megatron's rule": (
        {"vocab_size": 93, "tie_word_embeddings": True},
        {"tensor_parallel": 2, "stages": 2, "padded": 256},
        ["--make-vocab-size-divisible-by", 128],
    ),
    "a rank of padding only": (
        {"vocab_size": 30},
        {"tensor_parallel": 4, "padded": 64},
        ["--padded-vocab-size", 64],
    ),
    "fp32": ({"dtype": "fp32"}, {"tensor_parallel": 2}, []),
    "fp16": ({"dtype": "fp16"}, {"tensor_parallel": 2}, []),
}


@pytest.mark.parametrize("case", CASES)
def test_shards_equal_the_naive_reference(case, tmp_path):
    changes, layout, flags = CASES[case]
    config = toy_config(**changes)
    source = make_hugging_face_folder(tmp_path / "hf", config, num_files=2)
    sizes = [*tp(layout.get("tensor_parallel", 1)), *pp(layout.get("stages", 1))]
    convert(source, tmp_path / "mg", *sizes, *flags).require()

    assert (tmp_path / "mg/latest_checkpointed_iteration.txt").read_bytes() == b"1"
    folders = {path.name: path for path in (tmp_path / "mg/iter_0000001").glob("mp_rank_*")}
    expected = reference_shards(config, **layout)
    assert set(folders) == set(expected)
    for folder, models in expected.items():
        state = genuine_load(folders[folder] / "model_optim_rng.pt")
        assert set(state) == {"args", "checkpoint_version", "iteration", *models}
        assert (state["checkpoint_version"], state["iteration"]) == (3.0, 1)
        for key, model in models.items():
            assert_equal_models(state[key], model)
        for name, value in loader_arguments(config, layout).items():
            assert getattr(state["args"], name) == value, name


def loader_arguments(config: Qwen2Config, layout: dict) -> dict[str, object]:
    """What Megatron-LM's loader compares between the checkpoint's args and its own."""
    rows = layout.get("padded", config.vocab_size)
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "add_position_embedding": True,
        "tensor_model_parallel_size": layout.get("tensor_parallel", 1),
        "pipeline_model_parallel_size": layout.get("stages", 1),
        "max_position_embeddings": config.max_position_embeddings,
        "padded_vocab_size": rows,
        # its own rule must give the same padding again, whatever it is
        "make_vocab_size_divisible_by": rows // layout.get("tensor_parallel", 1),
        "tokenizer_type": "HuggingFaceTokenizer",
        "num_query_groups": config.num_query_groups,
        "ffn_hidden_size": config.ffn_hidden_size,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
    }


def test_the_pickle_is_protocol_2(tmp_path):
    """Which torch's weights_only reader takes in every release."""
    source = make_hugging_face_folder(tmp_path / "hf")
    convert(source, tmp_path / "mg").require()
    path = tmp_path / "mg/iter_0000001/mp_rank_00/model_optim_rng.pt"
    data = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
    assert next(arg for op, arg, _ in pickletools.genops(data) if op.name == "PROTO") == 2


# -- reading what others write


def save_as_mindspeed_llm(folder: Path, config: Qwen2Config, shards: dict, fused: bool) -> None:
    """Writes reference shards the way MindSpeed-LLM's converter does."""
    args = argparse.Namespace(
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        load_dir="/models/Qwen2.5",
        params_dtype=torch.bfloat16,
        num_layer_list=None,
        rope_scaling={"factor": 4.0, "type": "yarn"},
        moe=[],
        spec=("a", "b"),
    )
    folder.mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    for rank, models in shards.items():
        (folder / "release" / rank).mkdir(parents=True)
        state: dict = {"args": args, "checkpoint_version": 3.0, "iteration": 1}
        for key, model in models.items():
            renamed = OrderedDict()
            for name, tensor in model.items():
                for plain, te in zip(LOCAL_NORMS, FUSED_NORMS, strict=True):
                    if fused and name.endswith(plain):
                        name = name.removesuffix(plain) + te
                renamed[name] = tensor
            renamed["decoder.layers.0.self_attention.core_attention._extra_state"] = None
            renamed["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(
                3, dtype=torch.uint8
            )
            state[key] = renamed
        torch.save(state, folder / "release" / rank / "model_optim_rng.pt", pickle_protocol=4)


@pytest.mark.parametrize("fused", [False, True], ids=["local norms", "fused norms"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_files_of_mindspeed_llm_are_merged(fused, tied, tmp_path):
    config = toy_config(num_layers=4, tie_word_embeddings=tied)
    source = make_hugging_face_folder(tmp_path / "hf", config)
    shards = reference_shards(config, tensor_parallel=2, stages=2, per_chunk=1, padded=128)
    save_as_mindspeed_llm(tmp_path / "mg", config, shards, fused)
    convert(tmp_path / "mg", tmp_path / "back", "--hf-cfg-dir", source, to="hf").require()
    assert load_folder(tmp_path / "back") == load_folder(source)


def test_a_training_checkpoint_with_optimizer_and_rng_state_is_merged(tmp_path):
    """Megatron-LM's own: an iteration number, numpy and CUDA RNG states, optimizer tensors."""
    config = toy_config()
    source = make_hugging_face_folder(tmp_path / "hf", config)
    models = reference_shards(config)["mp_rank_00"]
    state = {
        "args": argparse.Namespace(num_layers=2, data_path=["a", "b"], lr=1e-5, load=Path("x")),
        "checkpoint_version": 3.0,
        "iteration": 1234,
        "tokens": 5,
        **models,
        "optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}},
        "opt_param_scheduler": {"max_lr": 1e-5, "num_steps": 7},
        "rng_state": [
            {
                "random_rng_state": (3, (1, 2, 3), None),
                "np_rng_state": np.random.RandomState(0).get_state(),
                "torch_rng_state": torch.get_rng_state(),
            }
        ],
    }
    folder = tmp_path / "mg/iter_0001234/mp_rank_00"
    folder.mkdir(parents=True)
    torch.save(state, folder / "model_optim_rng.pt")
    (tmp_path / "mg/latest_checkpointed_iteration.txt").write_text("1234\n")
    convert(tmp_path / "mg", tmp_path / "back", "--hf-cfg-dir", source, to="hf").require()
    assert load_folder(tmp_path / "back") == load_folder(source)
