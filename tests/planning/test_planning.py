"""The planner against the table of parameters, the launchers' own checks, and recorded traffic."""

from __future__ import annotations

import functools
import json
import re
import shlex
from dataclasses import fields, replace
from itertools import pairwise, product
from pathlib import Path

import pytest

from commands import run_python
from helpers import random_hugging_face_model, tiny_config
from npusim.traffic import GOLDEN, LAYOUTS, LENGTH, MICRO_BATCH, MICRO_BATCHES, minimum
from qwen2_ascend import markdown
from qwen2_ascend.checkpoint.rules import Shard, megatron_pieces
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning import settings as finetuning
from qwen2_ascend.planning import report, search
from qwen2_ascend.planning.command import PlanOptions, _choices, as_launchers_write, main
from qwen2_ascend.planning.devices import DEVICES, find_device
from qwen2_ascend.planning.flops import train_flops_per_token
from qwen2_ascend.planning.job import Job, RunLayout
from qwen2_ascend.planning.memory import fullest_stage, stage_memory
from qwen2_ascend.planning.parameters import num_parameters, parameters
from qwen2_ascend.planning.roofline import (
    bubble_fraction,
    stage_attention,
    stage_products,
    step_time,
)
from qwen2_ascend.planning.traffic import step_traffic
from qwen2_ascend.training import settings as pretraining
from qwen2_ascend.training.planned import as_run_layout

DOCUMENT = Path(__file__).parents[2] / "docs" / "planning.md"
EXAMPLES = Path(__file__).parents[2] / "examples" / "README.md"


def job(model: str = "7B", **changes) -> Job:
    usual = {"config": Qwen2Config.named(model), "seq_length": 4096, "global_batch_size": 256}
    return Job(**{**usual, **changes})


def machine(num_devices: int, device: str = "910B2") -> search.Machine:
    found = find_device(device)
    return search.Machine(
        device=found, num_devices=num_devices, devices_per_node=found.devices_per_node
    )


def result(model: str, num_devices: int, **changes) -> report.Result:
    asked, where = job(model, **changes), machine(num_devices)
    return report.Result(
        model, asked, where, search.find_plans(asked, where), search.fewest_devices(asked, where)
    )


def _some_of(found: list[search.Plan]) -> list[search.Plan]:
    """Four shapes, and the fastest of each way to recompute: to parse one takes a while."""
    kinds = {report.recompute_words(plan.cut): plan for plan in reversed(found)}
    shapes = report.best_of_each_shape(found)
    return [*shapes[:2], *shapes[-2:], *kinds.values()]


def launched(plan: search.Plan, model: str = "7B", module=pretraining):
    """The settings that the launcher makes of the flags for a plan; it takes them."""
    settings = module.parse(shlex.split(" ".join(report.launch_flags(model, plan.cut))))
    module.validate(settings, plan.cut.job.config, plan.cut.num_devices)
    return settings


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("cut", [(1, 1, None), (2, 2, None), (4, 1, None), (8, 2, 1), (2, 4, None)])
def test_every_rank_has_the_parameters_of_the_table(cut, tied):
    tp, pp, per_chunk = cut
    config = tiny_config(tie_word_embeddings=tied)
    asked = RunLayout(job=job(config=config), tp=tp, pp=pp, layers_per_chunk=per_chunk)
    pieces = megatron_pieces(config, asked.layout, config.vocab_size)
    for stage in range(pp):
        shards = [shard for shard in pieces if (shard.tp_rank, shard.pp_stage) == (0, stage)]
        assert all(isinstance(shard, Shard) for shard in shards) and shards
        expected = 0
        for shard in shards:
            for piece in pieces[shard].values():
                size = 1
                for length in piece.shape:
                    size *= length
                expected += size
        assert parameters(asked, stage).all == expected


