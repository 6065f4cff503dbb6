"""What `preprocess --task sft|dpo` says at its end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen2_ascend.data.chat.encoding import UNUSED
from qwen2_ascend.data.output import Output
from qwen2_ascend.data.settings import PreprocessSettings
from qwen2_ascend.data.state import State
from qwen2_ascend.errors import first_of
from qwen2_ascend.pretrained import one_line


def print_summary(
    output: Output,
    settings: PreprocessSettings,
    state: State,
    lengths: Sequence[np.ndarray],
    packs: int | None,
    seconds: float,
) -> None:
    """Prints what was read and written.

    Args:
        output: the files.
        settings: what was asked for.
        state: what the run has counted.
        lengths: tokens of each chat; of pairs of each side.
        packs: rows that hold several chats, where such were written.
        seconds: how long this run took.
    """
    all_lengths = np.concatenate(lengths)
    tokens = int(all_lengths.sum())
    what = "pairs" if settings.task == "dpo" else "chats"
    print(f"{output.prefix}_packed_*_document.bin and .idx; --data-path {output.prefix}")
    print(f"  {what:<16} {len(lengths[0]):,}")
    print(f"  tokens           {tokens:,}")
    shown = ", ".join(f"{name} {value:,}" for name, value in _quantiles(all_lengths).items())
    print(f"  tokens/chat      {shown}")
    trained_tokens = state.tallies.get("trained_tokens", 0)
    print(f"  trained on       {trained_tokens:,} tokens, {trained_tokens / tokens:.1%}")
    if seq_length := settings.seq_length:
        truncated = state.tallies.get("truncated", 0)
        print(f"  truncated        {truncated:,} chats, to {seq_length:,} tokens")
        if packs is not None:
            full = tokens / (packs * seq_length)
            print(f"  packs            {packs:,} of {seq_length:,}, {full:.1%} full")
    unused = {k: n for k, n in state.tallies.items() if k.startswith(UNUSED)}
    if unused:
        shown = [
            f"{one_line(key.removeprefix(UNUSED), 40)} ({rows:,} rows)"
            for key, rows in sorted(unused.items(), key=lambda item: (-item[1], item[0]))
        ]
        print(f"  keys not used    {first_of(shown)}")
    listed = f", listed in {output.bad_rows}" if state.bad_rows else ""
    print(f"bad rows  {state.bad_rows:,}{listed}")
    print(f"time      {seconds:,.1f} s")


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Smallest, median, 90th percentile and largest; each one of the lengths."""
    shares = {"min": 0.0, "median": 0.5, "p90": 0.9, "max": 1.0}
    return {
        name: int(np.quantile(lengths, share, method="inverted_cdf"))
        for name, share in shares.items()
    }
