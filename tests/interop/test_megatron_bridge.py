"""Megatron-Bridge takes our torch_dist folders for checkpoints of Megatron-LM.

It makes the model of what `args` say and loads the weights, on one rank. Its export to Hugging Face
maps the names of Transformer Engine's layers, which a CPU does not have.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from checkpoint.toys import convert, pp, tp
from helpers import make_tiny_hugging_face_folder, tiny_config
from interop.checkouts import TESTS, checkouts, contains, run_python
from interop.test_megatron_lm import add_tokenizer


@pytest.fixture(scope="module")
def bridge() -> Path:
    if importlib.util.find_spec("omegaconf") is None:
        pytest.skip("omegaconf, which Megatron-Bridge is configured with, is not installed")
    has = contains("pyproject.toml", "<0.17.0")
    return checkouts("MEGATRON_BRIDGE_PATH", has, "a release for megatron-core 0.16")[0]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_it_loads_converted_folders(tied, bridge, tmp_path):
    config = tiny_config(tie_word_embeddings=tied)
    model = make_tiny_hugging_face_folder(tmp_path / "hf", config)
    add_tokenizer(model)
    convert(model, tmp_path / "mg", *tp(2), *pp(2), "--save-format", "torch_dist").require()
    output, iteration = tmp_path / "state.pt", tmp_path / "mg" / "iter_0000001"
    script = TESTS / "interop" / "megatron_bridge.py"
    run_python(script, bridge, iteration, model, output)
    found = torch.load(output, weights_only=True)
    convert(model, tmp_path / "one").require()
    file = tmp_path / "one" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    for name, expected in torch.load(file, weights_only=False)["model"].items():
        rows = found[name][: len(expected)]  # it pads the vocabulary anew
        assert torch.equal(rows, expected), name
        assert not found[name][len(expected) :].any(), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_mbridge_maps_weights_as_we_do(tied, tmp_path):
    has = contains("mbridge/models/qwen2.py", "Qwen2Bridge")
    checkout = checkouts("MBRIDGE_PATH", has, "a bridge for Qwen2")[0]
    config = tiny_config(tie_word_embeddings=tied)
    model = make_tiny_hugging_face_folder(tmp_path / "hf", config)
    convert(model, tmp_path / "mg", *tp(2)).require()
    script = TESTS / "interop" / "mbridge_mapping.py"
    told = run_python(script, checkout, model, tmp_path / "mg" / "iter_0000001")
    assert f"{50 if tied else 51} weights on 2 ranks" in told
