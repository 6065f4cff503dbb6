"""All ranks follow one plan, which rank 0 makes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from distributed.harness import each_check
from helpers import make_tiny_hugging_face_folder, tiny_config
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning import settings as finetuning
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.training.length import RunLength
from qwen2_ascend.training.plan import RunPlan, make_plan
from qwen2_ascend.training.settings import parse
from training.plan_worker import CHECKS

WORKER = Path(__file__).with_name("plan_worker.py")
FLAGS = "--mock-data --seq-length 8 --lr 1e-3"


def plan(flags: str) -> RunPlan:
    settings = parse(f"{FLAGS} {flags}".split())
    return RunPlan(settings=settings, config=tiny_config(), world_size=2, source=None)


test_ranks = each_check(WORKER, CHECKS)


def test_a_plan_is_as_long_as_its_flags_say() -> None:
    found = plan("--train-samples 50 --micro-batch-size 4").length
    assert found == RunLength(train_iters=6, global_batch_size=8)


def test_facts_hold_everything_but_paths() -> None:
    one = plan("--train-iters 3 --save here --report-dir there --num-workers 2").facts()
    other = plan("--train-iters 3 --save /elsewhere --report-dir /there").facts()
    assert one == other
    assert plan("--train-iters 3 --seed 5").facts() != one
    assert plan("--train-iters 3 --no-save-optim").facts() != one


def test_shards_without_a_config_take_that_beside_the_tokenizer(tmp_path: Path) -> None:
    """MindSpeed-LLM writes none; its command lines name the model's folder as the tokenizer's."""
    from qwen2_ascend.checkpoint.convert import Conversion, convert, prepare

    folder = make_tiny_hugging_face_folder(tmp_path / "hf")
    shards = tmp_path / "shards"
    request = Conversion(
        load_dir=folder,
        save_dir=shards,
        save_model_type="mg",
        layout=ParallelLayout(tensor_model_parallel_size=2),
    )
    convert(prepare(request))
    other = tmp_path / "other"
    other.mkdir()
    changed = replace(tiny_config(), rotary_base=7.0).to_hugging_face()
    (other / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    pretrain = f"{FLAGS} --train-iters 3 --load {shards} --tokenizer-name-or-path"
    tune = pretrain.replace("--mock-data", "--data-path chats")
    for read, flags in ((parse, pretrain), (finetuning.parse, tune)):
        assert make_plan(read(f"{flags} {other}".split())).config == tiny_config(), "its own"
    for path in shards.rglob("*.json"):
        path.unlink()
    for read, flags in ((parse, pretrain), (finetuning.parse, tune)):
        made = make_plan(read(f"{flags} {folder}".split()))
        assert made.config == tiny_config()
        assert made.source is not None
        assert folder / "config.json" in made.source.side_files
        with pytest.raises(UserError, match=r"has no config\.json"):
            make_plan(read(f"{flags} {tmp_path}".split()))
