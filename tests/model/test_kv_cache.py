"""The cache keeps what it is given through growing and moving, and is never uninitialized."""

from __future__ import annotations

import torch

from qwen2_ascend.model.kv_cache import KVCache, NewTokens


def cache(num_rows: int) -> KVCache:
    return KVCache(
        num_layers=2,
        num_rows=num_rows,
        num_groups=3,
        width=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def written(cache: KVCache, new: NewTokens, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values put into layer 1, `[s, b, ng, hn]`."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(*new.shape, 3, 4, generator=generator) for _ in range(2))
    cache.layers(new)[1].write(k, v)
    return k, v


def test_places_that_nothing_was_written_to_are_zero() -> None:
    """They are multiplied by the weight 0, which makes nothing of a NaN but a NaN."""
    poison = torch.full((2, 2, 2, 3, 64, 4), torch.nan)
    del poison  # its memory is likely to be what comes next
    held = cache(2)
    held.reserve(64)
    view = held.layers(NewTokens(range(2), [0, 0], [1, 1]))[0]
    assert (view.keys == 0).all() and (view.values == 0).all()


def test_what_is_written_stays_through_growing_and_moving() -> None:
    held = cache(3)
    held.reserve(4)
    k, v = written(held, NewTokens(range(3), [0, 0, 0], [2, 1, 3]), 1)
    held.reserve(9)
    k2, v2 = written(held, NewTokens(range(3), [2, 1, 3], [1, 1, 1]), 2)
    held.move(2, 0, 4)
    layer = held.layers(NewTokens(range(2), [4, 2], [1, 1]))[1]
    for store, first, second in ((layer.keys, k, k2), (layer.values, v, v2)):
        moved = torch.cat((first[3:6, 0], second[:, 2]))
        assert torch.equal(store[0, :, :4], moved.transpose(0, 1))
        kept = torch.cat((first[2:3, 0], second[:, 1]))
        assert torch.equal(store[1, :, :2], kept.transpose(0, 1))


def test_one_row_goes_on_with_many_tokens() -> None:
    held = cache(1)
    held.reserve(8)
    k, _ = written(held, NewTokens(range(1), [0], [3]), 1)
    k2, _ = written(held, NewTokens(range(1), [3], [4]), 2)
    new = NewTokens(range(1), [7], [1])
    assert new.lengths == [8] and new.shape == (1, 1)
    keys = held.layers(new)[1].keys[0, :, :7]
    assert torch.equal(keys, torch.cat((k, k2))[:, 0].transpose(0, 1))


def test_rotations_are_those_of_each_tokens_position() -> None:
    table = torch.arange(2 * 9 * 4.0).view(2, 9, 4)
    fresh = NewTokens(range(2), [0, 0], [2, 3])
    assert torch.equal(fresh.cos_sin(table), table[:, [0, 1, 0, 1, 2]])
    assert fresh.ends == (2, 5)
    each_one = NewTokens(range(2), [5, 2], [1, 1])
    assert torch.equal(each_one.cos_sin(table), table[:, [[5, 2]]])
    alone = NewTokens(range(1), [5], [3])
    assert torch.equal(alone.cos_sin(table), table[:, 5:8])
