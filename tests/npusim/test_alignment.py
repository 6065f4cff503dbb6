"""Alignment on simulated cards: the model there, transformers on the CPU, a fault between them."""

from __future__ import annotations

from typing import Any

import pytest

from npusim.launches import FUSED_OPERATORS

TP2 = "--device npu --tensor-model-parallel-size 2 --sequence-parallel"


# Foreign warnings are errors in the CPU's tests, and torch_npu adds many of its own.
@pytest.mark.filterwarnings("default")
@pytest.mark.simulated(cards=2, alone="alignment")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fused_layers_agree_with_transformers_on_the_cpu(precision: str, run) -> None:
    """Every sublayer and gradient of TP2, out of the fused operators and over HCCL."""
    from alignment.align_worker import TIED, judged
    from npusim.simulator import recording
    from qwen2_ascend.alignment.report import describe_verdict

    with recording() as record:
        found = judged(run, f"{TP2} --precision {precision}")
    assert set(record.ops) >= FUSED_OPERATORS
    if found is None:  # another rank than the first
        return
    assert found.aligned, describe_verdict(found)
    assert "simulated" in found.record.origin
    assert len(found.findings) == 16 * TIED.num_layers + 4
    assert len(found.gradients) == 12 * TIED.num_layers + 2
    tensors = (*found.record.activations.values(), *found.record.gradients.values())
    assert all(x.device.type == "cpu" and x.float().abs().max() > 0 for x in tensors)


def full_attention(chunks: list[Any]) -> None:
    """Layer 2's operator is given no mask: sparse_mode is ignored then, and nothing complains."""
    import torch_npu

    def attend(q: Any, k: Any, v: Any, *, softmax_scale: float, **_: Any) -> Any:
        q, k, v = (x.flatten(2) for x in (q, k, v))  # [s, b, n, hn] to SBH
        heads = q.shape[-1] // 8
        return torch_npu.npu_fusion_attention(
            q, k, v, heads, "SBH", scale=softmax_scale, sparse_mode=2
        )[0]

    core = chunks[0].decoder.layers[2].self_attention.core_attention
    core._ops = core._ops._replace(attention=attend)


@pytest.mark.filterwarnings("default")
@pytest.mark.simulated(cards=2, alone="alignment")
def test_a_fused_operator_without_its_mask_is_located(run) -> None:
    from alignment.align_worker import judged
    from qwen2_ascend.alignment.report import describe_verdict

    found = judged(run, f"{TP2} --no-gradients --bf16", full_attention)
    if found is not None:
        parted = [finding.name for finding in found.parted]
        assert parted == ["layers.2.core_attention"], describe_verdict(found)