# --- what is valid --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "num_devices", "asked", "changes"),
    [
        ("0.5B", 8, {}, {"dtype": "fp32"}),
        ("7B", 16, {}, {"cross_entropy_chunk_size": 2048}),
        ("14B", 8, {}, {}),
        ("72B", 256, {}, {}),
        ("7B", 16, {}, {"seq_length": 65536, "global_batch_size": 16}),
        ("7B", 16, {"context_parallel_algo": "ulysses_cp_algo", "context_parallel_size": 4}, {}),
        ("7B", 4, {"reuse_fp32_param": True, "swap_attention": True}, {}),
        ("7B", 2, {"o2_gradient": True, "o2_optimizer": True}, {}),
        ("7B", 8, {"num_layer_list": (6, 8, 8, 6), "recompute_norm": 3}, {}),
    ],
)
def test_a_launch_command_is_planned_as_it_was_found(model, num_devices, asked, changes):
    """The launcher takes it, and its --plan sees the very layout whose flags the search gives."""
    wanted = job(model, **changes)
    found = search.find_plans(wanted, machine(num_devices), search.Choices(**asked))
    for plan in _some_of(found):
        settings = launched(plan, model)
        assert as_run_layout(settings, wanted.config, num_devices, "npu") == plan.cut
        assert settings.layout() == plan.cut.layout
        assert settings.padded_vocab_size(wanted.config) == plan.cut.padded_vocab_size
        assert settings.data_parallel_size(num_devices) == plan.cut.dp


def test_layouts_are_found_that_only_some_recomputing_lets_in():
    """SwiGLU's and norms' outputs are recomputed, or a block's fewest layers; faster than all."""
    plans = search.find_plans(job("14B"), machine(8))
    words = [report.recompute_words(plan.cut) for plan in plans if plan.has_headroom]
    assert "swiglu+norm" in words and any(word.startswith("block ") for word in words)
    block = next(p for p in plans if report.recompute_words(p.cut).startswith("block "))
    assert block.has_headroom
    fewer = replace(block.cut, recomputed_layers=block.cut.recomputed_layers - block.cut.num_chunks)
    where = machine(8)
    assert not search.plan_of(fewer, where).has_headroom
    whole = replace(block.cut, recomputed_layers=None)
    assert search.plan_of(whole, where).time.total > block.time.total


def test_fused_products_are_proposed_with_sequence_parallelism():
    """A launcher refuses --use-ascend-mc2 without it; --use-ascend-coc takes both."""
    for flag, expected in (("mc2", {True}), ("coc", {True, False})):
        choices = _choices(PlanOptions(**{f"use_ascend_{flag}": "yes"}))
        found = [plan.cut for plan in search.find_plans(job("7B"), machine(16), choices)]
        assert {cut.sequence_parallel for cut in found if cut.tp > 1} == expected
        assert any(cut.tp == 1 for cut in found)


def test_long_sequences_are_shared():
    """Context parallelism is tried by itself where it leaves a rank enough tokens."""
    short = search.find_plans(job("7B"), machine(16))
    long = search.find_plans(job("7B", seq_length=65536, global_batch_size=16), machine(16))
    assert {plan.cut.cp for plan in short} == {1}
    assert {plan.cut.cp for plan in long} == {1, 2, 4, 8, 16}


def test_what_would_fit_in_16_bits_is_said(capsys):
    main(["--model", "7B", "--num-devices", "2", "--memory-gb", "75", "--top", "1"])
    said = capsys.readouterr().out
    assert "does not fit" in said
    assert "With --o2-gradient --o2-optimizer, which cost precision, it fits: " in said


