"""plan --from-log: the rates of a machine out of a few measured steps, and what follows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import qwen2_ascend
from commands import run_python
from helpers import make_tiny_hugging_face_folder, tiny_config
from qwen2_ascend.config import Qwen2Config, YarnScaling
from qwen2_ascend.errors import UserError
from qwen2_ascend.planning.command import main
from qwen2_ascend.planning.devices import device_called, find_device
from qwen2_ascend.planning.job import Job, RunLayout
from qwen2_ascend.planning.log import (
    RUN_FILE,
    as_entry,
    as_run_layout,
    rates_of,
    read_log,
    with_start,
)
from qwen2_ascend.planning.roofline import step_time

DEVICE = find_device("910B3")
SLOW = replace(
    DEVICE.rates,
    products=0.6,
    memory=0.25,
    links=0.35,
    layer_seconds=6e-3,
    step_seconds=0.1,
    source="a machine of the test",
)
JOB = Job(config=Qwen2Config.named("7B"), seq_length=4096, global_batch_size=64)
LOGGED = [
    RunLayout(job=JOB, tp=2, dp=4, sequence_parallel=True, distributed_optimizer=True),
    RunLayout(job=JOB, tp=8, sequence_parallel=True, micro_batch_size=2),
    RunLayout(job=JOB, tp=2, pp=4, sequence_parallel=True),
    RunLayout(job=JOB, tp=4, dp=2, distributed_optimizer=True, recompute="full"),
]
HELD_OUT = [
    RunLayout(job=JOB, tp=4, pp=2, sequence_parallel=True),
    RunLayout(job=JOB, pp=4, dp=2, distributed_optimizer=True, recompute="full"),
    RunLayout(
        job=replace(JOB, seq_length=16384), tp=8, sequence_parallel=True, recompute="selective"
    ),
    RunLayout(job=replace(JOB, global_batch_size=256), tp=4, dp=2, sequence_parallel=True),
]


def seconds(cut: RunLayout) -> float:
    """Seconds of a step on the machine of the test."""
    return step_time(cut, DEVICE, SLOW, devices_per_node=8).total


def write_log(
    folder: Path, cut: RunLayout, noise: float = 0.0, first: int = 0, steps: int = 6
) -> Path:
    """A log as a run writes it: a slow first step, then steps that differ by `noise`."""
    folder.mkdir(exist_ok=True)
    file = folder / RUN_FILE
    starts = with_start(file, as_entry(cut, "Ascend910B3", 8, first), first)
    file.write_text(json.dumps({"starts": starts}), encoding="utf-8")
    metrics = folder / "metrics.jsonl"
    with metrics.open("a", encoding="utf-8") as lines:
        for at in range(first + 1, first + steps + 1):
            one = seconds(cut) * (20 if at == first + 1 else 1 + noise * (-1) ** at)
            lines.write(json.dumps({"iteration": at, "step_seconds": one}) + "\n")
    return metrics


def test_other_layouts_are_predicted_from_a_few_logged_ones(tmp_path: Path) -> None:
    """The machine is half as fast as published ones, and has logged four layouts.

    Within 15%; the published rates are off by more than 20%.
    """
    logs = [write_log(tmp_path / str(i), cut, 0.02) for i, cut in enumerate(LOGGED)]
    rates = rates_of([run for log in logs for run in read_log(log)])
    usual, fitted = [], []
    for cut in HELD_OUT:
        truth = seconds(cut)
        for found, known in ((usual, DEVICE.rates), (fitted, rates)):
            found.append(abs(step_time(cut, DEVICE, known, devices_per_node=8).total / truth - 1))
    assert max(fitted) < 0.15, fitted
    assert min(usual) > 0.2, "the test shows nothing: the usual rates would do as well"


def test_one_log_scales_all(tmp_path: Path) -> None:
    """Which is all that one layout can tell."""
    (run,) = read_log(write_log(tmp_path, LOGGED[0]))
    rates = rates_of([run])
    assert step_time(run.cut, DEVICE, rates, devices_per_node=8).total == pytest.approx(
        seconds(LOGGED[0]), rel=0.02
    )
    assert rates.products < DEVICE.rates.products and rates.links < DEVICE.rates.links


def test_a_resumed_run_may_have_another_layout(tmp_path: Path) -> None:
    """Steps belong to the start that they come after, each start's first step to none."""
    write_log(tmp_path, LOGGED[0], steps=6)
    metrics = write_log(tmp_path, LOGGED[1], first=6)
    first, second = read_log(metrics)
    assert (first.cut, second.cut) == (LOGGED[0], LOGGED[1])
    assert (first.num_steps, second.num_steps) == (5, 5)
    assert first.seconds == pytest.approx(seconds(LOGGED[0]))
    assert second.seconds == pytest.approx(seconds(LOGGED[1]))


