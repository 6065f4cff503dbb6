"""DeepSpeed ZeRO: its losses, its checkpoints, its flags, and --deepspeed-config."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from commands import TORCHRUN, run_python
from distributed.harness import each_check
from distributed.jobs import read_metrics
from finetuning.deepspeed_worker import CHECKS, data_of
from helpers import make_tiny_hugging_face_folder, tiny_config
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning.deepspeed.config import deepspeed_config
from qwen2_ascend.finetuning.deepspeed.settings import parse, validate

WORKER = Path(__file__).with_name("deepspeed_worker.py")
LAUNCHER = Path(__file__).parents[2] / "launch" / "finetune_qwen2_deepspeed.py"
NEEDED = "--config 0.5B --seq-length 32 --lr 1e-5 --data-path chats --train-iters 3"

# not importorskip: DeepSpeed's import looks for devices
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra `deepspeed` is not installed"
)

test_deepspeed = needs_deepspeed(each_check(WORKER, CHECKS))


# --- flags ---------------------------------------------------------------------------------------


def settings_of(flags: str):
    return parse([*NEEDED.split(), *flags.split()])


def faults_of(flags: str, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        validate(settings_of(flags), tiny_config(), world_size)
    return "\n".join(caught.value.faults)


@pytest.mark.parametrize(
    "flags",
    [
        "--tensor-model-parallel-size 2",
        "--pipeline-model-parallel-size 2",
        "--use-distributed-optimizer",
        "--stage dpo",
        "--ckpt-format torch",
        "--use-fused-rmsnorm",
        "--cross-entropy-chunk-size 8",
        "--recompute-granularity selective",
        "--zero-stage 0",
    ],
)
def test_what_has_no_meaning_here_is_no_flag(flags: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        settings_of(flags)
    assert caught.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--offload-param", "--offload-param needs --zero-stage 3, not 2"),
        ("--zero-stage 3 --cpu-adam torch", "--cpu-adam torch needs --offload-optimizer"),
        ("--bf16 --fp16", "--bf16 and --fp16: give one of them"),
        ("--deepspeed-config nowhere.json", "--deepspeed-config nowhere.json: cannot be read"),
        ("--micro-batch-size 2 --global-batch-size 3", "--global-batch-size 3 is not a multiple"),
        ("--save-hf out", "--save-hf needs --save"),
    ],
)
def test_contradictions_are_refused(flags: str, message: str) -> None:
    assert message in faults_of(flags)


def test_the_flags_alone_make_a_configuration() -> None:
    settings = settings_of("--micro-batch-size 2 --global-batch-size 16 --bf16 --clip-grad 0.5")
    config = deepspeed_config(settings.zero, settings, world_size=4, device="npu")
    assert config["train_batch_size"] == 16
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True} and config["fp16"] == {"enabled": False}
    assert config["zero_optimization"] == {"stage": 2}


def test_deepspeed_updates_in_host_memory_where_that_is_not_the_device() -> None:
    settings = settings_of("--offload-optimizer")
    name = "zero_force_ds_cpu_optimizer"
    assert name not in deepspeed_config(settings.zero, settings, 1, "npu")
    assert deepspeed_config(settings.zero, settings, 1, "cpu")[name] is False


def written(folder: Path, **config: object) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return f"--deepspeed-config {path}"


def test_a_configuration_file_adds_what_no_flag_says(tmp_path: Path) -> None:
    """The flags say what "auto" stands for, as in the file for transformers' Trainer."""
    flags = written(
        tmp_path,
        train_batch_size="auto",
        gradient_accumulation_steps=2,
        bf16={"enabled": "auto"},
        optimizer={"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        zero_optimization={
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": 1000,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
        },
        wall_clock_breakdown=True,
    )
    settings = settings_of(f"{flags} --global-batch-size 4 --bf16")
    config = deepspeed_config(settings.zero, settings, 2, "npu")
    assert config["zero_optimization"] == {
        "stage": 3,
        "stage3_prefetch_bucket_size": 1000,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    }
    assert config["wall_clock_breakdown"] and config["bf16"]["enabled"]
    assert "optimizer" not in config and config["train_batch_size"] == 4


@pytest.mark.parametrize(
    ("flags", "config", "message"),
    [
        ("", {"train_batch_size": 3}, "train_batch_size 3 contradicts --micro-batch-size"),
        ("--zero-stage 2", {"zero_optimization": {"stage": 3}}, "contradicts --zero-stage"),
        ("", {"zero_optimization": {"stage": 0}}, "stage 0 is none of 1, 2, 3"),
        ("", {"zero_optimization": 3}, "zero_optimization 3 is not a JSON object"),
        ("", {"gradient_clipping": 5}, "gradient_clipping 5 contradicts --clip-grad"),
        ("--bf16", {"bf16": {"enabled": False}}, "bf16.enabled false contradicts --bf16"),
        ("", {"fp16": {"enabled": True}}, "fp16.enabled true contradicts --bf16 and --fp16"),
        (
            "--offload-optimizer",
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            'device "nvme" contradicts --offload-optimizer',
        ),
        ("", {"scheduler": {"type": "WarmupLR"}}, "is set by --lr-decay-style"),
        ("", {"optimizer": {"type": "Lamb"}}, 'optimizer.type "Lamb": the optimizer is AdamW'),
        ("", {"optimizer": {"params": {"lr": 3.0}}}, "optimizer.params.lr 3.0: the optimizer is"),
    ],
)
def test_a_file_that_contradicts_the_flags_is_refused(
    flags: str, config: dict, message: str, tmp_path: Path
) -> None:
    assert message in faults_of(f"{flags} {written(tmp_path, **config)}")


