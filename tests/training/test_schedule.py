"""The learning rate of every step equals its closed form."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime.megatron_compat import megatron_release
from qwen2_ascend.training.length import RunLength
from qwen2_ascend.training.optimizer_settings import OptimizerSettings
from qwen2_ascend.training.schedule import build_schedule, changed, current_lr

BATCH, ITERS, LR, MIN = 8, 20, 1e-3, 1e-4


def learning_rates(**flags) -> list[float]:
    """What the parameter groups are given in each step."""
    optimizer = SimpleNamespace(param_groups=[{}])
    schedule = build_schedule(
        optimizer,
        OptimizerSettings(lr=LR, **{"min_lr": MIN, **flags}),
        RunLength(train_iters=ITERS, global_batch_size=BATCH),
    )
    found = []
    for _ in range(ITERS):
        assert optimizer.param_groups[0]["lr"] == current_lr(schedule)
        found.append(current_lr(schedule))
        schedule.step(increment=BATCH)
    return found


def warmed_up(step: int, warmup: int, rest) -> float:
    return LR * step / warmup if step <= warmup else rest(step)


def wsd(coefficient):
    """Constant until the last five steps, which `coefficient` of their part is for."""
    return lambda i: LR if i <= 15 else MIN + (LR - MIN) * coefficient((i - 15) / 5)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"lr_decay_style": "constant"}, lambda i: LR),
        ({"lr_decay_style": "linear"}, lambda i: LR + (MIN - LR) * i / ITERS),
        (
            {"lr_decay_style": "cosine", "lr_warmup_iters": 4},
            lambda i: warmed_up(
                i, 4, lambda i: MIN + (LR - MIN) * (1 + math.cos(math.pi * (i - 4) / 16)) / 2
            ),
        ),
        (
            {"lr_decay_style": "cosine", "lr_warmup_fraction": 0.25, "lr_decay_iters": 12},
            lambda i: (
                warmed_up(
                    i, 3, lambda i: MIN + (LR - MIN) * (1 + math.cos(math.pi * (i - 3) / 9)) / 2
                )
                if i <= 12
                else MIN
            ),
        ),
        (
            {"lr_decay_style": "linear", "lr_warmup_iters": 5, "lr_warmup_init": 2e-4},
            lambda i: (
                2e-4 + (LR - 2e-4) * i / 5 if i <= 5 else LR + (MIN - LR) * (i - 5) / (ITERS - 5)
            ),
        ),
        (
            {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 4},
            lambda i: warmed_up(i, 4, lambda i: max(MIN, LR * math.sqrt(4 / i))),
        ),
        ({"lr_wsd_decay_style": "linear"}, wsd(lambda x: 1 - x)),
        ({"lr_wsd_decay_style": "cosine"}, wsd(lambda x: (1 + math.cos(math.pi * x)) / 2)),
        ({"lr_wsd_decay_style": "exponential"}, wsd(lambda x: 2 * 0.5**x - 1)),
        ({"lr_wsd_decay_style": "minus_sqrt"}, wsd(lambda x: 1 - math.sqrt(x))),
    ],
)
def test_closed_forms(flags: dict, expected) -> None:
    if "lr_wsd_decay_style" in flags:
        flags = {**flags, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 5}
    if flags.get("lr_wsd_decay_style") == "minus_sqrt" and megatron_release() < (0, 13):
        with pytest.raises(UserError, match=r"minus_sqrt .* install megatron-core 0\.13"):
            learning_rates(**flags)
        return
    found = learning_rates(**flags)
    assert found == pytest.approx([expected(step) for step in range(ITERS)], rel=1e-12)
    assert max(found) <= LR


def test_weight_decay_follows_the_groups_multiplier() -> None:
    groups = [{"wd_mult": 1.0}, {"wd_mult": 0.0}]
    schedule = build_schedule(
        SimpleNamespace(param_groups=groups),
        OptimizerSettings(lr=LR, weight_decay=0.1),
        RunLength(train_iters=2, global_batch_size=1),
    )
    schedule.step(increment=1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_a_resumed_run_follows_its_command_line_and_says_so() -> None:
    def build(lr: float):
        return build_schedule(
            SimpleNamespace(param_groups=[{}]),
            OptimizerSettings(lr=lr, lr_decay_style="constant"),
            RunLength(train_iters=ITERS, global_batch_size=BATCH),
        )

    before, after = build(1e-3), build(2e-3)
    before.step(increment=5 * BATCH)
    saved = before.state_dict()
    assert changed(before, saved) == []
    assert changed(after, saved) == ["max_lr 0.001 -> 0.002"]
    after.load_state_dict(saved)
    assert (after.num_steps, current_lr(after)) == (5 * BATCH, 2e-3)
