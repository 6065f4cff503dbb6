"""Every call of a torch_npu operator in the package fits its recorded schema; without torch_npu."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npusim.schemas import RECORDED, faults, find_uses, recorded_schemas

PLUGIN = Path(__file__).parents[2] / "plugin"


def faults_in(source: str) -> list[str]:
    return [fault for use in find_uses(source) for fault in faults(use)]


def test_every_call_site_of_the_package_fits():
    found = [
        f"{path.relative_to(PLUGIN)}:{use.line}: {fault}"
        for path in sorted(PLUGIN.rglob("*.py"))
        for use in find_uses(path.read_text(encoding="utf-8"))
        for fault in faults(use)
    ]
    assert not found, "\n".join(found)


def test_no_call_site_is_overlooked():
    """There are as many uses as the text has names of operators after a dot."""
    for path in PLUGIN.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        code = "\n".join(line.split("#")[0] for line in source.splitlines())
        named = sum(code.count(f".{op}(") for op in recorded_schemas())
        assert len(find_uses(source)) >= named, path


@pytest.mark.parametrize(
    "source",
    [
        "import torch_npu\ny, rstd = torch_npu.npu_rms_norm(x, gamma, 1e-6)",
        "y = torch_npu.npu_rms_norm(x, gamma, epsilon=eps)[0]",
        "y, *_ = torch_npu.npu_fusion_attention(q, k, v, 14, 'SBH', scale=s, sparse_mode=2)",
        "y = torch.ops.npu.npu_swiglu(x)",
        "y = torch.ops.npu.npu_swiglu(x, **({'dim': -1} if a else {}))",
        "y = torch.ops.npu.npu_swiglu.default(x, dim=-1)",
        "from torch_npu import npu_swiglu as swiglu\ny = swiglu(x, -1)",
        "y = self.torch_npu.npu_rotary_mul(x, cos, sin, rotary_mode='half')",
        "a = torch_npu.npu_fusion_attention(\n"
        "    q, k, v, n, 'TND', actual_seq_qlen=[3, 5], actual_seq_kvlen=ends, atten_mask=None)",
    ],
)
def test_right_calls_pass(source):
    assert len(find_uses(source)) == 1
    assert faults_in(source) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torch_npu.npu_rms_norn(x, g)", "not an operator"),
        ("from torch_npu import npu_rmsnorm\nnpu_rmsnorm(x, g)", "not an operator"),
        ("torch_npu.npu_rms_norm(x)", "'gamma' is missing"),
        ("torch_npu.npu_rms_norm(x, g, eps=1e-6)", "no argument 'eps'"),
        ("torch_npu.npu_rms_norm(x, g, gamma=g)", "'gamma' given twice"),
        ("torch_npu.npu_rms_norm(x, g, 1e-6, True)", "4 positional arguments, and it takes 3"),
        ("torch_npu.npu_swiglu(x, dim='last')", "'dim' is 'last'"),
        ("torch_npu.npu_swiglu(x, dim=None)", "'dim' is None"),
        ("torch_npu.npu_swiglu(x, dim=1.5)", "'dim' is 1.5"),
        ("torch_npu.npu_fusion_attention(q, k, v, 4, 'SBH', pre_tokens=3)", "'pre_tokens'"),
        ("torch_npu.npu_fusion_attention(q, k, v, 4, SBH, sync=1)", "'sync' is 1"),
        ("torch_npu.npu_fused_infer_attention_score(q, k, v, mask)", "4 positional arguments"),
        ("torch_npu.npu_fusion_attention(q, k, v, 4, 'SBH', **more)", "spell them out"),
        ("torch_npu.npu_swiglu(*xs)", "spell them out"),
        ("torch_npu.npu_swiglu(x, **({'dim': 1} if a else more))", "spell them out"),
        ("torch_npu.npu_swiglu(x, **({'dims': 1} if a else {}))", "no argument 'dims'"),
        ("torch_npu.npu_swiglu(x, **({'dim': 'no'} if a else {}))", "'dim' is 'no'"),
        ("y, rstd = torch_npu.npu_swiglu(x)", "1 result(s), unpacked into 2"),
        ("y, a, b = torch_npu.npu_rms_norm(x, g)", "2 result(s), unpacked into 3"),
        ("y = torch_npu.npu_swiglu(x)[0]", "a subscript takes a piece"),
        ("y = torch_npu.npu_rms_norm(x, g)[2]", "no number 2"),
        ("swiglu = torch_npu.npu_swiglu", "named but not called"),
        ("swiglu = getattr(torch_npu, 'npu_swiglu')", "named but not called"),
        ("y = functools.partial(torch.ops.npu.npu_swiglu, dim=-1)", "named but not called"),
    ],
)
def test_wrong_calls_are_found(source, message):
    assert any(message in fault for fault in faults_in(source)), faults_in(source)


def test_the_schemas_tell_what_is_positional_and_what_has_a_default():
    (schema,) = recorded_schemas()["npu_fused_infer_attention_score"]
    assert [a.name for a in schema.arguments if not a.kwarg_only] == ["query", "key", "value"]
    (schema,) = recorded_schemas()["npu_fusion_attention"]
    assert {a.name: a.default_value for a in schema.arguments}["scale"] == 1.0


@pytest.mark.simulated
def test_the_recorded_schemas_are_those_of_torch_npu():
    import torch_npu

    from npusim.schemas import schemas_of_installed_torch_npu

    if not torch_npu.__version__.startswith(("2.13.", "2.14.")):
        pytest.skip(f"{RECORDED.name} is not of torch_npu {torch_npu.__version__}")
    assert schemas_of_installed_torch_npu() == json.loads(RECORDED.read_text(encoding="utf-8"))
