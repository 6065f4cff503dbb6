"""What a model folder says of generation, and what the flags make of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.inference.sampling import NAMES, PROCESSORS, WARPERS, Place, Sampling
from qwen2_ascend.inference.settings import NUMBERS, SamplingSettings
from qwen2_ascend.pretrained import one_line, read_json_object

DEFAULT_MAX_NEW_TOKENS = 512
DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""transformers', where generation_config.json does not say."""
LENGTHS = ("max_new_tokens", "max_length", "stop_strings", "eos_token_id")
WITHOUT_EFFECT = frozenset(
    (
        "transformers_version",
        "bos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        "use_cache",
        "cache_config",
        "cache_implementation",
        "max_cache_len",
        "return_legacy_cache",
        "return_dict_in_generate",
        "low_memory",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "renormalize_logits",
        "early_stopping",
        "length_penalty",
        "num_beam_groups",
        "diversity_penalty",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_lookbehind",
        "target_lookbehind",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "compile_config",
        "disable_compile",
        "generation_kwargs",
        "prefill_chunk_size",
        "use_mtp",
    )
)
"""Keys that change how transformers works, not which text comes of it without beams."""
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "guidance_scale": 1, "penalty_alpha": 0}
"""Values at which a key that is not implemented asks for nothing."""


class Defaults:
    """generation_config.json, or where there is none what config.json says of generation.

    Args:
        folder: a Hugging Face folder.

    Raises:
        UserError: the file is not JSON, or a value in it is not what its key asks for.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "generation_config.json"
        is_own = self._path.exists()
        if not is_own:
            self._path = folder / "config.json"
        raw = {k: v for k, v in read_json_object(self._path).items() if v is not None}
        if not is_own:  # the rest is about the model
            raw = {k: v for k, v in raw.items() if k in (*NAMES, *LENGTHS)}
        self._raw = raw
        self.eos_tokens = self._eos_tokens()
        self.stop = self._stop()
        for name in ("max_new_tokens", "max_length"):
            raise_if(self._faults({name: raw.get(name)}))

    def unused(self) -> str:
        """The keys that ask for what is not implemented, in a sentence; or nothing."""
        known = WITHOUT_EFFECT.union(NAMES, LENGTHS)
        unused = [
            f"{name}={one_line(value, 40)}"
            for name, value in self._raw.items()
            if name not in known
            and not name.startswith("_")
            and value is not False
            and NEUTRAL.get(name) != value
        ]
        if not unused:
            return ""
        return f"{self._path.name}: not implemented and left out: {', '.join(unused)}"

    def sampling(
        self, settings: SamplingSettings, more: Mapping[str, Any] | None = None
    ) -> tuple[Sampling, str]:
        """How tokens are chosen, from the flags and else from the file; and where it is from.

        Args:
            settings: the flags.
            more: options of NAMES that go before those of the file, too.

        Raises:
            UserError: a value that no generation can have.
        """
        flags = {
            name: value
            for name in ("temperature", "top_k", "top_p", "repetition_penalty")
            if (value := getattr(settings, name)) is not None
        }
        given = {name: self._raw[name] for name in NAMES if name in self._raw}
        given |= {k: v for k, v in (more or {}).items() if v is not None}
        drawing = settings.do_sample or (flags.keys() & {"temperature", "top_k", "top_p"})
        values = {**DEFAULTS, **given, **flags}
        if drawing or settings.greedy:
            values["do_sample"] = bool(drawing)
        if type(values["do_sample"]) is not bool:
            raise UserError(
                f"{self._path}: do_sample={values['do_sample']!r} is not true or false."
            )
        steps = (*PROCESSORS, *(WARPERS if values["do_sample"] else ()))
        raise_if(self._faults({s.name: values.get(s.name) for s in steps}))
        try:
            sampling = Sampling(**values)
        except TypeError as error:
            raise UserError(f"{self._path}: {one_line(error)}.") from None
        used = [name for name in NAMES if name in self._raw]
        listed = ", ".join(f"{name}={one_line(self._raw[name], 40)}" for name in used)
        return sampling, f"{self._path.name} says {listed}" if used else ""

    def check(self, sampling: Sampling, place: Place, vocab_size: int) -> None:
        """Tries all that `sampling` does once, so that no value fails in the middle of a run.

        Raises:
            UserError: transformers refuses a value.
        """
        try:
            logits = torch.zeros(1, vocab_size)
            logits = sampling.processors(place)(place.prompt_ids, logits)
            for warp in sampling.warpers("cpu"):
                warp(None, torch.zeros(1, vocab_size))
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            raise UserError(f"{self._path}: {one_line(error)}") from None

    def max_new_tokens(self, settings: SamplingSettings, num_prompt_tokens: int) -> int:
        """Tokens to add at most; below one where the prompt is as long as max_length already."""
        if settings.max_new_tokens is not None:
            return settings.max_new_tokens
        if "max_new_tokens" in self._raw:
            return self._raw["max_new_tokens"]
        if "max_length" in self._raw:
            return self._raw["max_length"] - num_prompt_tokens
        return DEFAULT_MAX_NEW_TOKENS

    def describe_length(self, settings: SamplingSettings) -> str:
        """The limit in words, for a log."""
        given = (settings.max_new_tokens, self._raw.get("max_new_tokens"))
        if given == (None, None) and "max_length" in self._raw:
            return f"at most {self._raw['max_length']} tokens with the prompt"
        return f"at most {self.max_new_tokens(settings, 0)} new tokens"

    def _faults(self, values: Mapping[str, Any]) -> list[str]:
        """Which of these numbers are none, or none that the flags of those names take."""
        faults = []
        for name, value in values.items():
            if name not in NUMBERS or value is None:
                continue
            number = NUMBERS[name]
            is_number = type(value) in ((int, float) if number.kind is float else (int,))
            if not is_number or not math.isfinite(value):
                faults.append(f"{self._path}: {name}={one_line(repr(value))} is not a number.")
            elif not number.allows(value):
                faults.append(f"{self._path}: {name}={value} {number.rule}.")
        return faults

    def _eos_tokens(self) -> tuple[int, ...]:
        value = self._raw.get("eos_token_id", [])
        tokens = value if isinstance(value, list) else [value]
        if any(type(token) is not int for token in tokens):
            raise UserError(
                f"{self._path}: eos_token_id={one_line(repr(value))} is not a token id or a list."
            )
        return tuple(tokens)

    def _stop(self) -> tuple[str, ...]:
        value = self._raw.get("stop_strings", [])
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
            raise UserError(
                f"{self._path}: stop_strings={one_line(repr(value))} is not a text or a list of "
                "texts."
            )
        return tuple(texts)
