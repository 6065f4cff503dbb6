"""MindSpeed-LLM's command lines of generation and chat start here, and mean what they meant."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from checkpoint.toys import convert, pp, tp
from commands import TORCHRUN, World, run_commands, run_python
from helpers import tiny_config
from inference import worlds
from inference.worlds import CONTEXT, model_with_tokenizer
from pasted.command_lines import CommandLine, command_lines, line_named
from pasted.models import config_of, save_adapter, tiny_line
from pasted.test_convert import make_lora_run
from qwen2_ascend.errors import UserError
from qwen2_ascend.inference.pasted import GENERATE_FLAGS
from qwen2_ascend.inference.settings import ALL_TASKS, GenerateSettings, parse, validate
from qwen2_ascend.lora_config import LoraConfig

LAUNCH = Path(__file__).parents[2] / "launch" / "generate_qwen2.py"
LINES = command_lines("generate")
OTHER_BASE = "2.2.0/deepseek_r1_distill_qwen/generate_distill_qwen_7b"
"""Its --rotary-base is not the published model's."""
LORA_LINE = "2.2.0/qwen2/generate_qwen2_7b_lora_ptd"
NEW = 12
QUESTION = "how are you?"
TURNS = ("is it?", "and then", "for 日本")
STOP = "be"
SYSTEM = "You are a helpful assistant."
CONFIG = tiny_config(vocab_size=400, max_position_embeddings=CONTEXT)
LORA = LoraConfig(rank=8, alpha=16, targets=("all-linear",))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("lora") / "adapter", CONFIG, LORA)


def settings_of(line: CommandLine, adapter: Path) -> GenerateSettings:
    paths: dict[str, str | Path] = {"--lora-load": adapter}
    paths |= {"--load": "model", "--tokenizer-name-or-path": "tokenizer"}
    return parse(line.with_paths(paths))


@pytest.mark.parametrize("line", [x for x in LINES if not x.is_moe], ids=lambda x: x.name)
def test_every_line_starts(line: CommandLine, adapter: Path) -> None:
    settings, config = settings_of(line, adapter), config_of(line)
    if line.name == OTHER_BASE:
        with pytest.raises(UserError, match="config says 10000") as caught:
            validate(settings, config, line.world_size)
        assert len(caught.value.faults) == 1
        return
    validate(settings, config, line.world_size)
    assert settings.tasks() == (("chat",) if "--task" in line.flags else ALL_TASKS)
    notes = "\n".join(settings.model.notes(settings.pasted, GENERATE_FLAGS, config))
    pasted = {flag for flag, _ in settings.pasted}
    assert all(flag in notes for flag in pasted)
    assert ("say --fp32" in notes) == ("--bf16" not in line.flags)


def test_a_model_with_experts_is_refused_in_one_sentence(adapter: Path) -> None:
    (line,) = (line for line in LINES if line.is_moe)
    with pytest.raises(UserError) as caught:
        settings_of(line, adapter)
    (fault,) = caught.value.faults
    assert "--num-experts" in fault and "mixture-of-experts" in fault


def test_a_script_of_windows_is_said(adapter: Path) -> None:
    with pytest.raises(UserError, match="line ends"):
        settings_of(LINE._replace(flags=["\r"]), adapter)


LINE = line_named("generate", "2.2.0/qwen25/chat_qwen25_7b_lora_ptd")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--padded-vocab-size", "151000"], "below the vocabulary, vocab_size=152064"),
        (["--max-position-embeddings", "1000000"], "the config says max_position_embeddings="),
        (["--num-layers", "48"], "the config says 28"),
        (["--rotary-base", "10000"], "the config says 1000000"),
        (["--context-parallel-size", "2"], "only 1 is supported"),
        (["--prompt", "a"], "--task asks a question of its own"),
        (["--hf-chat-template"], "--hf-chat-template and --prompt-type"),
        (["--history-turns", "-1"], "--history-turns -1"),
        (["--max-length", "9"], "say --max-new-tokens"),
        (["--add-eos-token", "a"], "say --stop"),
        (["--greedy"], "--task says it"),
    ],
)
def test_what_does_not_hold_is_refused(more: list[str], words: str, adapter: Path) -> None:
    line = LINE._replace(flags=[*LINE.flags, *more])
    with pytest.raises(UserError) as caught:
        validate(settings_of(line, adapter), config_of(line), 1)
    (fault,) = caught.value.faults
    assert words in fault


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "a", "--hf-chat-template"], "say --apply-chat-template"),
        (["--prompt-file", "a", "--hf-chat-template"], "say --apply-chat-template"),
        (["--prompt", "a", "--history-turns", "1"], "--history-turns needs --chat or --task chat"),
        (["--chat", "--history-turns", "-1"], "--history-turns -1"),
        (["--chat", "--hf-chat-template", "--prompt-type", "qwen"], "give one of them"),
        (["--chat", "--hf-chat-template", "--history-turns", "0"], None),
        (["--prompt", "a", "--hf-chat-template", "--apply-chat-template"], None),
        (["--task", "chat", "--hf-chat-template", "--history-turns", "1"], None),
    ],
)
def test_flags_of_turns_hold_or_are_refused(flags: list[str], words: str | None) -> None:
    """A prompt of one's own is continued as it is where no flag makes a message of it."""
    settings = parse(["--load", "model", *flags])
    if words is None:
        validate(settings, CONFIG, 1)
        return
    with pytest.raises(UserError, match=words):
        validate(settings, CONFIG, 1)


