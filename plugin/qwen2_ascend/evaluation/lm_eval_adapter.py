"""Qwen2LM: this project's model behind lm-eval's interface, at any layout.

Every rank runs the same evaluation over the same questions; what a rank asks the model, all ask.
The answers are those of lm-eval's own `hf` model, which obeys generation_config.json too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]  # an extra
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from qwen2_ascend.evaluation.scoring import Scorer
from qwen2_ascend.inference.generator import Generator, Request
from qwen2_ascend.inference.settings import SamplingSettings

if TYPE_CHECKING:
    from qwen2_ascend.inference.engine import Engine
    from qwen2_ascend.inference.tokenizer import Defaults, Tokenizer

MAX_NEW_TOKENS = 256
"""lm-eval's own default, where a task does not say."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the largest number of new tokens; the first that is there counts."""


class Qwen2LM(TemplateLM):
    """Scores and continues texts for lm-eval.

    Args:
        engine: this rank's.
        tokenizer: the model's.
        defaults: what the model's folder says of generation: how tokens are chosen where a task
            does not say, and which end a text. The first of these also stands before a text that
            has nothing before it.
        seed: of the draws, where a task samples.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        defaults: Defaults,
        *,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        self._engine = engine
        self._tokenizer = tokenizer
        self._scorer = Scorer(engine)
        self._defaults = defaults
        self._seed = seed

    @property
    def eot_token_id(self) -> int:
        return self._defaults.eos_tokens[0]

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
        return self._tokenizer.render_chat(
            chat_history, add_generation_prompt=add_generation_prompt
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        """Of (texts, context's tokens, continuation's tokens): log-probability, and whether greedy.

        A context that is too long loses its beginning.
        """
        sequences, firsts = [], []
        for _texts, context, continuation in requests:
            tokens = [*context, *continuation][-self.max_length :]
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
        groups: dict[SamplingSettings, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(_asked(request.args[1]), []).append(index)
        for asked, indices in groups.items():
            sampling, _ = self._defaults.sampling(asked)
            generator = Generator(
                self._engine,
                decode=self._tokenizer.decode,
                eos_tokens=self._defaults.eos_tokens,
                sampling=sampling,
                seed=self._seed,
            )
            wanted = [self._request(index, *requests[index].args) for index in indices]
            for done in generator.run(wanted):
                answers[done.index] = done.text
        return answers

    def _request(self, index: int, text: str, options: dict[str, Any]) -> Request:
        given = (options[name] for name in LIMITS if options.get(name) is not None)
        most = min(int(next(given, MAX_NEW_TOKENS)), self.max_length - 1)
        until = options.get("until") or []
        return Request(
            index=index,
            tokens=self._tokenizer.encode(text)[-(self.max_length - most) :],
            max_new_tokens=most,
            stop=[until] if isinstance(until, str) else until,
        )

    def _rolling(self, text: str) -> float:
        pairs = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length - 1,
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


def _asked(options: dict[str, Any]) -> SamplingSettings:
    """lm-eval's generation options, which are transformers' names; greedy unless they say."""
    penalty = options.get("repetition_penalty")
    heat = float(options.get("temperature") or 0.0)
    if not (heat > 0 and options.get("do_sample") is not False):
        return SamplingSettings(greedy=True, repetition_penalty=penalty)
    return SamplingSettings(
        do_sample=True,
        temperature=heat,
        top_k=options.get("top_k"),
        top_p=options.get("top_p"),
        repetition_penalty=penalty,
    )
