"""How many tokens have which error: what the board draws of a sublayer."""

from __future__ import annotations

import json

import pytest
import torch

from qwen2_ascend.alignment.judge import token_error, token_histogram


def test_every_token_is_counted_where_its_error_is() -> None:
    reference = torch.ones(2, 3, 4, dtype=torch.float64)
    sizes = torch.tensor([[1e-7, 2e-7, 5e-7], [1e-6, 1e-6, 3e-5]], dtype=torch.float64)
    ours = reference * (1 + sizes[..., None])
    found = token_histogram(ours, reference)
    edges, counts = found["edges"], found["counts"]
    assert len(edges) == len(counts) + 1 and sum(counts) == 6
    assert edges[0] <= 1e-7 * (1 + 1e-6) and edges[-1] > 3e-5
    assert edges[1] / edges[0] == pytest.approx(10**0.1)
    assert counts[-1] == 1 and max(counts) == 2
    assert token_error(ours, reference).worst == pytest.approx(3e-5)


def test_equal_tensors_and_numbers_that_are_none_have_a_place_too() -> None:
    x = torch.ones(1, 5, 4)
    assert sum(token_histogram(x, x)["counts"]) == 5
    broken = x.clone()
    broken[0, 2, 1] = float("nan")
    found = token_histogram(broken, x)
    assert sum(found["counts"]) == 5 and found["counts"][-1] == 1
    json.dumps(found, allow_nan=False)
