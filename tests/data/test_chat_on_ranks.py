"""Chats with a model, and on several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_worker import CHECKS

from distributed.harness import Check, Launches

WORKER = Path(__file__).parent / "chat_worker.py"


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS.all(), ids=str)
def test_chats_on_ranks(check: Check, launches: Launches) -> None:
    launches.result(WORKER, check).require()
