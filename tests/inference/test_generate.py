"""launch/generate_qwen2.py as a user runs it: prompts, files, a chat over a pipe, mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from commands import World, run_commands
from inference.worlds import CONTEXT, Theirs, model_with_tokenizer

LAUNCH = Path(__file__).parents[2] / "launch" / "generate_qwen2.py"
PROMPTS = ("def f(日本 x):", "the of and")
ROWS = [
    {"prompt": "return ( naïve )", "id": "a"},
    {"messages": [{"role": "user", "content": "语 over 😀?"}]},
    {"prompt": "it was he"},
    {"prompt": "be"},
]
TURNS = ("is it?", "and then", "for 日本")
NEW = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("generate")
    model_with_tokenizer(folder / "hf")
    lines = [json.dumps(row) for row in ROWS]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    bad = ['{"prompt": "a"}', "{", "[]", '{"text": "a"}', '{"prompt": ""}', '{"messages": [1]}']
    (folder / "bad.jsonl").write_text("\n".join(bad), encoding="utf-8")
    (folder / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(folder / "hf" / name, folder / "bare" / name)
    (folder / "stopped.jsonl.part").write_text(_first_results(lines), encoding="utf-8")
    (folder / "foreign.jsonl.part").write_text('{"prompt": "x", "response": "y"}\n')
    commands = {name: _command(flags, folder) for name, flags in _commands().items()}
    commands["chat"]["stdin"] = f"{TURNS[0]}\n{TURNS[1]}\n/reset\n\n{TURNS[2]}\n/exit\nmore\n"
    commands["sampled chat"]["stdin"] = TURNS[0]
    commands["short chat"]["stdin"] = f"{TURNS[0]}\n{TURNS[1]}\n"
    return World(folder, run_commands(folder, commands))


def _first_results(lines: list[str]) -> str:
    """What a run that was killed in its second line leaves."""
    done = {**json.loads(lines[0]), "response": "KEPT"}
    return json.dumps(done) + "\n" + '{"messages": [{"ro'


def _command(flags: list[str], folder: Path) -> dict[str, Any]:
    flags = [flag.replace("{d}", str(folder)) for flag in flags]
    return {"program": "generate", "flags": flags}


def _commands() -> dict[str, list[str]]:
    model = ["--load", "{d}/hf", "--max-new-tokens", str(NEW)]
    file = [*model, "--prompt-file", "{d}/rows.jsonl", "--batch-size", "2", "--output-file"]
    prompts = [word for text in PROMPTS for word in ("--prompt", text)]
    return {
        "prompts": [*model, *prompts],
        "one": [*model, "--prompt", PROMPTS[0]],
        "file": [*file, "{d}/out.jsonl"],
        "exists": [*file, "{d}/out.jsonl"],
        "stopped": [*file, "{d}/stopped.jsonl"],
        "resumed": [*file, "{d}/stopped.jsonl", "--resume"],
        "foreign": [*file, "{d}/foreign.jsonl", "--resume"],
        "sampled": [*file, "{d}/sampled.jsonl", "--temperature", "1.5", "--seed", "3"],
        "sampled one": [*file[:-2], "4", "--output-file", "{d}/sampled4.jsonl", "--do-sample",
                        "--temperature", "1.5", "--seed", "3"],
        "chat": [*model, "--chat", "--system-prompt", "to be"],
        "short chat": [*model, "--chat", "--history-turns", "0"],
        "sampled chat": [*model, "--chat", "--top-p", "0.9"],
        "template": [*model, "--apply-chat-template", "--prompt", TURNS[0]],
        "bad rows": [*model, "--prompt-file", "{d}/bad.jsonl"],
        "no tokenizer": ["--load", "{d}/bare", "--prompt", "a"],
        "too long": [*model, "--prompt", "日" * CONTEXT, "--prompt", "a"],
        "bad values": [*model, "--temperature", "0", "--top-p", "1.5", "--top-k", "-1", "--greedy",
                       "--max-new-tokens", "0", "--batch-size", "0"],
        "no prompt": model,
        "no checkpoint": ["--load", "{d}/nowhere", "--prompt", "a"],
        "layout": [*model, "--prompt", "a", "--tensor-model-parallel-size", "2"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def answers(world: World):
    """What transformers makes of a prompt or of messages, greedily."""
    theirs = Theirs(world.folder / "hf")

    def answer(row: dict[str, Any], stops: tuple[int, ...] = (0,)) -> str:
        if "messages" not in row:
            return theirs.text(row["prompt"], NEW, stops)
        text = theirs.tokenizer.apply_chat_template(
            row["messages"], tokenize=False, add_generation_prompt=True
        )
        return theirs.text(text, NEW, (*stops, 2))

    return answer


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_texts_of_prompts_are_printed_in_order(world: World, answers) -> None:
    run = world.runs["prompts"].require()
    first, second = (answers({"prompt": text}) for text in PROMPTS)
    assert run.out == f"--- 1 of 2 ---\n{first}\n--- 2 of 2 ---\n{second}\n"
    assert world.runs["one"].out == f"{first}\n"


def test_the_log_says_what_is_done_and_from_where(world: World) -> None:
    log = world.runs["prompts"].err
    assert "device cpu, backend gloo, 1 process(es)" in log
    assert "TP1 PP1, fp32, torch operators" in log
    assert (
        "greedy, repetition penalty 1.1 (generation_config.json says repetition_penalty=1.1)" in log
    )
    assert f"at most {NEW} new tokens, eos 0" in log
    assert "tokens/s" in log
    assert "sampling, temperature 1.5, top-k 50, repetition penalty 1.1, seed 3" in (
        world.runs["sampled"].err
    )


def test_a_file_is_answered_in_its_order(world: World, answers) -> None:
    assert world.runs["file"].require().out == ""
    found = rows(world.folder / "out.jsonl")
    # one chat makes <|im_end|> end all of them
    stops = (0, 2)
    for row, wanted in zip(found, ROWS, strict=True):
        assert {key: row[key] for key in wanted} == wanted
        assert row["response"] == answers(wanted, stops)
        assert row["finish_reason"] in ("eos", "length")
        assert row["num_new_tokens"] <= NEW and row["num_prompt_tokens"] > 0
    assert not list(world.folder.glob("out.jsonl.part"))


def test_results_are_neither_replaced_nor_mixed(world: World) -> None:
    for name, words in {
        "exists": "exists already; say --overwrite",
        "stopped": "a stopped run has left stopped.jsonl.part; say --resume",
        "foreign": "line 1 of",
    }.items():
        assert words in world.runs[name].require(2).err
    assert (world.folder / "foreign.jsonl.part").exists()


def test_a_stopped_run_goes_on(world: World) -> None:
    """What was there stays; the torn line is made again."""
    run = world.runs["resumed"].require()
    assert "1 of 4 results are there already" in run.err
    assert "stopped.jsonl.part is an older release's" in run.err
    found = rows(world.folder / "stopped.jsonl")
    assert found[0]["response"] == "KEPT"
    assert found[1:] == rows(world.folder / "out.jsonl")[1:]


def test_samples_do_not_depend_on_the_batch(world: World) -> None:
    found = rows(world.folder / "sampled.jsonl")
    assert found == rows(world.folder / "sampled4.jsonl")
    assert found != rows(world.folder / "out.jsonl")


def test_a_chat_over_a_pipe(world: World, answers) -> None:
    run = world.runs["chat"].require()
    system = {"role": "system", "content": "to be"}
    messages, expected = [system], []
    for index, turn in enumerate(TURNS):
        if index == 2:
            messages = [system]
        messages.append({"role": "user", "content": turn})
        expected.append(answers({"messages": messages}))
        messages.append({"role": "assistant", "content": expected[-1]})
    assert run.out == "".join(f"{text}\n" for text in expected)
    assert "sampling" in world.runs["sampled chat"].require().err


def test_a_chat_shows_the_model_as_many_turns_as_asked(world: World, answers) -> None:
    alone = [answers({"messages": [{"role": "user", "content": turn}]}) for turn in TURNS[:2]]
    assert world.runs["short chat"].require().out == "".join(f"{text}\n" for text in alone)


def test_a_prompt_as_a_message(world: World, answers) -> None:
    expected = answers({"messages": [{"role": "user", "content": TURNS[0]}]})
    assert world.runs["template"].out == f"{expected}\n"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bad rows", ["bad.jsonl:2: is not JSON", "bad.jsonl:3: is a JSON list", ":4: needs one"]),
        ("bad rows", ['bad.jsonl:5: "prompt" is', "bad.jsonl:6:"]),
        ("no tokenizer", ["no tokenizer can be read", "--tokenizer-name-or-path"]),
        ("too long", ["--prompt 1: has", f"(max_position_embeddings) is {CONTEXT}"]),
        ("bad values", ["--temperature 0.0 must be above zero", "--top-p 1.5", "--top-k -1"]),
        ("bad values", ["--max-new-tokens 0", "--batch-size 0", "--greedy draws nothing"]),
        ("bad values", ["give one of --prompt, --prompt-file and --chat"]),
        ("no prompt", ["give one of --prompt, --prompt-file and --chat"]),
        ("no checkpoint", ["nowhere: no such folder"]),
        ("layout", ["1 process(es) for tensor_model_parallel_size=2", "--nproc-per-node 2"]),
    ],
)
def test_mistakes_are_named_together(world: World, name: str, words: list[str]) -> None:
    told = world.runs[name].require(2).err
    assert [word for word in words if word not in told] == []
