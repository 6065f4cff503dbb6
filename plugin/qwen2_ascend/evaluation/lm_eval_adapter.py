"""Qwen2LM: this project's model behind lm-eval's interface, at any layout.

Every rank runs the same evaluation over the same questions; what a rank asks the model, all ask.
The answers are those of lm-eval's own `hf` model, which obeys generation_config.json too.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]  # an extra
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from qwen2_ascend.errors import UserError
from qwen2_ascend.evaluation.local_tasks import LIMITS
from qwen2_ascend.evaluation.scoring import Scorer
from qwen2_ascend.inference.generator import Generator, Request
from qwen2_ascend.inference.sampling import NAMES, Place
from qwen2_ascend.inference.settings import SamplingSettings

if TYPE_CHECKING:
    from qwen2_ascend.inference.engine import Engine
    from qwen2_ascend.inference.generation_config import Defaults
    from qwen2_ascend.inference.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256
"""lm-eval's own default, where a task does not say."""


class Qwen2LM(TemplateLM):
    """Scores and continues texts for lm-eval.

    Args:
        engine: this rank's.
        tokenizer: the model's.
        defaults: what the model's folder says of generation: how tokens are chosen where a task
            does not say, and which end a text.
        seed: the seed of the draws, where a task samples.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, defaults: Defaults, *, seed: int
    ) -> None:
        super().__init__()
        self._engine = engine
        self._tokenizer = tokenizer
        self._scorer = Scorer(engine)
        self._defaults = defaults
        self._seed = seed

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's own end of text, where it has one, as with lm-eval's `hf` model."""
        token = self._tokenizer.eos_token
        return self._defaults.eos_tokens[0] if token is None else token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        token = self._tokenizer.bos_token
        return self.eot_token_id if token is None else token

    @property
    def max_length(self) -> int:
        """Tokens of the model's context."""
        return self._engine.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer.folder).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self._tokenizer.template() if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        render = partial(self._tokenizer.render_chat, add_generation_prompt=add_generation_prompt)
        try:
            return render(chat_history)
        except UserError:
            without_system = [message for message in chat_history if message["role"] != "system"]
            if len(without_system) == len(chat_history):
                raise
            warnings.warn("the chat template refuses the system's message; left out", stacklevel=2)
            return render(without_system)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        if add_special_tokens is None:
            prefix = self._tokenizer.token_text(self.prefix_token_id)
            add_special_tokens = not string.startswith(prefix)
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        """Each continuation's log-probability after its context, and whether it is the greedy one.

        A context that is too long loses its beginning; the last token is only asked for.
        """
        sequences, firsts = [], []
        for _texts, context, continuation in requests:
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            sequences.append(tokens)
            firsts.append(len(tokens) - len(continuation))
        return [
            (sum(one.log_probability for one in row), all(one.is_likeliest for one in row))
            for row in self._by_length(sequences, firsts)
        ]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the context's length that do not overlap
        in what they score; before the first token stands the end-of-text token."""
        return [self._rolling(request.args[0]) for request in requests]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continues texts up to a stop string."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(_options(request.args[1])), []).append(index)
        for indices in groups.values():
            wanted = [self._request(index, *requests[index].args) for index in indices]
            generator = self._generator(requests[indices[0]].args[1], wanted[0])
            for done in generator.run(wanted):
                text = self._tokenizer.decode_as_configured(done.tokens)
                for stop in filter(None, wanted[indices.index(done.index)].stop):
                    text = text.split(stop)[0]
                answers[done.index] = text
        return answers

    def _generator(self, options: dict[str, Any], first: Request) -> Generator:
        """What continues texts with a task's options, tried on the first of them."""
        options = _options(options)
        if unknown := options.keys() - set(NAMES):
            raise UserError(f"generation_kwargs: {', '.join(sorted(unknown))}: not implemented.")
        heat = float(options.pop("temperature", None) or 0.0)
        drawing = heat > 0 and options.pop("do_sample", None) is not False
        options |= {"temperature": heat} if drawing else {}
        asked = SamplingSettings(greedy=not drawing, do_sample=drawing)
        sampling, _ = self._defaults.sampling(asked, options)
        eos_tokens = {*self._defaults.eos_tokens, self.eot_token_id}
        place = Place(prompt=first.tokens, max_new_tokens=1, eos_tokens=sorted(eos_tokens))
        self._defaults.check(sampling, place, self._engine.config.vocab_size)
        return Generator(
            self._engine,
            decode=self._tokenizer.decode,
            eos_tokens=eos_tokens,
            sampling=sampling,
            special_tokens=self._tokenizer.special_tokens(),
            seed=self._seed,
        )

    def _request(self, index: int, text: str, options: dict[str, Any]) -> Request:
        given = (options[name] for name in LIMITS if options.get(name) is not None)
        most = min(int(next(given, MAX_NEW_TOKENS)), self.max_length - 1)
        until = options.get("until") or []
        bos = self._tokenizer.bos_token
        has_bos = bos is not None and text.startswith(self._tokenizer.token_text(bos))
        tokens = self._tokenizer.encode(text, add_special_tokens=not has_bos)
        return Request(
            index=index,
            tokens=tokens[-(self.max_length - most) :],
            max_new_tokens=most,
            stop=[until] if isinstance(until, str) else until,
        )

    def _rolling(self, text: str) -> float:
        pairs = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        requests = [(("", ""), *pair) for pair in map(make_disjoint_window, pairs)]
        return sum(value for value, _ in self._loglikelihood_tokens(requests))

    def _by_length(self, sequences: list[list[int]], firsts: list[int]) -> list[Any]:
        """Scores the longest first, so that memory runs out at once or not at all."""
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        scored = self._scorer.score([sequences[i] for i in order], [firsts[i] for i in order])
        results: list[Any] = [None] * len(order)
        for index, row in zip(order, scored, strict=True):
            results[index] = row
        return results


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's generation options, which are transformers' names, without the limits."""
    return {k: v for k, v in sorted(given.items()) if k not in (*LIMITS, "until")}
