"""Products in pieces that are exchanged while the next is computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.overlap_worker import CHECKS

WORKER = Path(__file__).parent / "overlap_worker.py"


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS.all(), ids=str)
def test_pieces(check, launches) -> None:
    launches.result(WORKER, check).require()
