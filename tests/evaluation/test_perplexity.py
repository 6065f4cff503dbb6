"""Perplexity is transformers', at every layout; windows score each token once."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from distributed.harness import each_check
from evaluation.evaluation_worker import CHECKS
from qwen2_ascend.evaluation.scoring import windows

WORKER = Path(__file__).with_name("evaluation_worker.py")
test_perplexity = each_check(WORKER, CHECKS)


@given(st.data())
def test_windows_score_each_token_but_the_first_once(data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(2, 200))
    window = data.draw(st.integers(2, 220))
    stride = data.draw(st.integers(1, window - 1))
    scored = []
    for begin, end, first in windows(num_tokens, window, stride):
        assert end - begin <= window
        assert begin < first < end
        # what is promised about the context
        assert begin == 0 or first - begin >= window - stride
        scored += range(first, end)
    assert scored == list(range(1, num_tokens))
