"""What preprocessing says about itself: a bar on a terminal, lines in a log, a table at the end."""

from __future__ import annotations

import time
from typing import Any

from qwen2_ascend.data.output import Output
from qwen2_ascend.data.state import State
from qwen2_ascend.markdown import aligned
from qwen2_ascend.progress import progress_bar


class Progress:
    """Documents and tokens so far, and how much of the input that is."""

    def __init__(self, total_bytes: int, log_interval: int) -> None:
        self._total_bytes = max(1, total_bytes)
        self._log_interval = log_interval
        self._bar: Any = None
        self._documents = self._tokens = self._logged = 0

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        self._bar = progress_bar(self._total_bytes, "B")
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self._documents > self._logged:
            self._log()

    def update(self, *, documents: int, tokens: int, read_bytes: int) -> None:
        """Adds documents and tokens; `read_bytes` of the input are read by now."""
        self._documents += documents
        self._tokens += tokens
        self._read_bytes = min(read_bytes, self._total_bytes)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._rate(self._tokens):,.0f} tokens/s", refresh=False)
            self._bar.update(self._read_bytes - self._bar.n)
        elif self._documents // self._log_interval > self._logged // self._log_interval:
            self._log()

    def _rate(self, count: int) -> float:
        return count / max(1e-9, time.monotonic() - self._started)

    def _log(self) -> None:
        self._logged = self._documents
        print(
            f"processed {self._documents:,} documents, {self._tokens:,} tokens "
            f"({self._rate(self._documents):,.0f} documents/s, "
            f"{self._rate(self._tokens):,.0f} tokens/s), "
            f"{100 * self._read_bytes / self._total_bytes:.0f}% of the input",
            flush=True,
        )


def print_summary(output: Output, state: State, seconds: float, resumed_tokens: int) -> None:
    """Prints what was written, in `seconds` and, `resumed_tokens` of it, by an earlier run."""
    for key, of in state.counts.items():
        mean = of.tokens / max(1, of.documents)
        rows = [
            ("documents", f"{of.documents:,}"),
            ("tokens", f"{of.tokens:,}"),
            (
                "tokens/document",
                f"mean {mean:,.1f}, shortest {of.shortest:,}, longest {of.longest:,}",
            ),
        ]
        print("\n  ".join([f"{output.dataset(key)}.bin and .idx", *aligned(rows, "l")]))
    where = f", listed in {output.bad_rows}" if state.bad_rows else ""
    print(f"bad rows  {state.bad_rows:,}{where}")
    new = sum(of.tokens for of in state.counts.values()) - resumed_tokens
    resumed = f"; {resumed_tokens:,} tokens were there already" if resumed_tokens else ""
    print(f"time      {seconds:,.1f} s, {new / max(seconds, 1e-9):,.0f} tokens/s{resumed}")
