"""Settings, records and judging without torchrun; the command line in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.command_lines import COMMANDS, SHAPE
from commands import World, run_commands
from helpers import make_tiny_hugging_face_folder, tiny_config
from qwen2_ascend.alignment import judge as judging
from qwen2_ascend.alignment.align import align
from qwen2_ascend.alignment.record import Record, load_record, save_record
from qwen2_ascend.alignment.reference import compute, load_model, widened
from qwen2_ascend.alignment.report import to_json
from qwen2_ascend.alignment.settings import parse, validate
from qwen2_ascend.alignment.sublayers import describe, full_name, sublayers
from qwen2_ascend.checkpoint.source import open_source
from qwen2_ascend.errors import UserError

CONFIG = tiny_config(num_layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hugging_face_folder(tmp_path_factory.mktemp("model") / "hf", CONFIG, seed=2)


@pytest.fixture(scope="module")
def own(folder: Path) -> tuple[Record, object]:
    """transformers' own run in fp32 as a record, and its model."""
    model = load_model(open_source(folder), None, torch.float32)
    tokens = torch.randint(CONFIG.vocab_size, (2, 1, 9), generator=torch.Generator().manual_seed(1))
    found = compute(model, tokens, with_gradients=True)
    record = Record(
        config=CONFIG,
        precision="fp32",
        origin="transformers",
        tokens=tokens,
        activations=found.activations,
        loss=found.loss,
        gradients=found.gradients,
    )
    return record, model


# --- judging -------------------------------------------------------------------------------------


def judged(record: Record, model: object, **wrong: torch.Tensor) -> list[judging.Finding]:
    """Every sublayer of the record, some of whose outputs are others."""
    record = dataclasses.replace(record, activations={**record.activations, **wrong})
    return judging.judge_sublayers(record, model, 4.0)


def test_each_sublayer_of_transformers_is_what_its_forward_computes(own) -> None:
    """Its own run, judged sublayer by sublayer, is off by its own noise and by nothing else."""
    record, model = own
    findings = judged(record, model)
    assert [x.name for x in findings] == [x.name for x in sublayers(CONFIG.num_layers)]
    assert record.activations.keys() == {x.name for x in findings}
    assert not any(finding.parted for finding in findings)
    assert all(x.own.worst <= x.noise.worst for x in findings), findings
    noisy = [x for x in findings if not x.name.endswith(("input", "embedding"))]
    assert all(x.noise.mean > 0 for x in noisy)


@pytest.mark.parametrize("name", [x.name for x in sublayers(2)])
def test_a_small_fault_of_any_sublayer_is_located(own, name: str) -> None:
    """One token's output is off by 1e-4: the sublayer parts; what is computed from it does not
    see its right input, so it parts as well, and nothing before it does."""
    record, model = own
    wrong = record.activations[name].clone()
    wrong[0, -1] *= 1.0001
    parted = [x.name for x in judged(record, model, **{name: wrong}) if x.parted]
    assert parted[0] == name
    children = {x.name for x in sublayers(2) if name in x.parents}
    assert set(parted) <= {name} | children


def test_nan_parts(own) -> None:
    record, model = own
    name = full_name(1, "up")
    wrong = record.activations[name].clone()
    wrong[1, 2, 3] = torch.nan
    assert next(x for x in judged(record, model, **{name: wrong}) if x.parted).name == name