def test_flags_are_written_as_the_launchers_take_them(capsys):
    """A flag has no value, one, or is denied; what the launchers call a flag is called so here."""
    from qwen2_ascend.training.optimizer_settings import PrecisionSettings
    from qwen2_ascend.training.recompute_settings import RecomputeSettings
    from qwen2_ascend.training.settings import ParallelSettings

    words = "--model 7B --num-devices 8 --sequence-parallel --bf16 --no-reuse-fp32-param"
    expected = "--model 7B --num-devices 8 --sequence-parallel yes --dtype bf16 "
    expected += "--reuse-fp32-param no"
    assert as_launchers_write(words.split()) == expected.split()
    assert as_launchers_write(["--sequence-parallel", "no"]) == ["--sequence-parallel", "no"]
    main([*words.split(), "--recompute-norm", "--top", "1"])
    assert "sequence parallel" in capsys.readouterr().out
    own = {field.name for field in fields(PlanOptions)}
    groups = (ParallelSettings, RecomputeSettings, PrecisionSettings)
    theirs = {field.name for group in groups for field in fields(group)}
    # what moves neither memory nor, as far as is known, time
    others = {"overlap_param_gather", "distributed_timeout_minutes", "on_nonfinite", "hysteresis"}
    scales = {name for name in theirs if "loss_scale" in name}
    assert theirs - own == others | scales | {"bf16", "fp16"}


def test_a_vocabulary_that_does_not_divide_is_padded(tmp_path):
    config = tiny_config(vocab_size=255)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_hugging_face()), encoding="utf-8")
    asked = job(config=Qwen2Config.from_pretrained(path), seq_length=64)
    plan = next(plan for plan in search.find_plans(asked, machine(4)) if plan.cut.tp == 4)
    settings = launched(plan, str(path))
    assert settings.padded_vocab_size(config) == plan.cut.padded_vocab_size == 512


def test_a_lora_command_is_one_that_the_launcher_takes():
    for plan in _some_of(search.find_plans(job(lora_rank=16), machine(8))):
        assert launched(plan, module=finetuning).lora_config().rank == 16


def test_a_command_for_several_nodes_is_for_all_devices():
    found = result("72B", 256)
    words = shlex.split(report.launch_command("72B", found.plans[0].cut, found.machine))
    nodes, per_node = (
        int(words[words.index(flag) + 1]) for flag in ("--nnodes", "--nproc-per-node")
    )
    assert nodes * per_node == 256 and "launch/pretrain_qwen2.py" in words


def test_every_layout_that_the_launcher_takes_is_found():
    """All of a small model's on 8 devices, tried one by one."""
    config = tiny_config()
    asked = job(config=config, seq_length=64, global_batch_size=16, backend="cpu", dtype="fp32")
    found = {
        plan.cut
        for plan in search.find_plans(asked, machine(8, "CPU"))
        if not (plan.cut.sequence_parallel or plan.cut.distributed_optimizer)
        and plan.cut.recompute == "none"
    }
    assert found == {
        cut
        for tp, pp in product(range(1, 9), repeat=2)
        if 8 % (tp * pp) == 0
        for chunk, size in product((None, 1, 2, 3), search.MICRO_BATCH_SIZES)
        if _is_taken(
            cut := RunLayout(
                job=asked,
                tp=tp,
                pp=pp,
                dp=8 // (tp * pp),
                layers_per_chunk=chunk,
                micro_batch_size=size,
            )
        )
    }


def _is_taken(cut: RunLayout) -> bool:
    """The launcher's checks decide; a chunk that is a whole stage is no interleaved pipeline."""
    settings = _some_settings(cut.job.seq_length, cut.job.global_batch_size)
    parallel = replace(
        settings.parallel,
        tensor_model_parallel_size=cut.tp,
        pipeline_model_parallel_size=cut.pp,
        num_layers_per_virtual_pipeline_stage=cut.layers_per_chunk,
    )
    batch = replace(settings.batch, micro_batch_size=cut.micro_batch_size)
    try:
        pretraining.validate(
            replace(settings, parallel=parallel, batch=batch), cut.job.config, cut.num_devices
        )
    except UserError:
        return False
    return cut.layers_per_chunk is None or cut.num_chunks > 1


