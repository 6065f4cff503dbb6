"""Processed logits are those of transformers' classes, and the draws follow them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from qwen2_ascend.inference.sampling import (
    Place,
    Sampling,
    candidates,
    choose,
    sequence_generator,
)

VOCABULARY = 997


def logits(seed: int, rows: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, VOCABULARY, generator=generator)).to(dtype).float()


def processed(scores: torch.Tensor, sampling: Sampling, ids: torch.Tensor) -> torch.Tensor:
    """Our scores laid out over the vocabulary again."""
    rows = [
        sampling.processors(place(row.tolist()))(row[None], score[None].clone())
        for row, score in zip(ids, scores, strict=True)
    ]
    kept, tokens = candidates(torch.cat(rows), sampling)
    assert (tokens.diff(dim=-1) > 0).all()
    return torch.full_like(scores, -torch.inf).scatter(1, tokens, kept)


def place(prompt: list[int], **changes: Any) -> Place:
    return Place(**{"prompt": prompt, "max_new_tokens": 9, "eos_tokens": [3, 5], **changes})


@lru_cache
def tiny_model() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=9, num_attention_heads=2, num_key_value_heads=2, **sizes)
    )


def transformers_processed(
    scores: torch.Tensor, options: dict[str, Any], ids: torch.Tensor
) -> torch.Tensor:
    """What generate() itself puts together, row by row as sequences of their own length."""
    model = tiny_model()
    rows = []
    for row, score in zip(ids[:, None], scores[:, None], strict=True):
        config = GenerationConfig(do_sample=True, **{"top_k": 0, **options})
        config.update(**config._get_default_generation_params(), defaults_only=True)
        config._eos_token_tensor = torch.tensor([3, 5])
        config.max_length = row.shape[1] + 9
        made = model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=row.shape[1],
            encoder_input_ids=row,
            device="cpu",
        )
        rows.append(made(row, score.clone()))
    return torch.cat(rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 1},
        {"top_k": 20},
        {"top_k": 5000},
        {"top_p": 0.8},
        {"top_p": 1e-6},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7, "temperature": 2.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        {"min_p": 0.05},
        {"min_p": 0.05, "top_k": 20},
        {"typical_p": 0.5},
        {"typical_p": 0.5, "top_k": 30},
        {"epsilon_cutoff": 3e-3},
        {"eta_cutoff": 3e-3},
        {"no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 1},
        {"bad_words_ids": [[7], [3]]},
        {"min_length": 50},
        {"min_new_tokens": 2},
        {"suppress_tokens": [1, 2]},
        {"begin_suppress_tokens": [1, 2]},
        {"forced_eos_token_id": 5},
        {"exponential_decay_length_penalty": (0, 1.5)},
        {"sequence_bias": [[[4], -9.0]], "no_repeat_ngram_size": 1, "suppress_tokens": [9]},
    ],
    ids=str,
)
def test_processed_logits_equal_transformers(options: dict) -> None:
    sampling = Sampling(do_sample=True, **options)
    for seed in range(8):
        ids = torch.randint(VOCABULARY, (5, 30), generator=torch.Generator().manual_seed(seed))
        scores = logits(seed)
        found = processed(scores, sampling, ids)
        assert torch.equal(found, transformers_processed(scores, options, ids))


def test_tokens_that_tie_with_the_kth_stay() -> None:
    """bf16 logits have many equal ones; which of them were left out would be a matter of luck."""
    options = {"top_k": 20}
    sampling = Sampling(do_sample=True, **options)
    scores = logits(3, dtype=torch.bfloat16)
    ids = torch.zeros(5, 1, dtype=torch.long)
    found = processed(scores, sampling, ids)
    assert ((found > -torch.inf).sum(dim=-1) > 20).any()
    assert torch.equal(found, transformers_processed(scores, options, ids))


def test_draws_follow_the_probabilities() -> None:
    sampling = Sampling(do_sample=True, temperature=1.5, top_k=8, top_p=0.9)
    scores = logits(1, rows=1)
    expected = processed(scores, sampling, torch.zeros(1, 1, dtype=torch.long)).softmax(-1)[0]
    generator, count = sequence_generator(5, 0), 4000
    drawn = torch.tensor(
        [choose(scores.clone(), sampling, [[]], [], [generator])[0] for _ in range(count)]
    )
    found = torch.bincount(drawn, minlength=VOCABULARY) / count
    assert (found[expected == 0] == 0).all()
    # four standard deviations
    assert ((found - expected).abs() <= 4 * (expected / count).sqrt() + 1e-9).all()


def test_a_sequence_draws_the_same_whatever_it_is_batched_with() -> None:
    sampling = Sampling(do_sample=True, temperature=3.0)
    scores = logits(2)

    def drawn(rows: list[int]) -> list[int]:
        generators = [sequence_generator(9, row) for row in rows]
        return choose(scores[rows].clone(), sampling, [[]] * len(rows), [], generators)

    together = drawn([0, 1, 2, 3, 4])
    assert [drawn([row])[0] for row in range(5)] == together
    assert drawn([3, 1]) == [together[3], together[1]]
    assert len(set(together)) > 1


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.9], [-1.0, -2.0, -1.1]])
    sampling = Sampling(repetition_penalty=1.2)
    processors = [sampling.processors(place([ids])) for ids in (1, 0)]
    assert choose(scores, sampling, [[1], [0]], processors, []) == [2, 2]
