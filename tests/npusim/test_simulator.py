"""The simulated device itself: what it computes, what it records, what it does not hide."""

from __future__ import annotations

import pytest

from npusim.env import SOC_910B, SOC_910C

pytestmark = pytest.mark.simulated


def on_both_chips(test):
    """Parametrizes a test over the chips whose operators are the same."""
    chips = [
        pytest.param(soc, marks=pytest.mark.simulated(soc=soc)) for soc in (SOC_910B, SOC_910C)
    ]
    return pytest.mark.parametrize("soc", chips)(test)


@on_both_chips
def test_the_chip_is_the_one_that_was_asked_for(soc):
    import torch

    assert torch.npu.get_device_name() == soc
    assert torch.npu.device_count() == 8


def test_fresh_memory_is_poison():
    import torch

    assert torch.empty(4, 4, device="npu").isnan().all()
    assert torch.empty(4, dtype=torch.bfloat16, device="npu").isnan().all()


def test_an_output_that_nobody_computes_stays_poison(simulator):
    import torch
    import torch_npu

    x, gamma = torch.ones(2, 8).npu(), torch.ones(8).npu()
    with torch.utils._python_dispatch._disable_current_modes():
        y, _ = torch_npu.npu_rms_norm(x, gamma)
    assert y.isnan().all()
    assert not torch_npu.npu_rms_norm(x, gamma)[0].isnan().any()


def test_an_operator_without_a_reference_is_an_error():
    import torch
    import torch_npu

    x, gamma = torch.ones(2, 8).npu(), torch.ones(8).npu()
    with pytest.raises(NotImplementedError, match="npu_add_rms_norm has no reference"):
        torch_npu.npu_add_rms_norm(x, x, gamma)


@on_both_chips
def test_the_operators_are_recorded_with_their_arguments(soc):
    import torch
    import torch_npu

    from npusim.simulator import recording

    query = torch.randn(6, 1, 32, requires_grad=True, device="npu")
    key, value = torch.randn(2, 6, 1, 16, device="npu")
    mask = torch.ones(2048, 2048, device="npu").triu(1).bool()
    with recording() as record:
        attention = torch_npu.npu_fusion_attention(
            query, key, value, 4, "SBH", atten_mask=mask, scale=0.25, sparse_mode=2
        )
        attention[0].sum().backward()
    assert record.ops == ["aclnnFlashAttentionScore", "aclnnFlashAttentionScoreGrad"]
    forward = record.launches[0]
    assert forward.arguments[:3] == ("f32[6,1,32]", "f32[6,1,16]", "f32[6,1,16]")
    assert forward.arguments[6] == "bool[2048,2048]"
    assert "'SBH'" in forward.arguments
    assert forward.doubles[:2] == (0.25, 1.0)


def test_recording_sees_aten_operators_when_their_host_code_runs(simulator):
    import torch

    from npusim.simulator import recording

    simulator.host_code = True
    x = torch.ones(3, device="npu")
    with recording() as record:
        y = x + x * 2
    assert record.ops == ["aclnnMuls", "aclnnAdd"]
    assert y.tolist() == [3, 3, 3]


def test_in_place_operators_run_once_when_their_host_code_runs_too(simulator):
    import torch

    simulator.host_code = True
    assert torch.full((3,), 8.0, device="npu").mul_(2).div_(4).tolist() == [4, 4, 4]


def test_the_host_code_of_expanded_tensors_runs(simulator):
    import torch

    simulator.host_code = True
    x = torch.arange(3.0).npu()[:, None].expand(3, 4)[1:]
    assert (x * 2).tolist() == [[2] * 4, [4] * 4]
    assert simulator.host_faults == {}


def test_aten_operators_compute_on_the_same_memory():
    import torch

    x = torch.arange(12.0).view(3, 4).npu()
    x[1:, ::2].add_(10)
    x.T[0].mul_(-1)
    expected = torch.arange(12.0).view(3, 4)
    expected[1:, ::2] += 10
    expected[:, 0] *= -1
    assert torch.equal(x.cpu(), expected)


def test_results_stay_on_their_device():
    import torch

    x = torch.ones(3, device="npu:1")
    assert (x + 1).device == torch.device("npu:1")
    assert torch.zeros_like(x).device == torch.device("npu:1")
    assert x.cpu().device == torch.device("cpu")
    assert isinstance(x.sum().item(), float)


def test_random_numbers_follow_the_npu_generator():
    import torch

    torch.npu.manual_seed(5)
    state = torch.npu.get_rng_state()
    first, second = torch.rand(8, device="npu"), torch.rand(8, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.rand(8, device="npu"), first)
    assert not torch.equal(first, second)
    cpu = torch.get_rng_state()
    torch.randn(8, device="npu")
    assert torch.equal(torch.get_rng_state(), cpu)


def test_linear_and_matmul_gradients_are_torch_own():
    import torch

    def gradients(device):
        torch.manual_seed(0)
        x, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
        vector, batch = torch.randn(5), torch.randn(2, 5, 3)
        leaves = [t.to(device).requires_grad_() for t in (x, weight, bias, vector, batch)]
        x, weight, bias, vector, batch = leaves
        y = torch.nn.functional.linear(x, weight, bias)
        ((y @ vector).sum() + (y @ batch).square().sum()).backward()
        return [leaf.grad.cpu() for leaf in leaves]

    for found, expected in zip(gradients("npu"), gradients("cpu"), strict=True):
        torch.testing.assert_close(found, expected)