# --- run truly, on a tiny model -------------------------------------------------------------------


def _flags(name: str, folder: Path, load: str, **changes: object) -> list[str]:
    """A published line for the tiny model, computing on the CPU."""
    paths: dict[str, str | Path] = {
        "--load": folder / load,
        "--lora-load": folder / "adapter",
        "--tokenizer-name-or-path": folder / "hf",
    }
    changes = {"max_new_tokens": NEW, **changes}
    flags = tiny_line(line_named("generate", name), CONFIG, paths, **changes)
    return flags if "--bf16" in flags else [*flags, "--fp32"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("pasted")
    model_with_tokenizer(folder / "hf")
    save_adapter(folder / "adapter", CONFIG, LORA)
    theirs = folder / "theirs"
    make_lora_run(folder / "hf", theirs, [*tp(2), *pp(2)])
    convert(theirs / "merged", theirs / "hf", "--hf-cfg-dir", folder / "hf", to="hf").require()
    layout = "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2"
    words = f"convert --load-dir {folder}/hf --save-dir {folder}/shards --save-model-type mg"
    top_1 = ["--top-k", "1"]
    base = _flags("2.2.0/qwen25/generate_qwen25_7b_ptd", folder, "hf")
    plain = [*_flags("2.2.0/qwen25/generate_qwen25_14b_ptd", folder, "hf"), "--task", "chat"]
    in_turns = ["--apply-chat-template", "--prompt-type", "qwen", "--repetition-penalty", "1"]
    commands: dict[str, list[str]] = {
        "generate": _flags("2.2.0/qwen25/generate_qwen25_7b_ptd", folder, "shards"),
        "distill": [*_flags(OTHER_BASE, folder, "hf"), *top_1],
        "lora": _flags(LORA_LINE, folder, "hf"),
        "lora shards": _flags(LORA_LINE, folder, "theirs/base", lora_load=folder / "theirs/lora"),
        "other rank": [*_flags(LORA_LINE, folder, "hf"), "--lora-r", "4"],
        "no adapter": _flags(LORA_LINE, folder, "hf", lora_load=None),
        "chat": [*_flags("2.2.0/qwen25/chat_qwen25_7b_ptd", folder, "shards"), *top_1],
        "plain chat": [*plain, *top_1],
        "template": [*plain, "--hf-chat-template", "--history-turns", "0", *top_1],
        "stop": [*base, "--task", "beam_search", "--stop", STOP],
        "seed": _flags("2.2.0/qwen25/generate_qwen25_7b_ptd", folder, "hf", seed=7),
        "one prompt": [*base, "--prompt", "the of", "--greedy"],
        "in turns": [*base, *in_turns, "--prompt", TURNS[0], "--greedy"],
    }
    given: dict[str, dict[str, Any]] = {
        "convert": {"program": "qwen2-ascend", "flags": f"{words} {layout}".split()}
    }
    chat = f"{TURNS[0]}\n{TURNS[1]}\nclear\n\n{TURNS[2]}\nquit\nmore\n"
    given |= {
        name: {"program": "generate", "flags": flags, "stdin": chat if "chat" in name else ""}
        for name, flags in commands.items()
    }
    given["template"]["stdin"] = f"{TURNS[0]}\n{TURNS[1]}\n"
    runs = run_commands(folder, given)
    runs["convert"].require()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):  # as MindSpeed-LLM's
        (folder / "shards" / name).unlink(missing_ok=True)
    return World(folder, runs)


class Theirs(worlds.Theirs):
    """transformers, by the tokens that MindSpeed-LLM gives the model."""

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        super().__init__(folder)
        if adapter is not None:
            from peft import PeftModel

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.model = PeftModel.from_pretrained(self.model, adapter).merge_and_unload()

    def answer(self, text: str, *, num_beams: int = 1, stops: tuple[int, ...] = (0,)) -> str:
        options = {"num_beams": num_beams, "repetition_penalty": 1.0}  # the folder's is 1.1
        return self.text(text, NEW, stops, **options)


def sections(out: str) -> dict[str, str]:
    """Each task's text."""
    parts = out.split("--- ")[1:]
    return {part.split(":")[0]: part.split(" ---\n", 1)[1].removesuffix("\n") for part in parts}


