"""Jobs with many flags at once against the same job at TP1 PP1 without what must not matter."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from distributed import pairs
from distributed.harness import Checks, Run, main
from distributed.jobs import read_metrics
from helpers import make_tiny_hugging_face_folder, tiny_config
from qwen2_ascend.errors import UserError

CHECKS = Checks()

TOLERANCES = {"fp32": (2e-5, 2e-3), "bf16": (2e-2, 0.25), "fp16": (2e-2, 0.25)}
"""Relative, of losses and gradient norms: several times what was measured over all pairs."""
STARTS = 5
"""More than any job needs to be complete."""
LOSSY = ("--no-save-optim", "--no-load-optim")
"""Flags with which a run in two parts is another run than a whole one."""
PATHS = ("--save", "--load", "--report-dir", "--save-adapter")


def check_row(kind: str, row: pairs.Row, run: Run) -> str:
    of = pairs.KINDS[kind]
    data = made_data(run)
    name = pairs_name(kind, row)
    try:
        own = play(of, row, run.folder / name, data)
    except UserError as error:  # what is known only when the data is there
        assert str(error).startswith("profiling from step "), error
        return f"refused: {error}"
    plain = reference(of, row)
    expected = play(of, plain, run.folder / f"{name}-reference", data)
    if "--log-interval" in row and "--save" in row:
        own, expected = last_line(own), last_line(expected)
    settings = pairs.settings_of(of, row)
    worst = compared(own, expected, settings.precision_name())
    adapter = row.get("--save-adapter")
    if adapter is not None and run.runtime.rank == 0:
        worst = max(worst, compared_adapters(run.folder, name, settings.precision_name()))
    return f"{worst:.1e} {named(row)}"


def reference(kind: pairs.Kind, row: pairs.Row) -> pairs.Row:
    """The same job at TP1 PP1, in one part, without what must not matter."""
    dropped = set(kind.neutral) | set(pairs.SAVE)
    if any(flag in row for flag in LOSSY):
        dropped -= {*pairs.STOPPED, "--ckpt-format"}
    plain = {flag: value for flag, value in row.items() if flag not in dropped}
    if plain.pop("--make-vocab-size-divisible-by", None) is not None:
        settings = pairs.settings_of(kind, row)
        plain["--padded-vocab-size"] = settings.padded_vocab_size(tiny_config())
    return plain


def play(kind: pairs.Kind, row: pairs.Row, folder: Path, data: Path) -> list[dict[str, Any]]:
    """Starts the job until it is complete; its metrics, on every rank."""
    import torch

    from qwen2_ascend import runtime
    from qwen2_ascend.telemetry import reporting

    settings = pairs.settings_of(kind, {**kind.base, **row})
    settings = placed(settings, folder, data)
    for _ in range(STARTS):
        runtime.destroy_model_parallel()
        with mock.patch("qwen2_ascend.training.logging.draw_loss"):
            is_complete = begin_once(settings)
        if is_complete:
            break
    assert is_complete, f"it is not complete after {STARTS} starts"
    assert not reporting._failed, reporting._failed
    torch.distributed.barrier()
    return read_metrics(folder / "report")


def begin_once(settings: Any) -> bool:
    """What the launcher does, but that the process goes on; whether the run is complete."""
    from qwen2_ascend.finetuning import finetune
    from qwen2_ascend.finetuning import launch as tuning
    from qwen2_ascend.training import launch, pretrain
    from qwen2_ascend.training.settings import PretrainSettings
    from qwen2_ascend.training.setup import train_and_report
    from qwen2_ascend.training.start import begin

    of: Any = launch if isinstance(settings, PretrainSettings) else tuning
    own = launch.checked_plan(settings, of.make_plan, of.validate, of.check_data)
    plan, running = begin(settings, of.make_plan, own)
    if of is launch:
        return train_and_report(pretrain.prepare(plan, running), plan)
    training, plan = finetune.prepare(plan, running)
    storage = finetune.lora_storage(training, plan)
    is_complete = train_and_report(training, plan, storage and storage.checkpointer)
    stays: Any = SimpleNamespace(rank=running.rank, close=lambda: None)
    finetune.finish(plan, stays, is_complete, storage)
    return is_complete


def placed(settings: Any, folder: Path, data: Path) -> Any:
    """The settings with the folders of this launch."""
    from dataclasses import fields, is_dataclass, replace

    def of(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(of(one) for one in value)
        if not isinstance(value, str | Path):
            return value
        text = str(value)
        for sign, place in ((pairs.FOLDER, folder), (pairs.DATA, data)):
            if text.startswith(sign):
                text = f"{place}/{text.removeprefix(sign)}"
        return type(value)(text)

    changes = {}
    for group in fields(settings):
        value = getattr(settings, group.name)
        if is_dataclass(value) and not isinstance(value, type):
            changes[group.name] = replace(
                value, **{one.name: of(getattr(value, one.name)) for one in fields(value)}
            )
    return replace(settings, **changes)


def compared(own: list[dict], expected: list[dict], precision: str) -> float:
    """The largest relative difference of a loss."""
    assert [row["iteration"] for row in own] == [row["iteration"] for row in expected]
    of_loss, of_norm = TOLERANCES[precision]
    worst = 0.0
    for one, other in zip(own, expected, strict=True):
        tolerances = {"loss": of_loss, "validation_loss": of_loss, "grad_norm": of_norm, "lr": 0}
        for name in tolerances.keys() & (one.keys() | other.keys()):
            a, b = one.get(name), other.get(name)
            if a is None or b is None:
                assert a == b, f"{name} of iteration {one['iteration']}: {a}, expected {b}"
                continue
            off = abs(a - b) / max(abs(b), 1e-3)
            assert off <= tolerances[name] + 1e-12, (
                f"{name} of iteration {one['iteration']}: {a}, expected {b} (off by {off:.1e})"
            )
            worst = max(worst, off if "loss" in name else 0.0)
    return worst


def last_line(metrics: list[dict]) -> list[dict]:
    """The last line without means: a checkpoint ends an interval of the log and cuts it
    otherwise."""
    *_, last = (row for row in metrics if "loss" in row)
    return [{name: last[name] for name in ("iteration", "grad_norm", "lr")}]


def compared_adapters(folder: Path, name: str, precision: str) -> float:
    """How far the exported adapter is from the reference's, of what was learnt."""
    from safetensors.numpy import load_file

    one, other = (
        load_file(folder / which / "adapter" / "adapter_model.safetensors")
        for which in (name, f"{name}-reference")
    )
    assert one.keys() == other.keys()
    off = math.fsum(float(abs(one[key] - other[key]).sum()) for key in one)
    off /= math.fsum(float(abs(other[key]).sum()) for key in other if "lora_B" in key) or 1.0
    assert off <= (1e-3 if precision == "fp32" else 0.5), f"the adapter is off by {off:.1%}"
    return off


