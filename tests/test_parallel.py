"""ParallelLayout: stages partition the layers, and what does not fit is said all at once."""

from __future__ import annotations

import re
import time
from itertools import chain

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from helpers import tiny_config
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.parallel import (
    ParallelLayout,
    padded_vocab_size,
    sequence_faults,
    sequence_ranges,
    sequence_unit,
    tensor_parallel_sizes,
)


def layout(tp: int = 1, pp: int = 1, **others) -> ParallelLayout:
    return ParallelLayout(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **others)


def faults(config: Qwen2Config, *args, padded: int | None = None, **others) -> tuple[str, ...]:
    try:
        layout(*args, **others).check(config, padded)
    except UserError as error:
        return error.faults
    return ()


# --- stages ---------------------------------------------------------------------------------------


@st.composite
def layouts_with_layers(draw) -> tuple[ParallelLayout, int]:
    """A layout that fits, even, uneven or interleaved, and its number of layers."""
    pp = draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["even", "uneven", "interleaved"]))
    if kind == "uneven":
        numbers = tuple(draw(st.lists(st.integers(1, 5), min_size=pp, max_size=pp)))
        return layout(1, pp, num_layer_list=numbers), sum(numbers)
    n = draw(st.integers(1, 4))
    if kind == "even" or pp == 1:
        return layout(1, pp), pp * n
    chunks = draw(st.integers(1, 4))
    return layout(1, pp, num_layers_per_virtual_pipeline_stage=n), pp * n * chunks


@given(layouts_with_layers())
def test_stages_partition_the_layers(case: tuple[ParallelLayout, int]) -> None:
    """Property: every layer is in one chunk of one stage, and the model runs through the chunks in
    order: all stages' first chunks, then all stages' second ones."""
    parallel, num_layers = case
    parallel.check(tiny_config(num_layers=num_layers))
    stages = parallel.stages(num_layers)
    assert len(stages) == parallel.pp
    assert len({len(chunks) for chunks in stages}) == 1
    in_order = chain.from_iterable(zip(*stages, strict=True))
    assert list(chain.from_iterable(in_order)) == list(range(num_layers))
    chunks = parallel.virtual_pipeline_size(num_layers)
    assert len(stages[0]) == (chunks or 1)


def test_stages_by_hand() -> None:
    assert layout(1, 2).stages(6) == ((range(0, 3),), (range(3, 6),))
    assert layout(1, 3, num_layer_list=(1, 3, 2)).stages(6) == (
        (range(0, 1),),
        (range(1, 4),),
        (range(4, 6),),
    )
    interleaved = layout(1, 2, num_layers_per_virtual_pipeline_stage=2)
    assert interleaved.virtual_pipeline_size(12) == 3
    assert interleaved.stages(12) == (
        (range(0, 2), range(4, 6), range(8, 10)),
        (range(2, 4), range(6, 8), range(10, 12)),
    )


# --- tensor parallel sizes ------------------------------------------------------------------------


@st.composite
def configs(draw) -> Qwen2Config:
    groups, per_group = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return tiny_config(
        num_query_groups=groups,
        num_attention_heads=groups * per_group,
        kv_channels=2 * draw(st.integers(1, 8)),
        hidden_size=draw(st.sampled_from([24, 60, 64, 96, 720])),
        ffn_hidden_size=draw(st.sampled_from([48, 60, 96, 144, 720])),
        vocab_size=720720,
    )


@given(configs())
def test_sizes_that_are_offered_are_those_that_pass(config: Qwen2Config) -> None:
    """Property: the check passes exactly for the offered sizes, and they are exactly those that
    give every rank whole heads, whole rows and whole columns."""
    offered = tensor_parallel_sizes(config)
    heads, groups = config.num_attention_heads, config.num_query_groups
    rows = (heads + 2 * groups) * config.kv_channels
    for tp in range(1, heads + 3):
        divides = [heads, config.hidden_size, config.ffn_hidden_size, rows]
        good = all(n % tp == 0 for n in divides) and (groups % tp == 0 or tp % groups == 0)
        assert (tp in offered) == good
        assert (not faults(config, tp, padded=720720 * tp)) == good


