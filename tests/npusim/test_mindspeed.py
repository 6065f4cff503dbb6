"""`--mindspeed` on simulated cards: the genuine MindSpeed changes no loss.

MINDSPEED_PATH names a checkout of the branch that goes with the installed megatron-core
(core_r0.16.0 for 0.16, 2.3.0_core_r0.12.1 for 0.12). Without it these tests skip. What MindSpeed
imports and cannot be had here is replaced by inert stand-ins; see stand_ins.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from commands import TORCHRUN, run_python
from distributed.train_worker import FLAGS, LAYOUTS, reference
from npusim.build import Unavailable
from npusim.env import environment

TOLERANCE = 1e-6
LAUNCH = Path(__file__).parents[2] / "launch" / "pretrain_qwen2.py"
TRIED = ("tp2", "pp2", "tp2-pp2", "dp2-distributed-optimizer")


@pytest.fixture(scope="module")
def simulation() -> dict[str, str]:
    """The environment of simulated cards, with MindSpeed on the path."""
    checkout = os.environ.get("MINDSPEED_PATH")
    if checkout is None:
        pytest.skip("MINDSPEED_PATH does not name a MindSpeed checkout")
    assert (Path(checkout) / "mindspeed" / "megatron_adaptor.py").is_file(), checkout
    try:
        simulated = environment(num_devices=4)
    except Unavailable as error:
        pytest.skip(f"no simulated device: {error}")
    simulated["PYTHONPATH"] += os.pathsep + checkout
    return simulated


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers import make_tiny_hugging_face_folder

    return make_tiny_hugging_face_folder(tmp_path_factory.mktemp("model") / "hf")


def launch(
    layout: str, flags: str, model: Path, report: Path, simulation: dict[str, str]
) -> tuple[str, list[dict]]:
    """What `torchrun launch/pretrain_qwen2.py` printed, and its metrics."""
    cards, sizes = LAYOUTS[layout]
    command = [*TORCHRUN, str(cards), "-m", "npusim.stand_ins", str(LAUNCH)]
    command += f"{FLAGS.replace('--device cpu', '--device npu')} {sizes} {flags}".split()
    command += ["--load", str(model), "--report-dir", str(report)]
    out = run_python(*command, environ=simulation).out
    rows = (report / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return out, [json.loads(row) for row in rows]


@pytest.mark.timeout(800)
@pytest.mark.parametrize("layout", TRIED)
def test_losses_are_those_without_mindspeed(layout, model, simulation, tmp_path) -> None:
    out, found = launch(layout, "--mindspeed", model, tmp_path / "with", simulation)
    assert "MindSpeed: " in out and "asked for" in out and "attributes replaced" in out
    out, plain = launch(layout, "--no-mindspeed", model, tmp_path / "without", simulation)
    assert "MindSpeed: refused by --no-mindspeed" in out
    expected, norms = reference(model, False)
    assert len(found) == len(plain) == len(expected)
    for with_it, without, loss, norm in zip(found, plain, expected, norms, strict=True):
        assert abs(with_it["loss"] - without["loss"]) <= TOLERANCE
        assert abs(with_it["loss"] - loss) <= TOLERANCE
        assert abs(with_it["grad_norm"] - norm) <= 4 * TOLERANCE


def test_the_stand_ins_compute_nothing() -> None:
    """A kernel that is called after all must not go unnoticed."""
    from npusim.stand_ins import InertModule

    kernels = InertModule("triton")

    @kernels.jit
    def kernel(x):
        return x

    @kernels.autotune(configs=[kernels.Config({"BLOCK": 1})], key=["n"])
    def tuned(x):
        return x

    for call in (kernel[(1,)], tuned, kernels.language.load):
        with pytest.raises(RuntimeError, match="of which there is a stand-in only"):
            call(1)
