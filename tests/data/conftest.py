"""Fixtures of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import save_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
