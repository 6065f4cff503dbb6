"""Processed logits are those of transformers' classes, and the draws follow them."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen2_ascend.inference.sampling import (
    Sampling,
    candidates,
    choose,
    penalize,
    sequence_generator,
)

VOCABULARY = 997


def logits(seed: int, rows: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, VOCABULARY, generator=generator)).to(dtype).float()


def processed(scores: torch.Tensor, sampling: Sampling, ids: torch.Tensor) -> torch.Tensor:
    """Our scores laid out over the vocabulary again."""
    scores = scores.clone()
    penalize(scores, sampling.repetition_penalty, [set(row) for row in ids.tolist()])
    kept, tokens = candidates(scores, sampling)
    return torch.full_like(scores, -torch.inf).scatter(1, tokens, kept)


def transformers_processed(
    scores: torch.Tensor, sampling: Sampling, ids: torch.Tensor
) -> torch.Tensor:
    """In the order in which generate() puts them together."""
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    return chain(ids, scores.clone())


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
    ],
    ids=str,
)
def test_processed_logits_equal_transformers(options: dict) -> None:
    sampling = Sampling(do_sample=True, **options)
    for seed in range(20):
        ids = torch.randint(VOCABULARY, (5, 30), generator=torch.Generator().manual_seed(seed))
        scores = logits(seed)
        found = processed(scores, sampling, ids)
        assert torch.equal(found, transformers_processed(scores, sampling, ids))


def test_tokens_that_tie_with_the_kth_stay() -> None:
    """bf16 logits have many equal ones; which of them were left out would be a matter of luck."""
    sampling = Sampling(do_sample=True, top_k=20)
    scores = logits(3, dtype=torch.bfloat16)
    ids = torch.zeros(5, 1, dtype=torch.long)
    found = processed(scores, sampling, ids)
    assert ((found > -torch.inf).sum(dim=-1) > 20).any()
    assert torch.equal(found, transformers_processed(scores, sampling, ids))


def test_draws_follow_the_probabilities() -> None:
    sampling = Sampling(do_sample=True, temperature=1.5, top_k=8, top_p=0.9)
    scores = logits(1, rows=1)
    expected = processed(scores, sampling, torch.zeros(1, 1, dtype=torch.long)).softmax(-1)[0]
    generator, count = sequence_generator(5, 0), 4000
    drawn = torch.tensor(
        [choose(scores.clone(), sampling, [()], [generator])[0] for _ in range(count)]
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
        return choose(scores[rows].clone(), sampling, [()] * len(rows), generators)

    together = drawn([0, 1, 2, 3, 4])
    assert [drawn([row])[0] for row in range(5)] == together
    assert drawn([3, 1]) == [together[3], together[1]]
    assert len(set(together)) > 1


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.9], [-1.0, -2.0, -1.1]])
    sampling = Sampling(repetition_penalty=1.2)
    assert choose(scores, sampling, [{1}, {0}], []) == [2, 2]
