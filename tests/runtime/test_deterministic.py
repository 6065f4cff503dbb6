"""--deterministic: two runs end with the same bits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from commands import environment, run_python
from helpers import make_tiny_hugging_face_folder

LAUNCH = Path(__file__).parents[2] / "launch" / "pretrain_qwen2.py"
FLAGS = "--mock-data --seq-length 16 --micro-batch-size 2 --global-batch-size 4 --train-iters 3 "
FLAGS += "--lr 1e-3 --bf16 --deterministic --no-save-optim"


def trained(command: list[str], folder: Path, environ: Mapping[str, str]) -> tuple[list, bytes]:
    """(loss and gradient norm of each step, the weights) of a run that saves into `folder`."""
    arguments = f"{FLAGS} --load {folder.parent / 'hf'} --save {folder} --ckpt-format torch"
    run_python(*command, *arguments.split(), environ=environ)
    rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [(row["loss"], row["grad_norm"]) for row in map(json.loads, rows)]
    return steps, weights(folder)


def weights(folder: Path) -> bytes:
    """Every tensor of the checkpoint's weights."""
    import torch

    (path,) = folder.glob("iter_*/mp_rank_00/model_optim_rng.pt")
    model = torch.load(path, weights_only=False)["model"]
    tensors = [model[name] for name in sorted(model) if torch.is_tensor(model[name])]
    assert len(tensors) > 20
    return b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)


@pytest.mark.timeout(860)
def test_two_runs_on_the_cpu_end_with_the_same_bits(tmp_path: Path) -> None:
    make_tiny_hugging_face_folder(tmp_path / "hf")
    environ = environment(OMP_NUM_THREADS="2")
    command = [str(LAUNCH), "--device", "cpu"]
    first, second = (trained(command, tmp_path / name, environ) for name in ("first", "second"))
    assert len(first[0]) == 3 and first[0][0] != first[0][2]
    assert first == second