@functools.cache
def _some_settings(seq_length: int, global_batch_size: int):
    flags = f"--seq-length {seq_length} --global-batch-size {global_batch_size}"
    return pretraining.parse(f"--config 0.5B --mock-data --train-iters 1 --lr 1e-5 {flags}".split())


# --- memory ---------------------------------------------------------------------------------------


def test_72b_does_not_fit_on_16_cards_and_it_is_said_what_would():
    found = result("72B", 16)
    # 2 + 4 + 12 bytes of each of 72.7e9 weights are above 16 times 64 GiB
    assert not any(plan.fits for plan in found.plans)
    assert num_parameters(found.job.config) * 18 > 16 * found.machine.device.memory
    assert found.fewest.cut.num_devices == 32
    assert "does not fit" in report.answer(found)
    assert "32 devices" in report.answer(found)
    text = report.text(found, top=3, commands=1)
    assert "torchrun" not in text


def test_the_fewest_devices_are_the_fewest():
    for model in ("0.5B", "7B", "14B"):
        asked = job(model)
        fewest = search.fewest_devices(asked, machine(1))
        number = fewest.cut.num_devices
        assert fewest.fits and fewest.memory.total <= machine(1).usable_memory
        if number > 1:
            assert not any(plan.fits for plan in search.find_plans(asked, machine(number // 2)))


def test_the_fullest_stage_is_the_first_or_the_last():
    for plan in search.find_plans(job("14B"), machine(64))[::40]:
        totals = [stage_memory(plan.cut, stage).total for stage in range(plan.cut.pp)]
        assert max(totals) == fullest_stage(plan.cut)[1].total == plan.memory.total


def test_memory_is_what_the_parts_say():
    """Weights and optimizer by their definition; recomputing and chunking only save."""
    cut = RunLayout(job=job(), tp=2, dp=8, distributed_optimizer=True)
    memory = stage_memory(cut, 0)
    own = parameters(cut, 0)
    assert memory.weights == 2 * own.buffers[0] and memory.gradients == 4 * own.buffers[0]
    assert memory.optimizer == 12 * own.buffers[0] // 8
    peaks = [stage_memory(replace(cut, recompute=kind), 0).total for kind in search.RECOMPUTE]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3
    chunked = replace(cut, job=job(cross_entropy_chunk_size=1024), recompute="full")
    assert stage_memory(chunked, 0).total < peaks[-1]
    tuned = replace(cut, job=job(lora_rank=16))
    assert stage_memory(tuned, 0).at_rest < 1.1 * 2 * own.all


# --- traffic and time -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS, ids=lambda name: name.replace(" ", "-"))
def test_traffic_is_what_the_simulated_cards_recorded(name):
    """Above it are the few numbers that ranks tell each other; see docs/benchmarks.md.

    `minimum` is no such list of calls but a bound that holds for any.
    """
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]["bytes"]
    layout = LAYOUTS[name]
    asked = Job(
        config=tiny_config(),
        seq_length=LENGTH,
        global_batch_size=MICRO_BATCHES * MICRO_BATCH * layout.dp,
    )
    cut = RunLayout(
        job=asked,
        tp=layout.tp,
        pp=layout.pp,
        dp=layout.dp,
        sequence_parallel=layout.sequence_parallel,
        distributed_optimizer="distributed-optimizer" in layout.flags,
        micro_batch_size=MICRO_BATCH,
    )
    sent = sum(step_traffic(cut).values())
    assert sent >= minimum(layout)
    assert 0 <= recorded - sent <= 512 * layout.cards * (layout.cards - 1) + 100


def test_flops_are_those_that_torch_counts() -> None:
    """torch counts attention as if it were not causal: twice the average, but for the diagonal."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    config, b, s = tiny_config(), 3, 32
    model = random_hugging_face_model(config)
    model.set_attn_implementation("eager")  # the counter does not see into the fused one
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(b, s, dtype=torch.int64), use_cache=False)
    heads = config.num_attention_heads * config.kv_channels
    not_causal = config.num_layers * b * 4 * heads * s * s
    causal = not_causal * (s + 1) / (2 * s)
    matrices = counter.get_total_flops() - not_causal
    found = b * s * train_flops_per_token(config, s, config.vocab_size)
    assert found == pytest.approx(3 * (matrices + causal), rel=1e-12)


def test_arithmetic_is_that_of_the_training_log():
    """The ranks' sum is; recomputing layers costs a third more."""
    asked = job("14B")
    cut = RunLayout(job=asked, tp=4, pp=4, dp=2, micro_batch_size=2)
    per_token = train_flops_per_token(asked.config, asked.seq_length, cut.padded_vocab_size)
    expected = asked.tokens_per_step * per_token
    passes = cut.num_microbatches * cut.dp * cut.tp

    def flops(cut: RunLayout, stage: int) -> float:
        return stage_products(cut, stage) + stage_attention(cut, stage)

    found = passes * sum(flops(cut, stage) for stage in range(cut.pp))
    assert found == pytest.approx(expected, rel=1e-12)
    middle = flops(replace(cut, recompute="full"), 1) / flops(cut, 1)
    assert middle == pytest.approx(4 / 3)


def test_more_micro_batches_and_chunks_leave_a_smaller_bubble():
    cut = RunLayout(job=job("14B"), pp=4, dp=4)
    assert bubble_fraction(cut) == pytest.approx(3 / (64 + 3))
    assert bubble_fraction(replace(cut, layers_per_chunk=3)) == pytest.approx(0.75 / (64 + 0.75))
    assert bubble_fraction(replace(cut, pp=1)) == 0


def test_a_mesh_gives_few_cards_few_links():
    """A group of n cards has n - 1 of 7 links; a switch gives any group all."""
    mesh, switch = find_device("910B2"), find_device("910C")
    found = [mesh.link(n, n, 8) / 1e9 for n in (2, 4, 8)]
    assert found == pytest.approx([28, 84, 196])
    assert switch.link(2, 2, 16) == switch.link(16, 16, 16) == switch.node_bandwidth
    assert mesh.link(16, 16, 8) == mesh.network_bandwidth


def test_more_tensor_parallelism_never_means_more_on_a_card():
    for distributed in (False, True):
        sizes = [
            stage_memory(
                RunLayout(job=job("72B"), tp=tp, distributed_optimizer=distributed), 0
            ).at_rest
            for tp in (1, 2, 4, 8)
        ]
        assert sizes == sorted(sizes, reverse=True)


def test_a_pipeline_waits_for_the_other_stages_once():
    """However many micro-batches there are; with two chunks of a stage for half as long."""
    device = find_device("910B2")

    def bubble(batch: int, chunk: int | None = None) -> float:
        cut = RunLayout(job=job("14B", global_batch_size=batch), pp=8, layers_per_chunk=chunk)
        return step_time(cut, device, device.rates, devices_per_node=8).bubble

    assert bubble(8) == pytest.approx(bubble(512))
    assert bubble(8, 3) == pytest.approx(bubble(8) / 2, rel=0.03)


def test_a_layout_without_headroom_comes_after_those_that_have_it():
    found = result("14B", 8)
    assert found.plans[0].has_headroom
    tight = [plan for plan in found.plans if plan.fits and not plan.has_headroom]
    roomy = [plan for plan in found.plans if plan.has_headroom]
    assert tight and found.plans.index(tight[0]) == len(roomy)
    assert all(p.memory.total <= found.machine.comfortable_memory for p in roomy)


def test_python_has_the_commands_answer(capsys):
    import qwen2_ascend

    found = qwen2_ascend.plan("7B", 8, seq_length=8192)
    assert found.plans[0].cut.job.seq_length == 8192
    main(["--model", "7B", "--num-devices", "8", "--seq-length", "8192", "--top", "1"])
    assert found.plans[0].cut.label() in capsys.readouterr().out


def test_python_is_told_of_its_mistakes_too():
    import qwen2_ascend

    with pytest.raises(UserError, match="--num-devices '8' is not a whole number"):
        qwen2_ascend.plan("7B", "8")  # type: ignore[arg-type]


def test_the_bin_that_a_910b_is_taken_for_is_said(capsys):
    main(["--model", "0.5B", "--num-devices", "1", "--top", "1"])
    said = capsys.readouterr().out
    assert "--device 910B is taken as 910B2 (64 GiB" in said
    for name, gib in {"910B1": 64, "910B3": 64, "910B4": 32}.items():
        assert f"{name} ({gib} GiB" in said
    main(["--model", "0.5B", "--num-devices", "1", "--top", "1", "--device", "910B3"])
    assert "is taken as" not in capsys.readouterr().out


# --- the command ----------------------------------------------------------------------------------


def test_help_waits_for_no_numpy():
    """Which took half of the second that a command's start had taken; --from-log alone needs it."""
    script = "import sys, qwen2_ascend.planning.command; sys.exit('numpy' in sys.modules)"
    run_python("-c", script)


@pytest.mark.parametrize(
    "flags",
    [
        "--optimizer-cpu-offload",
        "--optimizer-cpu-offload --optimizer-offload-fraction 0.25",
        "--use-ascend-mc2",
        "--use-ascend-coc --coc-parallel-num 4",
        "--context-parallel-size 2 --context-parallel-algo kvallgather_cp_algo",
        "--overlap-grad-reduce",
    ],
)
def test_the_command_asks_for_what_was_planned(flags, capsys):
    """The launch command has the flags, and the launcher's settings take them for the same cut."""
    given = f"{flags} --tensor-model-parallel-size 2 --device 910B2"
    main(["--model", "1.5B", "--num-devices", "8", "--top", "1", *given.split()])
    said = capsys.readouterr().out
    command = said[said.index("torchrun") :].replace("\\\n", " ")
    words = command[command.index("launch/") :].split()[1:]
    import qwen2_ascend

    found = qwen2_ascend.plan("1.5B", 8, **_keywords(given)).plans[0].cut
    settings = pretraining.parse(words)
    assert as_run_layout(settings, found.job.config, 8, "npu") == found
    assert all(word in words for word in flags.split())


def _keywords(flags: str) -> dict:
    """Keywords of `qwen2_ascend.plan`."""
    words, keywords = flags.split(), {}
    for word, after in pairwise([*words, "--"]):
        if word.startswith("--"):
            value = "yes" if after.startswith("--") else after
            numbers = {"--optimizer-offload-fraction": float, "--coc-parallel-num": int}
            kind = numbers.get(word, int if word.endswith("-size") else str)
            keywords[word[2:].replace("-", "_")] = kind(value)
    return keywords


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ("--use-ascend-mc2 --use-ascend-coc", "give one of them"),
        ("--coc-parallel-num 4", "needs --use-ascend-coc"),
        ("--use-ascend-coc --coc-parallel-num 3", "is not 1, 2, 4 or 8"),
        ("--optimizer-offload-fraction 0.5", "needs --optimizer-cpu-offload"),
        ("--optimizer-cpu-offload --optimizer-offload-fraction 2", "above 0 and at most 1"),
        ("--optimizer-cpu-offload --optimizer-offload-fraction 0", "above 0 and at most 1"),
        ("--optimizer-cpu-offload --dtype fp32", "needs --bf16"),
        ("--optimizer-cpu-offload --o2-optimizer", "give one of them"),
        ("--recompute-num-layers 2", "--recompute-num-layers needs --recompute-method"),
        ("--recompute-granularity full --recompute-norm", "^--recompute-norm: .* say .* block"),
        (
            "--recompute-granularity full --recompute-method uniform "
            "--recompute-activation-function",
            "^--recompute-activation-function: .* uniform computes all layers again, whole",
        ),
        ("--recompute-granularity full --swap-attention", "^--swap-attention: .* say .* block"),
        ("--zero-stage 2 --overlap-grad-reduce", "--overlap-grad-reduce is not planned with"),
    ],
)
def test_flags_that_exclude_each_other_are_refused(flags, fault):
    with pytest.raises(UserError, match=fault):
        main(["--model", "0.5B", "--num-devices", "2", *flags.split()])