@given(configs(), st.integers(2, 40))
def test_what_a_message_offers_works(config: Qwen2Config, tp: int) -> None:
    found = faults(config, tp, padded=720720 * tp)
    assume(found)
    for fault in found:
        (words,) = re.findall(r"use ([\d, or]+)\.", fault)
        for size in map(int, re.findall(r"\d+", words)):
            assert not faults(config, size, padded=720720 * size)


@pytest.mark.parametrize(
    ("size", "usable"),
    [
        ("0.5B", (1, 2)),
        ("1.5B", (1, 2, 4)),
        ("3B", (1, 2, 4, 8, 16)),
        ("7B", (1, 2, 4)),
        ("14B", (1, 2, 4, 8)),
        ("32B", (1, 2, 4, 8)),
        ("72B", (1, 2, 4, 8, 16, 32, 64)),
    ],
)
def test_published_models_can_be_cut_in_these(size: str, usable: tuple[int, ...]) -> None:
    """Divisors of heads, hidden and ffn in common, by hand: 72B has 64 heads and an ffn of
    29568 = 2^7 * 3 * 7 * 11; 7B has 28 heads, but an ffn of 18944 = 2^9 * 37."""
    assert tensor_parallel_sizes(Qwen2Config.named(size)) == usable


# --- faults ---------------------------------------------------------------------------------------

CONFIG = tiny_config(num_layers=6)

