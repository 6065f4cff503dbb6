"""The flags that hide tensor parallelism's exchange: what they mean, and what is refused."""

from __future__ import annotations

import pytest

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning import settings as finetuning
from qwen2_ascend.training import settings as pretraining

NEEDED = "--mock-data --seq-length 32 --lr 1e-5 --train-iters 3"
TP2, SP = "--tensor-model-parallel-size 2", "--sequence-parallel"
MC2, COC = "--use-ascend-mc2", "--use-ascend-coc"


def faults(flags: str, model: str = "7B", world_size: int = 8) -> list[str]:
    settings = pretraining.parse(f"{NEEDED} --config {model} {flags}".split())
    try:
        pretraining.validate(settings, Qwen2Config.named(model), world_size)
    except UserError as error:
        return list(error.faults)
    return []


@pytest.mark.parametrize(
    ("flags", "model", "words"),
    [
        (f"{MC2} {COC} --bf16 {TP2} {SP}", "7B", ["give one of them"]),
        (f"{MC2} {TP2} {SP}", "7B", ["multiplies bf16 or fp16, not fp32; add --bf16"]),
        (f"{MC2} --bf16 {SP} --tensor-model-parallel-size 16", "72B", ["2, 4 or 8, not 16"]),
        (f"{MC2} --bf16 {TP2}", "7B", ["needs --sequence-parallel", "or say --use-ascend-coc"]),
        (f"{MC2} --bf16 {TP2} {SP} --device cpu", "7B", ["the device is cpu"]),
        (f"{MC2} {TP2} {SP} --device cpu", "7B", ["add --bf16", "the device is cpu"]),
        (f"{COC} --coc-parallel-num 3", "7B", ["3 is not 1, 2, 4 or 8"]),
        ("--coc-parallel-num 4", "7B", ["4 needs --use-ascend-coc"]),
        ("--coc-fused-kernel", "7B", ["needs --use-ascend-coc"]),
        (
            f"{COC} --coc-parallel-num 8 {TP2} {SP} --seq-length 12",
            "7B",
            ["8 does not divide the 6 rows", "use 1, 2, or other lengths"],
        ),
        (f"{COC} --coc-parallel-num 8 {TP2} --seq-length 12", "7B", ["12 rows", "use 1, 2, 4,"]),
    ],
)
def test_what_cannot_be_is_refused(flags: str, model: str, words: list[str]) -> None:
    """The refusal names the way out; it may have several faults at once."""
    found = faults(flags, model, world_size=16)
    told = "\n".join(found)
    assert all(word in told for word in words), told
    assert len(found) == (2 if "add --bf16" in told and "device" in told else 1)


@pytest.mark.parametrize(
    ("columns", "limit"), [("hidden states", 128), ("linear_fc2", 100), ("linear_fc1", 40000)]
)
def test_columns_outside_the_operators_range_are_refused(columns: str, limit: int) -> None:
    from dataclasses import replace

    name = {"hidden states": "hidden_size"}.get(columns, "ffn_hidden_size")
    size = {"linear_fc2": 2 * limit, "linear_fc1": 2 * limit}.get(columns, limit)
    config = replace(Qwen2Config.named("7B"), **{name: size})
    settings = pretraining.parse(f"{NEEDED} --config 7B {MC2} {TP2} {SP} --bf16".split())
    found = settings.overlap.faults(settings, config)
    assert any(f"a rank's {columns}, not" in fault for fault in found)


@pytest.mark.parametrize("size", ["0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"])
def test_every_published_model_fits_the_operators(size: str) -> None:
    """They fit at every number of ranks that the operators and the model allow."""
    from qwen2_ascend.parallel import tensor_parallel_sizes

    for tp in set(tensor_parallel_sizes(Qwen2Config.named(size))) & {2, 4, 8}:
        flags = f"{MC2} {SP} --bf16 --tensor-model-parallel-size {tp}"
        assert faults(flags, size) == [], tp


@pytest.mark.parametrize(
    ("flags", "notes"),
    [
        ("", []),
        (f"{MC2}", ["--use-ascend-mc2 has no effect: without tensor parallelism"]),
        (f"{COC} --coc-parallel-num 4", ["--use-ascend-coc has no effect: without"]),
        (f"{MC2} {TP2} {SP} --bf16", ["torch_npu's fused operators"]),
        (f"{COC} {TP2}", ["no effect with --coc-parallel-num 1"]),
        (f"{COC} {TP2} --coc-parallel-num 4", ["products in 4 pieces"]),
        (
            f"{COC} {TP2} --coc-fused-kernel --coc-parallel-num 2",
            ["its library of kernels is not used", "products in 2 pieces"],
        ),
    ],
)
def test_the_log_says_what_has_an_effect(flags: str, notes: list[str]) -> None:
    assert faults(flags) == []
    settings = pretraining.parse(f"{NEEDED} --config 7B {flags}".split())
    found = settings.overlap.notes(settings.parallel.tensor_model_parallel_size)
    assert len(found) == len(notes)
    assert all(word in note for word, note in zip(notes, found, strict=True))


def test_batches_of_their_own_lengths_are_cut_as_equally_as_can_be() -> None:
    """No length has to be divided: tests/model/overlap_worker.py has pieces of several sizes."""
    flags = f"--config 7B --stage sft --data-path x --lr 1e-5 --train-iters 3 {COC} {TP2}"
    for more, expected in (("", 1), ("--variable-seq-lengths", 0)):
        words = f"{flags} --coc-parallel-num 8 --seq-length 12 {more}".split()
        settings = finetuning.parse(words)
        assert len(settings.overlap.faults(settings, Qwen2Config.named("7B"))) == expected


def test_the_planner_hides_half_of_the_exchange() -> None:
    from qwen2_ascend.planning.devices import find_device
    from qwen2_ascend.training.planned import as_run_layout

    for flags, hides in (("", False), (f"{COC} --coc-parallel-num 2", True), (MC2, True)):
        words = f"{NEEDED} --config 7B --bf16 {TP2} {flags}".split()
        cut = as_run_layout(
            pretraining.parse(words), Qwen2Config.named("7B"), 8, find_device("910B")
        )
        assert cut.mc2 is hides