def test_steps_of_a_start_that_the_planner_does_not_know_are_no_others(tmp_path: Path) -> None:
    """A run with --optimizer-cpu-offload goes on in the folder, twice as slow."""
    metrics = write_log(tmp_path, LOGGED[0], steps=6)
    starts = with_start(tmp_path / RUN_FILE, None, 6)
    (tmp_path / RUN_FILE).write_text(json.dumps({"starts": starts}), encoding="utf-8")
    with metrics.open("a", encoding="utf-8") as lines:
        for at in range(7, 20):
            lines.write(json.dumps({"iteration": at, "step_seconds": 1e3}) + "\n")
    (run,) = read_log(metrics)
    assert run.num_steps == 5 and run.seconds == pytest.approx(seconds(LOGGED[0]))
    starts = with_start(tmp_path / RUN_FILE, None, 0)
    assert [one["layout"] for one in starts] == [None], "a new run in the folder has no others'"


@pytest.mark.parametrize("starts", [[1], {"a": 1}, [{}], 5])
def test_a_run_json_that_somebody_broke_is_begun_anew(tmp_path: Path, starts: object) -> None:
    (tmp_path / RUN_FILE).write_text(json.dumps({"starts": starts}), encoding="utf-8")
    entry = as_entry(LOGGED[0], "cpu", 1, 3)
    assert with_start(tmp_path / RUN_FILE, entry, 3) == [entry]


@pytest.mark.parametrize(
    ("device", "iteration"), [(5, 2), ("cpu", "Infinity"), ("cpu", "NaN"), ("cpu", '"x"')]
)
def test_a_log_of_odd_values_is_a_fault(tmp_path: Path, device: object, iteration: object) -> None:
    metrics = write_log(tmp_path, LOGGED[0])
    starts = [as_entry(LOGGED[0], "cpu", 1, 0) | {"device": device}]
    (tmp_path / RUN_FILE).write_text(json.dumps({"starts": starts}), encoding="utf-8")
    with metrics.open("a", encoding="utf-8") as lines:
        lines.write(f'{{"iteration": {iteration}, "step_seconds": 1}}\n')
    with pytest.raises(UserError, match=r"--from-log .* cannot be read"):
        read_log(metrics)


