"""The mapping table: boxes tile every tensor, and cut it as a naive reference cuts it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.reference import reference_models
from checkpoint.toys import hugging_face_shapes
from helpers import tiny_config
from qwen2_ascend.checkpoint.rules import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    Rule,
    Shard,
    TensorSlice,
    hugging_face_pieces,
    megatron_pieces,
    qwen2_rules,
)
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.parallel import ParallelLayout, tensor_parallel_sizes
from qwen2_ascend.planning.parameters import num_parameters


@st.composite
def cases(draw) -> tuple[Qwen2Config, ParallelLayout, int]:
    """A config, a layout that fits it, and a padded vocabulary."""
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    shape = {
        "num_query_groups": groups,
        "num_attention_heads": groups * per_group,
        "kv_channels": 2 * draw(st.integers(1, 3)),
        "hidden_size": draw(st.sampled_from([12, 24])),
        "ffn_hidden_size": draw(st.sampled_from([12, 24, 48])),
        "tie_word_embeddings": draw(st.booleans()),
        "vocab_size": draw(st.integers(5, 20)),
    }
    pp, n = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    others: dict[str, object] = {}
    num_layers = pp * n
    match draw(st.sampled_from(["even", "uneven", "interleaved"])):
        case "uneven":
            numbers = tuple(draw(st.lists(st.integers(1, 3), min_size=pp, max_size=pp)))
            others["num_layer_list"], num_layers = numbers, sum(numbers)
        case "interleaved" if pp > 1:
            others["num_layers_per_virtual_pipeline_stage"] = n
            num_layers *= draw(st.integers(1, 2))
    config = tiny_config(**shape, num_layers=num_layers)
    tp = draw(st.sampled_from(tensor_parallel_sizes(config)))
    padded = -(-config.vocab_size // tp) * tp + tp * draw(st.integers(0, 2))
    layout = ParallelLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        **others,  # type: ignore[arg-type]
    )
    layout.check(config, padded)
    return config, layout, padded


def region(box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def tensors(config: Qwen2Config, padded: int) -> dict[str, tuple[Rule, int]]:
    """Every whole-model tensor: its rule and layer."""
    found = {}
    for rule in qwen2_rules(config, padded):
        for layer in range(config.num_layers) if "{}" in rule.megatron else [0]:
            found[rule.megatron.format(layer)] = (rule, layer)
    return found


# --- tiling ---------------------------------------------------------------------------------------


@given(cases())
def test_ranks_tile_every_view_exactly(case) -> None:
    """Property: over the tensor-parallel ranks every element of a view is in one box, or, where
    nothing is cut, in every rank's."""
    config, layout, padded = case
    for rule in qwen2_rules(config, padded):
        covered = np.zeros(rule.view, dtype=int)
        for tp_rank in range(layout.tp):
            box = rule.shard(layout.tp, tp_rank)
            assert all(0 <= start < stop for start, stop in box)
            covered[region(box)] += 1
        expected = layout.tp if rule.shard_axis is None else 1
        assert (covered == expected).all(), rule.megatron


@given(cases())
def test_hugging_face_parts_tile_the_unpadded_view(case) -> None:
    config, _, padded = case
    for rule in qwen2_rules(config, padded):
        covered = np.zeros(rule.view, dtype=int)
        for _, box in rule.parts:
            covered[region(box)] += 1
        is_vocabulary = rule.megatron in (EMBEDDING, OUTPUT)
        assert (covered[:, : config.vocab_size if is_vocabulary else None] == 1).all()
        if is_vocabulary:
            assert (covered[:, config.vocab_size :] == 0).all()


@given(cases())
def test_shards_hold_the_whole_model_and_nothing_twice(case) -> None:
    """Property: over all ranks and stages every element of every tensor is held once; norms by
    each tensor-parallel rank, and a tied embedding again by the last stage."""
    config, layout, padded = case
    counts = {name: np.zeros(rule.view, int) for name, (rule, _) in tensors(config, padded).items()}
    again = np.zeros_like(counts[EMBEDDING])
    for shard, pieces in megatron_pieces(config, layout, padded).items():
        for name, piece in pieces.items():
            is_copy = name == OUTPUT and piece.tensor == EMBEDDING
            (again if is_copy else counts[piece.tensor])[region(piece.box)] += 1
            assert not is_copy or shard.pp_stage == layout.pp - 1
    for name, (rule, _) in tensors(config, padded).items():
        expected = layout.tp if rule.shard_axis is None else 1
        assert (counts[name] == expected).all(), name
    assert (again == (config.tie_word_embeddings and layout.pp > 1)).all()


@given(cases())
def test_shapes_are_those_of_the_boxes(case) -> None:
    config, layout, padded = case
    rules = tensors(config, padded)
    every = [hugging_face_pieces(config), *megatron_pieces(config, layout, padded).values()]
    for piece in (piece for pieces in every for piece in pieces.values()):
        rule = rules[piece.tensor][0]
        sizes = [stop - start for start, stop in piece.box]
        assert np.prod(sizes) == np.prod(piece.shape)
        assert len(piece.shape) == (2 if rule.is_matrix else 1)


# --- against a naive reference --------------------------------------------------------------------


def hugging_face_model(config: Qwen2Config) -> dict[str, np.ndarray]:
    """Every tensor with numbers of its own, under transformers' names and shapes."""
    model, start = {}, 1
    for name, shape in hugging_face_shapes(config).items():
        stop = start + int(np.prod(shape))
        model[name] = np.arange(start, stop).reshape(shape)
        start = stop
    return model


