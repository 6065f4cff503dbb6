"""PreprocessSettings: every flag of `qwen2-ascend preprocess`, and the rules between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qwen2_ascend.data.chat.settings import ChatSettings
from qwen2_ascend.errors import raise_if
from qwen2_ascend.flags import Flag, flag_of, number_faults


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """Turns text, JSONL or Parquet into Megatron's .bin/.idx with a Hugging Face tokenizer.

    Writes PREFIX_KEY_document.bin and .idx for each key; --data-path takes PREFIX_KEY_document.
    Of chats (--task sft) and preference pairs (--task dpo) it writes
    PREFIX_packed_input_ids_document and the others of MindSpeed-LLM's; --data-path takes PREFIX.
    """

    task: Literal["pretrain", "sft", "dpo"] = "pretrain"
    """What the data is for: pretrain reads texts, sft chats, dpo preference pairs. The
    handlers of MindSpeed-LLM say it too, by --handler-name."""

    input: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE|GLOB|DIR ...")]
    """Files, globs or folders: .jsonl/.json, .parquet, anything else is text; .gz of these. Chats
    may also be a JSON array."""
    output_prefix: Annotated[Path, tyro.conf.arg(metavar="PREFIX")]
    """Where the result goes, without suffix."""
    tokenizer_name_or_path: Annotated[
        str, tyro.conf.arg(aliases=["--tokenizer-model"], metavar="DIR")
    ]
    """Hugging Face folder of the tokenizer."""
    tokenizer_type: Literal["PretrainedFromHF", "HuggingFaceTokenizer"] = "PretrainedFromHF"
    """Megatron's flag, so that its command lines work; there is only the one kind."""
    json_keys: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY ...")] = ("text",)
    """Keys of a JSON object, or columns of a Parquet file, to take; one output each."""
    append_eod: Flag = False
    """End each document with the end-of-document token."""
    eod_token: Annotated[str | None, tyro.conf.arg(metavar="TOKEN")] = None
    """The end-of-document token; by default the tokenizer's eos_token, as in Megatron. Of Qwen's
    instruct models that is <|im_end|>; their pretraining used <|endoftext|>."""
    input_format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """What the files are; auto goes by their names."""
    split_text_on: Literal["file", "blank-line", "line"] = "file"
    """What one document of a text file is; rows of other files are documents."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What to do with a row that gives no document: not JSON, no such key, not a string, empty, not
    UTF-8, too long; or no chat, or none with a token to train on."""
    max_document_bytes: Annotated[int, tyro.conf.arg(metavar="BYTES")] = 16 * 2**20
    """Longest row or text document; a worker needs about 140 times as much memory for it."""
    workers: int | None = None
    """Processes that tokenize; by default as many as there are cores. The result is the same."""
    log_interval: Annotated[int, tyro.conf.arg(metavar="DOCUMENTS")] = 10_000
    """Documents between two lines of progress, where no bar can be shown."""
    save_interval_mb: Annotated[float, tyro.conf.arg(metavar="MB")] = 256
    """MB of text between two points that --resume can go on from."""
    resume: Flag = False
    """Finish a run that was interrupted; starts one when there is none."""
    overwrite: Flag = False
    """Replace an existing result, or an unfinished run."""
    chat: Annotated[ChatSettings, tyro.conf.arg(name="")] = field(default_factory=ChatSettings)
    seq_length: int | None = None
    """Chats: cut longer ones at the end; without it they are cut when they are trained on."""
    pack: Flag = False
    """Chats: write packs of --seq-length; without it they can be packed when they are trained on.
    As in MindSpeed-LLM the chats of a pack see one another, unless --neat-pack is given."""
    neat_pack: Flag = False
    """Chats: write packs of which each chat sees only itself; says --pack too."""
    seed: int = 1234
    """Chats: seed of the packs."""

    @property
    def packs(self) -> bool:
        """Whether packs are written."""
        return self.pack or self.neat_pack

    def __post_init__(self) -> None:
        raise_if(self._faults())

    def _faults(self) -> list[str]:
        counts = ("max_document_bytes", "log_interval", "workers")
        faults = number_faults(self, at_least_one=counts, above_zero=("save_interval_mb",))
        if not self.input:
            faults.append("--input names no file, glob or folder.")
        if not self.json_keys or len(set(self.json_keys)) < len(self.json_keys):
            faults.append(f"--json-keys {' '.join(self.json_keys)}: give each key once.")
        if self.output_prefix.name in ("", ".", "..") or self.output_prefix.is_dir():
            faults.append(
                f"--output-prefix {self.output_prefix}: is a folder; give the start of a file "
                f"name in it, such as {self.output_prefix / 'corpus'}."
            )
        if self.eod_token is not None and not self.append_eod:
            faults.append(f"--eod-token {self.eod_token} has no effect without --append-eod.")
        if self.resume and self.overwrite:
            faults.append("--resume and --overwrite exclude each other.")
        return faults + (self._text_faults() if self.task == "pretrain" else self._chat_faults())

    def _text_faults(self) -> list[str]:
        """Flags about chats, where none are read."""
        given = {
            "--seq-length": self.seq_length is not None,
            "--pack": self.pack,
            "--neat-pack": self.neat_pack,
            **{
                flag_of(name): value != getattr(ChatSettings(), name)
                for name, value in vars(self.chat).items()
            },
        }
        return [f"{name} has no effect without --task sft or dpo." for name in given if given[name]]

    def _chat_faults(self) -> list[str]:
        faults = []
        if self.append_eod:
            faults.append("--append-eod is for texts; the chat template ends every turn itself.")
        if self.json_keys != ("text",):
            faults.append(
                "--json-keys is for texts; --map-keys says what the columns of chats are called."
            )
        if self.split_text_on != "file":
            faults.append("--split-text-on is for texts; a chat is a row of its file.")
        if self.input_format == "text":
            faults.append("--input-format text: chats are JSON, JSONL or Parquet.")
        if self.seq_length is not None and self.seq_length < 2:
            faults.append(f"--seq-length {self.seq_length} must be at least 2.")
        flag = "--pack" if self.pack else "--neat-pack"
        if self.packs and self.seq_length is None:
            faults.append(f"{flag} needs --seq-length.")
        if self.packs and self.task == "dpo":
            faults.append(f"{flag} is for --task sft; preference pairs are not packed.")
        if self.seed < 0:
            faults.append(f"--seed {self.seed} must not be below zero.")
        return faults
