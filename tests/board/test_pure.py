"""What the board's page shows, computed without it: names, noise, layouts, commands, reports."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from board.serving import write_run
from qwen2_ascend.board import noise, plans, precision, runs
from qwen2_ascend.board.access import Access, is_loopback
from qwen2_ascend.board.command import BoardOptions, address, wanted_token
from qwen2_ascend.board.jail import Jail
from qwen2_ascend.board.job import order
from qwen2_ascend.board.listing import list_folders
from qwen2_ascend.board.metrics import Point
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning import settings as finetuning
from qwen2_ascend.planning import report
from qwen2_ascend.training import settings as pretraining

# --- names ----------------------------------------------------------------------------------------


def test_a_name_leads_to_its_path_and_back(tmp_path: Path) -> None:
    for folder in ("a/out/run", "b/out"):
        (tmp_path / folder).mkdir(parents=True)
    jail = Jail([tmp_path / "a" / "out", tmp_path / "b" / "out"])
    assert list(jail.roots) == ["out", "out-2"]
    run = tmp_path / "a" / "out" / "run"
    assert jail.name(run) == "out/run" and jail.path("out/run") == run
    assert jail.path("run") == run and jail.path(str(run)) == run
    assert jail.path("out-2") == tmp_path / "b" / "out"
    assert jail.name(tmp_path / "b" / "out") == "out-2"


def test_links_inside_are_followed_and_links_out_are_not(tmp_path: Path) -> None:
    (tmp_path / "in" / "real").mkdir(parents=True)
    (tmp_path / "in" / "inner").symlink_to(tmp_path / "in" / "real")
    (tmp_path / "in" / "outer").symlink_to(tmp_path)
    (tmp_path / "inside-by-name-only").mkdir()
    jail = Jail([tmp_path / "in"])
    assert jail.path("inner/new") == tmp_path / "in" / "real" / "new"
    for name in ("outer", "outer/x", "..", "../inside-by-name-only", "/", "a\0b", ""):
        with pytest.raises(UserError):
            jail.path(name)


def test_what_is_no_folder_is_no_root(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folders in ([tmp_path / "file"], [tmp_path / "none"], [tmp_path, tmp_path]):
        with pytest.raises(UserError):
            Jail(folders)


def test_a_listing_finds_what_forms_offer_and_stays_out_of_checkpoints(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 1)
    write_run(tmp_path / "run" / "iter_0000010", 1)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("10")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / "model" / name).touch()
    (tmp_path / "chats.jsonl").touch()
    (tmp_path / "chats.json").symlink_to("/etc/hostname")
    listing = list_folders(Jail([tmp_path]))
    assert listing.runs == [tmp_path / "run"]
    assert listing.models == [tmp_path / "model", tmp_path / "run"]
    assert listing.data == [tmp_path / "chats.jsonl"]


# --- access ---------------------------------------------------------------------------------------


def test_other_addresses_need_a_token_and_loopback_gets_one_when_asked(monkeypatch) -> None:
    monkeypatch.delenv("QWEN2_ASCEND_BOARD_TOKEN", raising=False)
    assert wanted_token(BoardOptions()) is None
    assert wanted_token(BoardOptions(host="::1")) is None
    for options in (
        BoardOptions(host="0.0.0.0"),
        BoardOptions(host="node7"),
        BoardOptions(token=True),
    ):
        token = wanted_token(options)
        assert token is not None and len(token) >= 32 and token != wanted_token(options)
    monkeypatch.setenv("QWEN2_ASCEND_BOARD_TOKEN", "0123456789abcdef")
    assert wanted_token(BoardOptions()) == "0123456789abcdef"
    monkeypatch.setenv("QWEN2_ASCEND_BOARD_TOKEN", "short")
    with pytest.raises(UserError, match="at least 16"):
        wanted_token(BoardOptions(host="0.0.0.0"))
    assert address("127.0.0.1", 7860, None) == "http://127.0.0.1:7860/"
    assert address("fe80::1", 1, "t").startswith("http://[fe80::1]:1/?token=t")


def test_loopback_is_this_machine_alone() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost", "[::1]")))
    assert not any(
        map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "node7", "localhost.evil.example", ""))
    )


def test_names_of_other_sites_are_no_names_of_this_machine() -> None:
    access = Access("127.0.0.1", None)
    for host in ("localhost", "127.0.0.1:7860", "[::1]:7860", "LOCALHOST:1"):
        assert access.refusal("GET", {"host": host}, None) is None
    for host in ("evil.example", "127.0.0.1.evil.example", "", "localhost.evil.example:7860"):
        assert access.refusal("GET", {"host": host}, None) is not None


# --- noise ----------------------------------------------------------------------------------------


def curve(*values: float, step: int = 1) -> list[Point]:
    return [Point(step * i, value, value, value) for i, value in enumerate(values, 1)]


def test_the_band_is_three_deviations_of_a_run_from_the_pairs_mean() -> None:
    band = noise.noise_band(curve(*[1.0] * 100), curve(*[1.2] * 100))
    assert band is not None
    # half the distance is 0.1; two draws that differ by d deviate by d / sqrt(2)
    assert band.middle == pytest.approx([1.1] * 100)
    assert band.width == pytest.approx([3 * 0.2 / 2**0.5] * 100)
    inside = noise.outside(band, curve(*[1.5] * 100))
    assert inside == noise.Outside(share=0.0, since=None)
    late = noise.outside(band, curve(*[1.1] * 60, *[1.6] * 40))
    assert late is not None and late.share == 0.4 and late.since == 61
    back = noise.outside(band, curve(*[9.0] * 60, *[1.1] * 40))
    assert back is not None and back.share == 0.6 and back.since is None


@pytest.mark.parametrize("number", [2, 3, 4])
def test_the_band_of_a_few_iterations_has_as_many(number: int) -> None:
    first, second = ([Point(i, x + i, 0.0, 9.0) for i in range(number)] for x in (0.0, 0.1))
    band = noise.noise_band(first, second)
    assert band is not None
    assert len(band.iterations) == len(band.middle) == len(band.width) == number
    assert noise.outside(band, first) is not None


def test_runs_logged_at_other_intervals_are_compared_where_both_are() -> None:
    band = noise.noise_band(curve(*range(100)), curve(*range(9, 100, 10), step=10))
    assert band is not None and band.iterations[0] == 10 and band.iterations[-1] == 100
    assert max(band.width) < 1e-9
    assert noise.noise_band(curve(1, 2), []) is None
    assert noise.noise_band(curve(1, 2, 3), curve(1, 2, 3, step=100)) is None
    assert noise.outside(band, []) is None


# --- runs -----------------------------------------------------------------------------------------


def test_a_runs_checkpoints_and_log(tmp_path: Path) -> None:
    run = write_run(tmp_path, 3)
    for number in (10, 20):
        folder = run / f"iter_{number:07d}"
        folder.mkdir()
        (folder / "x").write_bytes(bytes(1000))
    (run / "latest_checkpointed_iteration.txt").write_text("20\n")
    (run / ".iter_0000030.part").mkdir()
    found = runs.checkpoints(run)
    assert [(x.name, x.size, x.is_last) for x in found] == [
        ("iter_0000020", 1000, True),
        ("iter_0000010", 1000, False),
    ]
    assert runs.find_log(run) is None
    (run / "run.log").write_bytes(
        b"one\n 10%|#\r 90%|###\r\n\x1b[31mred\xff\n" + b"y" * 200_000 + b"\nlast"
    )
    log = runs.find_log(run)
    assert log is not None
    assert runs.log_tail(log)[-1] == "last"
    (run / "slurm-1.out").write_bytes(b"one\n 10%|#\r 90%|###\n\x1b[31mred\n")
    os.utime(run / "slurm-1.out", (2e9, 2e9))
    log = runs.find_log(run)
    assert log is not None and runs.log_tail(log) == ["one", " 90%|###", "\\x1b[31mred"]


def test_a_run_that_reached_its_end_is_not_live(tmp_path: Path) -> None:
    assert runs.run_state(write_run(tmp_path / "a", 3, train_iters=3)).is_live is False
    state = runs.run_state(write_run(tmp_path / "b", 3, train_iters=4))
    assert state.is_live and (state.iteration, state.train_iters) == (3, 4)
    old = write_run(tmp_path / "c", 3)
    os.utime(old / "metrics.jsonl", (1e9, 1e9))
    assert not runs.run_state(old).is_live


# --- plan -----------------------------------------------------------------------------------------

FORM = {
    "model": "7B",
    "device": "910B",
    "num_devices": "16",
    "seq_length": 4096,
    "global_batch_size": 256,
    "dtype": "bf16",
    "lora_r": 16,
}


def spoken(named: Any) -> Any:
    """What an English page makes of texts by their names."""
    if isinstance(named, list):
        return [spoken(one) for one in named]
    if not isinstance(named, dict):
        return named
    values = {name: spoken(one) for name, one in named["values"].items()}
    joined = {
        name: ", ".join(one) if isinstance(one, list) else one for name, one in values.items()
    }
    return report.TEXTS[named["key"]].format(**joined)


@pytest.mark.parametrize("method", plans.METHODS)
def test_every_command_is_one_that_its_launcher_takes(tmp_path: Path, method: str) -> None:
    asked = plans.question({**FORM, "method": method}, Jail([tmp_path]))
    table = plans.answer(asked)
    assert len(table["rows"]) > 5
    assert spoken(table["answer"]) == report.answer(plans._planned(asked)).split("\n")
    for number, row in enumerate(table["rows"][:4]):
        assert sum(row["parts"].values()) == row["memory"]["total"]
        command = plans.command(asked, number, "node")
        words = shlex.split(command.replace("\\\n", ""))
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        module = pretraining if method == "pretrain" else finetuning
        assert words[at] == f"launch/{'pretrain' if method == 'pretrain' else 'finetune'}_qwen2.py"
        settings = module.parse(words[at + 1 :])
        parallel = settings.parallel
        assert parallel.tensor_model_parallel_size == row["tensor_model_parallel_size"]
        assert parallel.pipeline_model_parallel_size == row["pipeline_model_parallel_size"]
        assert settings.batch.micro_batch_size == row["micro_batch_size"]
        assert words[:7] == [
            "torchrun", "--nnodes", "2", "--node-rank", "$NODE_RANK", "--nproc-per-node", "8",
        ]  # fmt: skip


RECORDER = '#!/bin/sh\necho "$PET_NODE_RANK" "$@" >> "$RECORD"\n'
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 9
shift
for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit 8; done
"""