def reference(model, config: Qwen2Config, layout: ParallelLayout, padded: int):
    """Every chunk of every rank, from the description of the layout."""
    interleaved = layout.num_layers_per_virtual_pipeline_stage
    cut = (layout.tp, layout.pp, interleaved, layout.num_layer_list, padded)
    return reference_models(model, config, *cut)


def assembled(model, config: Qwen2Config, padded: int) -> dict[str, np.ndarray]:
    """Whole-model views filled from the Hugging Face tensors by their boxes."""
    views = {name: np.zeros(rule.view, int) for name, (rule, _) in tensors(config, padded).items()}
    for name, piece in hugging_face_pieces(config).items():
        views[piece.tensor][region(piece.box)] = model[name].reshape(
            views[piece.tensor][region(piece.box)].shape
        )
    return views


@settings(max_examples=60)
@given(cases())
def test_boxes_cut_as_the_reference_does(case) -> None:
    """Property: every rank's keys, shapes and numbers are those of the naive reference."""
    config, layout, padded = case
    model = hugging_face_model(config)
    views = assembled(model, config, padded)
    every = megatron_pieces(config, layout, padded)
    expected = reference(model, config, layout, padded)
    assert set(every) == set(expected)
    for shard, pieces in every.items():
        assert list(pieces) == list(expected[shard])
        for name, piece in pieces.items():
            found = views[piece.tensor][region(piece.box)].reshape(piece.shape)
            assert np.array_equal(found, expected[shard][name]), (shard, name)


@settings(max_examples=30)
@given(cases())
def test_shards_give_the_hugging_face_tensors_back(case) -> None:
    config, layout, padded = case
    model = hugging_face_model(config)
    views = {name: np.zeros(rule.view, int) for name, (rule, _) in tensors(config, padded).items()}
    stored = reference(model, config, layout, padded)
    for shard, pieces in megatron_pieces(config, layout, padded).items():
        for name, piece in pieces.items():
            target = views[piece.tensor][region(piece.box)]
            target[...] = stored[shard][name].reshape(target.shape)
    for name, piece in hugging_face_pieces(config).items():
        found = views[piece.tensor][region(piece.box)].reshape(piece.shape)
        assert np.array_equal(found, model[name]), name


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_hugging_face_names_and_shapes_are_transformers(tied: bool) -> None:
    import torch
    from transformers import Qwen2Config as HuggingFaceConfig
    from transformers import Qwen2ForCausalLM

    config = tiny_config(tie_word_embeddings=tied)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(HuggingFaceConfig(**config.to_hugging_face()))
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=True)}
    pieces = hugging_face_pieces(config)
    assert {name: piece.shape for name, piece in pieces.items()} == theirs
    assert sum(int(np.prod(piece.shape)) for piece in pieces.values()) == num_parameters(config)


@pytest.mark.parametrize("size", ["0.5B", "7B", "72B"])
def test_published_models_have_as_many_parameters_as_their_pieces(size: str) -> None:
    config = Qwen2Config.named(size)
    pieces = hugging_face_pieces(config).values()
    assert sum(int(np.prod(piece.shape)) for piece in pieces) == num_parameters(config)


def test_keys_of_a_stage_by_hand() -> None:
    config = tiny_config(num_layers=2, tie_word_embeddings=True, vocab_size=254)
    layout = ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    first, last = (megatron_pieces(config, layout, 256)[Shard(1, stage, 0)] for stage in (0, 1))
    layer = {
        "decoder.layers.0.input_layernorm.weight": (64,),
        "decoder.layers.0.self_attention.linear_qkv.weight": (64, 64),
        "decoder.layers.0.self_attention.linear_qkv.bias": (64,),
        "decoder.layers.0.self_attention.linear_proj.weight": (64, 32),
        "decoder.layers.0.pre_mlp_layernorm.weight": (64,),
        "decoder.layers.0.mlp.linear_fc1.weight": (96, 64),
        "decoder.layers.0.mlp.linear_fc2.weight": (64, 48),
    }
    vocabulary = (128, 64)
    shapes = [{name: piece.shape for name, piece in pieces.items()} for pieces in (first, last)]
    assert shapes == [
        {EMBEDDING: vocabulary, **layer},
        {**layer, FINAL_NORM: (64,), OUTPUT: vocabulary},
    ]
    assert last[OUTPUT] == TensorSlice(EMBEDDING, ((0, 1), (128, 256), (0, 64)), vocabulary)
    assert last["decoder.layers.0.mlp.linear_fc2.weight"].tensor.startswith("decoder.layers.1.")


# --- rows -----------------------------------------------------------------------------------------


@given(blocks=st.integers(1, 5), rows=st.integers(1, 6), data=st.data())
def test_rows_become_the_box_that_holds_them(blocks: int, rows: int, data) -> None:
    """Property: a box of stored rows holds just those rows of the array, or they straddle."""
    rule = Rule(megatron="m.weight", parts=(), view=(blocks, rows, 3))
    start = data.draw(st.integers(0, blocks * rows - 1))
    stop = data.draw(st.integers(start + 1, blocks * rows))
    array = np.arange(blocks * rows * 3).reshape(blocks, rows, 3)
    whole_blocks = start % rows == 0 and stop % rows == 0
    inside_one = start // rows == (stop - 1) // rows
    if whole_blocks or inside_one:
        found = array[region(rule.rows_box(start, stop))].reshape(-1, 3)
        assert np.array_equal(found, array.reshape(-1, 3)[start:stop])
    else:
        with pytest.raises(ValueError, match="straddle blocks"):
            rule.rows_box(start, stop)
