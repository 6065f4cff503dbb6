"""The device's operators, fused on an NPU, against their plain twins in fp64 on the CPU.

The figures are largest errors, relative to the largest number of the result: `result` and
`gradient` of the card, and beside them `noise`, what the plain twin itself is off in that dtype.
How far a card may be off is a guess, since none has been measured: the report is there to mend it.
"""

from __future__ import annotations

import pytest

from npu.hardware import chosen
from npusim.test_fused_ops import DTYPES, HEADS, PACKINGS, error, qkv_of, randn, run

pytestmark = [pytest.mark.hardware, pytest.mark.filterwarnings("default")]

SLACK = 10
"""Times the noise of the dtype."""

dtypes = pytest.mark.parametrize("dtype", DTYPES)
heads = pytest.mark.parametrize("heads", HEADS, ids=["14/2", "28/4"])


@pytest.fixture(scope="module")
def runtime(hardware):
    from qwen2_ascend import runtime

    running = runtime.start(hardware.name, mindspeed=False)
    yield running
    running.close()


def compare(name, tensors, dtype, figures, constants=(), **options) -> None:
    """Runs the operator on the card, and its twin on the CPU in the dtype and in fp64."""
    import torch

    from qwen2_ascend.ops import get_ops

    device = chosen()
    plain, fused = getattr(get_ops("torch"), name), getattr(get_ops(device.backend), name)
    rounded = [x.to(getattr(torch, dtype)) for x in tensors]
    fixed = [x.to(getattr(torch, dtype)) for x in constants]
    found = run(
        fused, [x.to(device.name) for x in rounded], [x.to(device.name) for x in fixed], **options
    )
    twin = run(plain, rounded, fixed, **options)
    exact = run(plain, [x.double() for x in rounded], [x.double() for x in fixed], **options)
    errors = [error(own, right) for own, right in zip(found, exact, strict=True)]
    noises = [error(noisy, right) for noisy, right in zip(twin, exact, strict=True)]
    figures.update(result=errors[0], gradient=max(errors[1:]), noise=max(noises))
    least = torch.finfo(getattr(torch, dtype)).eps
    for own, noise in zip(errors, noises, strict=True):
        assert own <= SLACK * max(noise, least)


@dtypes
@heads
@pytest.mark.parametrize("packing", PACKINGS)
def test_attention(packing, heads, dtype, runtime, figures) -> None:
    b, ends = PACKINGS[packing]
    options = {"softmax_scale": heads[2] ** -0.5, "ends": ends}
    compare("attention", qkv_of(heads, b), dtype, figures, **options)


@dtypes
@heads
def test_long_attention(heads, dtype, runtime, figures) -> None:
    """Longer than the compressed mask, and no multiple of any tile."""
    compare("attention", qkv_of(heads, 1, 2300), dtype, figures, softmax_scale=heads[2] ** -0.5)


@dtypes
@pytest.mark.parametrize("shape", [(12, 2, 896), (3, 1, 3584)], ids=str)
def test_rms_norm(shape, dtype, runtime, figures) -> None:
    weight = 1 + 0.3 * randn(shape[-1])
    compare("rms_norm", [randn(*shape), weight], dtype, figures, epsilon=1e-6)


@dtypes
@pytest.mark.parametrize("shape", [(12, 2, 2, 7, 64), (12, 2, 4, 128)], ids=str)
def test_rotary(shape, dtype, runtime, figures) -> None:
    import torch

    half = 3 * randn(shape[0], shape[-1] // 2)
    angles = torch.cat((half, half), dim=-1)
    compare("rotary", [randn(*shape)], dtype, figures, [angles.cos(), angles.sin()])


@dtypes
@pytest.mark.parametrize("shape", [(12, 2, 9728), (7, 3, 64)], ids=str)
def test_swiglu(shape, dtype, runtime, figures) -> None:
    compare("swiglu", [randn(*shape)], dtype, figures)
