"""Outputs that are computed again in backward: which layers, which bytes, the same gradients."""

from __future__ import annotations

import pytest
import torch

from planning.tensor_memory import TensorMemory
from qwen2_ascend.errors import UserError
from qwen2_ascend.model.recompute import RecomputedOutputs, computed, not_kept
from qwen2_ascend.ops.rms_norm import rms_norm
from qwen2_ascend.ops.swiglu import swiglu
from qwen2_ascend.planning.job import ALL_LAYERS
from qwen2_ascend.training import settings as pretraining

NEEDED = "--config 7B --mock-data --seq-length 32 --lr 1e-5 --train-iters 3"
FUNCTION, NORM = "--recompute-activation-function", "--recompute-norm"
BLOCK = "--recompute-granularity full --recompute-method block"


def gradients(again: bool) -> tuple[int, list[torch.Tensor]]:
    """Bytes that a norm, a product, SwiGLU and a product keep, and their gradients."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    x, scale, first, second = drawn(64, 1, 32), drawn(32), drawn(96, 32), drawn(32, 48)
    memory = TensorMemory()
    with memory:
        x.detach()  # both ways look at it
        normalized = computed(lambda t: rms_norm(t, scale, 1e-6), x, again=again)
        with not_kept(normalized):
            gate_up = torch.nn.functional.linear(normalized, first)
        activated = computed(swiglu, gate_up, again=again)
        with not_kept(activated):
            result = torch.nn.functional.linear(activated, second).square().sum()
        del normalized, activated, gate_up
        kept = memory.live
    result.backward()
    return kept, [x.grad, scale.grad, first.grad, second.grad]  # type: ignore[list-item]


def test_what_is_computed_again_is_not_kept_and_changes_no_bit() -> None:
    (kept, expected), (less, found) = gradients(False), gradients(True)
    assert kept - less == 4 * 64 * (32 + 48), "the norm's output and SwiGLU's"
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def test_without_a_gradient_nothing_is_remembered() -> None:
    with torch.no_grad():
        output = computed(swiglu, torch.ones(2, 8), again=True)
    assert not vars(output)


@pytest.mark.parametrize(
    ("number", "after", "layers"),
    [(9, 0, [0, 1, 2, 3]), (2, 0, [0, 1]), (2, 1, [1, 2]), (9, 3, [3]), (0, 2, []), (1, 9, [])],
)
def test_layers_are_the_first_after_those_recomputed_whole(
    number: int, after: int, layers: list[int]
) -> None:
    assert list(RecomputedOutputs(number=number, after=after).layers(4)) == layers


@pytest.mark.parametrize(
    ("flags", "outputs"),
    [
        (FUNCTION, (ALL_LAYERS, 0)),
        (f"{FUNCTION} {FUNCTION}-num-layers 3", (3, 0)),
        (f"{BLOCK} --recompute-num-layers 4 {FUNCTION}", (ALL_LAYERS, 4)),
        (f"{BLOCK} {FUNCTION} {FUNCTION}-num-layers 14", (0, 1)),
        ("", None),
    ],
)
def test_flags_name_layers(flags: str, outputs: tuple[int, int] | None) -> None:
    """A block without a number recomputes all layers whole; then there is nothing left to do."""
    settings = pretraining.parse(f"{NEEDED} {flags}".split())
    assert settings.recompute.single_outputs("activation_function") == outputs
    assert settings.recompute.faults(28) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (f"{FUNCTION}-num-layers 3", f"3 needs {FUNCTION}"),
        (f"{NORM} {NORM}-num-layers 29", "29 must be from 0 to 28"),
        (
            f"--recompute-granularity full --recompute-method uniform {NORM}",
            "say --recompute-method block",
        ),
    ],
)
def test_what_cannot_be_is_refused(flags: str, words: str) -> None:
    from qwen2_ascend.config import Qwen2Config

    settings = pretraining.parse(f"{NEEDED} {flags}".split())
    with pytest.raises(UserError, match=words):
        pretraining.validate(settings, Qwen2Config.named("7B"), 1)
