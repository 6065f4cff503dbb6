"""MindSpeed-LLM's published command lines of pretraining and fine-tuning start here as they are.

Each line is parsed and checked as its launcher does, with the config of the model it is for and its
number of ranks on nodes of eight; and four of them train, on a small model.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from distributed.jobs import ROOT, torchrun
from distributed.pairs_worker import write_corpus
from finetuning.finetune_worker import _write as write_chats
from helpers import make_tiny_hugging_face_folder, tiny_config
from pasted.command_lines import CommandLine, command_lines
from pasted.models import config_of, scaled
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning import settings as finetuning
from qwen2_ascend.pasted_flags import pasted_notes
from qwen2_ascend.training import settings as pretraining
from qwen2_ascend.training.megatron_flags import training_flags

MODULES: dict[str, ModuleType] = {"pretrain": pretraining, "finetune": finetuning}
LINES = [line for kind in MODULES for line in command_lines(kind)]
CUT_SHORT = "pretrain_qwen25_coder_7b_32k_ptd"
"""A script with Windows line ends: all that its command gets is a carriage return."""
WHOLE = [line for line in LINES if not line.is_moe and not line.name.endswith(CUT_SHORT)]
PATHS = dict.fromkeys(
    ("--load", "--save", "--data-path", "--tokenizer-name-or-path", "--lora-load"), "path"
)


def by_name(name: str) -> CommandLine:
    (line,) = (line for line in LINES if line.name == name)
    return line


def without(flags: list[str], left_out: set[str]) -> list[str]:
    """A command line without some flags and their values."""
    kept, keeps = [], True
    for word in flags:
        keeps = word not in left_out if word.startswith("--") else keeps
        kept += [word] if keeps else []
    return kept


def faults(line: CommandLine, words: list[str], config: Qwen2Config) -> list[str]:
    module = MODULES[line.kind]
    try:
        module.validate(module.parse(words), config, line.world_size)
    except UserError as error:
        return list(error.faults)
    return []


@pytest.fixture(autouse=True)
def _on_nodes_of_eight(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    line = getattr(getattr(request.node, "callspec", None), "params", {}).get("line")
    if line is not None:
        monkeypatch.setenv("WORLD_SIZE", str(line.world_size))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(min(line.world_size, 8)))


@pytest.mark.parametrize("line", WHOLE, ids=lambda line: line.name)
def test_a_line_starts(line: CommandLine) -> None:
    assert faults(line, line.with_paths(PATHS), config_of(line)) == []


@pytest.mark.parametrize("line", WHOLE, ids=lambda line: line.name)
def test_a_line_means_what_it_says(line: CommandLine) -> None:
    """Every flag with a value is a setting of that value, or a note of the log with it."""
    module = MODULES[line.kind]
    words = line.with_paths(PATHS)
    settings = module.parse(words)
    notes = "\n".join(pasted_notes(settings.pasted, training_flags(type(settings))))
    assert settings.batch.seq_length == int(line.values("--seq-length")[0])
    assert settings.optimizer.lr == float(line.values("--lr")[0])
    if "--context-parallel-size" in words:
        parallel = settings.parallel
        assert parallel.context_parallel_size == int(line.values("--context-parallel-size")[0])
        assert [parallel.context_parallel_algo] == line.values("--context-parallel-algo")
    for flag, group, name in (
        ("--reset-position-ids", "data", "keep_documents_apart"),
        ("--reset-attention-mask", "data", "keep_documents_apart"),
        ("--variable-seq-lengths", "data", "variable_seq_lengths"),
        ("--no-pad-to-seq-lengths", "data", "variable_seq_lengths"),
        ("--neat-pack", "data", "pack"),
        ("--no-shuffle", "data", "no_shuffle"),
        ("--manual-gc", "runtime", "manual_gc"),
    ):
        held = getattr(getattr(settings, group), name, None)
        if flag in words and held is not None:
            assert held is True, flag
        elif flag in words:
            assert flag in notes
    if "--rope-scaling-type" in words:
        yarn = settings.config_of_run(config_of(line)).yarn
        assert yarn is not None
        assert yarn.factor == float(line.values("--rope-scaling-factor")[0])
        original = line.values("--rope-scaling-original-max-position-embeddings")
        assert yarn.original_max_position_embeddings == int(original[0])
        assert "--rope-scaling-type yarn" in notes


@pytest.mark.parametrize(
    "line", [line for line in LINES if line.is_moe], ids=lambda line: line.name
)
def test_a_model_with_experts_is_refused_in_one_sentence(line: CommandLine) -> None:
    (fault,) = faults(line, line.with_paths(PATHS), tiny_config())
    assert "mixture-of-experts" in fault and "dense models only" in fault
    assert "--num-experts" in fault or "--moe" in fault


def test_a_script_with_windows_line_ends_is_told_so() -> None:
    (line,) = (line for line in LINES if line.name.endswith(CUT_SHORT))
    (fault,) = faults(line, line.with_paths(PATHS), tiny_config())
    assert "Windows line ends" in fault and "sed -i" in fault


def test_a_folder_decides_against_a_flag() -> None:
    """This line's epsilon is not that of the model it is for; MindSpeed-LLM does not look."""
    line = by_name("2.2.0/deepseek_r1_distill_qwen/tune_distill_qwen_14b_full")
    words = line.with_paths(PATHS)
    config = Qwen2Config.named("DeepSeek-R1-Distill-Qwen-14B")
    (fault,) = faults(line, words, config)
    assert fault.startswith("--norm-epsilon 1e-6: the config says 1e-05, and it decides")