def test_fp64_of_transformers_goes_through_no_fp32(folder: Path, own) -> None:
    """Widened, its logits are those of all sublayers one after the other in fp64."""
    record, _ = own
    model = widened(load_model(open_source(folder), None, torch.float32), torch.float64)
    found = compute(model, record.tokens, with_gradients=False)
    assert all(x.dtype == torch.float64 for x in found.activations.values())
    wide = dataclasses.replace(record, precision="fp64", activations=found.activations)
    narrow = load_model(open_source(folder), None, torch.float32)
    assert max(x.own.worst for x in judged(wide, narrow)) < 1e-14
    exact = {k: v.double() for k, v in record.activations.items()}
    assert 1e-9 < judging.token_error(exact["logits"], found.activations["logits"]).mean < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_are_not_rounded_to_16_bits(folder: Path, dtype: torch.dtype) -> None:
    """transformers itself rounds them where it loads in that dtype: then angles are off by far more
    than the dtype rounds, and a wrong rotary base of ours would pass as noise."""
    from transformers import Qwen2ForCausalLM

    model = load_model(open_source(folder), None, dtype)
    theirs: Any = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype)
    assert torch.equal(model.model.rotary_emb.inv_freq, theirs.model.rotary_emb.inv_freq)
    tokens = torch.arange(48).view(1, -1)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, theirs(tokens).logits)


