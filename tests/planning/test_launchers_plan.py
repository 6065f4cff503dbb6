"""--plan: a launcher says what the planner says of its command, and trains nothing."""

from __future__ import annotations

import pytest

from commands import run_python
from helpers import make_tiny_hugging_face_folder, tiny_config
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning import command as tuning
from qwen2_ascend.finetuning.deepspeed import command as by_zero
from qwen2_ascend.finetuning.deepspeed import settings as zero_settings
from qwen2_ascend.finetuning.deepspeed.launch import finetune as finetune_by_zero
from qwen2_ascend.finetuning.launch import finetune
from qwen2_ascend.planning import report, search
from qwen2_ascend.planning.command import main as plan
from qwen2_ascend.planning.devices import find_device
from qwen2_ascend.planning.job import ALL_LAYERS, Job, RunLayout, Zero
from qwen2_ascend.planning.memory import HCCL_BYTES, communicators, fullest_stage
from qwen2_ascend.planning.parameters import num_parameters
from qwen2_ascend.planning.search import Machine, plan_of
from qwen2_ascend.planning.zero import zero_at_rest, zero_memory
from qwen2_ascend.training import command as pretraining
from qwen2_ascend.training import launch
from qwen2_ascend.training import settings as pretraining_settings
from qwen2_ascend.training.planned import as_run_layout, expected

COMMAND = (
    "--config 14B --mock-data --seq-length 4096 --train-iters 3 --lr 1e-5 --bf16 "
    "--tensor-model-parallel-size 4 --sequence-parallel --pipeline-model-parallel-size 2 "
    "--use-distributed-optimizer --global-batch-size 64 --micro-batch-size 2"
)


ZERO_COMMAND = (
    "--config 7B --data-path chats.jsonl --seq-length 4096 --train-iters 3 --lr 1e-5 "
    "--bf16 --global-batch-size 64 --micro-batch-size 2"
)


def planned(flags: str = ""):
    """The settings of COMMAND with further flags, and the planner's view of them."""
    settings = pretraining_settings.parse(f"{COMMAND} {flags}".split())
    return settings, as_run_layout(settings, Qwen2Config.named("14B"), 16, "npu")


def test_the_command_is_planned_on_so_many_devices(capsys) -> None:
    assert pretraining.main(f"{COMMAND} --plan 16 --plan-device 910B3".split()) == 0
    said = capsys.readouterr().out
    _, cut = planned()
    assert (cut.label(), cut.num_microbatches) == ("TP4 PP2 DP2", 16)
    gigabytes = fullest_stage(cut)[1].total / 1e9
    assert "fits: 1 of 1 valid layouts" in said and f"takes {gigabytes:.1f} GB" in said
    assert "16 x 910B3" in said


def test_a_log_is_told_what_the_plan_was() -> None:
    """Devices have the names that their drivers give; torch's memory is without HCCL's."""
    _, cut = planned()
    told = expected(cut, "Ascend910B3", 8)
    assert told is not None and told.device == "910B3"
    device = find_device("910B3")
    plan = plan_of(cut, Machine(device=device, num_devices=16, devices_per_node=8))
    assert told.seconds == plan.time.total
    assert told.memory == plan.memory.total - communicators(cut) * HCCL_BYTES
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
    settings, cut = planned(flags)
    assert {name: getattr(cut, name) for name in fields} == fields
    assert cut.job.cross_entropy_chunk_size == settings.recompute.cross_entropy_chunk_size


@pytest.mark.parametrize("number", [1, 2])
def test_uniform_by_several_layers_is_said_to_be_planned_by_one(number: int, capsys) -> None:
    uniform = (
        f"--recompute-granularity full --recompute-method uniform --recompute-num-layers {number}"
    )
    assert pretraining.main(f"{COMMAND} {uniform} --plan 16 --plan-device 910B3".split()) == 0
    by_launcher = capsys.readouterr().out
    plan(f"--model 0.5B --num-devices 2 {uniform} --device 910B3".split())
    for said in (by_launcher, capsys.readouterr().out):
        assert ("uniform is planned as with 1" in said) == (number > 1)


def test_a_chunk_recomputes_its_own_layers() -> None:
    """Megatron's block counts in each chunk, the planner in the stage."""
    flags = "--recompute-granularity full --recompute-method block --recompute-num-layers 2"
    flags += " --num-layers-per-virtual-pipeline-stage 6"
    _, cut = planned(flags)
    assert cut.recomputed(0) == 2 * cut.num_chunks == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--plan 9", "cannot be shared out"),
        ("--plan 0", "--plan 0 must be at least 1"),
        ("--plan 16 --plan-device 920", "--plan-device 920 is not known"),
    ],
)
def test_what_cannot_be_planned_is_refused(flags: str, words: str, capsys) -> None:
    with pytest.raises(UserError, match=words):
        launch.pretrain(pretraining_settings.parse(f"{COMMAND} {flags}".split()))


