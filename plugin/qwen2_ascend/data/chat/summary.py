"""What `preprocess --task sft|dpo` says at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen2_ascend.data.chat.encoding import UNUSED
from qwen2_ascend.data.output import Output
from qwen2_ascend.data.parts import State
from qwen2_ascend.data.settings import PreprocessSettings
from qwen2_ascend.pretrained import one_line

MOST_KEYS = 20
"""Keys that are named one by one."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was read and written."""

    num_rows: int
    bad_rows: int
    lengths: np.ndarray
    """Tokens of each chat; of pairs of both sides."""
    trained_tokens: int
    truncated: int
    unused_keys: Mapping[str, int]
    """Keys that mean nothing here, and in how many rows they are."""
    packs: int | None = None

    @classmethod
    def of(cls, state: State, prefixes: Sequence[Path]) -> Summary:
        """The summary of the finished files at `prefixes`."""
        from qwen2_ascend.data.indexed import open_indexed

        datasets = [open_indexed(prefix) for prefix in prefixes]
        # copies, while the datasets are there: a view outlives the memory map and crashes
        lengths = [np.array(dataset.sequence_lengths) for dataset in datasets]
        return cls(
            num_rows=len(lengths[0]),
            bad_rows=state.bad_rows,
            lengths=np.concatenate(lengths),
            trained_tokens=state.tallies.get("trained_tokens", 0),
            truncated=state.tallies.get("truncated", 0),
            unused_keys={
                key.removeprefix(UNUSED): count
                for key, count in sorted(state.tallies.items(), key=lambda item: -item[1])
                if key.startswith(UNUSED)
            },
        )

    def print(self, output: Output, settings: PreprocessSettings, seconds: float) -> None:
        """Prints a table."""
        tokens = int(self.lengths.sum())
        what = "pairs" if settings.task == "dpo" else "chats"
        print(f"{output.prefix}_packed_*_document.bin and .idx; --data-path {output.prefix}")
        print(f"  {what:<16} {self.num_rows:,}")
        print(f"  tokens           {tokens:,}")
        shown = ", ".join(f"{name} {value:,}" for name, value in quantiles(self.lengths).items())
        print(f"  tokens/chat      {shown}")
        share = self.trained_tokens / tokens
        print(f"  trained on       {self.trained_tokens:,} tokens, {share:.1%}")
        if seq_length := settings.seq_length:
            print(f"  truncated        {self.truncated:,} chats, to {seq_length:,} tokens")
            if self.packs is not None:
                full = tokens / (self.packs * seq_length)
                print(f"  packs            {self.packs:,} of {seq_length:,}, {full:.1%} full")
        if self.unused_keys:
            shown = [f"{one_line(k, 40)} ({n:,} rows)" for k, n in self.unused_keys.items()]
            more = f" and {len(shown) - MOST_KEYS} more" if len(shown) > MOST_KEYS else ""
            print(f"  keys not used    {', '.join(shown[:MOST_KEYS])}{more}")
        listed = f", listed in {output.bad_rows}" if self.bad_rows else ""
        print(f"bad rows  {self.bad_rows:,}{listed}")
        print(f"time      {seconds:,.1f} s")


def quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Smallest, median, 90th percentile and largest; each one of the lengths."""
    shares = {"min": 0.0, "median": 0.5, "p90": 0.9, "max": 1.0}
    return {
        name: int(np.quantile(lengths, share, method="inverted_cdf"))
        for name, share in shares.items()
    }
