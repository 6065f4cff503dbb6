"""Every query is computed with every key that it may see, once, by the rank that holds it."""

from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.context_cases import sent_bytes
from qwen2_ascend.model.context_plan import (
    GATHER,
    RING,
    ULYSSES,
    Launch,
    gathered_launches,
    ring_launches,
    ulysses_repeats,
)
from qwen2_ascend.parallel import sequence_ranges

S, B = 24, 2


@st.composite
def packings(draw: st.DrawFn) -> tuple[int, ...] | None:
    """Where documents end in B rows of S tokens."""
    if draw(st.booleans()):
        return None
    ends = draw(st.sets(st.integers(1, S * B - 1)))
    return tuple(sorted(ends | {S * (row + 1) for row in range(B)}))


def seen(ends: tuple[int, ...] | None) -> set[tuple[int, int, int]]:
    """Each row, query and key of causal attention within documents, written out."""
    whole = ends or tuple(S * (row + 1) for row in range(B))
    return {
        (start // S, query % S, key % S)
        for start, end in pairwise((0, *whole))
        for query in range(start, end)
        for key in range(start, query + 1)
    }


def computed(launches: list[tuple[Launch, list[int], list[int]]]) -> Counter:
    """How often each row, query and key is computed, from places back to positions."""
    found: Counter = Counter()
    for launch, queries, keys in launches:
        assert len({block.causal for block in launch}) <= 1, "one operator computes a launch"
        for block in launch:
            assert block.rows and block.queries and block.keys
            for row in block.rows:
                for n, query in enumerate(block.queries):
                    hidden = len(block.queries) - 1 - n if block.causal else 0
                    for key in block.keys[: len(block.keys) - hidden]:
                        found[row, queries[query], keys[key]] += 1
    return found


def held(cp: int, rank: int, algorithm: str) -> list[int]:
    return list(chain(*sequence_ranges(S, cp, rank, algorithm)))


@given(packings(), st.sampled_from([1, 2, 3, 4, 6]))
def test_the_ring_computes_every_pair_once(ends, cp) -> None:
    found: Counter = Counter()
    for rank in range(cp):
        launches = ring_launches(S, B, cp, rank, ends)
        assert len(launches) == cp and launches[0], "one's own keys come first"
        found += computed(
            [
                (launch, held(cp, rank, RING), held(cp, (rank - n) % cp, RING))
                for n, launch in enumerate(launches)
            ]
        )
    assert found == Counter(dict.fromkeys(seen(ends), 1))


@given(packings(), st.sampled_from([1, 2, 3, 4, 6]))
def test_gathered_keys_compute_every_pair_once(ends, cp) -> None:
    found: Counter = Counter()
    for rank in range(cp):
        launches = gathered_launches(S, B, cp, rank, ends)
        own = held(cp, rank, GATHER)
        found += computed([(launch, own, list(range(S))) for launch in launches])
    assert found == Counter(dict.fromkeys(seen(ends), 1))


@pytest.mark.parametrize("plan", [ring_launches, gathered_launches])
def test_ranks_have_equal_work(plan) -> None:
    """Pairs of a query and a key that are computed for whole rows, in units of a chunk's square."""
    cp, unit = 4, (S // 8) ** 2

    def work(launch: Launch) -> float:
        total = 0
        for block in launch:
            m, n = len(block.queries), len(block.keys)
            total += m * n - (m * (m - 1) // 2 if block.causal else 0)
        return total

    loads = [[work(launch) for launch in plan(S, 1, cp, rank, None)] for rank in range(cp)]
    assert len({sum(load) for load in loads}) == 1
    if plan is ring_launches:  # in every step, so that no rank waits for another
        assert all(len(set(step)) == 1 for step in zip(*loads, strict=True))
        assert loads[0][1] == 2 * unit


def test_whole_rows_are_one_piece_a_launch() -> None:
    """An operator takes it without copies of q and k."""
    for rank in range(4):
        for plan in (ring_launches, gathered_launches):
            assert [len(launch) for launch in plan(S, B, 4, rank, None)] in ([1] * 4, [1] * 2)


def test_a_chunk_that_no_document_reaches_into_needs_no_other_rank() -> None:
    ends = tuple(range(3, S * B + 1, 3))
    for rank in range(4):
        own, *others = ring_launches(S, B, 4, rank, ends)
        assert own and not any(others)


def test_bytes_sent() -> None:
    """7B at TP1, CP4, 8,192 tokens a rank, bf16: written out."""
    sizes = {"tokens": 8192, "np": 28, "ng": 4, "hn": 128, "element": 2}
    keys = 8192 * 4 * 128 * 2
    assert sent_bytes(RING, 4, **sizes) == (6 * keys, 12 * keys)
    assert sent_bytes(GATHER, 4, **sizes) == sent_bytes(RING, 4, **sizes)
    whole = 8192 * (28 + 4 + 4 + 28) * 128 * 2
    assert sent_bytes(ULYSSES, 4, **sizes) == (0.75 * whole, 0.75 * whole)


@pytest.mark.parametrize(("ng", "cp", "repeats"), [(4, 2, 1), (4, 4, 1), (2, 4, 2), (4, 6, 3)])
def test_ulysses_repeats_groups_so_that_ranks_divide_them(ng, cp, repeats) -> None:
    assert ulysses_repeats(ng, cp) == repeats
