"""--optimizer-cpu-offload: what it needs, excludes and does on a CPU."""

from __future__ import annotations

import pytest

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.training import offload
from qwen2_ascend.training.offload import config_keywords
from qwen2_ascend.training.settings import parse, validate

NEEDED = "--config 7B --mock-data --seq-length 32 --lr 1e-5 --train-iters 3 --bf16"
OFFLOAD = "--use-distributed-optimizer --optimizer-cpu-offload"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--optimizer-cpu-offload", "needs --use-distributed-optimizer"),
        ("--optimizer-offload-fraction 0.5", "needs --optimizer-cpu-offload"),
        (f"{OFFLOAD} --optimizer-offload-fraction -1", "above 0 and at most 1"),
        (f"{OFFLOAD} --optimizer-offload-fraction 0", "0 must be above 0 .* to offload nothing"),
        (f"{OFFLOAD} --optimizer-offload-fraction 1.5", "above 0 and at most 1"),
        (f"{OFFLOAD} --reuse-fp32-param", "--reuse-fp32-param: give one of them"),
        (f"{OFFLOAD} --o2-optimizer", "--o2-optimizer: give one of them"),
    ],
)
def test_what_is_refused(flags: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(parse(f"{NEEDED} {flags}".split()), Qwen2Config.named("7B"), 1)


def test_megatron_lms_flags_are_taken() -> None:
    """Users paste them: the precision-aware optimizer is what the offload goes through."""
    flags = f"{OFFLOAD} --use-precision-aware-optimizer --overlap-cpu-optimizer-d2h-h2d"
    settings = parse(f"{NEEDED} {flags} --optimizer-offload-fraction 0.4".split())
    validate(settings, Qwen2Config.named("7B"), 1)
    assert settings.optimizer.optimizer_offload_fraction == 0.4
    assert config_keywords(settings.optimizer, "cpu") == {}


def test_a_release_whose_optimizer_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core 0.12 is such."""
    settings = parse(f"{NEEDED} {OFFLOAD}".split())

    class Older:
        pass

    monkeypatch.setattr(offload, "OptimizerConfig", Older)
    with pytest.raises(UserError, match=r"install megatron-core 0\.16"):
        config_keywords(settings.optimizer, "npu")