FAULTS = {
    "tp": ((3,), {"padded": 258}, [
        "does not divide num_attention_heads=8; use 1, 2, 4 or 8",
        "does not divide hidden_size=64",
    ]),
    "zero": ((0, 0), {}, ["tensor_model_parallel_size=0", "pipeline_model_parallel_size=0"]),
    "pp": ((1, 4), {}, ["does not divide num_layers=6; use 1, 2, 3 or 6, or say --num-layer-list"]),
    "vpp": (
        (1, 2),
        {"num_layers_per_virtual_pipeline_stage": 2},
        ["does not divide the 3 layers of a stage; use 1 or 3"],
    ),
    "vpp without pp": (
        (1, 1),
        {"num_layers_per_virtual_pipeline_stage": 2},
        ["needs pipeline_model_parallel_size of at least 2"],
    ),
    "vpp zero": (
        (1, 2),
        {"num_layers_per_virtual_pipeline_stage": 0},
        ["num_layers_per_virtual_pipeline_stage=0 must be at least 1"],
    ),
    "list": (
        (1, 2),
        {"num_layer_list": (1, 2, 2)},
        ["num_layer_list=1,2,2 has 3 numbers for pipeline_model_parallel_size=2", "sums to 5"],
    ),
    "list with zero": ((1, 2), {"num_layer_list": (6, 0)}, ["each must be at least 1"]),
    "list and vpp": (
        (1, 2),
        {"num_layer_list": (2, 4), "num_layers_per_virtual_pipeline_stage": 1},
        ["exclude each other"],
    ),
    "vocabulary": (
        (2,),
        {"padded": 257},
        ["does not divide the vocabulary of 257 rows; pad it, for example --padded-vocab-size 258"],
    ),
    "small vocabulary": ((1,), {"padded": 255}, ["padded_vocab_size=255 is below vocab_size=256"]),
    "everything": (
        (5, 4),
        {},
        [
            "num_attention_heads=8",
            "hidden_size=64",
            "ffn_hidden_size=96",
            "num_layers=6",
            "the vocabulary of 256 rows",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_all_faults_are_named_at_once(case: str) -> None:
    args, others, expected = FAULTS[case]
    found = faults(CONFIG, *args, **others)
    assert len(found) == len(expected)
    for text, fault in zip(expected, found, strict=True):
        assert text in fault


def test_groups_that_fit_no_way_are_a_fault() -> None:
    config = tiny_config(
        num_attention_heads=12, num_query_groups=4, kv_channels=12, hidden_size=96, vocab_size=252
    )
    (fault,) = faults(config, 6)
    assert "neither divides nor is a multiple of num_query_groups=4; use 1, 2, 3, 4" not in fault
    assert "neither divides nor is a multiple of num_query_groups=4" in fault
    assert not faults(config, 4)
    assert not faults(config, 12)


def test_a_group_whose_rows_cannot_be_shared_is_a_fault() -> None:
    """6 heads in 2 groups over 6 ranks: a group's (3 + 2) * 8 rows are not divisible by 3."""
    config = tiny_config(num_attention_heads=6, num_query_groups=2, hidden_size=96, vocab_size=252)
    (fault,) = faults(config, 6)
    assert "does not divide the 80 rows of linear_qkv" in fault


@pytest.mark.parametrize("layers", [10**9, 10**18, 10**18 + 9])
def test_absurd_sizes_are_answered_at_once(layers: int) -> None:
    start = time.process_time()
    assert faults(tiny_config(num_layers=layers), 1, 7)
    assert time.process_time() - start < 2


# --- vocabulary -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab_size", "tp", "padded"),
    [(151936, 1, 151936), (151936, 2, 152064), (152064, 4, 152064), (151936, 8, 152576)],
)
def test_padding_is_megatrons(vocab_size: int, tp: int, padded: int) -> None:
    config = tiny_config(vocab_size=vocab_size)
    assert padded_vocab_size(config, tp, divisible_by=128) == padded


@given(st.integers(1, 5000), st.integers(1, 16), st.integers(1, 256))
def test_padding_is_the_least_that_fits(vocab_size: int, tp: int, divisible_by: int) -> None:
    config = tiny_config(vocab_size=vocab_size)
    padded = padded_vocab_size(config, tp, divisible_by=divisible_by)
    unit = divisible_by * tp
    assert padded % unit == 0
    assert padded - unit < vocab_size <= padded


@given(st.integers(1, 5000), st.integers(1, 16))
def test_without_padding_the_vocabulary_stays_or_the_way_out_works(vocab_size, tp) -> None:
    config = tiny_config(vocab_size=vocab_size)
    try:
        assert padded_vocab_size(config, tp) == vocab_size
        assert vocab_size % tp == 0
    except UserError as error:
        (offered,) = re.findall(r"--padded-vocab-size (\d+)", str(error))
        assert padded_vocab_size(config, tp, size=int(offered)) == int(offered)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 300, "divisible_by": 128}, "give one of them"),
        ({"size": 200}, "padded_vocab_size=200 is below vocab_size=256"),
        ({"size": 257}, "does not divide the vocabulary of 257 rows"),
        ({"divisible_by": 0}, "--make-vocab-size-divisible-by 0 must be at least 1"),
    ],
)
def test_padding_mistakes_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        padded_vocab_size(tiny_config(), 2, **options)


# --- sequences ------------------------------------------------------------------------------------

ALGORITHMS = ("megatron_cp_algo", "ulysses_cp_algo", "kvallgather_cp_algo")