def test_lines_of_several_steps_count_as_that_many(tmp_path: Path) -> None:
    write_log(tmp_path, LOGGED[0], steps=0)
    rows = [(10, 9.0), (20, 2.0), (30, 4.0), (35, 2.0)]
    lines = [json.dumps({"iteration": at, "step_seconds": s}) for at, s in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"iteration": 4']))
    (run,) = read_log(tmp_path / "metrics.jsonl")
    # the first line has the first step in it
    assert (run.seconds, run.num_steps) == (2.0, 25)


def test_a_layout_survives_the_file() -> None:
    yarn = YarnScaling(factor=4.0, original_max_position_embeddings=32768, attention_factor=1.0)
    config = replace(JOB.config, yarn=yarn)
    cut = RunLayout(
        job=replace(JOB, config=config, lora_rank=8), pp=2, num_layer_list=(12, 16), cp=2
    )
    entry = json.loads(json.dumps(as_entry(cut, "Ascend910B3", 8, 0)))
    assert as_run_layout(entry["layout"]) == replace(cut, job=replace(cut.job, config=JOB.config))


def test_the_command_plans_on_the_machine_of_the_log(tmp_path: Path, capsys) -> None:
    """What is not asked is as in the log; Python has the same answer."""
    logs = [write_log(tmp_path / str(i), cut) for i, cut in enumerate(LOGGED)]
    main(["--from-log", *map(str, logs), "--top", "2"])
    said = capsys.readouterr().out
    assert "on 8 x 910B3" in said and "sequences of 4096, 64 per step" in said
    assert "constants are fitted to 20 steps of 4 layouts of the log" in said
    assert said.count("s/step in 5 steps; fitted") == 4 and "is taken as" not in said
    found = qwen2_ascend.plan(from_log=tuple(logs), num_devices=16, global_batch_size=128)
    assert found.plans[0].cut.num_devices == 16
    assert found.plans[0].cut.job.global_batch_size == 128
    assert found.plans[0].cut.label() in qwen2_ascend_says(logs, capsys)


@pytest.mark.parametrize("logged", [True, False])
def test_flags_say_otherwise_than_the_log_either_way(logged: bool, tmp_path: Path) -> None:
    """A log of DPO with scores in memory is asked about SFT without, and the other way."""
    cut = replace(LOGGED[0], job=replace(JOB, pairs=logged, keeps_scores=logged))
    log = write_log(tmp_path, cut)
    stage, backend = ("sft", "auto") if logged else ("dpo", "unfused")
    as_logged = qwen2_ascend.plan(from_log=(log,)).job
    assert (as_logged.pairs, as_logged.keeps_scores) == (logged, logged)
    asked = qwen2_ascend.plan(from_log=(log,), stage=stage, attention_backend=backend).job
    assert (asked.pairs, asked.keeps_scores) == (not logged, not logged)


def qwen2_ascend_says(logs: list[Path], capsys) -> str:
    main(["--from-log", *map(str, logs), "--num-devices", "16", "--global-batch-size", "128"])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("--from-log none.jsonl", "there is no file none.jsonl"),
        ("--from-log {log} --device 910B3", "leave out --device"),
        ("--model 7B", "give --num-devices, or --from-log"),
        ("--from-log {log} {other}", "of different devices: 910B3, A100"),
        ("--from-log {unknown}", "does not know the device Ascend910B"),
    ],
)
def test_what_cannot_be_fitted_is_told(words: str, fault: str, tmp_path: Path) -> None:
    named = {"log": write_log(tmp_path / "log", LOGGED[0])}
    for name, device in {"other": "NVIDIA A100-SXM4-80GB", "unknown": "Ascend910B"}.items():
        named[name] = write_log(tmp_path / name, LOGGED[0])
        file = tmp_path / name / RUN_FILE
        file.write_text(file.read_text().replace("Ascend910B3", device))
    with pytest.raises(UserError, match=fault):
        main(words.format(**named).split())


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        (RUN_FILE, '{"starts": [', f"{RUN_FILE}: not valid JSON"),
        (RUN_FILE, '{"starts": 1}', f"{RUN_FILE} cannot be read: TypeError"),
        ("metrics.jsonl", "version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_files_that_are_none_of_a_log_are_refused(
    name: str, text: str, fault: str, tmp_path: Path
) -> None:
    metrics = write_log(tmp_path, LOGGED[0])
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"^[^(]*{fault}"):
        read_log(metrics)


def test_lines_that_are_no_rows_are_left_out(tmp_path: Path) -> None:
    """A kill cuts a line short; a disk that was full may leave any bytes."""
    metrics = write_log(tmp_path, LOGGED[0], steps=3)
    (before,) = read_log(metrics)
    for bad in (b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"[1]\n", b'{"iteration": 9'):
        metrics.write_bytes(bad + metrics.read_bytes())
        metrics.write_bytes(metrics.read_bytes() + bad)
    assert read_log(metrics) == [before]


def test_a_log_without_a_second_step_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no step after a first one"):
        read_log(write_log(tmp_path, LOGGED[0], steps=1))


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("Ascend910B3", "910B3"),
        ("Ascend910_9391", "910C"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", None),
        ("Ascend910B", None),
        ("cpu", "CPU"),
    ],
)
def test_devices_are_known_by_what_drivers_call_them(said: str, name: str | None) -> None:
    device = device_called(said)
    assert (device.name if device else None) == name
    assert device is None or find_device(said) is device


def test_a_run_writes_what_the_planner_reads(tmp_path: Path, capsys) -> None:
    """A CPU's log has no plan: run.json is the run's layout, and --from-log takes it."""
    make_tiny_hugging_face_folder(tmp_path / "hf", tiny_config())
    flags = (
        f"--config {tmp_path / 'hf'} --mock-data --device cpu --num-workers 0 --seq-length 32 "
        f"--global-batch-size 4 --micro-batch-size 2 --train-iters 3 --lr 1e-3 --recompute-norm "
        f"--report-dir {tmp_path / 'run'}"
    )
    script = "import sys; from qwen2_ascend.training import command\n"
    script += "sys.exit(command.main(sys.argv[1:]))"
    said = run_python("-c", script, *flags.split()).out
    assert "planned for" not in said and "iteration 3/3" in said
    metrics = tmp_path / "run" / "metrics.jsonl"
    (run,) = read_log(metrics)
    assert (run.device.name, run.num_steps, run.cut.num_devices) == ("CPU", 2, 1)
    assert (run.cut.micro_batch_size, run.cut.num_microbatches) == (2, 2)
    assert run.cut.recompute_norm and run.cut.job.config.hidden_size == tiny_config().hidden_size
    main(["--from-log", str(metrics), "--num-devices", "2", "--top", "1"])
    assert "on 2 x CPU" in capsys.readouterr().out
