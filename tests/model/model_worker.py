"""What building a model gives, in one process: dtypes, marks, recomputation, configuration."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from distributed.harness import Checks, Run, main
from helpers import random_hugging_face_model, tiny_config
from qwen2_ascend.parallel import ParallelLayout

if TYPE_CHECKING:
    import torch

CHECKS = Checks()
CONFIG = tiny_config()
ALONE = ParallelLayout()


def built(run: Run, **options: Any) -> Any:
    """The one chunk of CONFIG's model, in training mode, from a fixed seed."""
    from qwen2_ascend import runtime
    from qwen2_ascend.model.build import build_model

    runtime.destroy_model_parallel()
    runtime.initialize_model_parallel(ALONE, CONFIG.num_layers)
    run.runtime.seed_all(5)
    (chunk,) = build_model(CONFIG, ALONE, **options)
    return chunk


def some_tokens() -> torch.Tensor:
    import torch

    return torch.randint(CONFIG.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))


def filled(chunk: Any, model: Any) -> Any:
    """`chunk` with the weights of a transformers model."""
    import torch

    from distributed.reference import expected_parameters
    from qwen2_ascend.checkpoint.rules import Shard

    tensors = dict(model.named_parameters())
    expected = expected_parameters(CONFIG, ALONE, CONFIG.vocab_size, Shard(0, 0, 0), tensors)
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            parameter.copy_(expected[name])
    return chunk


def half_precision(run: Run, dtype: str) -> str:
    """Half-precision logits are as near to the exact ones as transformers' own are."""
    from qwen2_ascend.model.build import TORCH_DTYPES

    model = random_hugging_face_model(CONFIG, seed=3).to(TORCH_DTYPES[dtype])
    chunk = filled(built(run, dtype=dtype), model)
    assert {parameter.dtype for parameter in chunk.parameters()} == {TORCH_DTYPES[dtype]}
    logits = chunk(some_tokens(), None, None)
    theirs = model(some_tokens(), use_cache=False).logits
    exact = model.double()(some_tokens(), use_cache=False).logits
    own, noise = ((x - exact).abs().max().item() for x in (logits, theirs))
    assert logits.dtype == TORCH_DTYPES[dtype]
    assert own <= 1.5 * noise, (own, noise)
    return f"off by {own:.1e}; transformers by {noise:.1e}"


for _dtype in ("bf16", "fp16"):
    CHECKS.case(f"{_dtype}_logits", 1, half_precision, dtype=_dtype)


def dropped_gradients(run: Run, **options: Any) -> dict[str, torch.Tensor]:
    dropout = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
    chunk = built(run, dtype="fp64", **dropout, **options)
    run.runtime.seed_all(9)
    chunk.train()
    chunk(some_tokens(), None, None, labels=some_tokens()).sum().backward()
    return {name: parameter.grad for name, parameter in chunk.named_parameters()}


@CHECKS.add(world_size=1)
def recomputation_repeats_dropout(run: Run) -> str:
    """Recomputed layers draw the dropout they drew at first: gradients do not change at all."""
    import torch

    plain, again = dropped_gradients(run), dropped_gradients(run)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    full = {"recompute_granularity": "full", "recompute_num_layers": 1}
    for options in (
        {**full, "recompute_method": "uniform"},
        {**full, "recompute_method": "block"},
        {"recompute_granularity": "selective"},
    ):
        found = dropped_gradients(run, **options)
        different = [name for name in plain if not torch.equal(plain[name], found[name])]
        assert not different, (options, different)
    return "bit-equal"


@CHECKS.add(world_size=1)
def evaluation_drops_nothing(run: Run) -> None:
    import torch

    chunk = built(run, hidden_dropout=0.2, attention_dropout=0.2).eval()
    plain = built(run).eval()
    with torch.no_grad():
        assert torch.equal(chunk(some_tokens(), None, None), plain(some_tokens(), None, None))


@CHECKS.add(world_size=1)
def unset_weights_carry_the_same_marks(run: Run) -> None:
    """The gradient norm reads these marks; without them it counts a cut weight on one rank only."""
    names = ("tensor_model_parallel", "partition_dim", "sequence_parallel", "shared_embedding")
    marks = []
    for perform_initialization in (True, False):
        chunk = built(run, perform_initialization=perform_initialization)
        marks.append(
            {
                name: [getattr(parameter, mark, None) for mark in names]
                for name, parameter in chunk.named_parameters()
            }
        )
    assert marks[0] == marks[1]
    assert marks[0]["decoder.layers.0.mlp.linear_fc2.weight"][:2] == [True, 1]


@CHECKS.add(world_size=1)
def random_weights_have_the_configured_spread(run: Run) -> None:
    parameters = dict(built(run).named_parameters())
    fc1 = parameters["decoder.layers.3.mlp.linear_fc1.weight"]
    assert abs(fc1.std().item() / CONFIG.init_method_std - 1) < 0.05
    assert parameters["decoder.layers.0.self_attention.linear_qkv.bias"].abs().max() == 0
    assert (parameters["decoder.final_layernorm.weight"] == 1).all()


@CHECKS.add(world_size=1)
def a_mask_is_refused_not_ignored(run: Run) -> None:
    import pytest
    import torch

    mask = torch.ones(16, 16, dtype=torch.bool).triu(1)
    with pytest.raises(AssertionError, match="causal"):
        built(run)(some_tokens(), None, mask)


@CHECKS.add(world_size=1)
def an_interleaved_pipeline_gets_the_transfers_that_are_right(run: Run) -> None:
    from qwen2_ascend.model.build import transformer_config

    interleaved = ParallelLayout(
        pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1
    )
    config = transformer_config(CONFIG, interleaved)
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (True, False)
    assert config.virtual_pipeline_model_parallel_size == 2
    plain = transformer_config(
        CONFIG, dataclasses.replace(interleaved, num_layers_per_virtual_pipeline_stage=2)
    )
    assert (plain.overlap_p2p_comm, plain.batch_p2p_comm) == (False, True)
    assert plain.virtual_pipeline_model_parallel_size is None


@CHECKS.add(world_size=1)
def what_does_not_fit_is_refused(run: Run) -> None:
    import pytest

    from qwen2_ascend import runtime
    from qwen2_ascend.errors import UserError
    from qwen2_ascend.model.build import build_model, transformer_config

    two = ParallelLayout(tensor_model_parallel_size=2)
    refused = {
        "sequence_parallel needs tensor_model_parallel_size": lambda: transformer_config(
            CONFIG, ALONE, sequence_parallel=True
        ),
        "does not divide num_layers": lambda: build_model(
            CONFIG, ParallelLayout(pipeline_model_parallel_size=3)
        ),
        r"1 process\(es\) cannot be shared out": lambda: runtime.initialize_model_parallel(two, 4),
        "device=npu: this process already runs on cpu": lambda: runtime.start("npu"),
    }
    for message, call in refused.items():
        with pytest.raises(UserError, match=message):
            call()


if __name__ == "__main__":
    main(CHECKS)
