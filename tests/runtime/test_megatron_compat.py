"""Differences between megatron-core's releases, absorbed in one place."""

from __future__ import annotations

import pytest

from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.runtime.megatron_compat import supported_keywords, virtual_pipeline_size


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
