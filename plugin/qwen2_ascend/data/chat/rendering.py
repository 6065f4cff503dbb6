"""A chat as token ids, by the tokenizer's own chat template, and on which of them the loss is.

The loss is on what the model would say itself: from behind the generation prompt
(of Qwen, `<|im_start|>assistant` and a newline) up to and including the token that ends the turn
(`<|im_end|>`). The newline that Qwen's template writes behind that token is not trained on:
generation has stopped there. Where each turn begins and ends is asked of the template itself, by
rendering the chat up to that turn. That is right if such a rendering is how the whole chat's
begins, which is checked; a template with `{% generation %}` markers is asked for those instead.
A chat of which the text lacks a part is refused: it would be trained on as another one.

Text is tokenized piece by piece, cut where the loss begins and ends, because that is how the
model meets it: the generation prompt is complete before the first token of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qwen2_ascend import chat_template as templates
from qwen2_ascend.chat_template import (
    GENERATION_MARKER,
    ChatError,
    LimitError,
    lost_reasoning,
    lost_tools,
    lost_turns,
    template_for,
)
from qwen2_ascend.data.chat.formats import Chat
from qwen2_ascend.data.chat.settings import ChatSettings
from qwen2_ascend.errors import UserError
from qwen2_ascend.pretrained import is_encodable, one_line
from qwen2_ascend.prompt_types import PromptType, prompt_template


class TemplateError(UserError):
    """The chat template cannot say where the assistant's turns are; every row would meet it."""


class Tokens(NamedTuple):
    """A tokenized chat."""

    ids: np.ndarray
    """int32, `[n]`."""
    trained: np.ndarray
    """bool, `[n]`."""


class Segment(NamedTuple):
    """A part of a rendered chat."""

    text: str
    trained: bool