# --- truly started --------------------------------------------------------------------------------

FUSED = {"--use-flash-attn", "--use-fused-rmsnorm", "--use-fused-rotary-pos-emb"}
FUSED |= {"--use-fused-swiglu"}
"""Kernels of an NPU's, which a cpu refuses."""
SMALL = tiny_config(max_position_embeddings=64)
"""The model that a line is for instead."""


def small(line: CommandLine, paths: dict[str, Path], tp: int, device: str = "cpu") -> list[str]:
    """The line for a small model, cut into `tp` ranks; where it cuts sequences, into two parts."""
    flag = "--context-parallel-size"
    cp = 2 if flag in line.flags and line.values(flag)[:1] != ["1"] else 1
    words = without(line.with_paths(paths), FUSED if device == "cpu" else set())
    words = scaled(
        words,
        SMALL,
        tensor_model_parallel_size=tp // cp,
        context_parallel_size=cp,
        pipeline_model_parallel_size=1,
        num_layer_list=None,
        num_layers_per_virtual_pipeline_stage=None,
        train_iters=2,
        global_batch_size=4,
    )
    return [*words, "--device", device]


@pytest.fixture(name="paths")
def _paths(tmp_path: Path) -> dict[str, Path]:
    return made_paths(tmp_path)


def made_paths(tmp_path: Path) -> dict[str, Path]:
    """A model, documents that end with its eos_token_id, prepared chats, and where to save."""
    folder = make_tiny_hugging_face_folder(tmp_path / "hf", tiny_config())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    write_corpus(tmp_path / "corpus")
    write_chats(tmp_path / "chats", "", 30, seed=0)
    return {
        "--load": folder,
        "--tokenizer-name-or-path": folder,
        "--save": tmp_path / "saved",
        "--data-path": tmp_path / "corpus",
    }


def run(line: CommandLine, paths: dict[str, Path], ranks: int) -> str:
    """The log of a line that has trained to its end."""
    launcher = ROOT / "launch" / f"{line.kind}_qwen2.py"
    script = [str(launcher), *small(line, paths, ranks)]
    nodes = f"--standalone --nproc-per-node {ranks}"
    with torchrun(paths["--save"].parent / "job", script, nodes) as job:
        assert job.wait(400) == [0], job.log[-4000:]
        return job.log


def losses(paths: dict[str, Path]) -> list[float]:
    text = (paths["--save"] / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.distributed
def test_yarn_and_manual_gc_run(paths: dict[str, Path]) -> None:
    """The checkpoint's config.json has the scaling, so what is trained with it is used with it."""
    line = by_name("2.2.0/qwen2/pretrain_qwen2_72b_32k_ptd")
    log = run(line, paths, 2)
    assert "TP1 PP1 CP2 DP1, megatron_cp_algo" in log
    assert "--rope-scaling-type yarn" in log and "config.json" in log
    given = Qwen2Config.from_pretrained(paths["--load"])
    saved = Qwen2Config.from_pretrained(paths["--save"])
    assert given.yarn is None
    assert saved.yarn == given.with_yarn(8.0, 4096).yarn
    assert saved.max_position_embeddings == 8 * 4096
    assert len(losses(paths)) == 2


@pytest.mark.distributed
def test_documents_that_see_themselves_alone_run(paths: dict[str, Path]) -> None:
    """The loss is another than that of the same line without the flag."""
    line = by_name("master/qwen25/pretrain_qwen25_72b_4k_pack")
    log = run(line, paths, 1)
    apart = losses(paths)
    assert "a document sees only itself" in log and "after token 0" in log
    others = {**paths, "--save": paths["--save"].with_name("across")}
    flags = [word for word in line.flags if word != "--reset-attention-mask"]
    run(line._replace(flags=flags), others, 1)
    assert len(apart) == 2 and abs(apart[0] - losses(others)[0]) > 1e-3


@pytest.mark.distributed
def test_chats_that_are_not_padded_to_the_length_run(paths: dict[str, Path]) -> None:
    """Sequence parallelism, without --pad-to-multiple-of."""
    line = by_name("master/qwen25/tune_qwen25_72b_4k_full_ptd")
    log = run(line, {**paths, "--data-path": paths["--save"].with_name("chats")}, 2)
    assert "batches are padded to a multiple of 2 tokens" in log
    assert len(losses(paths)) == 2


@pytest.mark.distributed
def test_packed_chats_run(paths: dict[str, Path]) -> None:
    line = by_name("2.2.0/qwen25/tune_qwen25_7b_4k_full_pack")
    run(line, {**paths, "--data-path": paths["--save"].with_name("chats")}, 1)
    assert len(losses(paths)) == 2
