"""Flags about chats: one group for `preprocess --task sft|dpo` and one for fine-tuning.

Names are MindSpeed-LLM's and LLaMA-Factory's where those have the flag. Only parsing happens here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qwen2_ascend.errors import raise_if
from qwen2_ascend.flags import Flag
from qwen2_ascend.prompt_types import PromptType

HANDLERS = {
    "AlpacaStyleInstructionHandler": "alpaca",
    "SharegptStyleInstructionHandler": "sharegpt",
    "OpenAIInstructionHandler": "openai",
    "AlpacaStylePairwiseHandler": "alpaca",
    "SharegptStylePairwiseHandler": "sharegpt",
}
"""MindSpeed-LLM's names for the formats."""


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """How rows are read as chats, and what of a chat is trained on."""

    handler_name: Literal[
        "auto",
        "alpaca",
        "sharegpt",
        "openai",
        "preference",
        "AlpacaStyleInstructionHandler",
        "SharegptStyleInstructionHandler",
        "OpenAIInstructionHandler",
        "AlpacaStylePairwiseHandler",
        "SharegptStylePairwiseHandler",
    ] = "auto"
    """What a row looks like; auto finds out for each file and says what it found."""
    map_keys: Annotated[str | None, tyro.conf.arg(metavar="JSON")] = None
    """Names of columns and tags that differ from the usual ones, as in MindSpeed-LLM:
    '{"prompt": "question", "response": "answer"}' or
    '{"messages": "chat", "tags": {"role_tag": "who", "content_tag": "what"}}'."""
    prompt_type: PromptType | None = None
    """A named template of MindSpeed-LLM's instead of the tokenizer's own; the tokens are its."""
    chat_template: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A Jinja chat template to use instead of the tokenizer's own."""
    train_on_prompt: Flag = False
    """Train on every token of a chat, not only on what the assistant says."""
    mask_history: Flag = False
    """Train only on the assistant's last turn."""

    def __post_init__(self) -> None:
        faults = []
        if self.prompt_type is not None and self.chat_template is not None:
            faults.append(
                f"--prompt-type {self.prompt_type} and --chat-template {self.chat_template}: each "
                "says how chats are written; give one of them."
            )
        if self.train_on_prompt and self.mask_history:
            faults.append(
                "--train-on-prompt and --mask-history: each says what is trained on; give one of "
                "them."
            )
        raise_if(faults)

    @property
    def format(self) -> str:
        """auto, alpaca, sharegpt, openai or preference."""
        return HANDLERS.get(self.handler_name, self.handler_name)


@dataclass(frozen=True, kw_only=True)
class ChatDataSettings:
    """What is fine-tuned on: prepared .bin/.idx files, or files of chats."""

    data_path: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PREFIX|FILE ...")] = ()
    """Prefixes as `preprocess --task sft|dpo` or MindSpeed-LLM writes them, without
    _packed_input_ids_document; or .json, .jsonl and .parquet files, which are prepared at start."""
    split: str = "100,0,0"
    """Shares of training, validation and test in --data-path, in the order of the rows."""
    train_data_path: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PREFIX|FILE ...")] = ()
    """Training data, instead of a share of --data-path."""
    valid_data_path: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PREFIX|FILE ...")] = ()
    """Validation data, instead of a share of --data-path."""
    data_cache_path: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where files of chats are prepared, on storage that all nodes share; else beside them."""
    pack: Annotated[bool, tyro.conf.arg(aliases=["--neat-pack"])] = False
    """Put several chats into one sample of --seq-length; each sees only itself."""
    variable_seq_lengths: Flag = False
    """Pad a micro-batch to its longest chat instead of to --seq-length."""
    pad_to_multiple_of: int = 1
    """With --variable-seq-lengths, pad up to a multiple of this."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What to do with a row that is no chat, or of which --seq-length leaves no trained token."""
    no_shuffle: Flag = False
    """Take the samples in the order of the files, every epoch."""
    num_workers: int | None = None
    """Processes per rank that read ahead; by default 0 on a cpu and 2 elsewhere."""
    eval_interval: int = 1000
    """Steps between two measurements of the validation loss, which is measured after the last step
    too."""
    eval_iters: int | None = None
    """Batches that the validation loss is measured on; without it, or at 0, it is not measured."""
