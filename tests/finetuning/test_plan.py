"""The plan of a LoRA run that goes on: what the command line need not say again, and may not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from helpers import make_tiny_hugging_face_folder, tiny_config
from logs import logged_lines
from pasted.models import save_adapter
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning import plan as megatron
from qwen2_ascend.finetuning import settings as tuning
from qwen2_ascend.finetuning.base_model import base_marks
from qwen2_ascend.finetuning.deepspeed import launch as deepspeed
from qwen2_ascend.finetuning.deepspeed import settings as tuning_by_zero
from qwen2_ascend.finetuning.saved_lora import find_saved_lora
from qwen2_ascend.lora_config import LoraConfig

LORA = LoraConfig(rank=2, alpha=4, dropout=0.25, targets=("q_proj", "v_proj"))
SAID = "--lora-r 2 --lora-alpha 4 --lora-target-modules q_proj v_proj"
NEEDED = "--seq-length 32 --lr 1e-5 --data-path chats --train-iters 3"
PATHS = [(tuning, megatron), (tuning_by_zero, deepspeed)]
"""Flags and plans of megatron-core's and of DeepSpeed's launcher."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a LoRA run after 2 steps."""
    base = make_tiny_hugging_face_folder(tmp_path / "hf", tiny_config())
    folder = tmp_path / "run"
    folder.mkdir()
    iteration = save_adapter(folder / "iter_0000002", tiny_config(), LORA)
    progress = {"iteration": 2, "consumed_samples": 2}
    state = {"base": str(base), "progress": progress}
    (iteration / "run.json").write_text(json.dumps(state))
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return folder


def planned(path: tuple[Any, Any], run: Path, flags: str) -> Any:
    settings, plans = path
    words = f"{NEEDED} --load {run} --save {run} {flags}".split()
    plan = plans.make_plan(settings.parse(words))
    settings.validate(plan.settings, plan.config, 1)
    return plan


@pytest.mark.parametrize("path", PATHS, ids=["megatron", "deepspeed"])
def test_what_is_not_said_again_is_as_it_was(path: tuple[Any, Any], run: Path) -> None:
    """Checks, the planner and the mark of an export know it too."""
    exports = f"--save-adapter {run.parent}/adapter --save-hf {run.parent}/tuned"
    silent, said = (planned(path, run, f"{flags} {exports}") for flags in ("", SAID))
    assert silent.lora == said.lora == LORA
    assert silent.settings.lora_rank == 2
    assert silent.identity() == said.identity()


@pytest.mark.parametrize("path", PATHS, ids=["megatron", "deepspeed"])
@pytest.mark.parametrize(
    "flags",
    [
        "--lora-dropout 0",
        f"{SAID} --lora-dropout 0.5",
        "--lora-r 3",
        "--lora-alpha 32",
        "--lora-target-modules all-linear",
        "--use-rslora",
    ],
)
def test_what_is_said_otherwise_is_refused(path: tuple[Any, Any], run: Path, flags: str) -> None:
    was = "rank 2, alpha 4, dropout 0.25 on q_proj, v_proj; say the same, or nothing"
    with pytest.raises(UserError, match=was):
        planned(path, run, flags)
    for flags in ("--lora-dropout 0.25", "--lora-r 2", "--lora-target-modules v_proj q_proj"):
        assert planned(path, run, flags).lora == LORA


@pytest.mark.parametrize("path", PATHS, ids=["megatron", "deepspeed"])
def test_a_run_that_goes_on_is_not_said_to_begin(path: tuple[Any, Any], run: Path) -> None:
    """What the refusal advises begins a new run on its adapter."""
    new = f"--save {run.parent}/new"
    with pytest.raises(UserError, match="holds a LoRA run, which goes on as it began") as caught:
        planned(path, run, f"--finetune {new}")
    (fault,) = caught.value.faults
    plan = planned(path, run, f"{fault.partition(' on its adapter with ')[2].rstrip('.')} {new}")
    assert plan.saved is None and plan.lora == replace(LORA, dropout=0)
    assert plan.settings.lora.lora_load == run / "iter_0000002"
    again = planned(path, run, "--finetune")  # as when it was begun, and then was killed
    assert again.saved is not None and again.lora == LORA


def test_a_lost_reference_sends_no_adapter_where_it_is_refused(run: Path) -> None:
    """--finetune alone is refused of a LoRA run, and is right where all weights are tuned."""
    from qwen2_ascend.finetuning import dpo

    saved = find_saved_lora(run)
    assert saved is not None
    settings = SimpleNamespace(checkpoint=SimpleNamespace(save=None))
    whole = SimpleNamespace(folder=saved.folder)
    for resumed, way_out in ((saved, saved.start_anew()), (whole, "--finetune")):
        plan: Any = SimpleNamespace(saved=resumed, saved_state={}, settings=settings)
        with mock.patch.object(dpo, "_identity"), pytest.raises(UserError) as caught:
            dpo._kept_reference(plan, {})
        assert str(caught.value).endswith(f"begin a new run with {way_out}.")


def test_the_adapter_that_it_began_with_may_be_said_again(run: Path) -> None:
    adapter = save_adapter(run.parent / "adapter", tiny_config(), LORA)
    plan = planned(PATHS[0], run, f"--lora-load {adapter}")
    assert plan.lora == LORA and plan.saved.folder == run / "iter_0000002"
    new = save_adapter(run.parent / "new", tiny_config(), LoraConfig(rank=3))
    with pytest.raises(UserError, match="is a run with LoRA of rank 2"):
        planned(PATHS[0], run, f"--lora-load {new}")


