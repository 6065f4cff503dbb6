"""--plan: a launcher says what the planner says of its command, and trains nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers import make_tiny_hugging_face_folder, tiny_config
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning import finetune as tuning
from qwen2_ascend.planning.devices import find_device
from qwen2_ascend.planning.job import ALL_LAYERS
from qwen2_ascend.planning.memory import HCCL_BYTES, communicators, fullest_stage
from qwen2_ascend.planning.search import Machine, plan_of
from qwen2_ascend.training import pretrain as pretraining
from qwen2_ascend.training import settings as pretraining_settings
from qwen2_ascend.training.planned import as_cut, expected

COMMAND = (
    "--config 14B --mock-data --seq-length 4096 --train-iters 3 --lr 1e-5 --bf16 "
    "--tensor-model-parallel-size 4 --sequence-parallel --pipeline-model-parallel-size 2 "
    "--use-distributed-optimizer --global-batch-size 64 --micro-batch-size 2"
)


def test_the_command_is_planned_on_so_many_devices(capsys) -> None:
    assert pretraining.main(f"{COMMAND} --plan 16 --plan-device 910B3".split()) == 0
    said = capsys.readouterr().out
    settings = pretraining_settings.parse(COMMAND.split())
    cut = as_cut(settings, Qwen2Config.named("14B"), 16, "npu")
    assert (cut.label(), cut.num_microbatches) == ("TP4 PP2 DP2", 16)
    gigabytes = fullest_stage(cut)[1].total / 1e9
    assert "fits: 1 of 1 valid layouts" in said and f"takes {gigabytes:.1f} GB" in said
    assert "16 x 910B3" in said


def test_a_log_is_told_what_the_plan_was() -> None:
    """On devices by the names that their drivers give; torch's memory is without HCCL's."""
    settings = pretraining_settings.parse(COMMAND.split())
    cut = as_cut(settings, Qwen2Config.named("14B"), 16, "npu")
    planned = expected(cut, "Ascend910B3", 8)
    assert planned is not None and planned.device == "910B3"
    device = find_device("910B3")
    plan = plan_of(cut, Machine(device=device, num_devices=16, devices_per_node=8))
    assert planned.seconds == plan.time.total
    assert planned.memory == plan.memory.total - communicators(cut) * HCCL_BYTES
    assert expected(cut, "cpu", 8) is None and expected(cut, "Ascend920", 8) is None


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        ("--reuse-fp32-param", {"reuse_fp32_param": True}),
        ("--recompute-norm", {"recompute_norm": ALL_LAYERS}),
        (
            "--recompute-activation-function --recompute-activation-function-num-layers 2",
            {"recompute_activation_function": 2, "recompute_norm": 0},
        ),
        ("--swap-attention", {"swap_attention": True}),
        ("--optimizer-cpu-offload", {"optimizer_offload_fraction": 1.0}),
        (
            "--optimizer-cpu-offload --optimizer-offload-fraction 0.25",
            {"optimizer_offload_fraction": 0.25},
        ),
        ("--use-ascend-mc2", {"mc2": True, "coc_parallel_num": 1}),
        ("--use-ascend-coc --coc-parallel-num 4", {"mc2": True, "coc_parallel_num": 4}),
        ("--use-ascend-coc", {"mc2": False, "coc_parallel_num": 1}),
        (
            "--context-parallel-size 2 --context-parallel-algo kvallgather_cp_algo",
            {"cp": 2, "gathers_keys": True, "context_parallel_algo": "kvallgather_cp_algo"},
        ),
        ("--num-layer-list 20,28", {"num_layer_list": (20, 28)}),
        ("--num-layers-per-virtual-pipeline-stage 6", {"layers_per_chunk": 6}),
        ("--cross-entropy-chunk-size 512", {}),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers 3",
            {"recompute": "full", "recomputed_layers": 3},
        ),
        (
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            {"recompute": "full", "recomputed_layers": None},
        ),
    ],
)
def test_what_the_planner_knows_it_is_told(flags: str, fields: dict) -> None:
    settings = pretraining_settings.parse(f"{COMMAND} {flags}".split())
    cut = as_cut(settings, Qwen2Config.named("14B"), 16, "npu")
    assert {name: getattr(cut, name) for name in fields} == fields
    assert cut.job.cross_entropy_chunk_size == settings.recompute.cross_entropy_chunk_size


def test_a_chunk_recomputes_its_own_layers() -> None:
    """Megatron's block counts in each chunk, the planner in the stage."""
    flags = "--recompute-granularity full --recompute-method block --recompute-num-layers 2"
    flags += " --num-layers-per-virtual-pipeline-stage 6"
    settings = pretraining_settings.parse(f"{COMMAND} {flags}".split())
    cut = as_cut(settings, Qwen2Config.named("14B"), 16, "npu")
    assert cut.recomputed(0) == 2 * cut.num_chunks == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--plan 9", "cannot be shared out"),
        ("--plan 0", "--plan 0 must be at least 1"),
        ("--plan 16 --plan-device 920", "--device 920 is not known"),
    ],
)
def test_what_cannot_be_planned_is_refused(flags: str, words: str, capsys) -> None:
    with pytest.raises(UserError, match=words):
        pretraining.pretrain(pretraining_settings.parse(f"{COMMAND} {flags}".split()))


def test_lora_and_dpo_are_planned(tmp_path, capsys) -> None:
    from qwen2_ascend.finetuning.settings import parse

    make_tiny_hugging_face_folder(tmp_path / "hf", tiny_config())
    command = (
        f"--load {tmp_path / 'hf'} --data-path chats.jsonl --seq-length 32 --train-iters 3 "
        "--lr 1e-3 --lora-r 4 --plan 2"
    )
    tuning.finetune(parse(command.split()))
    assert "LoRA rank 4" in capsys.readouterr().out
    tuning.finetune(parse(f"{command} --stage dpo".split()))
    assert "LoRA rank 4, pairs of sequences of 32" in capsys.readouterr().out


def test_nothing_is_trained_or_written(tmp_path) -> None:
    script = (
        "import sys; from qwen2_ascend.training import pretrain\n"
        f"status = pretrain.main('{COMMAND} --save {tmp_path / 'out'} --plan 16'.split())\n"
        "assert status == 0 and 'megatron' not in sys.modules, status"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
    assert not (tmp_path / "out").exists()
