"""Differences between megatron-core's releases, absorbed in one place."""

from __future__ import annotations

import math

import pytest

from qwen2_ascend.errors import UserError
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.runtime import megatron_compat
from qwen2_ascend.runtime.megatron_compat import (
    check_tensor_parallel,
    check_wsd_decay_style,
    megatron_release,
    supported_keywords,
    uneven_stages,
    virtual_pipeline_size,
)

CONFIG = "megatron.core.transformer.transformer_config.TransformerConfig"
SCHEDULER = "megatron.core.optimizer_param_scheduler.OptimizerParamScheduler"


class Older:
    """A class of an older megatron-core: its source says nothing of what came later."""


def test_only_what_the_signature_has_is_passed() -> None:
    def newer(model: object, vp_stage: int | None = None) -> None: ...

    def older(model: object) -> None: ...

    assert supported_keywords(newer, vp_stage=1) == {"vp_stage": 1}
    assert supported_keywords(older, vp_stage=1) == {}


@pytest.mark.parametrize(("per_chunk", "size"), [(None, None), (4, None), (2, 2), (1, 4)])
def test_one_chunk_per_stage_is_no_interleaved_pipeline(
    per_chunk: int | None, size: int | None
) -> None:
    layout = ParallelLayout(
        pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=per_chunk
    )
    assert virtual_pipeline_size(layout, num_layers=8) == size


def test_only_new_releases_cut_a_query_group(monkeypatch: pytest.MonkeyPatch) -> None:
    two, four = (ParallelLayout(tensor_model_parallel_size=tp) for tp in (2, 4))
    if megatron_release() >= (0, 16):
        check_tensor_parallel(four, num_query_groups=2)
        monkeypatch.setattr(CONFIG, Older)
    check_tensor_parallel(two, num_query_groups=2)
    with pytest.raises(UserError, match=r"=4 is above .*=2, .* cannot do.* 0\.16 or later"):
        check_tensor_parallel(four, num_query_groups=2)


def test_minus_sqrt_came_with_0_13(monkeypatch: pytest.MonkeyPatch) -> None:
    if megatron_release() >= (0, 13):
        check_wsd_decay_style("minus_sqrt")
        monkeypatch.setattr(SCHEDULER, Older)
    check_wsd_decay_style("exponential")
    with pytest.raises(UserError, match=r"minus_sqrt is not in .*-core 0\.13 or later"):
        check_wsd_decay_style("minus_sqrt")


@pytest.fixture
def old_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TransformerConfig without pipeline_model_parallel_layout, as before 0.13."""
    megatron_compat.prepare_import()  # or 0.15 warns, which is an error in a test
    old = type("Old", (), {"__dataclass_fields__": {}})
    monkeypatch.setattr(CONFIG, old)


def uneven(*numbers: int) -> dict:
    return uneven_stages(
        ParallelLayout(pipeline_model_parallel_size=len(numbers), num_layer_list=numbers)
    )


def test_an_old_config_gets_first_and_last(old_config: None) -> None:
    assert uneven(1, 3, 3, 2) == {
        "num_layers_in_first_pipeline_stage": 1,
        "num_layers_in_last_pipeline_stage": 2,
    }
    assert uneven(1, 3) == {"num_layers_in_first_pipeline_stage": 1}
    assert uneven(2, 2) == {}
    with pytest.raises(UserError, match=r"num_layer_list=1,3,2,2: .* only the first and the last"):
        uneven(1, 3, 2, 2)


def test_buckets_end_where_parameters_may_begin() -> None:
    """0.12 begins a bucket at a multiple of 64 that the number of ranks divides."""
    padded = megatron_compat._HalfPadding(math)
    assert padded.ceil(1.5) == 2
    for ranks in (*range(1, 33), 64, 96, 128, 256):
        begins = [n for n in range(0, 5000, 64) if n % ranks == 0]
        assert [n for n in begins if n % padded.lcm(ranks, 128)] == []
