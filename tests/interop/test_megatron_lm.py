"""Megatron-LM's own pretrain_gpt.py trains on with our checkpoints, on simulated cards.

It is given few flags besides --use-checkpoint-args: the model's shape, its layout and the type of
its tokenizer come from our `args`. Its losses are those of our own run on a CPU, on the same
samples.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from checkpoint.toys import convert, pp, tp
from helpers import make_tiny_hugging_face_folder, tiny_config
from interop.checkouts import TESTS, checkouts, contains, run_python
from npusim.build import Unavailable
from npusim.env import environment

LENGTH, BATCH, ITERATIONS = 24, 4, 2
TOLERANCE = 2e-5
"""Of a loss near 6; Megatron-LM prints seven digits."""
SAMPLES = f"--seq-length {LENGTH} --global-batch-size {BATCH} --split 100,0,0 --seed 1234"
SCHEDULE = f"--train-iters {ITERATIONS} --lr 1e-3 --min-lr 1e-3 --lr-decay-style constant"
CARDS = 4
FLAGS = f"""
    --use-checkpoint-args --use-mp-args-from-checkpoint-args --finetune
    {SAMPLES} {SCHEDULE} --micro-batch-size 2 --weight-decay 0.1 --clip-grad 1.0
    --norm-epsilon 1e-6 --log-interval 1 --eval-iters 0 --eval-interval 99 --distributed-backend nccl
    --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-rope-fusion --no-bias-dropout-fusion
    --dataloader-type single --num-workers 0 --distributed-timeout-minutes 5
"""
"""What pretrain_gpt.py needs besides: our data, our schedule, and no NVIDIA kernels."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer of as many words as the model knows."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    config = tiny_config()
    folder = make_tiny_hugging_face_folder(tmp_path_factory.mktemp("model") / "hf", config)
    words = {f"w{number}": number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w255").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Indexed token ids, as both sides read them."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("data") / "random"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    generator = np.random.default_rng(3)
    for _ in range(64):
        tokens = generator.integers(0, 250, int(generator.integers(10, 60)))
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="module")
def ours(model, data, tmp_path_factory) -> OurRun:
    return our_run(model, data, tmp_path_factory.mktemp("ours"))


class OurRun:
    """A run of ours on a CPU with a checkpoint after its first step.

    Attributes:
        losses: of its steps.
        saved: the --save folder.
    """

    def __init__(self, losses: list[float], saved: Path) -> None:
        self.losses, self.saved = losses, saved


def our_run(model: Path, data: Path, folder: Path) -> OurRun:
    flags = f"""
        --device cpu --load {model} --data-path {data} {SAMPLES} {SCHEDULE} --micro-batch-size 2
        --weight-decay 0.1 --clip-grad 1.0 --report-dir {folder / "report"}
        --save {folder / "saved"} --save-interval 1 --keep-last 9
    """
    launch = TESTS.parent / "launch" / "pretrain_qwen2.py"
    run_python(launch, *flags.split(), environment={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = (folder / "report" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return OurRun([json.loads(row)["loss"] for row in rows], folder / "saved")


@pytest.fixture(scope="module", params=["12", "16"], ids=["0.12", "0.16"])
def megatron(request, model, data) -> Any:
    """Runs pretrain_gpt.py of one release with further flags; gives the losses that it prints."""
    has = contains("megatron/core/package_info.py", f"MINOR = {request.param}\n")
    checkout = checkouts("MEGATRON_LM_PATH", has, f"release 0.{request.param}")[0]
    try:
        simulated = environment(num_devices=CARDS)
    except Unavailable as error:
        pytest.skip(f"no simulated device: {error}")
    simulated["PYTHONPATH"] = os.pathsep.join([str(checkout), simulated["PYTHONPATH"]])
    # torch's broadcast asks for the capability, which the device does not tell
    simulated |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCH_NPU_DEVICE_CAPABILITY": "8.0"}
    return functools.partial(run_megatron, simulated, model, data)


def run_megatron(simulated: dict[str, str], model: Path, data: Path, *flags: object) -> list[float]:
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", CARDS]
    script = TESTS / "interop" / "megatron_lm.py"
    output = run_python(
        *(*ranks, "-m", "interop.inside", script, *FLAGS.split()),
        *("--data-path", data, "--tokenizer-model", model, *flags),
        environment=simulated,
        seconds=900,
    )
    return [float(found) for found in re.findall(r"lm loss: (\S+)", output)]


def assert_same_losses(found: list[float], expected: list[float]) -> None:
    """Release 0.16 prints nothing at the first step and the mean at the second."""
    if len(found) == 1 and len(expected) > 1:
        expected = [sum(expected) / len(expected)]
    assert len(found) == len(expected), (found, expected)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= TOLERANCE, (
        found,
        expected,
    )


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("save_format", ["megatron", "torch_dist"])
def test_it_trains_from_converted_shards(save_format, megatron, model, ours, tmp_path):
    flags = [*tp(2), *pp(2), "--save-format", save_format]
    convert(model, tmp_path / "shards", *flags).require()
    ckpt_format = {"megatron": "torch"}.get(save_format, save_format)
    found = megatron("--load", tmp_path / "shards", "--ckpt-format", ckpt_format)
    assert_same_losses(found, ours.losses)