def test_lora_and_dpo_are_planned(tmp_path, capsys) -> None:
    from qwen2_ascend.finetuning.settings import parse

    make_tiny_hugging_face_folder(tmp_path / "hf", tiny_config())
    command = (
        f"--load {tmp_path / 'hf'} --data-path chats.jsonl --seq-length 32 --train-iters 3 "
        "--lr 1e-3 --lora-r 4 --plan 2"
    )
    finetune(parse(command.split()))
    assert "LoRA rank 4" in capsys.readouterr().out
    finetune(parse(f"{command} --stage dpo".split()))
    assert "LoRA rank 4, pairs of sequences of 32" in capsys.readouterr().out


def test_nothing_is_trained_or_written(tmp_path) -> None:
    script = (
        "import sys; from qwen2_ascend.training import command\n"
        f"status = command.main('{COMMAND} --save {tmp_path / 'out'} --plan 16'.split())\n"
        "assert status == 0 and 'megatron' not in sys.modules, status"
    )
    run_python("-c", script)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "zero"),
    [
        ("", Zero(stage=2)),
        ("--zero-stage 1", Zero(stage=1)),
        ("--zero-stage 3 --offload-optimizer", Zero(stage=3, offload_optimizer=True)),
        (
            "--zero-stage 3 --offload-param --offload-optimizer",
            Zero(stage=3, offload_optimizer=True, offload_param=True),
        ),
    ],
)
def test_zero_is_planned(flags: str, zero: Zero, capsys) -> None:
    """Its launcher plans it, and `plan` names the launcher and its flags for the same layout."""
    words = f"{ZERO_COMMAND} {flags}".split()
    assert by_zero.main([*words, "--plan", "8", "--plan-device", "910B3"]) == 0
    said = capsys.readouterr().out
    cut = as_run_layout(zero_settings.parse(words), Qwen2Config.named("7B"), 8, "npu")
    assert cut.zero == zero and f"ZeRO stage {zero.stage}" in said
    assert f"takes {zero_memory(cut).total / 1e9:.1f} GB" in said
    command = report.launch_command(
        "7B", cut, search.Machine(device=find_device("910B3"), num_devices=8, devices_per_node=8)
    )
    told = command.replace("\\\n", " ").split("finetune_qwen2_deepspeed.py")[1].split()
    assert as_run_layout(zero_settings.parse(told), Qwen2Config.named("7B"), 8, "npu") == cut


def test_zero_s_own_file_is_planned(tmp_path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(
        '{"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e7, "sub_group_size": 1e6,'
        ' "stage3_param_persistence_threshold": 10, "overlap_comm": true}}'
    )
    settings = zero_settings.parse([*ZERO_COMMAND.split(), "--deepspeed-config", str(file)])
    assert settings.planned_zero(8, "npu") == Zero(
        stage=3,
        reduce_bucket_size=50_000_000,
        sub_group_size=1_000_000,
        param_persistence_threshold=10,
        overlap_comm=True,
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lora-r 8", "does not know LoRA by DeepSpeed"),
        ("--attention-backend unfused", "does not know --attention-backend unfused by DeepSpeed"),
        ("--plan 7", "use a multiple of 14"),
    ],
)
def test_what_of_zero_cannot_be_planned_is_refused(flags: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        finetune_by_zero(zero_settings.parse(f"{ZERO_COMMAND} --plan 8 {flags}".split()))


@pytest.mark.parametrize("main", [tuning.main, by_zero.main])
def test_a_folder_that_could_not_be_written_at_the_end_is_refused(main, tmp_path, capsys) -> None:
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "notes.txt").write_text("mine")
    saved = f"--save {tmp_path / 'out'} --save-hf {tmp_path / 'tuned'}"
    assert main(f"{ZERO_COMMAND} {saved} --plan 8".split()) == 2
    assert f"--save-hf {tmp_path / 'tuned'} is there already" in capsys.readouterr().err


def test_more_stages_and_ranks_hold_less() -> None:
    """What lasts between steps is 16 N / d at stage 3, and 12 N / d of the optimizer at all."""
    job = Job(config=Qwen2Config.named("7B"), seq_length=4096, global_batch_size=64)
    at_rest = [
        [sum(zero_at_rest(RunLayout(job=job, dp=d, zero=Zero(stage=stage)))) for d in (2, 4, 8)]
        for stage in (1, 2, 3)
    ]
    assert at_rest[0] == at_rest[1]
    for row in at_rest:
        assert row[0] > row[1] > row[2]
    n = num_parameters(job.config)
    assert at_rest[0][2] == pytest.approx((2 + 12 / 8) * n, rel=1e-6)
    assert at_rest[2][2] == pytest.approx(16 / 8 * n, rel=0.01)  # small tensors are whole
    assert at_rest[2][2] > 16 / 8 * n
