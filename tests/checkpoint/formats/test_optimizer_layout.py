"""Where the distributed optimizer keeps parameters; real files are in tests/interop."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from qwen2_ascend.checkpoint.formats.megatron_optimizer import (
    Segment,
    bucket_size,
    cut_out,
    flat_starts,
    in_model_order,
    loss_scale,
    num_updates,
    own_buckets,
)
from qwen2_ascend.checkpoint.formats.stored import StoredTensor

SIZES = {"a": 100, "b": 64, "c": 10, "d": 130}


@pytest.mark.parametrize(
    ("alone", "bucket_size", "starts", "total"),
    [
        # backwards, each at a multiple of 64 elements
        ((), None, {"d": 0, "c": 192, "b": 256, "a": 320}, 420),
        # nothing is padded where a bucket ends
        ((), 200, {"d": 0, "c": 192, "b": 202, "a": 266}, 366),
        # a parameter alone ends the bucket before, with its padding
        (("b",), None, {"d": 0, "c": 192, "b": 256, "a": 320}, 420),
        (("d", "a"), None, {"d": 0, "c": 130, "b": 194, "a": 258}, 358),
    ],
)
def test_where_parameters_begin(
    alone: tuple[str, ...], bucket_size: int | None, starts: dict[str, int], total: int
) -> None:
    assert flat_starts(SIZES, alone=alone, bucket_size=bucket_size) == (starts, total)


@pytest.mark.parametrize(
    ("args", "place", "expected"),
    [
        ({}, (0, 0), None),
        ({"overlap_grad_reduce": True}, (1, 0), None),
        ({"overlap_grad_reduce": True}, (0, 1), None),
        ({"overlap_grad_reduce": True, "data_parallel_size": 8}, (0, 0), 40_000_000),
        (
            {"overlap_grad_reduce": True, "data_parallel_size": 32, "context_parallel_size": 2},
            (0, 0),
            64_000_000,
        ),
        ({"overlap_grad_reduce": True, "ddp_bucket_size": 7}, (0, 0), 7),
        ({"overlap_grad_reduce": True, "ddp_num_buckets": 4}, (0, 0), 250),
    ],
)
def test_bucket_size(args: dict, place: tuple[int, int], expected: int | None) -> None:
    assert bucket_size(Namespace(**args), *place, 1000) == expected


def test_a_tied_embedding_has_its_own_bucket_where_two_stages_have_it() -> None:
    tied = Namespace(untie_embeddings_and_output_weights=False)
    assert own_buckets(tied, 1) == ()
    assert len(own_buckets(tied, 2)) == 2
    assert own_buckets(Namespace(untie_embeddings_and_output_weights=True), 2) == ()


def test_a_fused_norm_comes_with_its_linear_layer() -> None:
    names = [
        "embedding.word_embeddings.weight",
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.1.input_layernorm.weight",
        "decoder.final_layernorm.weight",
    ]
    assert in_model_order(reversed(names), Namespace(transformer_impl="local")) == names
    names[1:3] = names[2:0:-1]
    fused = Namespace(transformer_impl="transformer_engine")
    assert in_model_order(reversed(names), fused) == names


def test_a_parameter_may_be_in_several_segments() -> None:
    whole = StoredTensor(Path("file"), 1000, (100,), "fp32")
    segments = [Segment(0, whole), Segment(100, whole._replace(offset=5000))]
    assert list(cut_out(segments, 90, 110)) == [
        Segment(0, StoredTensor(Path("file"), 1360, (10,), "fp32")),
        Segment(10, StoredTensor(Path("file"), 5000, (10,), "fp32")),
    ]
    assert list(cut_out(segments, 200, 210)) == []


@pytest.mark.parametrize(
    "optimizer",
    [
        {"state": {"common_step": 3.0}, "param_groups": []},
        {"state": {0: {"step": 3}}, "param_groups": []},
        {"optimizer": {"param_groups": [{"step": 3}]}},
        {"optimizer": {"state": {0: {}}, "param_groups": [{}, {"step": 3}]}},
    ],
)
def test_the_number_of_updates(optimizer: dict) -> None:
    assert num_updates(optimizer) == 3


def test_no_loss_scale() -> None:
    assert loss_scale({"optimizer": {}, "grad_scaler": {}}) == {}
    scaler = {"scale": 8.0, "growth_tracker": 1, "hysteresis_tracker": 2}
    assert loss_scale({"grad_scaler": scaler}) == scaler