def test_the_slurm_script_starts_the_launcher_on_every_node(tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    config = {"model_type": "qwen2", "num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 256}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}
    config |= {"max_position_embeddings": 8192, "architectures": ["Qwen2ForCausalLM"]}
    (tmp_path / "my model" / "config.json").write_text(json.dumps(config))
    form = {**FORM, "method": "sft", "model": str(tmp_path / "my model")}
    asked = plans.question(form, Jail([tmp_path]))
    programs = {
        "torchrun": RECORDER,
        "srun": SRUN,
        "scontrol": "#!/bin/sh\necho node-a\necho node-b\n",
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "RECORD": str(tmp_path / "record"),
        "SLURM_JOB_NODELIST": "node-[a-b]",
    }
    script = plans.command(asked, 0, "slurm")
    subprocess.run(["bash", "-c", script], env=environment, check=True, timeout=60, cwd=tmp_path)
    lines = (tmp_path / "record").read_text().splitlines()
    assert [line[0] for line in lines] == ["0", "1"]
    for line in lines:
        assert "--nnodes 2 --nproc-per-node 8 --master-addr node-a --master-port 29500" in line
        assert f"launch/finetune_qwen2.py --load {tmp_path / 'my model'} --data-path" in line


def test_the_volcano_job_starts_the_same(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    asked = plans.question({**FORM, "method": "sft"}, Jail([tmp_path]))
    job = yaml.safe_load(plans.command(asked, 0, "volcano"))
    (task,) = job["spec"]["tasks"]
    (container,) = task["template"]["spec"]["containers"]
    assert (job["spec"]["minAvailable"], task["replicas"]) == (2, 2)
    assert container["resources"]["limits"] == {"huawei.com/Ascend910": 8}
    volumes = {volume["name"] for volume in task["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$PET_NODE_RANK" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "VC_TASK_INDEX": "1",
        "VC_NODE_HOSTS": "qwen2-node-0.qwen2,qwen2-node-1.qwen2",
        **{one["name"]: one["value"] for one in container["env"]},
    }
    words = [*container["command"], *container["args"]]
    said = subprocess.run(
        words, env=environment, check=True, timeout=60, capture_output=True, text=True
    ).stdout
    assert said.startswith("1 --nnodes 2 --nproc-per-node 8 --master-addr qwen2-node-0.qwen2 ")
    assert "launch/finetune_qwen2.py --load Qwen2.5-7B-Instruct" in said


@pytest.mark.parametrize(
    "change",
    [
        {"model": "/etc"},
        {"model": "8B"},
        {"num_devices": "many"},
        {"num_devices": 10**9},
        {"device": "910Z"},
        {"seq_length": 10**6},
        {"method": "rm -rf"},
        {"dtype": None},
    ],
)
def test_what_cannot_be_planned_is_a_fault(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        plans.answer(plans.question({**FORM, "method": "sft", **change}, Jail([tmp_path])))


# --- start ----------------------------------------------------------------------------------------


def start_form(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "model $(touch owned)").mkdir(exist_ok=True)
    (tmp_path / "chats; rm -rf x.jsonl").touch()
    return {
        "model": f"{tmp_path.name}/model $(touch owned)",
        "data": f"{tmp_path.name}/chats; rm -rf x.jsonl",
        "save": f"{tmp_path.name}/new",
        "method": "lora",
        "lora_r": 8,
        "lora_alpha": "16",
        "processes": "4",
        "tp": 2,
        "pp": 2,
        "sequence_parallel": True,
        "distributed_optimizer": True,
        "recompute": "full",
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "seq_length": 512,
        "epochs": "1.5",
        "lr": "1e-5",
        "dtype": "bf16",
        "device": "cpu",
        "pack": True,
        "save_hf": True,
        "save_interval": 10,
    }


def test_a_form_becomes_the_command_that_a_person_would_type(tmp_path: Path) -> None:
    wanted = order(start_form(tmp_path), Jail([tmp_path]))
    words = list(wanted.words)
    assert words[:5] == [
        "torchrun",
        "--standalone",
        "--nproc-per-node",
        "4",
        "launch/finetune_qwen2.py",
    ]
    assert (
        shlex.split(wanted.shown.replace("\\\n", "")) == words
    )  # quoted for a shell, as it is run
    assert wanted.argv[3:] == words[1:]
    settings = finetuning.parse(words[5:])
    assert settings.model.load == tmp_path / "model $(touch owned)"
    assert settings.data.data_path == (str(tmp_path / "chats; rm -rf x.jsonl"),)
    assert settings.checkpoint.save == tmp_path / "new" / "run" and settings.data.pack
    assert (settings.lora.lora_r, settings.lora.lora_alpha) == (8, 16.0)
    assert settings.parallel.sequence_parallel and settings.parallel.use_distributed_optimizer
    assert settings.tuning.num_train_epochs == 1.5 and settings.optimizer.lr == 1e-5
    assert not (tmp_path / "new").exists()


def test_numbers_keep_their_digits(tmp_path: Path) -> None:
    typed = {"lr": "1.23456789e-5", "epochs": "2.00000001", "lora_alpha": "123456.75"}
    words = order({**start_form(tmp_path), **typed}, Jail([tmp_path])).words
    settings = finetuning.parse(words[5:])
    assert settings.optimizer.lr == 1.23456789e-5
    assert settings.tuning.num_train_epochs == 2.00000001
    assert settings.lora.lora_alpha == 123456.75


@pytest.mark.parametrize(
    "change",
    [
        {"save": "../out"},
        {"save": "/tmp/elsewhere"},
        {"save": "."},
        {"save": "full"},
        {"save": "a\nb"},
        {"data": "full"},
        {"model": "full/x"},
        {"lr": "1e-5; rm"},
        {"lr": "nan"},
        {"lr": "--load=/etc"},
        {"epochs": "inf"},
        {"processes": "4 --no-python"},
        {"tp": True},
        {"pack": "yes"},
        {"device": "cpu --load /etc"},
        {"save_interval": -1},
    ],
)
def test_no_field_carries_more_than_its_value(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError):
        order({**start_form(tmp_path), **change}, Jail([tmp_path]))


# --- precision ------------------------------------------------------------------------------------

BAD_REPORTS = {
    "no object": [],
    "no sublayers": {"verdict": "x"},
    "a name that is none": {"sublayers": [{"name": "layers.x.query"}]},
    "another model's": {"sublayers": [{"name": "layers.0.moe"}]},
    "no name": {"sublayers": [3]},
    "endless": {"sublayers": [{"name": "layers.99999999999.query"}]},
}


@pytest.mark.parametrize("value", BAD_REPORTS.values(), ids=BAD_REPORTS)
def test_what_is_no_report_is_a_fault(tmp_path: Path, value: Any) -> None:
    (tmp_path / "report.json").write_text(json.dumps(value))
    with pytest.raises(UserError):
        precision.read_report(tmp_path / "report.json")


def test_figures_that_are_none_are_left_out(tmp_path: Path) -> None:
    cell = {"name": "layers.0.query", "ratio": "high", "own": {"mean": None, "worst": 1e400}}
    cell["histogram"] = {"edges": [1, 2], "counts": ["x"]}
    (tmp_path / "report.json").write_text(json.dumps({"sublayers": [cell], "verdict": {"a": 1}}))
    (found,) = precision.read_report(tmp_path / "report.json")["cells"]
    assert found["ratio"] is None and found["own"] == {"mean": None, "worst": None}
    assert found["histogram"] is None


# --- words ----------------------------------------------------------------------------------------


def test_every_word_of_the_page_is_there_in_both_languages() -> None:
    static = Path(plans.__file__).parent / "static"
    english, chinese = (static / "words.js").read_text(encoding="utf-8").split("  zh: {")
    key = re.compile(r"[{,\s](\w+): \"((?:[^\"\\]|\\.)*)\"")
    words = [dict(key.findall(part)) for part in (english, chinese)]
    assert words[0].keys() == words[1].keys() and len(words[0]) > 150
    for name, text in words[0].items():
        holes = [sorted(re.findall(r"\{\w+\}", one)) for one in (text, words[1][name])]
        assert holes[0] == holes[1], name
    planned = {name: json.loads(f'"{words[0][name]}"') for name in report.TEXTS}
    assert planned == report.TEXTS  # an answer has the same words in a terminal and on the page
    used = set()
    for file in static.glob("*.js"):
        used |= set(re.findall(r"\b(?:t|quiet)\(\"(\w+)\"", file.read_text(encoding="utf-8")))
    assert used <= words[0].keys(), used - words[0].keys()
