"""Generation on the simulated device: the CPU's tokens, through the fused attention operators."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers import generated, make_tiny_hugging_face_folder, tiny_config

# The inference operator pads nothing here: a width that the device likes.
CONFIG = tiny_config(kv_channels=16, max_position_embeddings=256)
PROMPTS = ([5, 9, 200, 31, 7], [17], list(range(40, 60)))
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def folder() -> Path:
    path = Path(os.environ["NPUSIM_FOLDER"]) / "model"
    return path if path.exists() else make_tiny_hugging_face_folder(path, CONFIG, seed=4)


@pytest.fixture(scope="module")
def engine_of(folder: Path):
    """Builds engines on this rank's card."""
    from qwen2_ascend import runtime
    from qwen2_ascend.inference.engine import load_engine
    from qwen2_ascend.parallel import ParallelLayout

    running = runtime.start("npu", timeout_seconds=60)

    def build(dtype: str, backend: str):
        runtime.destroy_model_parallel()
        runtime.initialize_model_parallel(ParallelLayout(), CONFIG.num_layers)
        layout = ParallelLayout()
        return load_engine(folder, layout, dtype=dtype, backend=backend, num_rows=2, config=CONFIG)

    yield build
    running.close()


def tokens(engine) -> list[list[int]]:
    from qwen2_ascend.inference.generator import Generator, Request

    made = Generator(engine, decode=str, eos_tokens=[])
    requests = [
        Request(index=i, tokens=ids, max_new_tokens=NEW_TOKENS) for i, ids in enumerate(PROMPTS)
    ]
    return [done.tokens for done in sorted(made.run(requests), key=lambda done: done.index)]


def transformers_tokens(folder: Path, dtype: str) -> list[list[int]]:
    import torch
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder)
    model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]).eval()
    return [generated(model, ids, NEW_TOKENS) for ids in PROMPTS]


# Foreign warnings are errors in the CPU's tests, and torch_npu adds many of its own.
@pytest.mark.filterwarnings("default")
@pytest.mark.simulated(alone="generation")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tokens_are_those_of_the_cpu(folder, engine_of, dtype):
    from npusim.simulator import recording

    with recording() as record:
        found = tokens(engine_of(dtype, "npu"))
    expected = transformers_tokens(folder, dtype)
    same = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), NEW_TOKENS)
        for x, y in zip(found, expected, strict=True)
    ]
    prefills = [op for op in record.ops if "FlashAttention" in op and "Infer" not in op]
    decodes = [op for op in record.ops if "FusedInferAttention" in op]
    print(same, set(record.ops))
    assert len(prefills) >= CONFIG.num_layers, set(record.ops)
    if dtype == "fp32":
        # the inference operator takes fp16 and bf16 only: plain torch decodes
        assert found == expected
        assert not decodes
    else:
        # in bf16 two likeliest tokens can be a rounding apart; after that texts differ
        assert len(decodes) >= CONFIG.num_layers * NEW_TOKENS
        assert sum(same) >= len(PROMPTS) * NEW_TOKENS * 0.75, same