def test_a_line_without_a_task_shows_all_ways_and_chats(world: World) -> None:
    run, theirs = world.runs["generate"].require(), Theirs(world.folder / "hf")
    found = sections(run.out)
    assert tuple(found) == ALL_TASKS
    assert found["greedy"] == theirs.answer(QUESTION)
    assert found["beam_search"] == theirs.answer(QUESTION, num_beams=2)
    assert found["do_sample"] not in ("", found["greedy"])
    assert found["chat"] == ""  # the input has ended
    assert "sampling, temperature 0.7, top-k 50, top-p 0.95, seed 42" in run.err
    assert "--use-mcore-models: all models are megatron-core's" in run.err
    other = sections(world.runs["seed"].out)
    assert other["greedy"] == found["greedy"] and other["do_sample"] != found["do_sample"]


def test_a_stop_string_ends_the_best_beam(world: World) -> None:
    found = sections(world.runs["stop"].require().out)["beam_search"]
    whole = sections(world.runs["generate"].out)["beam_search"]
    assert found == whole.partition(STOP)[0] != whole


def test_an_adapter_is_merged(world: World) -> None:
    run, theirs = (
        world.runs["lora"].require(),
        Theirs(world.folder / "hf", world.folder / "adapter"),
    )
    found = sections(run.out)
    assert found["greedy"] == theirs.answer(QUESTION)
    assert found["greedy"] != sections(world.runs["generate"].out)["greedy"]


def test_their_lora_shards_are_merged(world: World) -> None:
    run, theirs = world.runs["lora shards"].require(), Theirs(world.folder / "theirs/hf")
    found = sections(run.out)
    assert found["greedy"] == theirs.answer(QUESTION)
    assert found["greedy"] != sections(world.runs["generate"].out)["greedy"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other rank", "is of rank 8"),
        ("no adapter", "--lora-r, --lora-alpha, --lora-target-modules: there is no adapter"),
    ],
)
def test_lora_flags_are_held_to_the_adapter(world: World, name: str, words: str) -> None:
    assert words in world.runs[name].require(2).err


def test_a_prompt_type_writes_the_question(world: World) -> None:
    run, theirs = world.runs["distill"].require(), Theirs(world.folder / "hf")
    expected = theirs.answer(f"<｜User｜>{QUESTION}<｜Assistant｜>")  # noqa: RUF001
    found = sections(run.out)
    assert found["greedy"] == found["do_sample"] == expected


def test_a_chat_in_the_prompt_type(world: World) -> None:
    """qwen's system text is in front, and no end of line stands after an answer's end."""
    run, theirs = world.runs["chat"].require(), Theirs(world.folder / "hf")
    begin = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    text, expected = begin, []
    for index, turn in enumerate(TURNS):
        text = begin if index == 2 else text
        text += "\n" if text != begin else ""
        text += f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
        expected.append(theirs.answer(text, stops=(0, 2)))
        text += f"{expected[-1]}<|im_end|>"
    assert sections(run.out)["chat"] == "\n".join(expected)


def test_a_chat_without_a_template_goes_on_with_the_text(world: World) -> None:
    run, theirs = world.runs["plain chat"].require(), Theirs(world.folder / "hf")
    text, expected = "", []
    for index, turn in enumerate(TURNS):
        text = turn if index == 2 else text + turn
        expected.append(theirs.answer(text))
        text += expected[-1]
    assert sections(run.out)["chat"] == "\n".join(expected)


def test_turns_that_are_not_remembered(world: World) -> None:
    run, theirs = world.runs["template"].require(), Theirs(world.folder / "hf")
    asked = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    expected = [theirs.answer(asked.format(turn), stops=(0, 2)) for turn in TURNS[:2]]
    assert sections(run.out)["chat"] == "\n".join(expected)


def test_a_prompt_of_ones_own_replaces_the_demonstration(world: World) -> None:
    assert "---" not in world.runs["one prompt"].require().out
    run, theirs = world.runs["in turns"].require(), Theirs(world.folder / "hf")
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{TURNS[0]}<|im_end|>\n"
    assert run.out == theirs.answer(f"{text}<|im_start|>assistant\n", stops=(0, 2)) + "\n"


@pytest.mark.distributed
def test_a_line_at_tp2_pp2_gives_the_same(world: World) -> None:
    """There may be no config.json beside the shards, as beside MindSpeed-LLM's."""
    changes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    name = "2.2.0/qwen25/generate_qwen25_7b_ptd"
    assert not (world.folder / "shards" / "config.json").exists()
    told = run_python(*TORCHRUN, 4, LAUNCH, *_flags(name, world.folder, "shards", **changes)).out
    assert sections(told) == sections(world.runs["generate"].out)