def test_gradients_are_handed_over_whole_and_dropped(folder: Path, own) -> None:
    """Over two micro-batches they are those that are kept without `take`."""
    record, _ = own
    tokens = record.tokens.flatten(0, 1).unsqueeze(1)
    assert len(tokens) > 1
    model = load_model(open_source(folder), None, torch.float64)
    kept = compute(model, tokens, with_gradients=True).gradients
    taken: dict[str, torch.Tensor] = {}
    found = compute(model, tokens, with_gradients=True, take=taken.__setitem__)
    assert not found.gradients
    assert taken.keys() == kept.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(taken[name], kept[name]) for name in kept)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_reference_curve_is_that_of_torch_adamw(folder: Path, monkeypatch) -> None:
    """Weights updated piece by piece, each in the backward that makes its gradient."""
    from qwen2_ascend.alignment import curve
    from qwen2_ascend.alignment.settings import CheckSettings

    monkeypatch.setattr(curve, "PIECE", 1000)
    checks = CheckSettings(lr=1e-2, weight_decay=0.1, clip_grad=0.5)
    tokens = torch.randint(256, (3, 2, 1, 13), generator=torch.Generator().manual_seed(3))
    model = load_model(open_source(folder), None, torch.float64)
    found = curve.reference_curve(model, model, tokens, checks)

    plain = load_model(open_source(folder), None, torch.float64)
    groups = [
        {"params": [p for p in plain.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    for step, (loss, norm) in zip(tokens, found, strict=True):
        optimizer.zero_grad()
        total = 0.0
        for batch in step:
            logits = plain(batch[:, :-1]).logits.flatten(0, 1)
            part = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten()) / len(step)
            part.backward()
            total += part.item()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item()
        optimizer.step()
        assert (loss, norm) == (pytest.approx(total, rel=1e-7), pytest.approx(expected, rel=1e-6))


def test_token_errors_are_relative_to_each_token() -> None:
    """A token of large numbers, as Qwen's first is, hides nothing of the others."""
    reference = torch.ones(1, 4, 8)
    reference[0, 0] = 1e6
    ours = reference.clone()
    ours[0, 2] += 0.5
    error = judging.Error(pytest.approx(0.125), pytest.approx(0.5))
    assert judging.token_error(ours, reference) == error
    assert judging.token_error(reference, reference) == judging.Error(0, 0)
    assert judging.token_error(ours, torch.zeros_like(ours)).worst == torch.inf


def test_steps_part_where_the_loss_leaves_the_noise() -> None:
    exact = [(2.0, 1.0), (1.9, 1.0), (1.8, 1.0)]
    narrow = [(2.001, 1.0), (1.9, 1.0), (1.8, 1.0)]
    ours = [(2.003, 1.0), (1.903, 1.0), (1.81, 1.0)]
    steps = judging.judge_steps(ours, exact, narrow, "fp32", 4.0)
    assert [step.parted for step in steps] == [False, False, True]


def test_places_are_said_in_words() -> None:
    assert describe("layers.3.query_rotary") == "layer 3, query, rotated"
    assert describe("final_layernorm") == "final norm"


# --- records -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_record_comes_back(own, tmp_path: Path, dtype: torch.dtype) -> None:
    record, _ = own
    activations = {name: tensor.to(dtype) for name, tensor in record.activations.items()}
    save_record(dataclasses.replace(record, activations=activations), tmp_path / "dump")
    read = load_record(tmp_path / "dump")
    assert (read.loss, read.precision, read.origin) == (record.loss, "fp32", "transformers")
    assert dataclasses.replace(read.config, dtype="fp32") == CONFIG
    assert torch.equal(read.tokens, record.tokens)
    for ours, theirs in ((read.activations, activations), (read.gradients, record.gradients)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    save_record(dataclasses.replace(record, gradients={}), tmp_path / "dump")
    assert load_record(tmp_path / "dump").gradients == {}


def test_a_broken_record_is_refused(own, tmp_path: Path) -> None:
    record, _ = own
    activations = {k: v for k, v in record.activations.items() if k != "layers.1.up"}
    save_record(dataclasses.replace(record, activations=activations), tmp_path)
    with pytest.raises(UserError, match=r"layers\.1\.up is missing"):
        load_record(tmp_path)
    (tmp_path / "activations.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        load_record(tmp_path)
    (tmp_path / "description.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="not of an alignment record"):
        load_record(tmp_path)


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "world_size", "told"),
    [
        ("--tensor-model-parallel-size 2", 1, "1 process(es) for one copy"),
        ("--tensor-model-parallel-size 2", 4, "torchrun --nproc-per-node 2"),
        ("--tensor-model-parallel-size 3", 3, "does not divide num_attention_heads=8"),
        ("--precision fp64 --train-iters 2", 1, "compare losses in fp32 or bf16"),
        ("--fp16 --train-iters 2", 1, "compare losses in fp32 or bf16"),
        ("--bf16 --fp16", 1, "--bf16 and --fp16: give one"),
        ("--bf16 --precision fp64", 1, "--precision fp64 and --bf16: give one"),
        ("--precision fp64 --device npu", 1, "no fp64"),
        ("--prompt x --prompt-file y", 1, "--prompt and --prompt-file"),
        ("--prompt-file nowhere", 1, "--prompt-file nowhere: no such file"),
        ("--micro-batch-size 2 --global-batch-size 3", 1, "not a multiple of"),
        ("--seq-length 4096", 1, "max_position_embeddings"),
        ("--noise-factor 0.5", 1, "--noise-factor 0.5 must be at least 1"),
        ("--dump-only", 1, "--dump-only needs --dump"),
        ("--dump d --dump-only --report r", 1, "there is no report"),
        ("--compare-with nowhere", 1, "nowhere: holds no description.json"),
        ("--from-dump nowhere", 2, "--from-dump needs one process"),
        ("--lr 1e-3 --clip-grad 0", 1, "--lr, --clip-grad: there are no steps without --train-it"),
        (
            "--from-dump d --bf16 --tensor-model-parallel-size 2 --seq-length 9 --prompt x "
            "--use-flash-attn --device npu --dump e --train-iters 2 --lr 1",
            1,
            "--from-dump runs nothing; leave --bf16, --tensor-model-parallel-size, --seq-length, "
            "--prompt, --train-iters, --lr, --dump, --use-flash-attn, --device out.",
        ),
        ("--compare-with d --prompt x", 1, "--compare-with brings its own tokens; leave --prompt"),
        ("--html nowhere/page.html", 1, "/nowhere; make it first"),
        ("--reference-model nowhere", 1, "--reference-model nowhere: holds no config.json"),
    ],
)
def test_mistakes_are_told_before_any_work(flags: str, world_size: int, told: str) -> None:
    settings = parse(["--load", "somewhere", *flags.split()])
    with pytest.raises(UserError) as caught:
        validate(settings, CONFIG, world_size)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--from-dump {} --device cpu --no-mindspeed --no-gradients --noise-factor 5 --json a.json",
        "--from-dump {} --compare-with {} --reference-model {}",
        "--compare-with {} --prompt x --train-iters 2 --lr 1e-3",
    ],
)
def test_what_a_dump_is_judged_by_may_be_said(flags: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "description.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    validate(parse(["--load", "m", *flags.replace("{}", str(tmp_path)).split()]), CONFIG, 1)


def test_all_mistakes_are_told_at_once() -> None:
    flags = "--load x --bf16 --fp16 --noise-factor 0 --dump-only --tensor-model-parallel-size 3"
    with pytest.raises(UserError) as caught:
        validate(parse(flags.split()), CONFIG, 3)
    assert len(caught.value.faults) >= 4


def test_a_missing_package_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(UserError, match=r"pip install 'qwen2-ascend\[report\]'"):
        validate(parse(["--load", "x", "--report", "out"]), CONFIG, 1)
    validate(parse(["--load", "x", "--json", "out.json"]), CONFIG, 1)


def test_a_refused_text_leaves_no_process_group(folder: Path) -> None:
    """The process could not align again: groups are there once."""
    with pytest.raises(UserError, match="no tokenizer can be read"):
        align(parse(["--load", str(folder), "--prompt", "hello", "--device", "cpu"]))
    assert not torch.distributed.is_initialized()


# --- the command ---------------------------------------------------------------------------------


def _without_a_key_bias(folder: Path, target: Path) -> None:
    """The same model, but for one tensor of layer 1."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.bias"].zero_()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def world(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    place = tmp_path_factory.mktemp("commands")
    (place / "hf").symlink_to(folder)
    make_tiny_hugging_face_folder(place / "other", CONFIG, seed=9)
    _without_a_key_bias(folder, place / "other-key")
    commands = {
        name: {"program": "align", "flags": [*line.flags.split(), "--device", "cpu"]}
        for name, line in COMMANDS.items()
    }
    return World(place, run_commands(place, commands))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_exit_status_says_whether_they_part(world: World, name: str) -> None:
    ended = world.runs[name]
    assert ended.status == COMMANDS[name].status, ended
    assert COMMANDS[name].told in ended.out + ended.err, ended


def test_the_report_is_one_file(world: World) -> None:
    page = (world.folder / "report" / "report.html").read_text(encoding="utf-8")
    assert page.index("ALIGNED") < page.index("<table>")
    assert page.count("data:image/png;base64,") == 2  # the heat map, the loss curve
    assert "http" not in page.replace("http-equiv", "")
    for sublayer in sublayers(CONFIG.num_layers):
        assert describe(sublayer.name) in page
    picture = (world.folder / "report" / "heatmap.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_the_json_has_every_figure(world: World) -> None:
    found = json.loads((world.folder / "report" / "report.json").read_text(encoding="utf-8"))
    assert found["aligned"] is True and found["first"] is None
    assert [x["name"] for x in found["sublayers"]] == [x.name for x in sublayers(2)]
    assert len(found["gradients"]) == 12 * 2 + 3
    assert [step["step"] for step in found["steps"]] == [1, 2]
    assert found["logits"]["top1"] == 1.0


def test_another_models_weights_part_at_the_embedding(world: World) -> None:
    found = json.loads((world.folder / "parted.json").read_text(encoding="utf-8"))
    assert found["aligned"] is False and found["first"] == "embedding"


def test_a_dump_holds_the_run(world: World) -> None:
    record = load_record(world.folder / "dump")
    n, b, s = SHAPE
    assert record.tokens.shape == (n, b, s + 1)
    assert record.activations["logits"].shape == (n * b, s, CONFIG.vocab_size)
    assert record.activations["layers.1.key_rotary"].shape == (n * b, s, 4 * 8)
    assert record.gradients["model.layers.0.mlp.up_proj.weight"].shape == (96, 64)


def test_json_has_no_infinity(own) -> None:
    record, model = own
    infinite = torch.full_like(record.activations["logits"], torch.inf)
    findings = tuple(judged(record, model, logits=infinite))
    figures = {"noise_factor": 4.0, "loss": 1.0, "loss_noise": 0.0}
    found = judging.Judgement(record=record, wide="fp64", findings=findings, **figures)
    json.dumps(to_json(found, None), allow_nan=False)
