"""Fixtures of this folder."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from corpora import save_tokenizer

with contextlib.suppress(ModuleNotFoundError):  # pythons.py has no megatron-core
    import qwen2_ascend.data.indexed  # noqa: F401 - elsewhere the runtime has started before that


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage_collection() -> Iterator[None]:
    """megatron-core collects garbage for every part it joins; spare it a look at all of torch."""
    gc.freeze()
    yield
    gc.unfreeze()
