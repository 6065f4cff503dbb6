"""MindSpeed-LLM's `convert_ckpt.py` and `convert_ckpt_v2.py` lines run here and convert."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from checkpoint.toys import (
    convert,
    fingerprint,
    hugging_face_shapes,
    load_folder,
    make_hugging_face_folder,
    pp,
    toy_config,
    tp,
)
from commands import Ended
from helpers import make_tiny_hugging_face_folder
from pasted.command_lines import CommandLine, command_lines
from qwen2_ascend.checkpoint.command import main
from qwen2_ascend.checkpoint.pasted import CONVERT_FLAGS
from qwen2_ascend.cli import run_command

CONFIG = toy_config(num_layers=8, num_query_groups=8)
"""TP 8 and PP 8 are among the lines."""
V1 = "--use-mcore-models --model-type GPT --add-qkv-bias --model-type-hf llama2"
SIBLINGS = {
    "distill": f"{V1} --load-model-type hf --save-model-type mg --target-tensor-parallel-size 2 "
    "--target-pipeline-parallel-size 1 --load-dir PATH --save-dir PATH --tokenizer-model PATH "
    "--params-dtype bf16",
    "qwen15": f"{V1} --load-model-type hf --save-model-type mg --target-tensor-parallel-size 8 "
    "--target-pipeline-parallel-size 8 --load-dir PATH --save-dir PATH --tokenizer-model PATH",
    "qwen2 vpp": f"{V1} --load-model-type hf --save-model-type mg --target-tensor-parallel-size 1 "
    "--target-pipeline-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 --load-dir PATH "
    "--save-dir PATH --tokenizer-model PATH --params-dtype bf16",
    "qwen25 list": f"{V1} --load-model-type hf --save-model-type mg --target-tensor-parallel-size "
    "4 --target-pipeline-parallel-size 4 --num-layer-list 1,2,2,3 --load-dir PATH --save-dir PATH "
    "--tokenizer-model PATH --params-dtype bf16",
    "v2": "--load-model-type hf --save-model-type mg --target-tensor-parallel-size 4 "
    "--target-pipeline-parallel-size 2 --load-dir PATH --save-dir PATH --model-type-hf qwen25",
    "v2 defaults": "--load-dir PATH --save-dir PATH --model-type-hf qwen25",
    "v2 merge": "--load-model-type mg --save-model-type hf --load-dir PATH --save-dir PATH "
    "--hf-cfg-dir PATH --model-type-hf qwen25",
}
LINES = [
    *(line for line in command_lines("convert") if not line.is_moe and "lora" not in line.name),
    *(CommandLine(name, "convert", "7B", 1, words.split()) for name, words in SIBLINGS.items()),
]


def run(words: list[str]) -> Ended:
    """The command as it stands; `toys.convert` would add flags."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = run_command(lambda: main(words))
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Ended(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hugging_face_folder(tmp_path_factory.mktemp("model_from_hf") / "hf", CONFIG)


@pytest.fixture(scope="module")
def shards(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards as MindSpeed-LLM's converters leave them: without config.json and tokenizer."""
    folder = tmp_path_factory.mktemp("model_weights") / "mcore"
    convert(original, folder, *tp(2), *pp(2)).require()
    leave_shards(folder)
    return folder


def leave_shards(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file() and path.name != "latest_checkpointed_iteration.txt":
            path.unlink()


@pytest.mark.parametrize("line", LINES, ids=[line.name for line in LINES])
def test_every_line_converts(
    line: CommandLine, original: Path, shards: Path, tmp_path: Path
) -> None:
    """Splitting, the result merges back bit for bit; merging, it is where their users look."""
    is_said = "--save-model-type" in line.flags
    merges = is_said and line.values("--save-model-type") == ["hf"]
    ours = tmp_path / "original"
    shutil.copytree(original, ours)
    before = fingerprint(ours)
    save = ours if merges else tmp_path / "saved"
    paths = {
        "--load-dir": shards if merges else ours,
        "--save-dir": save,
        "--tokenizer-model": ours / "tokenizer.json",
        "--hf-cfg-dir": ours,
    }
    run(line.with_paths(paths)).require()
    after = fingerprint(ours)
    assert {name: after[name] for name in before} == before
    if merges:
        assert load_folder(save / "mg2hf") == load_folder(original)
        assert (save / "mg2hf" / "tokenizer.json").is_file()
        return
    assert (save / "latest_checkpointed_iteration.txt").is_file()
    convert(save, tmp_path / "back", to="hf").require()
    assert load_folder(tmp_path / "back") == load_folder(original)


def test_line_of_experts_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (line,) = (line for line in command_lines("convert") if line.is_moe)
    ended = run(line.with_paths({"--load-dir": tmp_path, "--save-dir": tmp_path})).require(2)
    assert len(ended.err.splitlines()) == 1 and "models with experts" in ended.err


def test_merge_goes_beside_nothing_that_is_there(
    original: Path, shards: Path, tmp_path: Path
) -> None:
    """A merge that is there already is kept, unless --overwrite says otherwise."""
    ours = tmp_path / "original"
    shutil.copytree(original, ours)
    words = f"{V1} --load-model-type mg --save-model-type hf --load-dir {shards} --save-dir {ours}"
    ended = run(words.split()).require()
    assert f"{ours} stays as it is; the result is {ours / 'mg2hf'}" in ended.err
    assert "--overwrite" in run(words.split()).require(2).err
    run([*words.split(), "--overwrite"]).require()
    assert load_folder(ours / "mg2hf") == load_folder(original)


@pytest.mark.parametrize("flag", CONVERT_FLAGS)
def test_every_pasted_flag_is_said_or_refused(flag: str, original: Path, tmp_path: Path) -> None:
    meaning = CONVERT_FLAGS[flag]
    known = {"--num-layers": "8", "--true-vocab-size": "96"}
    value = [] if meaning.values == () else [known.get(flag) or (meaning.values or ("x",))[0]]
    words = ["--load-dir", str(original), "--save-dir", str(tmp_path / "saved"), *tp(2), flag]
    ended = run([*map(str, words), *value]).require(2 if meaning.refused else 0)
    assert " ".join([flag, *value]) in ended.err and meaning.says in ended.err
    assert (tmp_path / "saved").exists() != meaning.refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-layers 28", "--num-layers 28: the config says 8"),
        ("--true-vocab-size 97", "config.json says 96"),
        ("--target-expert-parallel-size 2", "only 1 is supported"),
        ("--model-type-hf baichuan", "only llama2 and qwen2 and qwen25 is supported"),
        ("--model-type-hf qwen2-moe", "models with experts"),
        ("--moe_grouped_gemm", "models with experts"),
        ("--lora-r 8", "--lora-r: name the LoRA checkpoint with --lora-load"),
    ],
)
def test_what_does_not_hold_is_refused(
    words: str, message: str, original: Path, tmp_path: Path
) -> None:
    line = f"--load-dir {original} --save-dir {tmp_path / 'saved'} {words}"
    assert message in run(line.split()).require(2).err
    assert not (tmp_path / "saved").exists()


def test_params_dtype_casts(tmp_path: Path) -> None:
    weights = {
        name: np.ones(shape, np.float32)
        for name, shape in hugging_face_shapes(toy_config(dtype="fp32")).items()
    }
    source = make_hugging_face_folder(tmp_path / "hf", toy_config(dtype="fp32"), weights=weights)
    words = f"--load-dir {source} --save-dir {tmp_path / 'mg'} --params-dtype bf16"
    run(words.split()).require()
    convert(tmp_path / "mg", tmp_path / "back", to="hf").require()
    assert {one.dtype for one in load_folder(tmp_path / "back").values()} == {"bfloat16"}


# --- LoRA -----------------------------------------------------------------------------------------

MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
BY_COLUMNS = ("linear_proj", "linear_fc2")
RANK, ALPHA = 8, 16
LAYOUTS = {
    "one rank": [],
    "TP2 PP2": [*tp(2), *pp(2)],
    "TP4": tp(4),
    "VPP": [*tp(2), *pp(2), "--num-layers-per-virtual-pipeline-stage", 1],
    "uneven": [*pp(2), "--num-layer-list", "1,3"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hugging_face_folder(tmp_path_factory.mktemp("base") / "hf")


def make_lora_run(
    base: Path,
    folder: Path,
    flags: list[Any],
    modules: tuple[str, ...] = MODULES,
    whole: bool = False,
) -> tuple[Path, Path]:
    """Shards of a LoRA run, as MindSpeed-LLM's training saves them, and the model it has become.

    The matrices of each rank are those of its own part of a module: W + alpha / r * B A holds for
    each rank by itself. With `whole` the weights lie beside them as base_layer.
    """
    shards = folder / "base"
    convert(base, shards, *flags).require()
    lora, merged = folder / "lora", folder / "merged"
    shutil.copytree(shards, lora)
    shutil.copytree(shards, merged)
    for path in sorted(shards.rglob("model_optim_rng.pt")):
        state = torch.load(path, weights_only=False)
        after = torch.load(path, weights_only=False)
        tp_rank = int(path.parent.name.split("_")[2])
        for key in [key for key in state if key.startswith("model")]:
            found: dict[str, Any] = {}
            for name, weight in state[key].items():
                module = name.split(".")[-2] if name.count(".") > 2 else ""
                if module not in modules:
                    found |= {name: weight} if whole else {}
                    continue
                stem, kind = name.rsplit(".", 1)
                found |= {f"{stem}.base_layer.{kind}": weight} if whole else {}
                if kind != "weight":
                    continue
                where = f"{path.parent.parent}{path.parent.name[10:]}{key}{name}"
                a, b = _matrices(where, module, weight, tp_rank)
                found |= {f"{stem}.lora_A.default.weight": a, f"{stem}.lora_B.default.weight": b}
                after[key][name] = weight + ALPHA / RANK * (b @ a)
            state[key] = found
        state["args"] = argparse.Namespace(**vars(state["args"]), lora_alpha=ALPHA, lora_r=RANK)
        torch.save(state, lora / path.relative_to(shards))
        torch.save(after, merged / path.relative_to(shards))
    for one in (lora, merged):
        for manifest in one.rglob("qwen2_ascend_manifest.json"):
            manifest.unlink()
    leave_shards(lora)
    return lora, merged


def _matrices(where: str, module: str, weight: Any, tp_rank: int) -> tuple[Any, Any]:
    """A rank's A and B; the one that is not cut is the same on every tensor-parallel rank."""

    def random(shape: tuple[int, int], of_rank: bool) -> Any:
        words = f"{where}{shape}{tp_rank if of_rank else ''}".encode()
        seed = int.from_bytes(hashlib.md5(words).digest()[:4], "little")
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1

    by_columns = module in BY_COLUMNS
    a = random((RANK, weight.shape[1]), by_columns)
    return a, random((weight.shape[0], RANK), not by_columns)


def is_merged(found: Path, merged: Path) -> None:
    """A folder has the weights of shards."""
    expected = found.with_name(f"{found.name}_expected")
    convert(merged, expected, to="hf").require()
    same_weights(found, expected)


def same_weights(one: Path, other: Path) -> None:
    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_shards_are_merged(layout: str, whole: bool, base: Path, tmp_path: Path) -> None:
    """The published line, into mg2hf/ of the original; whatever layout the run had."""
    (line,) = (line for line in command_lines("convert") if "lora" in line.name)
    lora, merged = make_lora_run(base, tmp_path, LAYOUTS[layout], whole=whole)
    ours = tmp_path / "original"
    shutil.copytree(base, ours)
    paths = {"--load-dir": tmp_path / "base", "--lora-load": lora, "--save-dir": ours}
    ended = run([*line.with_paths(paths), "--verify"]).require()
    assert "LoRA of rank 8" in ended.err
    is_merged(ours / "mg2hf", merged)
    with pytest.raises(AssertionError):
        same_weights(ours / "mg2hf", base)


def test_second_converters_lora_line(base: Path, tmp_path: Path) -> None:
    lora, merged = make_lora_run(base, tmp_path, LAYOUTS["TP2 PP2"], ("linear_qkv", "linear_fc2"))
    words = f"""--load-model-type mg --save-model-type hf --lora-r 8 --lora-alpha 16
        --lora-target-modules linear_qkv linear_fc2 --load-dir {tmp_path / "base"}
        --lora-load {lora} --save-dir {tmp_path / "hf"} --hf-cfg-dir {base}
        --model-type-hf qwen25"""
    run(words.split()).require()
    is_merged(tmp_path / "hf", merged)


def test_adapter_of_other_shards_than_the_models(base: Path, tmp_path: Path) -> None:
    """The base model may be cut otherwise, or not at all."""
    lora, merged = make_lora_run(base, tmp_path, LAYOUTS["TP2 PP2"])
    convert(base, tmp_path / "hf", "--adapter", lora, to="hf").require()
    is_merged(tmp_path / "hf", merged)


def test_adapter_that_was_trained_on_another_model(base: Path, tmp_path: Path) -> None:
    lora, _ = make_lora_run(base, tmp_path, LAYOUTS["TP2 PP2"], whole=True)
    other = make_tiny_hugging_face_folder(tmp_path / "other", seed=1)
    ended = convert(other, tmp_path / "hf", "--lora-load", lora, to="hf").require(2)
    assert "merge it into its own model" in ended.err and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lora-r 16", "--lora-r 16: {lora}/iter_0000001 is of rank 8"),
        ("--lora-alpha 32", "--lora-alpha 32: {lora}/iter_0000001 was trained with 16"),
        ("--lora-target-modules linear_qkv", "linear_qkv: {lora}/iter_0000001 adapts q_proj,"),
    ],
)
def test_flags_about_the_adapter_are_held_to_it(
    flags: str, message: str, base: Path, tmp_path: Path
) -> None:
    lora, _ = make_lora_run(base, tmp_path, [])
    ended = convert(base, tmp_path / "hf", "--lora-load", lora, *flags.split(), to="hf").require(2)
    assert message.format(lora=lora) in ended.err


def test_alpha_is_asked_for_where_nothing_says_it(base: Path, tmp_path: Path) -> None:
    lora, merged = make_lora_run(base, tmp_path, [])
    (path,) = lora.rglob("model_optim_rng.pt")
    state = torch.load(path, weights_only=False)
    del state["args"].lora_alpha
    torch.save(state, path)
    ended = convert(base, tmp_path / "hf", "--lora-load", lora, to="hf").require(2)
    assert "give --lora-alpha" in ended.err
    convert(base, tmp_path / "hf", "--lora-load", lora, "--lora-alpha", 16, to="hf").require()
    is_merged(tmp_path / "hf", merged)


def test_half_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    lora, _ = make_lora_run(base, tmp_path, [])
    (path,) = lora.rglob("model_optim_rng.pt")
    state = torch.load(path, weights_only=False)
    name = "decoder.layers.1.mlp.linear_fc2.lora_A.default.weight"
    state["model"] = {key: value for key, value in state["model"].items() if key != name}
    torch.save(state, path)
    ended = convert(base, tmp_path / "hf", "--lora-load", lora, to="hf").require(2)
    assert "layer 1: mlp.linear_fc2 has no pair of lora_A and lora_B" in ended.err


@pytest.mark.parametrize("what", ["nothing", "no adapter"])
def test_folder_without_adapter(what: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    if what == "no adapter":
        convert(base, tmp_path / "mg").require()
        folder = tmp_path / "mg"
    ended = convert(base, tmp_path / "hf", "--lora-load", folder, to="hf").require(2)
    expected = "holds no LoRA adapter" if what == "nothing" else "hold no lora_A and lora_B"
    assert expected in ended.err


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_own_lora_run_and_peft_folder_are_taken_by_the_same_flag(
    base: Path, tmp_path: Path
) -> None:
    """An iteration of our LoRA run is a PEFT folder; its run's folder names it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    names = ["q_proj", "v_proj", "down_proj"]
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=False)
    )
    iteration = tmp_path / "run" / "iter_0000003"
    adapted.save_pretrained(iteration)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("3")
    adapted.merge_and_unload().save_pretrained(tmp_path / "expected")
    for number, folder in enumerate((tmp_path / "run", iteration)):
        saved = tmp_path / f"hf{number}"
        ended = convert(base, saved, "--lora-load", folder, "--lora-r", 4, to="hf").require()
        same_weights(saved, tmp_path / "expected")
        assert "was trained on" not in ended.err
    config = json.loads((iteration / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "elsewhere/another-model"
    (iteration / "adapter_config.json").write_text(json.dumps(config))
    ended = convert(base, tmp_path / "other", "--lora-load", iteration, to="hf").require()
    assert "was trained on elsewhere/another-model; it is merged into another" in ended.err


def test_two_names_of_one_thing_do_not_contradict(original: Path, tmp_path: Path) -> None:
    base = f"--load-dir {original} --save-dir {tmp_path / 'out'} --save-model-type mg"
    for flags, words in (
        ("--params-dtype fp16 --dtype bf16", "--dtype says it too; leave one of them out"),
        ("--adapter a --lora-load b", "two names of one flag"),
    ):
        assert words in run(f"{base} {flags}".split()).require(2).err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_the_other_kind_is_named(original: Path, shards: Path, tmp_path: Path) -> None:
    for kind, folder, words in (
        ("mg", original, "is a Hugging Face folder"),
        ("hf", shards, "holds Megatron shards"),
    ):
        line = f"--load-model-type {kind} --load-dir {folder} --save-dir {tmp_path / 'out'}"
        ended = run(line.split()).require(2)
        assert words in ended.err and "--load-model-type" in ended.err


@pytest.mark.parametrize("flags", ["--overwrite", ""])
def test_v2_never_writes_over_the_original(
    flags: str, original: Path, shards: Path, tmp_path: Path
) -> None:
    """Whether or not --hf-cfg-dir names it: what nobody wrote with this project is left alone."""
    folder = shutil.copytree(original, tmp_path / "hf")
    before = fingerprint(folder)
    line = f"--load-model-type mg --save-model-type hf --load-dir {shards} --save-dir {folder}"
    run(f"{line} --model-type-hf qwen25 --hf-cfg-dir {original} {flags}".split()).require()
    assert (folder / "mg2hf" / "config.json").is_file()
    shutil.rmtree(folder / "mg2hf")
    assert fingerprint(folder) == before
