"""generation_config.json means what transformers' generate makes of it, or is refused, or said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from commands import Ended, commands_in
from inference.worlds import model_with_tokenizer
from qwen2_ascend.errors import UserError
from qwen2_ascend.inference.generation_config import NEUTRAL, WITHOUT_EFFECT, Defaults
from qwen2_ascend.inference.sampling import NAMES, Place
from qwen2_ascend.inference.settings import SamplingSettings

PROMPT = "return ( naïve"
NEW = 12
EOS = 0
CHANGES: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "nothing": lambda plain: {},
    "no_repeat_ngram_size": lambda plain: {"no_repeat_ngram_size": 1},
    "repetition_penalty": lambda plain: {"repetition_penalty": 1.8},
    "encoder_repetition_penalty": lambda plain: {"encoder_repetition_penalty": 3.0},
    "suppress_tokens": lambda plain: {"suppress_tokens": plain[:2]},
    "begin_suppress_tokens": lambda plain: {"begin_suppress_tokens": plain[:1]},
    "bad_words_ids": lambda plain: {"bad_words_ids": [plain[1:2], plain[3:5]]},
    "min_new_tokens": lambda plain: {"min_new_tokens": 6, "eos_token_id": plain[2]},
    "min_length": lambda plain: {"min_length": 10, "eos_token_id": plain[2]},
    "forced_eos_token_id": lambda plain: {"forced_eos_token_id": EOS},
    "sequence_bias": lambda plain: {"sequence_bias": [[plain[:1], -9.0]]},
    "exponential_decay": lambda plain: {"exponential_decay_length_penalty": [2, 2.0]},
    "max_length": lambda plain: {"max_length": 14},
    "max_new_tokens": lambda plain: {"max_new_tokens": 3},
}
"""What is added to the file, given the tokens that come without it."""


class World(NamedTuple):
    folder: Path
    expected: dict[str, list[int]]
    runs: Mapping[str, Ended]
    decode: Callable[[list[int]], str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("generation_config")
    model_with_tokenizer(folder / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    ids = torch.tensor([tokenizer(PROMPT).input_ids])

    def theirs(changes: dict[str, Any], name: str) -> list[int]:
        target = folder / name
        shutil.copytree(folder / "hf", target)
        raw = {"eos_token_id": EOS, "pad_token_id": EOS, **changes}
        (target / "generation_config.json").write_text(json.dumps(raw))
        model = AutoModelForCausalLM.from_pretrained(target).float().eval()
        limit = {} if "max_" in name else {"max_new_tokens": NEW}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **limit)
        return found[0, ids.shape[1] :].tolist()

    plain = theirs({}, "plain")
    expected = {name: theirs(change(plain), name) for name, change in CHANGES.items()}
    same = [n for n in CHANGES if expected[n] == plain and n != "nothing"]
    assert not same, f"change nothing here: {same}"
    commands = {}
    for name in CHANGES:
        flags = ["--load", folder / name, "--prompt", PROMPT, "--fp32", "--device", "cpu"]
        flags += ["--output-file", folder / f"{name}.jsonl"]
        flags += [] if "max_" in name else ["--max-new-tokens", NEW]
        commands[name] = {"program": "generate", "flags": list(map(str, flags))}
    with commands_in(folder, commands) as runs:
        yield World(folder, expected, runs, lambda x: tokenizer.decode(x, skip_special_tokens=True))


@pytest.mark.parametrize("name", CHANGES)
def test_texts_are_those_of_transformers(world: World, name: str) -> None:
    world.runs[name].require()
    (row,) = map(json.loads, (world.folder / f"{name}.jsonl").read_text().splitlines())
    assert row["num_new_tokens"] == len(world.expected[name])
    assert row["response"] == world.decode(world.expected[name])


def defaults(folder: Path, **values: Any) -> Defaults:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return Defaults(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_sample": True, "temperature": 0.0}, "temperature=0.0 must be above zero"),
        ({"do_sample": True, "temperature": -1}, "temperature=-1 must be above zero"),
        ({"do_sample": True, "temperature": "0.7"}, "temperature='0.7' is not a number"),
        ({"do_sample": True, "temperature": True}, "temperature=True is not a number"),
        ({"do_sample": True, "top_k": -1}, "top_k=-1 must not be below zero"),
        ({"do_sample": True, "top_k": 2.5}, "top_k=2.5 is not a number"),
        ({"do_sample": True, "top_p": 1.5}, "top_p=1.5 must be above 0"),
        ({"do_sample": True, "min_p": 2}, "min_p=2 must be from 0 to 1"),
        ({"do_sample": "yes"}, "do_sample='yes' is not true or false"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above zero"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size=-2 must not"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_length": "9"}, "max_length='9' is not a number"),
        ({"eos_token_id": "<|im_end|>"}, "eos_token_id='<|im_end|>' is not a token id"),
        ({"stop_strings": [1]}, "stop_strings=[1] is not a text"),
        ({"suppress_tokens": "a"}, ""),
        ({"bad_words_ids": [3]}, ""),
        ({"sequence_bias": {"a": 1}}, ""),
        ({"sequence_bias": [[[4000], 1.0]]}, "vocabulary size is 100"),
        ({"exponential_decay_length_penalty": [1]}, ""),
        ({"exponential_decay_length_penalty": 7}, ""),
        ({"forced_eos_token_id": "x"}, ""),
    ],
    ids=str,
)
def test_values_that_no_generation_can_have_are_refused_before_it(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    """transformers refuses them when it meets them, some in the middle of a text."""
    with pytest.raises(UserError) as caught:
        found = defaults(tmp_path, **values)
        sampling, _ = found.sampling(SamplingSettings())
        found.check(sampling, Place(prompt=[1, 2], max_new_tokens=5, eos_tokens=[0]), 100)
    assert message in str(caught.value)
    assert "generation_config.json: " in str(caught.value)


def test_values_that_a_greedy_text_does_not_use_are_no_fault(tmp_path: Path) -> None:
    """Some write temperature 0 beside do_sample false; transformers takes it."""
    found = defaults(tmp_path, do_sample=False, temperature=0.0, top_k=-1)
    assert found.sampling(SamplingSettings())[0].is_plain_greedy
    assert found.sampling(SamplingSettings(greedy=True))[0].is_plain_greedy
    with pytest.raises(UserError, match=r"temperature=0\.0 must be"):
        found.sampling(SamplingSettings(do_sample=True, top_k=5))
    drawn, _ = found.sampling(SamplingSettings(temperature=0.5, top_k=5))
    assert drawn.describe() == "sampling, temperature 0.5, top-k 5"


def test_flags_go_before_the_file_and_the_file_before_transformers_defaults(
    tmp_path: Path,
) -> None:
    found = defaults(tmp_path, do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=1.05)
    drawn, said = found.sampling(SamplingSettings(top_p=0.5))
    assert drawn.options == {
        "temperature": 0.7, "top_k": 50, "top_p": 0.5, "repetition_penalty": 1.05,
    }  # fmt: skip
    assert said.startswith("generation_config.json says do_sample=True, ")
    greedy, _ = found.sampling(SamplingSettings(greedy=True))
    assert not greedy.do_sample and greedy.options == {"repetition_penalty": 1.05}


def test_what_is_not_implemented_is_said_once_by_name(tmp_path: Path) -> None:
    found = defaults(tmp_path, num_beams=4, guidance_scale=1.5, chatglm="x", pad_token_id=5)
    assert found.unused() == (
        "generation_config.json: not implemented and left out: num_beams=4, guidance_scale=1.5, "
        "chatglm=x"
    )
    assert not defaults(tmp_path, num_beams=1, token_healing=False, guidance_scale=None).unused()


def test_every_key_of_transformers_is_obeyed_without_effect_or_said(tmp_path: Path) -> None:
    """A key that a later transformers knows is said by name until somebody decides about it."""
    from transformers import GenerationConfig

    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    decided = {*NAMES, *WITHOUT_EFFECT, "max_new_tokens", "max_length", "stop_strings"}
    rest = known - decided - {"eos_token_id"}
    found = defaults(tmp_path, **dict.fromkeys(sorted(rest), 7))
    for name in rest:
        assert f"{name}=7" in found.unused(), name
    assert set(NEUTRAL) & decided == set()


def test_lengths_and_stops(tmp_path: Path) -> None:
    none = SamplingSettings()
    assert defaults(tmp_path).max_new_tokens(none, 9) == 512
    assert defaults(tmp_path, max_length=20).max_new_tokens(none, 9) == 11
    assert defaults(tmp_path, max_length=20, max_new_tokens=7).max_new_tokens(none, 9) == 7
    given = SamplingSettings(max_new_tokens=3)
    assert defaults(tmp_path, max_new_tokens=7).max_new_tokens(given, 9) == 3
    assert defaults(tmp_path, stop_strings="a", eos_token_id=4).stop == ("a",)
    assert defaults(tmp_path, stop_strings=["a", "b"], eos_token_id=[4, 5]).eos_tokens == (4, 5)


def test_config_json_speaks_for_a_folder_without_the_file(tmp_path: Path) -> None:
    raw = {"eos_token_id": 7, "temperature": 0.5, "hidden_size": 64, "num_beams": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = Defaults(tmp_path)
    assert found.eos_tokens == (7,) and found.unused() == ""
    drawn, said = found.sampling(SamplingSettings(do_sample=True))
    assert drawn.options["temperature"] == 0.5 and said == "config.json says temperature=0.5"


def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path) -> None:
    for text in ("[1]", "{", "\x00"):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match=r"generation_config\.json"):
            Defaults(tmp_path)
