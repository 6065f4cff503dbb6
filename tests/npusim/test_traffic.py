"""What a training step moves between cards does not grow, and is near what it has to be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from npusim.traffic import GOLDEN, LAYOUTS, measure, minimum, table

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
REDUCED = ("fp32", "bf16", "int32")

layouts = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            id=name.replace(" ", "-"),
            marks=pytest.mark.simulated(cards=layout.cards, alone="traffic"),
        )
        for name, layout in LAYOUTS.items()
    ],
)


@pytest.fixture(scope="module")
def runtime():
    from qwen2_ascend import runtime as runtimes

    running = runtimes.start("npu", timeout_seconds=60)
    yield running
    running.close()


def golden() -> dict:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


# Foreign warnings are errors in the CPU's training tests, and torch_npu adds many of its own.
@pytest.mark.filterwarnings("default")
@layouts
def test_a_step_moves_what_it_did(name, runtime):
    found = measure(runtime, Path(os.environ["NPUSIM_FOLDER"]), LAYOUTS[name])
    assert found["bytes"] >= minimum(LAYOUTS[name])
    assert found["bytes"] <= golden()[name]["bytes"], found
    assert found["calls"] <= golden()[name]["calls"], found
    kinds = [kind.split() for kind in found["first rank"]]
    assert all(dtype in REDUCED for op, dtype, _ in kinds if "Reduce" in op), kinds


def test_only_sequence_parallelism_moves_much_more_than_it_must():
    """It gathers the inputs of the linear layers again in backward instead of keeping them."""
    for name, numbers in golden().items():
        above = numbers["bytes"] - minimum(LAYOUTS[name])
        cards = LAYOUTS[name].cards
        again = 0
        if LAYOUTS[name].sequence_parallel:
            calls = numbers["first rank"]
            gathers, scatters = calls["AllGather bf16 1536"], calls["ReduceScatter bf16 1536"]
            assert gathers == scatters + (2 * 4 + 1) * 2
            again = (gathers - scatters) * 1536 * 2 * cards
        # 512 bytes that all ranks tell each other, a few numbers, a padded buffer
        assert 0 <= above - again <= 512 * cards * (cards - 1) + 500, name


def test_the_table_is_that_of_the_document():
    assert table(golden()) in BENCHMARKS.read_text(encoding="utf-8")
