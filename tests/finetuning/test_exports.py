"""Exports are made when the run is complete, once, by the same command however often it starts."""

from __future__ import annotations

import json

import pytest

from commands import World, run_commands
from distributed.jobs import read_metrics
from helpers import make_tiny_hugging_face_folder, tiny_config
from qwen2_ascend.config import Qwen2Config

SIZES = "--seq-length 32 --global-batch-size 4 --lr 1e-2 --device cpu --no-log-energy"


def command_lines() -> list[tuple[str, str]]:
    data = f"--data-path {{d}}/chats {SIZES}"
    lora = f"--load {{d}}/run --pretrained-checkpoint {{d}}/hf --save {{d}}/run --lora-r 2 {data} "
    lora += "--train-iters 4 --exit-interval 2 --save-adapter {d}/adapter --save-hf {d}/tuned"
    alone = f"--load {{d}}/hf {data} --lora-r 2 --train-iters 2 --save-adapter {{d}}/alone"
    sft = f"--load {{d}}/sft --pretrained-checkpoint {{d}}/hf --save {{d}}/sft {data} "
    sft += "--num-train-epochs 1 --exit-interval 1 --save-hf {d}/sft_hf"
    once = f"--load {{d}}/once --pretrained-checkpoint {{d}}/bf16 --save {{d}}/once {data} "
    once += "--train-iters 1 --save-hf {d}/once_hf"
    yarn = f"--load {{d}}/yarn --pretrained-checkpoint {{d}}/hf --save {{d}}/yarn {data} "
    yarn += "--train-iters 2 --save-hf {d}/yarn_hf"
    scaling = "--rope-scaling-type yarn --rope-scaling-original-max-position-embeddings 64 "
    scaling += "--rope-scaling-factor"
    return [
        ("half", f"{lora} --lora-dropout 0.25"),
        ("whole", lora.replace("--lora-r 2", "")),
        ("again", lora),
        ("another run", lora.replace("--train-iters 4", "--train-iters 6")),
        ("alone", alone),
        ("alone again", alone),
        ("alone, another run", f"{alone} --seed 5"),
        ("sft 1", sft),
        ("sft 2", sft),
        ("sft 2 again", sft),
        ("once", once),
        ("once again", once),
        ("yarn, half", f"{yarn} --exit-interval 1 {scaling} 8"),
        ("yarn, another", f"{yarn} {scaling} 4"),
        ("yarn, whole", yarn),
        ("no yarn", f"{yarn} --exit-interval 1".replace("{d}/yarn", "{d}/plain")),
        ("yarn, late", f"{yarn} {scaling} 8".replace("{d}/yarn", "{d}/plain")),
        ("mixed", f"--load {{d}}/mixed {data} --lora-r 2 --train-iters 1 --save {{d}}/m "
         "--save-hf {d}/mixed_hf"),
        ("inside", f"--load {{d}}/hf {data} --train-iters 1 --save {{d}}/i --save-hf {{d}}/i/hf"),
        ("a file", f"--load {{d}}/hf {data} --train-iters 1 --save {{d}}/i "
         "--save-hf {d}/file/hf"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from finetuning.finetune_worker import _write

    folder = tmp_path_factory.mktemp("exports")
    make_tiny_hugging_face_folder(folder / "hf", tiny_config())
    make_tiny_hugging_face_folder(folder / "bf16", tiny_config(), dtype="bf16")
    mixed = make_tiny_hugging_face_folder(folder / "mixed", tiny_config())
    config = json.loads((mixed / "config.json").read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    (mixed / "config.json").write_text(json.dumps({**config, key: "bfloat16"}))
    _write(folder / "chats", "", 8, seed=0)
    # as a start that was killed while it exported has left it
    (folder / ".tuned.partial").mkdir()
    (folder / ".tuned.partial" / "model.safetensors").write_bytes(b"half")
    (folder / "file").write_text("in the way")
    given = {
        name: {"program": "finetune", "flags": flags.format(d=folder).split()}
        for name, flags in command_lines()
    }
    return World(folder, run_commands(folder, given))


def test_a_run_that_is_stopped_exports_nothing_and_goes_on(world: World) -> None:
    half, whole = (world.runs[name].require() for name in ("half", "whole"))
    assert "--save-adapter and --save-hf: written when the run is complete" in half.out
    assert not {"adapter", "tuned"} & set(half.there)
    assert "at iteration 2" in whole.out and "iteration 4/4" in whole.out
    assert {"adapter", "tuned"} <= set(whole.there) and ".tuned.partial" not in whole.there


def test_the_exports_are_of_the_last_checkpoint(world: World) -> None:
    folder, _ = world
    exported = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.25
    last = folder / "run" / "iter_0000004" / "adapter_model.safetensors"
    assert exported == last.read_bytes()
    assert (folder / "tuned" / "model.safetensors").stat().st_size > 100_000


def test_a_complete_run_says_what_is_there(world: World) -> None:
    again = world.runs["again"].require()
    assert "nothing is left to do" in again.out
    for flag in ("--save-adapter", "--save-hf"):
        assert f"{flag} {world[0]}" in again.out and "is there already, and complete" in again.out


def test_another_runs_export_is_in_the_way(world: World) -> None:
    for name in ("another run", "alone, another run"):
        ended = world.runs[name].require(2)
        assert "is there already; name a new folder" in ended.err, ended
        assert "iteration" not in ended.out


def test_a_run_without_checkpoints_is_not_trained_twice(world: World) -> None:
    first, second = (world.runs[name].require() for name in ("alone", "alone again"))
    assert "iteration 2/2" in first.out
    assert "is there already, and complete" in second.out and "iteration" not in second.out


def test_a_run_in_fp32_of_weights_in_bf16_is_known_by_its_own_checkpoint(world: World) -> None:
    first, again = (world.runs[name].require() for name in ("once", "once again"))
    assert "once_hf" in first.there and "iteration 1/1" in first.out
    assert "is there already, and complete" in again.out


def test_epochs_of_all_weights_too(world: World) -> None:
    """Two steps of one epoch, each by a start of its own; then there is nothing left."""
    first, second, again = (world.runs[f"sft {n}"].require() for n in ("1", "2", "2 again"))
    assert "sft_hf" not in first.there and "sft_hf" in second.there
    assert "is there already, and complete" in again.out


def test_a_config_of_another_dtype_than_the_weights_does_not_fail_the_export(world: World) -> None:
    world.runs["mixed"].require()
    config = json.loads((world[0] / "mixed_hf" / "config.json").read_text())
    assert "float32" in (config.get("dtype"), config.get("torch_dtype"))


@pytest.mark.parametrize(("name", "words"), [("inside", "lie in each other"), ("a file", "file")])
def test_an_export_that_cannot_be_made_is_refused_before_the_run(
    world: World, name: str, words: str
) -> None:
    ended = world.runs[name].require(2)
    assert words in ended.err and "iteration" not in ended.out, ended


def test_yarn_of_flags_is_that_of_the_run_its_checkpoints_and_its_export(world: World) -> None:
    """A start that does not say it goes on with it; one that says another is refused."""
    folder, runs = world
    names = ("half", "another", "whole", "late")
    half, another, whole, late = (runs[f"yarn, {name}"] for name in names)
    assert half.status == 0, half.err
    assert "--rope-scaling-factor 8: the run has this YaRN scaling" in half.out
    assert another.status == 2 and "--rope-scaling-factor 4: the config says 8.0" in another.err
    assert whole.status == 0 and "at iteration 1" in whole.out, whole.err
    assert late.status == 2 and "is without it, and goes on as it began" in late.err
    expected = tiny_config().with_yarn(8, 64)
    for made in ("yarn", "yarn_hf"):
        assert Qwen2Config.from_pretrained(folder / made) == expected
    assert Qwen2Config.from_pretrained(folder / "plain").yarn is None
    scaled, plain = (read_metrics(folder / name)[0]["loss"] for name in ("yarn", "plain"))
    assert abs(scaled - plain) > 1e-4, "the scaling is in the model"
