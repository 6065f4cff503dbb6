"""Small tokenizers and texts for the tests of this folder."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

WORDS = (
    "the of and to in a is that it was for as with his he be 日本 語 über naïve 😀 ( ) def return"
)


def documents(count: int, *, seed: int = 0, longest: int = 200) -> list[str]:
    """Texts of 1 to `longest` words, some beyond ASCII, some over several lines."""
    draw = random.Random(seed)
    words = WORDS.split()
    return [
        "".join(
            draw.choice(words) + draw.choice((" ", " ", " ", "\n", ", "))
            for _ in range(draw.randint(1, longest))
        )
        for _ in range(count)
    ]


def write_jsonl(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    lines = (json.dumps({key: text, "id": i}) + "\n" for i, text in enumerate(texts))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def save_tokenizer(folder: Path, *, eos_token: str = "<|endoftext|>", holes: int = 0) -> Path:
    """A byte-level BPE tokenizer as Qwen's, with a small vocabulary; `holes` makes it large."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(200, seed=99), trainer)
    raw = json.loads(tokenizer.to_str())
    start = len(raw["model"]["vocab"])
    raw["model"]["vocab"] |= {f"<unused_{i}>": start + i for i in range(holes)}
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos_token).save_pretrained(folder)
    return folder


def write_documents(prefix: str | Path, rows: Iterable[Sequence[int]], dtype=np.uint16) -> Path:
    """An indexed dataset of these tokens, a document a row."""
    from qwen2_ascend.data.indexed import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for row in rows:
        builder.add_document(row, [len(row)])
    builder.finalize(f"{prefix}.idx")
    return Path(prefix)


def stored(prefix: str | Path) -> list[np.ndarray]:
    """The documents that megatron-core's IndexedDataset reads."""
    from qwen2_ascend.data.indexed import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [np.array(dataset[i]) for i in range(len(dataset))]


def write_indexed(prefix: Path, lengths: Sequence[int], *, first: int = 1, dtype=np.uint16) -> Path:
    """An indexed dataset as Megatron's own preprocessing writes it.

    Document i holds `first + i` over and over and ends with token 0, so every token says where it
    is from.
    """
    rows = ([first + i] * (length - 1) + [0] for i, length in enumerate(lengths))
    return write_documents(prefix, rows, dtype)
