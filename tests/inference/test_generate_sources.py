"""generate_qwen2.py from whatever a run leaves, at TP2 PP2 too, and when it is interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from commands import TORCHRUN, World, environment, run_commands, run_python
from data.chats import said, write_rows
from inference.worlds import Theirs, model_with_tokenizer

LAUNCH = Path(__file__).parents[2] / "launch" / "generate_qwen2.py"
PROMPT, NEW = "return ( naïve 日本 )", 16
LAYOUT = "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2"
TUNING = "--seq-length 64 --train-iters 2 --lr 3e-2 --device cpu"
GENERATE = f"--max-new-tokens {NEW} --fp32 --device cpu"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A pretraining run, a LoRA run on shards, and what is generated from each."""
    folder = tmp_path_factory.mktemp("sources")
    model_with_tokenizer(folder / "hf")
    texts = ("the of and", "日本 語", "def return ( )")
    chats = [{"messages": [said("user", "be"), said("assistant", text)]} for text in texts]
    write_rows(folder / "chats.jsonl", chats)
    commands = {name: _command(line, folder) for name, line in _commands().items()}
    return World(folder, run_commands(folder, commands))


def _commands() -> dict[str, str]:
    lora = "finetune --load {d}/shards --data-path {d}/chats.jsonl --lora-r 4"
    return {
        "shards": f"qwen2-ascend convert --load-dir {{d}}/hf --save-dir {{d}}/shards "
        f"--save-model-type mg {LAYOUT}",
        "run": f"pretrain --load {{d}}/hf --mock-data {TUNING} --save {{d}}/run",
        "run to hf": "qwen2-ascend convert --load-dir {d}/run --save-dir {d}/run_hf "
        "--save-model-type hf",
        "lora": f"{lora} {TUNING} --save {{d}}/lora --save-adapter {{d}}/adapter "
        "--save-hf {d}/lora_hf",
        "from hf": f"generate --load {{d}}/hf {GENERATE}",
        "from shards": f"generate --load {{d}}/shards {GENERATE}",
        "from run": f"generate --load {{d}}/run {GENERATE}",
        "from lora": f"generate --load {{d}}/lora {GENERATE}",
        "from adapter": f"generate --load {{d}}/hf --adapter {{d}}/adapter {GENERATE}",
        "two adapters": f"generate --load {{d}}/lora --adapter {{d}}/adapter {GENERATE}",
    }


def _command(line: str, folder: Path) -> dict[str, Any]:
    program, *flags = line.replace("{d}", str(folder)).split()
    if program == "generate":
        flags += ["--prompt", PROMPT]
    return {"program": program, "flags": flags}


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        (["from hf", "from shards"], "hf"),
        (["from run"], "run_hf"),
        (["from lora", "from adapter"], "lora_hf"),
    ],
)
def test_texts_are_those_of_transformers_from_any_source(
    world: World, names: list[str], folder: str
) -> None:
    for made in ("shards", "run", "run to hf", "lora"):
        world.runs[made].require()
    expected = Theirs(world.folder / folder).text(PROMPT, NEW) + "\n"
    for name in names:
        assert world.runs[name].require().out == expected, name
    assert world.runs["from hf"].out != world.runs["from run"].out != world.runs["from lora"].out


def test_an_export_ends_its_answers_as_the_chats_have_taught(world: World) -> None:
    """The base model ends with token 0 alone; transformers' users find both in the folder."""
    base, tuned = (
        json.loads((world.folder / name / "generation_config.json").read_text())
        for name in ("hf", "lora_hf")
    )
    assert base["eos_token_id"] == [0]
    assert tuned == {**base, "eos_token_id": [2, 0]}
    run = world.runs["lora"]
    assert "answers end with token 2 too, as the chats have taught" in run.out + run.err


def test_the_log_names_the_adapter_and_two_are_refused(world: World) -> None:
    assert f"with the adapter in {world.folder}/lora/iter_0000002" in world.runs["from lora"].err
    assert "is a LoRA run, which has its own" in world.runs["two adapters"].require(2).err


@pytest.mark.distributed
def test_a_lora_run_on_shards_at_tp2_pp2(world: World) -> None:
    flags = f"--load {world.folder}/lora {GENERATE} --prompt-file {world.folder}/prompts.jsonl "
    flags += f"--output-file {world.folder}/tp2pp2.jsonl "
    flags += "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    write_rows(world.folder / "prompts.jsonl", [{"prompt": PROMPT}])
    run_python(*TORCHRUN, 4, LAUNCH, *flags.split())
    (line,) = (world.folder / "tp2pp2.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["response"] + "\n" == world.runs["from lora"].out


def test_an_interrupted_run_leaves_no_file_that_looks_whole(tmp_path: Path) -> None:
    """Ctrl-C between two results: status 130, no traceback, whole lines to go on from."""
    out, part = tmp_path / "stopped.jsonl", tmp_path / "stopped.jsonl.part"
    model_with_tokenizer(tmp_path / "hf")
    rows = [{"prompt": f"{PROMPT} {i}"} for i in range(60)]
    write_rows(tmp_path / "many.jsonl", rows)
    flags = f"--load {tmp_path}/hf --fp32 --device cpu --max-new-tokens 150 --batch-size 1 "
    flags += f"--prompt-file {tmp_path}/many.jsonl --output-file {out}"
    process = subprocess.Popen(
        [sys.executable, str(LAUNCH), *flags.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        deadline = time.monotonic() + 200
        while not (part.exists() and part.read_bytes().count(b"\n")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no result came"
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said, log = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, log
    assert said == "" and "Traceback" not in log and "Error" not in log
    assert not out.exists()
    lines = part.read_text(encoding="utf-8").splitlines()
    done = [json.loads(line) for line in lines]
    assert 0 < len(done) < len(rows)
    assert [row["prompt"] for row in done] == [row["prompt"] for row in rows[: len(done)]]
    _only_the_same_goes_on(flags, part, rows)


def _only_the_same_goes_on(flags: str, part: Path, rows: list[dict[str, str]]) -> None:
    """No file mixes two models or two ways to choose; a complete one needs no model."""
    model_with_tokenizer(part.parent / "other", ffn_hidden_size=64)
    before = part.read_bytes()
    for another, changed in (
        (f"{flags} --temperature 2 --seed 1", ["sampling greedy", "(now drawn", "seed None (now"]),
        (flags.replace("/hf ", "/other "), [f"with {part.parent}/hf: config "]),
    ):
        told = run_python(LAUNCH, *another.split(), "--resume", status=2).err
        assert f"--resume: {part} was begun otherwise" in told
        assert [words for words in changed if words not in told] == []
        assert part.read_bytes() == before
    whole = "".join(f"{json.dumps({**row, 'response': 'kept'})}\n" for row in rows)
    part.write_text(whole, encoding="utf-8")
    told = run_python(LAUNCH, *flags.split(), "--resume").err
    assert "all 60 results are there already" in told and "device cpu" not in told
    out = part.with_suffix("")
    assert out.read_text(encoding="utf-8") == whole
    assert not list(part.parent.glob(f"{part.name}*"))
