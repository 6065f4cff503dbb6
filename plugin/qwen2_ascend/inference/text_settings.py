"""What flags, generation_config.json and tokenizer together say about the texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2_ascend.inference.generation_config import Defaults
from qwen2_ascend.inference.generator import Generator
from qwen2_ascend.inference.sampling import Place
from qwen2_ascend.inference.settings import SamplingSettings

if TYPE_CHECKING:
    from qwen2_ascend.inference.engine import Engine
    from qwen2_ascend.inference.generator import Request
    from qwen2_ascend.inference.sampling import Sampling
    from qwen2_ascend.inference.tokenizer import Tokenizer


def text_settings(
    settings: SamplingSettings, folder: Path, tokenizer: Tokenizer, *, is_chat: bool
) -> TextSettings:
    """What is said of texts, in the `folder` of the model's config.json too.

    With `is_chat` the end of a turn ends a text.

    Raises:
        UserError: a value that no generation can have.
    """
    defaults = Defaults(folder)
    sampling, said = defaults.sampling(settings)
    eos = dict.fromkeys(defaults.eos_tokens)
    # of a model fine-tuned from a base one config.json may still name another
    if is_chat and (end_of_turn := tokenizer.end_of_turn()) is not None:
        eos[end_of_turn] = None
    return TextSettings(
        settings=settings,
        defaults=defaults,
        sampling=sampling,
        eos_tokens=tuple(eos),
        said=said,
    )


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """What flags, generation_config.json and tokenizer together say about the texts."""

    settings: SamplingSettings
    defaults: Defaults
    sampling: Sampling
    eos_tokens: tuple[int, ...]
    said: str

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a text."""
        return (*self.settings.stop, *self.defaults.stop)

    def max_new_tokens(self, num_prompt_tokens: int) -> int:
        """Tokens to add at most to such a prompt."""
        return self.defaults.max_new_tokens(self.settings, num_prompt_tokens)

    def check(self, requests: Sequence[Request], vocab_size: int) -> None:
        """Tries the options that change logits.

        Raises:
            UserError: one has a value that cannot be used.
        """
        prompt = requests[0].tokens if requests else [0]
        place = Place(prompt=prompt, max_new_tokens=1, eos_tokens=self.eos_tokens)
        self.defaults.check(self.sampling, place, vocab_size)

    def describe(self) -> Iterator[str]:
        """Lines for the log."""
        eos = ", ".join(map(str, self.eos_tokens)) or "none"
        words = self.sampling.describe()
        if self.sampling.do_sample:
            words += f", seed {self.settings.seed}"
        said = f" ({self.said})" if self.said else ""
        yield f"{words}{said}, {self.defaults.describe_length(self.settings)}, eos {eos}"
        if self.defaults.stop:
            yield f"texts end before the stop_strings of the model, {list(self.defaults.stop)}"
        if unused := self.defaults.unused():
            yield unused

    def generator(self, engine: Engine, tokenizer: Tokenizer) -> Generator:
        return Generator(
            engine,
            decode=tokenizer.decode,
            eos_tokens=self.eos_tokens,
            sampling=self.sampling,
            stop=self.stop,
            special_tokens=tokenizer.special_tokens(),
            seed=self.settings.seed,
        )