def made_data(run: Run) -> Path:
    """A model, a corpus, chats and preference pairs; written by the first rank that asks."""
    import torch

    from finetuning.finetune_worker import _write

    folder = run.folder / "data"
    if run.runtime.rank == 0 and not folder.exists():
        folder.mkdir()
        make_tiny_hugging_face_folder(folder / "hf", tiny_config(tie_word_embeddings=True))
        _write(folder / "chats", "", 30, seed=0)
        for number, side in enumerate(("chosen_", "rejected_")):
            _write(folder / "chats", side, 20, seed=number)
        write_corpus(folder / "corpus")
    torch.distributed.barrier()
    return folder


def write_corpus(prefix: Path, eod: int = 0) -> None:
    """Documents of 5 to 40 tokens that end with `eod`, which is nowhere else."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    draw = np.random.default_rng(3)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(60):
        length = int(draw.integers(5, 41))
        ids = torch.from_numpy(draw.integers(2, tiny_config().vocab_size, length))
        ids[-1] = eod
        builder.add_document(ids, [length])
    builder.finalize(f"{prefix}.idx")


def named(row: pairs.Row) -> str:
    """The row as a command line would have it."""
    words = []
    for flag, value in row.items():
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        words.append(flag if value is True else f"{flag} {shown}")
    return " ".join(words)


def pairs_name(kind: str, row: pairs.Row) -> str:
    import hashlib

    return f"{kind}-{hashlib.sha256(named(row).encode()).hexdigest()[:10]}"


def _add(kind: str, world_size: int, name: str, row: pairs.Row) -> None:
    CHECKS.case(name, world_size, check_row, kind, row)


for _number, (_kind, _world_size, _row) in enumerate(pairs.KNOWN):
    _add(_kind, _world_size, f"known-{_number}-{_kind}", _row)
for _kind in pairs.KINDS:
    for _world_size in (2, 4):
        _rows = pairs.rows(_kind, _world_size, pairs.SEED, pairs.ROWS)
        for _number, _row in enumerate(_rows):
            _add(_kind, _world_size, f"{_kind}-{_world_size}-seed{pairs.SEED}-{_number}", _row)


if __name__ == "__main__":
    main(CHECKS)
