"""What a worker of `preprocess --task sft|dpo` does: rows in, token ids and labels out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen2_ascend.data.chat.formats import RowFormat
from qwen2_ascend.data.chat.rendering import ChatRenderer, TemplateError, Tokens
from qwen2_ascend.data.chat.rows import where
from qwen2_ascend.data.chat.stored_files import IGNORED, SIDES
from qwen2_ascend.data.inputs import Row
from qwen2_ascend.data.settings import PreprocessSettings
from qwen2_ascend.data.tokenization import BadRow, Encoded, parse_row
from qwen2_ascend.errors import UserError
from qwen2_ascend.pretrained import open_tokenizer

UNUSED = "rows with the unused key "
"""What the tally of a key begins with that means nothing here."""
MOST_UNUSED = 100


def output_keys(task: str) -> tuple[str, ...]:
    """What is written for each row, as in the files' names; of pairs MindSpeed-LLM has no masks."""
    kinds = ("input_ids", "labels") + (("attention_mask",) if task == "sft" else ())
    return tuple(f"packed_{side}{kind}" for side in SIDES[task] for kind in kinds)


class ChatEncoder:
    """Turns rows into token ids and labels; one lives in each worker."""

    def __init__(
        self,
        settings: PreprocessSettings,
        formats: Mapping[str, RowFormat],
        chat_template: str | None,
    ) -> None:
        # several processes tokenize; threads below each would only be in each other's way
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._render = ChatRenderer(
            open_tokenizer(settings.tokenizer_name_or_path),
            chat_template=chat_template,
            prompt_type=settings.chat.prompt_type,
            train_on_prompt=settings.chat.train_on_prompt,
            mask_history=settings.chat.mask_history,
        )
        self._formats, self._task = formats, settings.task
        self._unused: set[str] = set()
        self._seq_length = settings.seq_length
        self._max_row_bytes = settings.max_document_bytes

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        tallies: Counter[str] = Counter()
        bad: dict[int, str] = {}
        chats = {}
        for i, row in enumerate(rows):
            try:
                values = self._parsed(row)
                chats[i] = self._formats[row.path].chats(values)
                unknown = self._formats[row.path].unknown_keys(values)
                tallies.update({UNUSED + self._counted(key) for key in unknown})
            except ValueError as error:
                bad[i] = str(error)
        rendered = iter(self._render([chat for pair in chats.values() for chat in pair]))
        kept: list[list[Tokens]] = []
        for i, pair in chats.items():
            results = [next(rendered) for _ in pair]
            try:
                kept.append([self._checked(result, rows[i]) for result in results])
            except ValueError as error:
                if isinstance(error, UserError):
                    raise
                bad[i] = str(error)
                continue
            tallies["truncated"] += sum(
                isinstance(full, Tokens) and len(full.ids) > len(cut.ids)
                for full, cut in zip(results, kept[-1], strict=True)
            )
        tallies["tokens"] = sum(len(t.ids) for pair in kept for t in pair)
        # a chat's first token is never predicted
        tallies["trained_tokens"] = sum(int(t.trained[1:].sum()) for pair in kept for t in pair)
        tokens, lengths = self._arrays(kept)
        return Encoded(
            tokens=tokens,
            lengths=lengths,
            bad_rows=[BadRow(where(rows[i]), bad[i]) for i in sorted(bad)],
            tallies=dict(tallies),
        )

    def _counted(self, key: str) -> str:
        """The key, or what all keys are counted as when a file has more than anyone would read."""
        if len(self._unused) < MOST_UNUSED:
            self._unused.add(key)
        return key if key in self._unused else "others"

    def _parsed(self, row: Row) -> Any:
        if row.raw is None:
            raise ValueError(
                f"longer than --max-document-bytes {self._max_row_bytes}; leave it out, or raise "
                "that"
            )
        return parse_row(row.raw)

    def _checked(self, result: Tokens | ValueError, row: Row) -> Tokens:
        """The tokens, cut to --seq-length.

        Raises:
            ValueError: none is left that is trained on.
            UserError: the template cannot be used.
        """
        if isinstance(result, TemplateError):
            raise UserError(f"{where(row)}: {result}")
        if isinstance(result, ValueError):
            raise result
        cut = Tokens(result.ids[: self._seq_length], result.trained[: self._seq_length])
        if not cut.trained[1:].any():
            raise ValueError(
                f"has no token to train on in its first {self._seq_length} of {len(result.ids)}"
                if result.trained[1:].any()
                else "has no token to train on"
            )
        return cut

    def _arrays(
        self, kept: list[list[Tokens]]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """All rows' numbers one after the other, and how many each row has, by key."""
        arrays: dict[str, np.ndarray] = {}
        lengths: dict[str, np.ndarray] = {}
        for n, side in enumerate(SIDES[self._task]):
            # there may be no row
            ids = np.concatenate([np.empty(0, np.int32), *(pair[n].ids for pair in kept)])
            trained = np.concatenate([np.empty(0, bool), *(pair[n].trained for pair in kept)])
            labels = np.where(trained, ids, np.int32(IGNORED))
            own = {f"packed_{side}input_ids": ids, f"packed_{side}labels": labels}
            if self._task == "sft":
                own["packed_attention_mask"] = np.ones_like(ids)
            arrays |= own
            counts = np.array([len(pair[n].ids) for pair in kept], dtype=np.int64)
            lengths |= dict.fromkeys(own, counts)
        return arrays, lengths
