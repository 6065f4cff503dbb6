"""The tokenizer of a model folder, and what its folder says about generation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen2_ascend.errors import UserError
from qwen2_ascend.files import read_text
from qwen2_ascend.inference.sampling import Sampling
from qwen2_ascend.inference.settings import SamplingSettings

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
DEFAULT_MAX_NEW_TOKENS = 512
DEFAULT_TOP_K = 50
"""transformers', where generation_config.json does not say."""


class Tokenizer:
    """Texts and chats to tokens, and back.

    Args:
        folder: a Hugging Face folder.

    Raises:
        UserError: it holds no tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            # without these transformers 5 makes up a tokenizer that knows no text
            if not any((folder / name).is_file() for name in TOKENIZER_FILES):
                raise FileNotFoundError(f"there is none of {', '.join(TOKENIZER_FILES)}")
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{folder}: no tokenizer can be read from it ({reason[:200]}); name the model's "
                "Hugging Face folder, with its tokenizer.json, with --tokenizer-name-or-path."
            ) from error
        self.folder = folder

    def encode(self, text: str) -> list[int]:
        """As transformers gives them to a model."""
        return list(self._tokenizer(text).input_ids)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> list[int]:
        """A chat up to where the assistant is to answer.

        Raises:
            UserError: the tokenizer has no chat template, or that refuses the messages.
        """
        text = self.render_chat(messages, tools=tools)
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """A chat as the template writes it.

        Raises:
            UserError: as `encode_chat`.
        """
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{self.folder}: its tokenizer has no chat template; give plain prompts, or a "
                "folder that has one with --tokenizer-name-or-path."
            )
        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the chat template refuses the messages: {reason}") from error

    def template(self) -> str:
        """The chat template itself, or nothing."""
        return self._tokenizer.chat_template or ""

    def decode(self, tokens: list[int]) -> str:
        """Without special tokens, and otherwise as the tokens are."""
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def end_of_turn(self) -> int | None:
        """The special token that the chat template ends an answer with."""
        mark = "answer"
        asked = [{"role": "user", "content": "question"}]
        try:
            text = self._tokenizer.apply_chat_template(
                [*asked, {"role": "assistant", "content": mark}], tokenize=False
            )
        except Exception:
            return None
        rest = self._tokenizer(text[text.rindex(mark) + len(mark) :], add_special_tokens=False)
        first = next(iter(rest.input_ids), None)
        return first if first in self._tokenizer.all_special_ids else None


class Defaults:
    """generation_config.json, or where there is none what config.json says of generation.

    Args:
        folder: a Hugging Face folder.

    Raises:
        UserError: the file is not JSON, or a value in it is not what its key asks for.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "generation_config.json"
        if not self._path.exists():
            self._path = folder / "config.json"
        try:
            raw = json.loads(read_text(self._path, most=1 << 20))
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path}: cannot be read as JSON: {error}") from None
        self._raw = {k: v for k, v in raw.items() if v is not None}
        self.eos_tokens = self._eos_tokens()

    def sampling(self, settings: SamplingSettings) -> tuple[Sampling, str]:
        """How tokens are chosen, from the flags and else from the file; and where it is from."""
        drawing = (settings.temperature, settings.top_k, settings.top_p)
        asked = settings.do_sample or any(value is not None for value in drawing)
        do_sample = asked or (self._value("do_sample", False) and not settings.greedy)
        penalty = _first(settings.repetition_penalty, self._value("repetition_penalty", 1.0))
        sampling = Sampling(repetition_penalty=penalty)
        if do_sample:
            sampling = Sampling(
                do_sample=True,
                temperature=_first(settings.temperature, self._value("temperature", 1.0)),
                top_k=_first(settings.top_k, self._value("top_k", DEFAULT_TOP_K)),
                top_p=_first(settings.top_p, self._value("top_p", 1.0)),
                repetition_penalty=penalty,
            )
        names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
        used = [name for name in names if name in self._raw]
        return sampling, f"{self._path.name} says {_listed(self._raw, used)}" if used else ""

    def max_new_tokens(self, settings: SamplingSettings) -> int:
        """Tokens to add at most."""
        wanted = self._value("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
        return _first(settings.max_new_tokens, wanted)

    def _value(self, name: str, default: Any) -> Any:
        value = self._raw.get(name, default)
        numbers = (int, float) if isinstance(default, float) else (type(default),)
        if type(value) not in numbers:
            raise UserError(f"{self._path}: {name}={value!r} is not a {type(default).__name__}.")
        return value

    def _eos_tokens(self) -> tuple[int, ...]:
        value = self._raw.get("eos_token_id", [])
        tokens = value if isinstance(value, list) else [value]
        if any(type(token) is not int for token in tokens):
            raise UserError(f"{self._path}: eos_token_id={value!r} is not a token id or a list.")
        return tuple(tokens)


def _first(given: Any, default: Any) -> Any:
    return default if given is None else given


def _listed(raw: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name}={raw[name]}" for name in names)
