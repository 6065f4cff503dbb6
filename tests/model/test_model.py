"""Building a model in one process; the layouts are in distributed/test_parity.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distributed.harness import Check, Launches
from helpers import tiny_config
from model.model_worker import CHECKS
from qwen2_ascend.errors import UserError
from qwen2_ascend.parallel import ParallelLayout

WORKER = Path(__file__).with_name("model_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS.all(), ids=str)
def test_model(check: Check, launches: Launches) -> None:
    launches.result(WORKER, check).require()


@pytest.fixture
def old_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TransformerConfig without pipeline_model_parallel_layout, as before megatron-core 0.13."""
    from qwen2_ascend.model import build

    monkeypatch.setattr(build, "TransformerConfig", type("Old", (), {"__dataclass_fields__": {}}))


def uneven(*numbers: int) -> dict[str, Any]:
    from qwen2_ascend.model.build import _uneven_stages

    layout = ParallelLayout(pipeline_model_parallel_size=len(numbers), num_layer_list=numbers)
    return _uneven_stages(sum(numbers), layout)


def test_an_old_release_gets_first_and_last(old_release: None) -> None:
    assert uneven(1, 3, 3, 2) == {
        "num_layers_in_first_pipeline_stage": 1,
        "num_layers_in_last_pipeline_stage": 2,
    }
    assert uneven(1, 3) == {"num_layers_in_first_pipeline_stage": 1}
    assert uneven(2, 2) == {}


def test_an_old_release_refuses_more_ranks_than_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen2_ascend.model import build

    config, four = tiny_config(num_query_groups=2), ParallelLayout(tensor_model_parallel_size=4)
    monkeypatch.setattr(build, "megatron_release", lambda: (0, 16))
    build._check_release(config, four)
    monkeypatch.setattr(build, "megatron_release", lambda: (0, 12))
    build._check_release(config, ParallelLayout(tensor_model_parallel_size=2))
    with pytest.raises(UserError, match=r"=4 is above num_query_groups=2, .* 0\.12 cannot do"):
        build._check_release(config, four)


def test_an_old_release_refuses_what_it_cannot_do(old_release: None) -> None:
    with pytest.raises(UserError, match=r"num_layer_list=1,3,2,2: .* only the first and the last"):
        uneven(1, 3, 2, 2)
