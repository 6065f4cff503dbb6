"""Shards go to MindSpeed-LLM's own converters and come from them, bit for bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from checkpoint.toys import convert, load_folder, make_hugging_face_folder, pp, toy_config, tp
from interop.checkouts import TESTS, checkouts, contains, run_python, simulated

V2_MODEL = "qwen25"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How shards are cut; `flags` are the same for their converter and for ours."""

    flags: list[object]
    tied: bool = False


LAYOUTS = {
    "tp1": Layout(flags=[]),
    "tp2": Layout(flags=tp(2)),
    "tp4": Layout(flags=tp(4)),
    "pp2": Layout(flags=pp(2)),
    "tp2-pp2-tied": Layout(flags=[*tp(2), *pp(2)], tied=True),
    "tp2-pp2-vpp2": Layout(
        flags=[*tp(2), *pp(2), "--num-layers-per-virtual-pipeline-stage", 1],
    ),
    "pp2-uneven": Layout(flags=[*pp(2), "--num-layer-list", "1,3"]),
    "tp2-pp3-uneven-tied": Layout(flags=[*tp(2), *pp(3), "--num-layer-list", "2,1,1"], tied=True),
}


@pytest.fixture(scope="module")
def v2() -> list[Path]:
    has = contains("convert_ckpt_v2.py", f"'{V2_MODEL}'")
    return checkouts("MINDSPEED_LLM_PATH", has, f"converter v2 with --model-type-hf {V2_MODEL}")


OF_V2 = LAYOUTS | {
    "tp2-fused-norms": Layout(flags=[*tp(2), "--transformer-impl", "transformer_engine"]),
}
"""Converter v2 also writes the names of Transformer Engine's layers."""


@dataclass(frozen=True, kw_only=True)
class V1:
    """Converter v1: it builds Megatron-LM's model, so it needs all that MindSpeed-LLM needs."""

    checkout: Path
    environment: dict[str, str]

    def run(self, *flags: object) -> None:
        base = ["--use-mcore-models", "--model-type", "GPT", "--model-type-hf", "llama2"]
        base += ["--add-qkv-bias", "--params-dtype", "bf16"]
        script = TESTS / "interop" / "mindspeed_llm_v1.py"
        run_python(
            *("-m", "interop.inside", script, *base, *flags),
            environment=self.environment,
            folder=self.checkout,
        )


@pytest.fixture(scope="module")
def v1() -> V1:
    has = contains("convert_ckpt.py", "--load-model-type")
    checkout = checkouts("MINDSPEED_LLM_PATH", has, "converter v1")[0]
    has = contains("megatron/core/package_info.py", "MINOR = 12\n")
    megatron = checkouts("MEGATRON_LM_PATH", has, "release 0.12")[0]
    has = contains("mindspeed/megatron_adaptor.py", "import")
    mindspeed = checkouts("MINDSPEED_PATH", has, "mindspeed/megatron_adaptor.py")[0]
    return V1(checkout=checkout, environment=simulated(1, checkout, megatron, mindspeed))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A Hugging Face folder, by whether its embeddings are tied."""
    folder = tmp_path_factory.mktemp("models")
    return {
        tied: make_hugging_face_folder(
            folder / f"tied-{tied}", toy_config(num_layers=4, tie_word_embeddings=tied)
        )
        for tied in (False, True)
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_v1_merges_our_shards(name, v1, models, tmp_path):
    """It takes config.json from its --save-dir and writes the model into a folder of that.

    Stages of unequal lengths have to be told to it, as with its own shards.
    """
    layout = LAYOUTS[name]
    model, shards, back = models[layout.tied], tmp_path / "shards", tmp_path / "back"
    convert(model, shards, *layout.flags).require()
    other = toy_config(num_layers=4, tie_word_embeddings=layout.tied)
    make_hugging_face_folder(back, other, seed=1, weights=None)
    told = layout.flags[-2:] if "--num-layer-list" in layout.flags else []
    v1.run(*command("mg", shards, back, *told))
    assert load_folder(back / "mg2hf") == load_folder(model)


@pytest.mark.parametrize("name", LAYOUTS)
def test_we_merge_the_shards_of_v1(name, v1, models, tmp_path):
    layout = LAYOUTS[name]
    model, shards, back = models[layout.tied], tmp_path / "shards", tmp_path / "back"
    tokenizer = ["--tokenizer-model", model / "tokenizer.json"]
    v1.run(*command("hf", model, shards, *tokenizer, *layout.flags))
    convert(shards, back, "--hf-cfg-dir", model, to="hf").require()
    assert load_folder(back) == load_folder(model)


def command(source: str, load: Path, save: Path, *flags: object) -> list[object]:
    """A converter's command line, v1's and v2's alike, from a kind of source to the other one."""
    target = {"hf": "mg", "mg": "hf"}[source]
    return ["--load-model-type", source, "--load-dir", load, "--save-model-type", target,
            "--save-dir", save, *flags]  # fmt: skip


def run_v2(checkout: Path, jobs: list[list[object]], folder: Path) -> str:
    file = folder / "jobs.json"
    file.write_text(json.dumps([[*map(str, job), "--model-type-hf", V2_MODEL] for job in jobs]))
    return run_python(TESTS / "interop" / "mindspeed_llm_v2.py", checkout, file)


def test_v2_merges_our_shards(v2, models, tmp_path):
    for name, layout in LAYOUTS.items():
        convert(models[layout.tied], tmp_path / "ours" / name, *layout.flags).require()
    for checkout in v2:
        back = tmp_path / checkout.name
        jobs = [
            command(
                "mg", tmp_path / "ours" / name, back / name, "--hf-cfg-dir", models[layout.tied]
            )
            for name, layout in LAYOUTS.items()
        ]
        run_v2(checkout, jobs, tmp_path)
        for name, layout in LAYOUTS.items():
            assert load_folder(back / name) == load_folder(models[layout.tied]), (checkout, name)


def test_we_merge_the_shards_of_v2(v2, models, tmp_path):
    """What v2 wrote tells us their layout, their vocabulary and their model."""
    for checkout in v2:
        theirs = tmp_path / checkout.name
        jobs = [
            command("hf", models[layout.tied], theirs / name, *layout.flags)
            for name, layout in OF_V2.items()
        ]
        run_v2(checkout, jobs, tmp_path)
        for name, layout in OF_V2.items():
            model, back = models[layout.tied], theirs / f"back-{name}"
            convert(theirs / name, back, "--hf-cfg-dir", model, to="hf").require()
            assert load_folder(back) == load_folder(model), (checkout, name)
