"""--o2-gradient and --o2-optimizer: what an update does, what it costs, and what is refused."""

from __future__ import annotations

import pytest
import torch

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.training.o2 import HalfMomentsAdamW
from qwen2_ascend.training.settings import parse, validate

LR, EPS, DECAY = 1e-2, 1e-8, 0.1
NEEDED = "--config 7B --mock-data --seq-length 32 --lr 1e-5 --train-iters 3"


def adamw(parameters: list[torch.Tensor], beta2: float, fused: bool = True) -> HalfMomentsAdamW:
    groups = [{"params": parameters, "fused": fused}]
    return HalfMomentsAdamW(groups, lr=LR, betas=(0.9, beta2), eps=EPS, weight_decay=DECAY)


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_is_adamw_with_rounded_moments(fused: bool) -> None:
    """Five steps of AdamW written out in fp64; only the moments are rounded between the steps."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(7, 5, generator=generator), torch.randn(3, generator=generator)]
    expected = [weight.double() for weight in weights]
    moments = [[torch.zeros_like(w).double() for w in weights] for _ in range(2)]
    optimizer = adamw(weights, 0.95, fused)
    for step in range(1, 6):
        for number, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape, generator=generator)
            grad = weight.grad.double()
            first, second = (kind[number] for kind in moments)
            first = 0.9 * first + 0.1 * grad
            second = 0.95 * second + 0.05 * grad**2
            root = (second / (1 - 0.95**step)).sqrt() + EPS
            expected[number] *= 1 - LR * DECAY
            expected[number] -= LR * first / (1 - 0.9**step) / root
            for kind, moment in zip(moments, (first, second), strict=True):
                # as fp32 arithmetic rounds it
                kind[number] = moment.float().bfloat16().double()
        optimizer.step()
    for weight, should in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.double(), should, rtol=1e-5, atol=1e-5)
        state = optimizer.state[weight]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        assert state["step"] == 5


@pytest.mark.parametrize(("beta2", "falls"), [(0.999, False), (0.9981, False), (0.95, True)])
def test_second_moments_freeze_where_the_note_says_so(beta2: float, falls: bool) -> None:
    weight = torch.linspace(1, 2, 100)
    optimizer = adamw([weight], beta2)
    weight.grad = torch.linspace(1, 30, 100)
    optimizer.step()
    before = optimizer.state[weight]["exp_avg_sq"].clone()
    weight.grad = torch.zeros(100)
    for _ in range(20):
        optimizer.step()
    after = optimizer.state[weight]["exp_avg_sq"]
    assert bool((after < before / 2).all()) == falls
    assert falls or torch.equal(after, before)
    settings = parse([*NEEDED.split(), "--bf16", "--o2-optimizer", "--adam-beta2", str(beta2)])
    notes = "\n".join(settings.precision.notes(settings.optimizer))
    assert ("never fall" in notes) == (not falls)


def test_loaded_moments_are_rounded_once() -> None:
    weight = torch.ones(4)
    optimizer = adamw([weight], 0.95)
    values = torch.tensor([1.0, 1.001, 1.01, 3.14159])
    optimizer.state[weight] = {
        "step": torch.tensor(3.0),
        "exp_avg": values.clone(),
        "exp_avg_sq": values.clone(),
    }
    optimizer.narrow()
    assert torch.equal(optimizer.state[weight]["exp_avg"], values.bfloat16())


def test_a_flag_that_says_the_contrary_is_refused() -> None:
    flags = "--bf16 --o2-gradient --accumulate-allreduce-grads-in-fp32"
    with pytest.raises(UserError, match="--o2-gradient accumulates in bf16"):
        validate(parse(f"{NEEDED} {flags}".split()), Qwen2Config.named("7B"), 1)
    validate(parse(f"{NEEDED} --bf16 --o2-gradient".split()), Qwen2Config.named("7B"), 1)
