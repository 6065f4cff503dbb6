"""What attention keeps for backward, on its way to the host and back."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from qwen2_ascend.model.swap import AttentionSwap, Group
from qwen2_ascend.ops.attention import attention
from qwen2_ascend.runtime.swapping import HostSwap

CPU = torch.device("cpu")


def gradients(swap: AttentionSwap | None, layers: int = 3) -> list[torch.Tensor]:
    """Gradients of the inputs of some attentions, one behind the other."""
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(16, 2, 6, 8, generator=generator) for _ in range(layers)]
    for tensor in inputs:
        tensor.requires_grad_()
    x = torch.zeros(16, 2, 4, 8)
    for tensor in inputs:
        q, k, v = tensor.split((4, 1, 1), dim=2)
        q = q + x
        if swap is None:
            context = attention(q, k, v, softmax_scale=0.3)
        else:
            with swap.keeping_outside():
                context = attention(q, k, v, softmax_scale=0.3)
        x = context.view(16, 2, 4, 8)
    x.square().sum().backward()
    return [tensor.grad for tensor in inputs]  # type: ignore[misc]


def test_gradients_are_the_same_to_the_last_bit() -> None:
    for one, other in zip(gradients(None), gradients(AttentionSwap(CPU)), strict=True):
        assert torch.equal(one, other)


def test_a_layer_fetches_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward fetches its own, then those of the layer whose turn is next, and nobody twice."""
    order: list[str] = []
    names: dict[int, str] = {}
    plain_out, plain_fetch = HostSwap.out, HostSwap.fetch

    def out(self: HostSwap, tensor: torch.Tensor):
        swapped = plain_out(self, tensor)
        names[id(swapped)] = f"{len(names)}"
        order.append(f"out {names[id(swapped)]}")
        return swapped

    def fetch(self: HostSwap, swapped) -> None:
        if swapped.back is None:
            order.append(f"back {names[id(swapped)]}")
        plain_fetch(self, swapped)

    monkeypatch.setattr(HostSwap, "out", out)
    monkeypatch.setattr(HostSwap, "fetch", fetch)
    swap = HostSwap(CPU)
    first = Group(swap, None)
    a = [first.keep(torch.ones(4, i)) for i in (1, 2)]
    second = Group(swap, first)
    b = [second.keep(torch.ones(4, i)) for i in (3, 4)]
    assert first.keep is not None and second.take(b[1]).shape == (4, 4)
    assert order == ["out 0", "out 1", "out 2", "out 3", "back 2", "back 3", "back 0", "back 1"]
    for member in (b[0], a[0], a[1]):
        first.take(member)
    assert len(order) == 8


def test_tensors_that_follow_each_other_in_one_place_are_told_apart() -> None:
    """The chats of a pack have such tensors, which come and go; several rounds are made."""
    swap = HostSwap(CPU)
    for _ in range(3):
        group, moved = Group(swap, None), []
        for number in range(6):
            tensor = torch.full((64, 64), float(number))
            moved.append(group.keep(tensor))
            del tensor
        group.close()
        assert [group.take(one)[0, 0].item() for one in moved] == [0, 1, 2, 3, 4, 5]


def test_many_equal_documents_have_their_own_gradients() -> None:
    def gradient(swap: AttentionSwap | None) -> torch.Tensor:
        x = torch.randn(64, 1, 6, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        context = swap.keeping_outside() if swap else nullcontext()
        with context:
            q, k, v = (2 * x).split((4, 1, 1), dim=2)
            ends = tuple(range(8, 65, 8))
            attended = attention(q, k, v, softmax_scale=0.3, ends=ends)
        attended.square().sum().backward()
        assert x.grad is not None
        return x.grad

    for _ in range(3):
        assert torch.equal(gradient(AttentionSwap(CPU)), gradient(None))


def test_host_memory_is_used_again() -> None:
    swap = HostSwap(CPU)
    tensor = torch.randn(8, 6).t()  # no gaps, other strides
    moved = swap.out(tensor)
    back = swap.take(moved)
    assert torch.equal(back, tensor) and back.stride() == tensor.stride()
    assert back.data_ptr() not in (tensor.data_ptr(), moved.host.data_ptr())
    assert swap.out(torch.zeros_like(tensor)).host.data_ptr() == moved.host.data_ptr()
    assert torch.equal(back, tensor), "what came back is not the memory that is used again"


def test_a_view_with_gaps_leaves_them_behind() -> None:
    swap = HostSwap(CPU)
    wide = torch.randn(4, 10)
    back = swap.take(swap.out(wide[:, 2:5]))
    assert torch.equal(back, wide[:, 2:5]) and back.untyped_storage().nbytes() == 4 * 3 * 4