@pytest.mark.parametrize("path", PATHS, ids=["megatron", "deepspeed"])
def test_an_adapter_has_its_alpha(path: tuple[Any, Any], run: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_config(), LORA)
    start = f"--load {tmp_path}/hf --finetune --save {tmp_path}/new --lora-load {adapter}"
    assert planned(path, run, f"{start} --lora-alpha 4").lora == replace(LORA, dropout=0)
    assert planned(path, run, f"{start} --lora-dropout 0.5").lora == replace(LORA, dropout=0.5)
    for flags in ("--lora-alpha 8", "--lora-target-modules q_proj", "--use-rslora"):
        with pytest.raises(UserError, match=r"adapter: is LoRA of rank 2, alpha 4, .* same, or"):
            planned(path, run, f"{start} {flags}")


@pytest.mark.parametrize("path", PATHS, ids=["megatron", "deepspeed"])
def test_what_is_said_of_adapters_that_are_not_wanted_is_refused(
    path: tuple[Any, Any], run: Path, tmp_path: Path
) -> None:
    start = f"--load {tmp_path}/hf --finetune --save {tmp_path}/new"
    assert planned(path, run, start).lora is None
    for flags in ("--lora-alpha 32", "--lora-dropout 0", "--use-rslora --lora-alpha 2"):
        with pytest.raises(UserError, match=rf"{flags.split()[0]}.*: give --lora-r RANK or --lora"):
            planned(path, run, f"{start} {flags}")


@pytest.fixture
def run_on_iteration(run: Path) -> Path:
    """The folder of the run that `run`'s base model is an iteration of; it has moved on since."""
    folder = run.parent / "pretraining"
    for number in (1, 2):
        make_tiny_hugging_face_folder(folder / f"iter_000000{number}", tiny_config(), seed=number)
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    say(run, base=str(folder / "iter_0000001"))
    return folder


def say(run: Path, **changes: Any) -> None:
    """Changes what the checkpoint in `run` says."""
    file = run / "iter_0000002" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("path", PATHS, ids=["megatron", "deepspeed"])
def test_adapters_stay_on_the_iteration_that_they_began_on(
    path: tuple[Any, Any], run: Path, run_on_iteration: Path
) -> None:
    """On rank 0, and on another whose node has a copy elsewhere."""
    first = run_on_iteration / "iter_0000001"
    plan = planned(path, run, f"--pretrained-checkpoint {run_on_iteration}")
    assert plan.base.resolve() == first.resolve()
    copy = run.parent / "copy"
    shutil.copytree(run_on_iteration, copy)
    settings, plans = path
    words = f"{NEEDED} --load {run} --save {run} --pretrained-checkpoint {copy}".split()
    assert plans.make_plan(settings.parse(words), plan.found).base == copy / "iter_0000001"


@pytest.mark.parametrize("path", PATHS, ids=["megatron", "deepspeed"])
def test_another_base_model_is_refused_or_said(path: tuple[Any, Any], run: Path) -> None:
    """By values where the checkpoint has a sample of them; an older one says where it was."""
    base, other = run.parent / "hf", run.parent / "other"
    make_tiny_hugging_face_folder(other, tiny_config(), seed=1)
    with logged_lines() as said:
        assert planned(path, run, f"--pretrained-checkpoint {other}").base == other
    assert any(f"{other}; the adapters began on {base}" in line for line in said)

    say(run, **base_marks(planned(path, run, "")))
    shutil.copytree(base, run.parent / "moved")
    assert planned(path, run, f"--pretrained-checkpoint {run.parent}/moved").saved is not None
    with pytest.raises(UserError, match="is not the base model that the adapters in"):
        planned(path, run, f"--pretrained-checkpoint {other}")
    shutil.rmtree(base)
    make_tiny_hugging_face_folder(base, tiny_config(), seed=1)
    with pytest.raises(UserError, match=r"as it was then.*: the weights have other values"):
        planned(path, run, "")


def test_yarn_does_not_come_late_to_a_zero_run_of_all_weights(tmp_path: Path) -> None:
    """The run goes on as it began; with --finetune its weights may begin a new one."""
    folder = tmp_path / "zero"
    iteration = make_tiny_hugging_face_folder(folder / "iter_0000002", tiny_config())
    progress = {"iteration": 2, "consumed_samples": 2}
    (iteration / "zero.json").write_text(json.dumps({"progress": progress}))
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    yarn = "--rope-scaling-type yarn --rope-scaling-factor 2 "
    yarn += "--rope-scaling-original-max-position-embeddings 64"
    assert planned(PATHS[1], folder, "").made()["iteration"] == 2
    with pytest.raises(
        UserError, match=r"the run in .*zero is without it, and goes on as it began"
    ):
        planned(PATHS[1], folder, yarn)
    anew = planned(PATHS[1], folder, f"{yarn} --finetune --save {tmp_path}/new")
    assert anew.saved is None and anew.config.yarn is not None


def test_a_folder_that_is_not_there_yet_has_no_weights_to_merge_into(tmp_path: Path) -> None:
    make_tiny_hugging_face_folder(tmp_path / "hf", tiny_config())
    flags = f"--config {tmp_path}/hf --lora-r 2 --save-hf {tmp_path}/tuned"
    with pytest.raises(UserError, match="--save-hf with LoRA needs --load"):
        planned(PATHS[0], tmp_path / "run", flags)