@given(st.integers(1, 8), st.integers(1, 5), st.sampled_from(ALGORITHMS))
def test_ranks_share_a_sequence_out(cp: int, unit: int, algorithm: str) -> None:
    """Property: every position is on one rank, and all hold as many; where a rank attends with its
    own queries alone, all have as many pairs of a query and a key it sees."""
    length = 2 * cp * unit
    held = [
        list(chain.from_iterable(sequence_ranges(length, cp, rank, algorithm)))
        for rank in range(cp)
    ]
    assert sorted(chain.from_iterable(held)) == list(range(length))
    assert {len(positions) for positions in held} == {length // cp}
    if algorithm != "ulysses_cp_algo":
        assert len({sum(position + 1 for position in positions) for positions in held}) == 1


def test_what_a_checkpoint_says_of_a_layout_is_the_same_at_every_cp() -> None:
    cut = layout(2, 2, context_parallel_size=4, context_parallel_algo="ulysses_cp_algo")
    assert cut.of_weights == layout(2, 2)


@pytest.mark.parametrize(
    ("cut", "seq_length", "sequence_parallel", "words"),
    [
        ({"context_parallel_size": 4}, 4100, False, "a multiple of 8, not 4100; use 4096 or 4104"),
        ({"context_parallel_size": 2, "tp": 4}, 4, True, "a multiple of 8, not 4; use 8"),
        (
            {"context_parallel_size": 4, "context_parallel_algo": "ulysses_cp_algo"},
            4098,
            False,
            "a multiple of 4, not 4098; use 4096 or 4100",
        ),
        (
            {"context_parallel_size": 8, "context_parallel_algo": "ulysses_cp_algo", "tp": 2},
            4096,
            False,
            "cannot share out the 4 query heads of a tensor-parallel rank",
        ),
        (
            {"context_parallel_size": 8, "context_parallel_algo": "ulysses_cp_algo", "tp": 2},
            4096,
            False,
            "use 1, 2 or 4, or megatron_cp_algo",
        ),
    ],
)
def test_sequences_that_cannot_be_cut_are_refused_with_what_could(
    cut: dict, seq_length: int, sequence_parallel: bool, words: str
) -> None:
    parallel = layout(cut.pop("tp", 1), **cut)
    found = sequence_faults(
        parallel, tiny_config(), seq_length, sequence_parallel=sequence_parallel
    )
    assert words in "".join(found)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_dropped_attention_weights_are_refused_where_results_are_merged(algorithm: str) -> None:
    """A run would otherwise end in its first step."""
    cut = layout(1, context_parallel_size=2, context_parallel_algo=algorithm)
    config = tiny_config(attention_dropout=0.1)
    told = "".join(sequence_faults(cut, config, 64, sequence_parallel=False))
    assert ("attention_dropout=0.1" in told) == (algorithm != "ulysses_cp_algo")
    assert ("--context-parallel-algo ulysses_cp_algo" in told) == bool(told)
    assert sequence_faults(layout(1), config, 64, sequence_parallel=False) == []


@pytest.mark.parametrize("cp", [2, 3, 4, 6, 7, 12, 14])
def test_ulysses_needs_ranks_that_divide_the_query_heads_alone(cp: int) -> None:
    """There are enough copies of the groups' keys for every rank's heads to find theirs."""
    from qwen2_ascend.model.context_plan import ulysses_repeats

    for heads, groups in ((14, 2), (12, 4), (12, 3), (28, 4)):
        config = tiny_config(num_attention_heads=heads, num_query_groups=groups)
        cut = layout(1, context_parallel_size=cp, context_parallel_algo="ulysses_cp_algo")
        is_refused = bool(sequence_faults(cut, config, 84 * cp, sequence_parallel=False))
        assert is_refused == (heads % cp != 0)
        if not is_refused:
            own = groups * ulysses_repeats(groups, cp) // cp
            assert heads // cp % own == 0, "a rank's groups have equally many heads"
            assert groups * ulysses_repeats(groups, cp) % cp == 0


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from(ALGORITHMS),
)
def test_a_length_that_is_taken_can_be_cut(
    cp: int, tp: int, sequence_parallel: bool, times: int, algorithm: str
) -> None:
    """Property: every rank gets as much, and tensor-parallel ranks can share it."""
    parallel = layout(tp, context_parallel_size=cp, context_parallel_algo=algorithm)
    length = times * sequence_unit(parallel, sequence_parallel=sequence_parallel)
    for rank in range(cp):
        held = sum(len(part) for part in sequence_ranges(length, cp, rank, algorithm))
        assert held * cp == length
        assert not sequence_parallel or held % tp == 0


def test_the_number_of_processes_has_to_fit() -> None:
    fault = layout(2, 2, context_parallel_size=2).world_fault(12)
    assert "context_parallel_size=2; start a multiple of 8" in fault
    assert "--nproc-per-node 16" in fault
