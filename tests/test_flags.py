"""A layout that cannot be is refused by every command, which names the flag."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from helpers import tiny_config
from qwen2_ascend.alignment import settings as alignment
from qwen2_ascend.checkpoint.command import main as convert
from qwen2_ascend.errors import UserError
from qwen2_ascend.evaluation import settings as evaluation
from qwen2_ascend.finetuning import settings as finetuning
from qwen2_ascend.inference import settings as inference
from qwen2_ascend.planning.command import main as plan
from qwen2_ascend.training import settings as pretraining

TRAINING = "--seq-length 32 --train-iters 1 --lr 1e-3"


def launched(module, needed: str) -> Callable[[list[str]], None]:
    """What parses a launcher's flags and checks them."""
    return lambda words: module.validate(module.parse([*needed.split(), *words]), tiny_config(), 1)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "pretrain": launched(pretraining, f"--mock-data {TRAINING}"),
    "finetune": launched(finetuning, f"--data-path x.jsonl {TRAINING}"),
    "align": launched(alignment, "--load x"),
    "generate": launched(inference, "--load x --prompt x"),
    "evaluate": launched(evaluation, "--load x --tasks x"),
    "plan": lambda words: plan(["--model", "7B", "--num-devices", "8", *words]),
    "convert": lambda words: convert(
        ["--load-dir", "x", "--save-dir", "y", "--save-model-type", "mg", *words]
    ),
}
MISTAKES = [
    ("--tensor-model-parallel-size", "0", "must be at least 1"),
    ("--pipeline-model-parallel-size", "-1", "must be at least 1"),
    ("--context-parallel-size", "0", "must be at least 1"),
    ("--num-layer-list", "0,28", "each stage needs at least 1 layer"),
    ("--num-layer-list", "28,x", "is not a list of whole numbers"),
    ("--num-layer-list", "", "is not a list of whole numbers"),
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("flag", "value", "rule"), MISTAKES)
def test_a_layout_that_cannot_be_names_its_flag(command, flag, value, rule) -> None:
    if flag == "--context-parallel-size" and command in ("generate", "evaluate", "convert"):
        pytest.skip("it has no such flag")
    if command == "convert":
        flag = flag.replace("tensor-model", "target-tensor").replace(
            "pipeline-model", "target-pipeline"
        )
    with pytest.raises(UserError) as caught:
        COMMANDS[command]([f"{flag}={value}"])
    (fault,) = caught.value.faults
    assert fault.startswith(f"{flag} {value}") and rule in fault


def test_the_planner_says_what_a_list_of_layers_lacks() -> None:
    with pytest.raises(UserError, match="num_layer_list=20,20 sums to 40, not num_layers=28"):
        COMMANDS["plan"](["--num-layer-list", "20,20"])
