"""launch/pretrain_qwen2.py as a user runs it, in one process: data, checkpoints, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from commands import World, environment, run_commands, run_python
from data.corpora import write_indexed
from distributed.jobs import read_metrics
from helpers import make_tiny_hugging_face_folder, tiny_config
from logs import logged_lines

LAUNCH = Path(__file__).parents[2] / "launch" / "pretrain_qwen2.py"
SIZES = "--seq-length 16 --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-3"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("pretrain")
    make_tiny_hugging_face_folder(folder / "hf", tiny_config(tie_word_embeddings=True))
    (folder / "hf" / "tokenizer.json").write_text("{}", encoding="utf-8")
    write_indexed(folder / "corpus", [40, 70, 55, 90] * 8, dtype=np.uint16)
    (folder / "broken" / "loss.png").mkdir(parents=True)
    commands = {
        name: {"program": "pretrain", "flags": flags.format(d=folder).split()}
        for name, flags in _commands().items()
    }
    return World(folder, run_commands(folder, commands))


def _commands() -> dict[str, str]:
    data = f"--data-path {{d}}/corpus --split 80,20,0 --eval-interval 3 --eval-iters 1 {SIZES}"
    parts = "--load {d}/parts --pretrained-checkpoint {d}/hf --save {d}/parts --exit-interval 2"
    other = "--load {d}/%s --pretrained-checkpoint {d}/hf --save {d}/%s --data-path {d}/corpus "
    other += "--split 80,20,0 --seq-length 16 --micro-batch-size 2 --lr 1e-3 "
    samples, steps = (other % (name, name) for name in ("by_samples", "by_steps"))
    samples, steps = f"{samples} --train-samples 24", f"{steps} --train-iters 4"
    return {
        "samples, batch 4": f"{samples} --global-batch-size 4 --exit-interval 2",
        "samples, batch 8": f"{samples} --global-batch-size 8",
        "steps, batch 8": f"{steps} --global-batch-size 8 --exit-interval 2",
        "steps, batch 4": f"{steps} --global-batch-size 4",
        "whole": f"--load {{d}}/hf --save {{d}}/whole {data}",
        "first": f"{parts} {data}",
        "second": f"{parts} {data}",
        "complete": f"{parts} {data}",
        "reports nothing": f"--load {{d}}/hf --mock-data --report-dir {{d}}/broken "
        f"--tensorboard-dir {{d}}/corpus.bin --save {{d}}/unreported {SIZES}",
        "random": f"--config {{d}}/hf/config.json --mock-data --bf16 --deterministic "
        f"--save {{d}}/random {SIZES}",
        "explodes": f"--load {{d}}/hf --mock-data {SIZES} --lr 1e30 --lr-decay-style constant",
        "no data": f"--load {{d}}/hf --data-path {{d}}/nothing {SIZES}",
        "no checkpoint": f"--load {{d}}/nowhere --mock-data {SIZES}",
        "no model": f"--mock-data {SIZES}",
        "no config": f"--load {{d}}/corpus.bin --mock-data {SIZES}",
        "two faults": f"--load {{d}}/hf {SIZES} --bf16 --fp16 --save-interval 3 --mock-data",
        "no npu": f"--load {{d}}/hf --mock-data --device npu {SIZES}",
    }


def metrics(folder: Path) -> list[dict[str, Any]]:
    timing = ("tokens_per_second", "tflops_per_device", "step_seconds", "peak_memory_bytes")
    return [{k: v for k, v in row.items() if k not in timing} for row in read_metrics(folder)]


def test_the_first_line_says_where_it_runs(world: World) -> None:
    run = world.runs["whole"].require()
    first, *others = run.out.splitlines()
    (weights,) = [line for line in others if line.startswith("weights: ")]
    for words in ("device cpu", "backend gloo", "1 process(es)", "megatron-core", "TP1 PP1 DP1"):
        assert words in first
    assert "hf" in weights and "safetensors" in weights


def test_a_run_in_two_parts_is_a_run_in_one(world: World) -> None:
    """The same command line starts, resumes and then has nothing left to do.

    The validation loss is measured at its interval and at the end, and not where the run stops.
    """
    names = ("first", "second", "complete")
    first, second, complete = (world.runs[name].require() for name in names)
    assert "stopped after iteration 2: --exit-interval 2" in first.out
    assert f"resumed {world.folder}/parts/iter_0000002 at iteration 2" in second.out
    assert "nothing is left to do" in complete.out and "saved" not in complete.out
    whole = metrics(world.folder / "whole")
    assert metrics(world.folder / "parts") == whole
    assert [row["iteration"] for row in whole if "loss" in row] == [1, 2, 3, 4]
    assert [row["iteration"] for row in whole if "validation_loss" in row] == [3, 4]


@pytest.mark.parametrize(
    ("name", "commands", "samples"),
    [
        ("by_samples", ("samples, batch 4", "samples, batch 8"), [4, 8, 16, 24]),
        ("by_steps", ("steps, batch 8", "steps, batch 4"), [8, 16, 20, 24]),
    ],
)
def test_a_run_goes_on_with_another_batch_to_the_end_that_was_asked_for(
    world: World, name: str, commands: tuple[str, str], samples: list[int]
) -> None:
    for command in commands:
        world.runs[command].require()
    assert [row["consumed_samples"] for row in metrics(world.folder / name)] == samples


def test_nothing_is_said_that_is_not_the_users_concern(world: World) -> None:
    for name in ("whole", "first", "second"):
        assert world.runs[name].err == ""


def test_a_plan_is_made_before_megatron_is_imported(world: World) -> None:
    """MindSpeed and the CPU's redirects have to come before it."""
    code = (
        "import sys\n"
        "from qwen2_ascend.training.plan import make_plan\n"
        "from qwen2_ascend.training.settings import parse\n"
        "plan = make_plan(parse(sys.argv[1:]))\n"
        "assert plan.saved and plan.config.num_layers == 4\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)\n"
    )
    flags = f"--load {world.folder}/parts --mock-data {SIZES}".split()
    run_python("-c", code, *flags)