def test_an_offloaded_element_takes_12_bytes_of_the_device():
    """AdamW's fp32 weight and two moments; on a CPU they are in the host's memory anyway."""
    plain = RunLayout(job=job("0.5B"), dp=2)
    plain = replace(plain, distributed_optimizer=True)
    half = replace(plain, optimizer_offload_fraction=0.5)
    updated = sum(parameters(plain, 0).buffers) // 2
    saved = stage_memory(plain, 0).at_rest - stage_memory(half, 0).at_rest
    assert saved == pytest.approx(12 * updated / 2, abs=1)
    on_cpu = [replace(cut, job=replace(cut.job, backend="cpu")) for cut in (plain, half)]
    assert stage_memory(on_cpu[0], 0) == stage_memory(on_cpu[1], 0)


def test_the_command_answers_in_words_json_and_a_picture(tmp_path, capsys):
    path, picture = tmp_path / "plans.json", tmp_path / "memory.png"
    files = f"--json {path} --picture {picture}"
    main(f"--model 7B --num-devices 16 {files} --top 4 --commands 2".split())
    said = capsys.readouterr().out
    assert "7B (7.62e9 parameters, bf16, all weights" in said and "fits: " in said
    assert "predicted, not measured" in said and said.count("torchrun") == 2
    found = json.loads(path.read_text(encoding="utf-8"))
    roomy = [plan for plan in found["layouts"] if plan["has_headroom"]]
    times = [plan["predicted_seconds"]["total"] for plan in roomy]
    assert found["fits"] and times and times == sorted(times)
    assert all(plan["memory"]["total"] > 0 for plan in found["layouts"])
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_a_layout_can_be_asked_for(capsys):
    words = (
        "--model 72B --num-devices 128 --tensor-model-parallel-size 8 --recompute-granularity full "
        "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 5 "
        "--sequence-parallel yes --use-distributed-optimizer yes --micro-batch-size 1"
    )
    main(words.split())
    said = capsys.readouterr().out
    assert "fits: 1 of 1 valid layouts" in said and "TP8 PP4 VPP4 DP4" in said


