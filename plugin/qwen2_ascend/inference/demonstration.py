"""What MindSpeed-LLM's inference.py does: answers to one question in four ways, and a chat.

How tokens are chosen is its own, too: generation_config.json only says which token ends a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2_ascend.inference.chat import Manner, chat, check_template, show
from qwen2_ascend.inference.generator import Request
from qwen2_ascend.inference.settings import GenerateSettings, SamplingSettings, Task
from qwen2_ascend.inference.text import TextStream
from qwen2_ascend.inference.text_settings import TextSettings, text_settings

if TYPE_CHECKING:
    from qwen2_ascend.inference.engine import Engine
    from qwen2_ascend.inference.tokenizer import Tokenizer

QUESTION = "how are you?"
NUM_BEAMS = 2
MAX_NEW_TOKENS = 128
HISTORY_TURNS = 3
TEMPERATURE, TOP_K, TOP_P = 0.7, 50, 0.95
"""Where the flags say nothing else."""
ENDS = ("q", "quit", "exit", "/exit")
BEGINS = ("clear", "new", "/reset")


class Demonstration:
    """The tasks of a command line, ready to run; `folder` has the model's config.json.

    Raises:
        UserError: an option that cannot be used, or a chat template that is missing.
    """

    def __init__(
        self, settings: GenerateSettings, folder: Path, tokenizer: Tokenizer, vocab_size: int
    ) -> None:
        wanted = settings.demonstration
        self._tokenizer = tokenizer
        is_plain = settings.model.prompt_type is None and not wanted.hf_chat_template
        self._manner = Manner(
            tokenizer=tokenizer,
            is_plain=is_plain,
            system_prompt=settings.prompts.system_prompt,
            history_turns=(HISTORY_TURNS if wanted.history_turns is None else wanted.history_turns),
            ends=ENDS,
            begins=BEGINS,
        )
        check_template(self._manner)
        self._texts: dict[Task, TextSettings] = {
            task: text_settings(
                _of_task(settings.sampling, task), folder, tokenizer, is_chat=not is_plain
            )
            for task in settings.tasks()
        }
        for text in self._texts.values():
            text.check([], vocab_size)

    def describe(self) -> Iterator[str]:
        """Lines for the log."""
        turns = self._manner.history_turns
        written = "as they are" if self._manner.is_plain else "by a chat template"
        yield f"tasks {' '.join(self._texts)}: texts {written}, {turns} turn(s) remembered"
        yield from dict.fromkeys(line for text in self._texts.values() for line in text.describe())

    def run(self, engine: Engine) -> None:
        """Does the tasks in their order, with an engine of one row."""
        for task, text in self._texts.items():
            if task == "chat":
                show(f"--- {task}: {ENDS[0]} ends it, {BEGINS[0]} begins anew ---\n")
                chat(text.generator(engine, self._tokenizer), self._manner, text.max_new_tokens)
                continue
            show(f"--- {task}: {QUESTION} ---\n")
            show(f"{self._answer(engine, task, text)}\n")

    def _answer(self, engine: Engine, task: Task, text: TextSettings) -> str:
        tokens = self._manner.encode([{"role": "user", "content": QUESTION}])
        room = engine.config.max_position_embeddings - len(tokens)
        room = min(text.max_new_tokens(len(tokens)), room)
        if not task.startswith("beam_search"):
            request = Request(index=0, tokens=tokens, max_new_tokens=room)
            (done,) = text.generator(engine, self._tokenizer).run([request])
            return done.text

        from qwen2_ascend.inference.beams import beam_search  # with megatron-core

        new = beam_search(
            engine.with_rows(2 * NUM_BEAMS),
            tokens,
            num_beams=NUM_BEAMS,
            max_new_tokens=room,
            eos_tokens=text.eos_tokens,
            sampling=text.sampling,
            seed=text.settings.seed,
        )
        stream = TextStream(self._tokenizer.decode, text.stop, self._tokenizer.special_tokens())
        for token in new:
            stream.add(token)
        stream.end()
        return stream.text


def _of_task(given: SamplingSettings, task: Task) -> SamplingSettings:
    """The flags of sampling as a task reads them."""
    base = replace(
        given,
        max_new_tokens=given.max_new_tokens or MAX_NEW_TOKENS,
        repetition_penalty=given.repetition_penalty or 1.0,
    )
    if task in ("greedy", "beam_search"):
        return replace(base, greedy=True, temperature=None, top_k=None, top_p=None)
    return replace(
        base,
        do_sample=True,
        temperature=TEMPERATURE if given.temperature is None else given.temperature,
        top_k=TOP_K if given.top_k is None else given.top_k,
        top_p=TOP_P if given.top_p is None else given.top_p,
    )
