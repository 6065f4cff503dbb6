"""The tokenizer of a model folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen2_ascend.chat_template import (
    end_of_turn,
    lost_tools,
    lost_turns,
    render,
    special_tokens,
    template_for,
)
from qwen2_ascend.data.chat.formats import read_chat
from qwen2_ascend.errors import UserError
from qwen2_ascend.pretrained import is_encodable, open_tokenizer
from qwen2_ascend.prompt_types import PromptType, prompt_template


class Tokenizer:
    """Texts and chats to tokens, and back.

    Args:
        folder: a Hugging Face folder.
        prompt_type: how chats are written; None as the tokenizer's chat template says.

    Raises:
        UserError: it holds no tokenizer.
    """

    def __init__(self, folder: Path, prompt_type: PromptType | None = None) -> None:
        self._tokenizer = open_tokenizer(folder)
        self._template = None if prompt_type is None else prompt_template(prompt_type)
        self.folder = folder

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A text's tokens by transformers, with a bos token where the tokenizer adds one.

        Raises:
            UserError: the text holds what is no character.
        """
        if not is_encodable(text):
            raise UserError("holds half of a surrogate pair or a byte that is not UTF-8.")
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """A chat up to where the assistant is to answer.

        Raises:
            UserError: the messages cannot be read, or the tokenizer has no chat template, or that
                refuses them or leaves a part of them out.
        """
        try:
            messages, tools = read_chat(messages, tools)
        except ValueError as error:
            raise UserError(f"{error}.") from None
        text = self.render_chat(messages, tools=tools)
        lost = lost_turns(text, messages)
        lost += lost_tools(
            self._tokenizer,
            text,
            messages,
            tools,
            template=self._template,
            add_generation_prompt=True,
        )
        if lost:
            raise UserError(
                f"the chat template leaves out {', '.join(lost)}; take it out of the chat, or name "
                "a folder whose template writes it with --tokenizer-name-or-path."
            )
        return self.encode(text, add_special_tokens=False)

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
        try:
            return render(
                self._tokenizer,
                messages,
                tools=tools,
                template=self._template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{error}.") from None

    def template(self) -> str:
        """The chat template itself, or nothing."""
        if self._template is None and not self._tokenizer.chat_template:
            return ""
        return template_for(self._tokenizer, None, self._template)

    def decode(self, tokens: list[int]) -> str:
        """The text without special tokens, and otherwise as the tokens are."""
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def decode_as_configured(self, tokens: list[int]) -> str:
        """Text without special tokens; tokenizer_config.json says whether spaces are cleaned up.

        Only whole texts can be decoded in this way.
        """
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    @property
    def bos_token(self) -> int | None:
        """The tokenizer's own, whether it puts it in front of texts or not."""
        return self._tokenizer.bos_token_id

    @property
    def eos_token(self) -> int | None:
        """The tokenizer's own; the model may end its texts with others."""
        return self._tokenizer.eos_token_id

    def token_text(self, token: int) -> str:
        """What is written for a token, special or not."""
        return self._tokenizer.decode([token])

    def special_tokens(self) -> dict[int, str]:
        """The tokens that `decode` leaves out, and what a chat template writes for them."""
        return special_tokens(self._tokenizer)

    def end_of_turn(self) -> int | None:
        """The special token that the chat template ends an answer with."""
        return end_of_turn(self._tokenizer, self._template)