def test_the_examples_memory_is_the_planners(tmp_path, capsys):
    text = EXAMPLES.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith("qwen2-ascend plan ")]
    names = ("full_7b", "lora_7b", "full_72b")
    for name, command in zip(names, commands, strict=True):
        path = tmp_path / f"{name}.json"
        main([*shlex.split(command)[2:], "--json", str(path)])
        memory = json.loads(path.read_text(encoding="utf-8"))["layouts"][0]["memory"]
        parts = [memory[part] for part in ("weights", "gradients", "optimizer")]
        parts += [memory["activations"] + memory["temporary"] + memory["logits"]]
        cells = [f"{size / 1e9:.1f}" for size in (*parts, memory["buffers"], memory["total"])]
        (row,) = [row for row in text.splitlines() if row.startswith(f"| {name} |")]
        assert row.endswith(f"| {' | '.join(cells)} |"), (row, cells)
    assert "fits: 1 of 1" in capsys.readouterr().out


def test_nothing_heavy_is_imported():
    script = (
        "import sys; from qwen2_ascend.planning.command import main\n"
        "main('--model 72B --num-devices 4096'.split())\n"
        "assert not {'torch', 'megatron', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    run_python("-c", script)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("--model 7B --num-devices 8 --device B300", "--device B300 is not known"),
        ("--model 8B --num-devices 8", "model '8B' is not known"),
        ("--model 7B --num-devices 0", "--num-devices 0 must be at least 1"),
        ("--model 7B --num-devices 8 --seq-length 262144", "max_position_embeddings=131072"),
        ("--model 7B --num-devices 9 --global-batch-size 16", "cannot share --global-batch-size"),
        ("--model 7B --num-devices 8 --tensor-model-parallel-size 3", "tensor parallel sizes are"),
        ("--model 7B --num-devices 8 --efficiency 1.5", "--efficiency 1.5 must be above 0"),
        ("--model 7B --num-devices 8 --commands -1", "--commands -1 must not be below zero"),
        (
            "--model 7B --num-devices 8 --json not/there.json",
            "there is no folder .*/not; make",
        ),
        ("--model 7B --num-devices 8 --picture .", r"--picture \.: is a folder"),
    ],
)
def test_mistakes_are_told(words, fault):
    with pytest.raises(UserError, match=fault):
        main(words.split())