class ChatRenderer:
    """Renders and tokenizes chats with one tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        prompt_type: PromptType | None = None,
        train_on_prompt: bool = False,
        mask_history: bool = False,
    ) -> None:
        """Takes the tokenizer's own template unless another is given.

        Args:
            tokenizer: transformers' tokenizer, with a fast backend or without.
            chat_template: a Jinja template instead of the tokenizer's.
            prompt_type: a named template instead; its tokens are MindSpeed-LLM's, which cuts a text
                behind the system text too, and trains on all that an answer is written as.
            train_on_prompt: the loss is on every token.
            mask_history: the loss is on the last of the trained turns only.

        Raises:
            UserError: there is no template.
        """
        self._tokenizer = tokenizer
        self._is_named = prompt_type is not None
        self._given = chat_template if prompt_type is None else prompt_template(prompt_type)
        texts = templates.all_templates(tokenizer, self._given).values()
        self._train_on_prompt, self._mask_history = train_on_prompt, mask_history
        if tokenizer.is_fast:
            self._backend = tokenizer.backend_tokenizer
            self._backend.no_truncation()
            self._backend.no_padding()
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special and token.content.strip()}
        special |= set(tokenizer.all_special_tokens)
        # what the template writes between turns; in a text it would end the turn there
        named = {
            token
            for name, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str) and any(name in text for text in texts)
        }
        self._control = sorted(t for t in special if t in named or any(t in x for x in texts))
        # up to the last special token, when nothing but white space follows
        tokens = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        self._turn_end = re.compile(rf"(?s)(.*(?:{tokens}))\s*\Z") if tokens else None

    def __call__(self, chats: Sequence[Chat]) -> list[Tokens | ValueError]:
        """The chats' tokens, in order.

        Where a chat cannot be rendered a ValueError stands for it, and a TemplateError where the
        template does not render a chat's beginning as it renders the chat.
        """
        results: list[Any] = []
        for chat in chats:
            try:
                self._check_texts(chat)
                with templates.limited(chat.messages):
                    results.append(self.cut(chat))
            except LimitError as error:
                results.append(TemplateError(error.faults))
            except ValueError as error:
                results.append(error)
        texts = [piece.text for r in results if isinstance(r, list) for piece in r]
        ids = iter(self._encode(texts))
        return [
            _joined([(next(ids), piece.trained) for piece in result])
            if isinstance(result, list)
            else result
            for result in results
        ]

    def render(self, chat: Chat, end: int | None = None, *, ask: bool = False) -> str:
        """The template's text of a chat's first `end` messages, or of all.

        With `ask` the generation prompt stands behind them.

        Raises:
            ValueError: the template refuses the chat.
        """
        return templates.render(
            self._tokenizer,
            chat.messages[:end],
            tools=chat.tools,
            template=self._given,
            add_generation_prompt=ask,
        )

    def cut(self, chat: Chat) -> list[Segment]:
        """The rendered chat, cut where the loss begins and ends.

        Raises:
            ValueError: the template refuses the chat, or leaves a part of it out.
            TemplateError: its beginning is rendered differently from the whole.
        """
        if self._takes_markers(chat):
            return self._marked(chat)
        whole = self.render(chat)
        self._check_whole(chat, whole)
        if self._train_on_prompt:
            return [Segment(whole, True)]
        at = self._end_of_system(chat, whole)
        pieces = [Segment(whole[:at], False)]
        for turn in chat.trained[-1:] if self._mask_history else chat.trained:
            if turn == 0:
                raise ChatError(
                    "turn 1 is the assistant's, and nothing before it asks for an answer; put a "
                    'turn before it, or "weight": 0 into it'
                )
            begin = self._length_of(self.render(chat, turn, ask=True), whole, turn)
            end = self._length_of(self.render(chat, turn + 1), whole, turn + 1)
            said = whole[begin:end]
            self._check_said(said, chat, (turn,))
            if not self._is_named and self._turn_end and (match := self._turn_end.match(said)):
                said = match[1]
            pieces += [Segment(whole[at:begin], False), Segment(said, True)]
            at = begin + len(said)
        pieces.append(Segment(whole[at:], False))
        return [piece for piece in pieces if piece.text]

    def _end_of_system(self, chat: Chat, whole: str) -> int:
        """Where a named template has written the system text that a chat brings."""
        if not self._is_named or chat.messages[0]["role"] != "system":
            return 0
        return self._length_of(self.render(chat, 1), whole, 1)

    def _length_of(self, beginning: str, whole: str, count: int) -> int:
        if whole.startswith(beginning):
            return len(beginning)
        at = next((i for i, (a, b) in enumerate(zip(beginning, whole, strict=False)) if a != b), 0)
        raise TemplateError(
            f"the chat template renders the first {count} message(s) of a chat differently from "
            f"the whole chat: {beginning[max(0, at - 20) : at + 20]!r} is "
            f"{whole[max(0, at - 20) : at + 20]!r} there. So it cannot be told where the "
            "assistant's turns begin and end. Give --chat-template one that does not rewrite "
            "earlier turns, or has {% generation %} markers; or --mask-history, which only asks "
            "for the last turn; or --train-on-prompt, which asks for none."
        )

    def _takes_markers(self, chat: Chat) -> bool:
        """Whether the markers' turns are the ones that are trained on."""
        if self._train_on_prompt or self._mask_history:
            return False
        if not GENERATION_MARKER.search(template_for(self._tokenizer, chat.tools, self._given)):
            return False
        said = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        return list(chat.trained) == said

    def _marked(self, chat: Chat) -> list[Segment]:
        """The rendered chat, cut at the template's markers."""
        template = template_for(self._tokenizer, chat.tools, self._given)
        whole, spans = templates.render_marked(
            self._tokenizer, chat.messages, tools=chat.tools, template=template
        )
        self._check_whole(chat, whole)
        self._check_said("".join(whole[begin:end] for begin, end in spans), chat, chat.trained)
        pieces, at = [], 0
        for begin, end in sorted(spans):
            begin = max(begin, at)
            pieces += [Segment(whole[at:begin], False), Segment(whole[begin:end], True)]
            at = max(at, end)
        pieces.append(Segment(whole[at:], False))
        return [piece for piece in pieces if piece.text]

    def _check_said(self, said: str, chat: Chat, turns: Sequence[int]) -> None:
        """Refuses a text between prompts or markers that is not the assistant's.

        Raises:
            ChatError: says what is not in it.
        """
        lost = lost_turns(said, chat.messages, turns)
        if lost := lost or lost_reasoning(said, chat.messages, turns):
            raise ChatError(
                f"the chat template does not write {', '.join(lost)} where the assistant speaks; "
                "give --chat-template one that does, or take it out of the row"
            )

    def _check_whole(self, chat: Chat, whole: str) -> None:
        """Refuses a chat that would be trained on as another one.

        Raises:
            ValueError: says what the template has left out.
        """
        last = chat.trained[-1]
        turns = [  # with --mask-history a template may leave earlier answers out
            turn
            for turn, message in enumerate(chat.messages)
            if turn == last or message["role"] != "assistant" or not self._mask_history
        ]
        lost = lost_turns(whole, chat.messages, turns)
        if self._train_on_prompt:  # otherwise turn by turn
            lost += lost_reasoning(whole, chat.messages, chat.trained)
        lost += lost_tools(self._tokenizer, whole, chat.messages, chat.tools, template=self._given)
        if lost:
            raise ChatError(
                f"the chat template leaves out {', '.join(lost)}; give --chat-template one that "
                "writes it, or take it out of the row"
            )

    def _check_texts(self, chat: Chat) -> None:
        """Refuses texts that would end their turn, or are no text.

        Raises:
            ValueError: which.
        """
        parts = [(f"turn {number}", message) for number, message in enumerate(chat.messages, 1)]
        for where, part in (*parts, ("a tool", chat.tools)):
            for text in _texts_in(part):
                for token in self._control:
                    if token in text:
                        raise ValueError(
                            f"{where} holds {one_line(token)}, which the template writes between "
                            "turns"
                        )
                if not is_encodable(text):
                    raise ValueError(
                        f"{where} holds half of a surrogate pair, which is no character"
                    )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if not self._tokenizer.is_fast:
            return self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        # without the offsets and masks that transformers asks for: twice as fast
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def given_template(chat: ChatSettings) -> str | None:
    """The template that --prompt-type or --chat-template says; None for the tokenizer's own.

    Raises:
        UserError: it cannot be read.
    """
    if chat.prompt_type is not None:
        return prompt_template(chat.prompt_type)
    if (path := chat.chat_template) is None:
        return None
    try:
        return path.read_text(encoding="utf-8-sig")  # editors put a BOM in front
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {path}: cannot be read: {one_line(error)}.") from None


def _texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys of objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (str(key), *_texts_in(item))
    elif isinstance(value, list):
        for item in value:
            yield from _texts_in(item)


def _joined(pieces: list[tuple[list[int], bool]]) -> Tokens:
    ids = np.array([i for piece, _ in pieces for i in piece], dtype=np.int32)
    trained = np.repeat([trained for _, trained in pieces], [len(piece) for piece, _ in pieces])
    return Tokens(ids, trained)
