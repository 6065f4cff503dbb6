"""Chats with a model, and on several ranks."""

from __future__ import annotations

from pathlib import Path

from chat_worker import CHECKS

from distributed.harness import each_check

WORKER = Path(__file__).parent / "chat_worker.py"
test_chats_on_ranks = each_check(WORKER, CHECKS)