def test_what_is_assumed_of_a_device_is_told(capsys):
    words = "--model 0.5B --num-devices 4 --device CPU --top 1"
    main(words.split())
    assert "Assumed, for want of figures: memory, peak flops, memory bandwidth, node" in (
        capsys.readouterr().out
    )
    own = "--memory-gb 16 --peak-tflops 1 --memory-bandwidth-gb 80 --node-bandwidth-gb 30"
    own += " --network-bandwidth-gb 25"
    main(f"{words} {own}".split())
    assert "Assumed" not in capsys.readouterr().out


def test_scores_in_memory_take_what_they_take(capsys):
    """The launcher is told, too."""
    words = "--model 7B --num-devices 8 --seq-length 16384 --recompute-granularity none"
    main(f"{words} --attention-backend unfused".split())
    assert "does not fit" in capsys.readouterr().out
    cut = RunLayout(job=job(keeps_scores=True), tp=4)
    more = stage_memory(cut, 0).activations - stage_memory(replace(cut, job=job()), 0).activations
    scores = 28 * 4096**2 * (28 // 4)
    assert 6 * scores < more < 6.5 * scores
    assert "--attention-backend unfused" in report.launch_flags("7B", cut)


def test_figures_of_devices_name_their_source():
    assert {"910B1", "910B2", "910B3", "910B4", "910C", "A100", "H100", "CPU"} <= DEVICES.keys()
    assert all(device.source for device in DEVICES.values())
    assert find_device("Ascend910B").memory == 64 * 2**30
    assert _table() in DOCUMENT.read_text(encoding="utf-8")


def _table() -> str:
    """docs/planning.md's."""
    rows = []
    heads = ("device", "memory, GB", "peak, TFLOP/s", "memory, GB/s", "in a node, GB/s")
    for device in DEVICES.values():
        bandwidths = (device.memory_bandwidth, device.node_bandwidth, device.network_bandwidth)
        figures = [device.memory / 1e9, device.peak_flops / 1e12, *(b / 1e9 for b in bandwidths)]
        names = ("memory", "peak_flops", "memory_bandwidth", "node_bandwidth", "network_bandwidth")
        marks = ["*" * (name in device.assumed) for name in names]
        pairs = zip(figures, marks, strict=True)
        cells = (f"{figure:.4g}{mark}" for figure, mark in pairs)
        rows.append((device.name, *cells, str(device.devices_per_node)))
    return markdown.table((*heads, "between nodes, GB/s", "per node"), rows)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("--memory-gb inf", "--memory-gb inf must be above zero, and a figure"),
        ("--memory-gb 1e300", "--memory-gb 1e+300 must be above zero, and a figure"),
        ("--peak-tflops inf", "--peak-tflops inf must be above zero, and a figure"),
        (
            "--recompute-norm --recompute-norm-num-layers -2",
            "-num-layers -2 must not be below zero",
        ),
    ],
)
def test_figures_that_no_device_has_are_faults(words: str, fault: str) -> None:
    with pytest.raises(UserError, match=re.escape(fault)):
        main(["--model", "0.5B", "--num-devices", "4", *words.split()])