def test_a_checkpoint_folder_is_complete(world: World) -> None:
    folder = world.folder / "parts"
    assert (folder / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8") == "4"
    assert {path.name for path in folder.glob("iter_*")} == {"iter_0000002", "iter_0000004"}
    assert (folder / "tokenizer.json").read_bytes() == b"{}"
    assert json.loads((folder / "config.json").read_bytes())["model_type"] == "qwen2"
    assert (folder / "loss.png").stat().st_size > 5000
    assert not list(folder.glob(".*")), "nothing temporary is left"


def test_what_only_reports_does_not_fail_a_run(world: World) -> None:
    """Picture and TensorBoard cannot be written: each is said once, and the run ends."""
    run = world.runs["reports nothing"].require()
    warnings = run.err.splitlines()
    assert len(warnings) == 2, run.err
    for words in ("TensorBoard in ", "loss.png is not drawn: "):
        assert sum(words in warning for warning in warnings) == 1, run.err
    assert "iteration 4/4" in run.out
    assert (world.folder / "unreported" / "iter_0000004").is_dir()


def test_a_log_that_cannot_be_written_does_not_fail_a_run(world: World, tmp_path: Path) -> None:
    flags = f"--load {world.folder}/hf --mock-data --report-dir {tmp_path} {SIZES}"
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, str(LAUNCH), *flags.split()],
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: the log: ") and len(done.stderr.splitlines()) == 1
    assert len(metrics(tmp_path)) == 4


def test_random_weights_from_a_config(world: World) -> None:
    run = world.runs["random"].require()
    assert "weights: random, seed 1234" in run.out
    config = json.loads((world.folder / "random" / "config.json").read_bytes())
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    assert (world.folder / "random" / "tokenizer.json").exists()


def test_a_loss_that_explodes_ends_the_run_in_words(world: World) -> None:
    run = world.runs["explodes"].require(1)
    assert run.err.startswith("error: iteration 2: loss")
    assert "samples 4-7 of the training data" in run.err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no data", "nothing"),
        ("no checkpoint", "nowhere: there is no checkpoint in it"),
        ("no model", "nothing says which model"),
        ("no config", "corpus.bin: no such folder"),
        ("two faults", "--bf16 and --fp16"),
        ("no npu", "device=npu cannot be used"),
    ],
)
def test_a_mistake_ends_with_two_and_no_traceback(world: World, name: str, words: str) -> None:
    run = world.runs[name].require(2)
    assert run.err.startswith("error: ") and words in run.err and "Traceback" not in run.out


def test_every_mistake_is_named_at_once(world: World) -> None:
    assert len(world.runs["two faults"].err.splitlines()) == 2


def test_rank_0_checks_for_all_before_any_rank_is_joined() -> None:
    flags = "--config 7B --mock-data --tensor-model-parallel-size 3"
    rank_0_of_3 = environment(RANK="0", LOCAL_RANK="0", WORLD_SIZE="3")
    words = [LAUNCH, *flags.split(), *SIZES.split()]
    ended = run_python(*words, status=2, environ=rank_0_of_3).require(2)
    assert "tensor_model_parallel_size=3" in ended.err


@pytest.mark.parametrize(
    ("tokens", "was", "now", "is_said"),
    [
        (3300, 100, 200, False),
        (3000, 100, 200, True),
        (3000, 200, 100, True),
        (900, 100, 100, False),
    ],
    ids=["within an epoch", "longer", "shorter", "the same"],
)
def test_another_order_of_the_data_is_said(tokens: int, was: int, now: int, is_said: bool) -> None:
    """Where a resumed run takes another number of samples, and repeats its data for them."""
    from qwen2_ascend.training.pretrain import log_another_order

    data: Any = SimpleNamespace(
        num_samples=now,
        config=SimpleNamespace(sequence_length=16),
        dataset=SimpleNamespace(sequence_lengths=np.array([tokens - 100, 100, 5000])),
        indices=np.array([0, 1]),
    )
    plan: Any = SimpleNamespace(
        saved_state={"opt_param_scheduler": {"wd_incr_steps": was}},
        length=SimpleNamespace(num_samples=now),
    )
    with logged_lines() as lines:
        log_another_order(plan, data)
    assert [f"was to take {was} samples, and now takes {now};" in line for line in lines] == (
        [True] if is_said else []
    )