# --- the launcher --------------------------------------------------------------------------------


@needs_deepspeed
@pytest.mark.distributed
def test_a_run_from_the_command_line_to_a_hugging_face_folder(tmp_path: Path) -> None:
    """Two steps, and with the same command line two more: chats in, a model out."""
    model = model_and_chats(tmp_path)
    flags = f"--pretrained-checkpoint {model} --load {tmp_path}/out --save {tmp_path}/out "
    flags += f"--data-path {tmp_path}/chats --seq-length 32 --train-iters 4 --lr 1e-3 "
    flags += "--zero-stage 3 --device cpu --global-batch-size 2 --bf16"
    first = launched(f"{flags} --exit-interval 2")
    assert "stopped after iteration 2" in first and "ZeRO stage 3" in first
    second = launched(f"{flags} --save-hf {tmp_path}/tuned")
    assert "resumed" in second and "iteration 4/4" in second
    assert [row["iteration"] for row in read_metrics(tmp_path / "out")] == [1, 2, 3, 4]
    saved = tmp_path / "out" / "iter_0000004" / "model.safetensors"
    assert data_of(tmp_path / "tuned") == data_of(saved.parent)
    assert data_of(saved.parent) != data_of(model)


@needs_deepspeed
@pytest.mark.distributed
def test_a_lora_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """One process for four steps; two go on from its second one: the same last two losses."""
    model = model_and_chats(tmp_path)
    flags = f"--data-path {tmp_path}/chats --seq-length 32 --train-iters 4 --lr 1e-2 --device cpu "
    flags += "--global-batch-size 4 --lora-r 4 "
    first = f"{flags} --load {model} --save {tmp_path}/one --save-interval 2"
    assert "LoRA: rank 4, alpha 32 on q_proj" in launched(first)
    shutil.copytree(tmp_path / "one" / "iter_0000002", tmp_path / "two" / "iter_0000002")
    (tmp_path / "two" / "latest_checkpointed_iteration.txt").write_text("2")
    second = f"{flags} --load {tmp_path}/two --save {tmp_path}/two --zero-stage 3 "
    second += f"--save-adapter {tmp_path}/adapter --save-hf {tmp_path}/tuned"
    said = launched(second, num_processes=2)
    assert "other ranks: the random number generators are seeded anew" in said
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / name)][-2:] for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=2e-6), losses
    adapter = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    last = tmp_path / "two" / "iter_0000004" / "adapter_model.safetensors"
    assert adapter == last.read_bytes()
    assert len(data_of(tmp_path / "tuned")) == len(data_of(model))
    assert data_of(tmp_path / "tuned") != data_of(model)


@needs_deepspeed
def test_all_weights_on_another_number_of_ranks_are_refused_with_the_way_out() -> None:
    from qwen2_ascend.finetuning.deepspeed.checkpoint import _check_cut
    from qwen2_ascend.finetuning.deepspeed.saved import SavedZero

    run: Any = SimpleNamespace(stage=2, runtime=SimpleNamespace(world_size=2))
    state = {"zero_stage": 2, "world_size": 4}
    with pytest.raises(UserError, match=r"stage 2 on 4 rank.* this is stage 2 on 2.*--no-load-opt"):
        _check_cut(run, SavedZero(folder=Path("out"), state=state))
    _check_cut(run, SavedZero(folder=Path("out"), state={**state, "world_size": 2}))


@needs_deepspeed
def test_a_resumed_dynamic_loss_scale_goes_on_by_the_rules_of_this_run() -> None:
    """A constant one, on either side, is what the flags say."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    from qwen2_ascend.finetuning.deepspeed.checkpoint import take_scale

    rules: Any = {"min_scale": 1.0, "delayed_shift": 1, "consecutive_hysteresis": False}
    saved = DynamicLossScaler(init_scale=2.0**8, scale_window=1000, **rules)
    saved.cur_scale, saved.cur_iter, saved.last_overflow_iter = 128.0, 2, 0
    own = DynamicLossScaler(init_scale=2.0**16, scale_window=7, **rules)
    take_scale(own, saved)
    assert (own.cur_scale, own.scale_window) == (128.0, 7)
    assert (own.cur_iter, own.last_overflow_iter) == (2, 0)
    constant = LossScaler(scale=64.0)
    take_scale(constant, saved)
    take_scale(own, constant)
    assert constant.cur_scale == 64.0 and own.cur_scale == 128.0


def model_and_chats(folder: Path) -> Path:
    from finetuning.finetune_worker import _write

    _write(folder / "chats", "", 8, seed=0)
    return make_tiny_hugging_face_folder(folder / "model")


def launched(flags: str, num_processes: int = 1) -> str:
    torchrun = (*TORCHRUN, num_processes) if num_processes > 1 else ()
    return run_python(*torchrun, LAUNCHER, *flags.split()).out
