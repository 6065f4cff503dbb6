"""All pairs of the launchers' flags: values to try, which of them go together, rows that hold all.

A row is a job: some flags with values. `rows` makes as few of them as it finds in which every two
values meet that the launcher's own rules allow together. The flags are read from the settings
classes, and every one has values here or a reason why not: `unknown_flags` names those that do not.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from helpers import tiny_config
from qwen2_ascend.data.chat.check import packing_faults
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.finetuning import settings as finetuning
from qwen2_ascend.training import settings as training

Row = dict[str, Any]
"""Values by flag."""

SEED = int(os.environ.get("PAIRS_SEED", "0"))
"""Another one for every commit (selection.py); a test's name has it, to run it again."""
ROWS = int(os.environ.get("PAIRS_ROWS", "2"))
"""Rows of each kind and world size; 0 is all that there are."""
FOLDER, DATA = "$folder/", "$data/"
"""What paths begin with: the job's own folder, that of the data."""

FULL = {"--recompute-granularity": "full"}
PROFILE = {"--profile-dir": Path(f"{FOLDER}profile")}
STEPS = {**PROFILE, "--profile": True, "--profile-step-start": 1, "--profile-step-end": 2}
SAVE = {"--save": Path(f"{FOLDER}save"), "--load": Path(f"{FOLDER}save")}
"""With --pretrained-checkpoint, which every job has: one command line starts and resumes."""
STOPPED = {**SAVE, "--exit-interval": 2}
OFFLOAD = {
    "--bf16": True,
    "--use-distributed-optimizer": True,
    "--optimizer-cpu-offload": True,
}
"""Flags that change nothing on the CPU; tests/npusim/test_offload.py has them on a device."""
OVERLAP = {
    "--use-distributed-optimizer": True,
    "--overlap-grad-reduce": True,
    "--overlap-param-gather": True,
}
O2 = {"--bf16": True, "--o2-gradient": True, "--o2-optimizer": True}

NEUTRAL: dict[str, list[Any]] = {
    "--tensor-model-parallel-size": [2],
    "--pipeline-model-parallel-size": [2],
    "--num-layers-per-virtual-pipeline-stage": [1],
    "--num-layer-list": ["1,3"],
    "--sequence-parallel": [True],
    "--context-parallel-size": [2],
    "--context-parallel-algo": [
        {"--context-parallel-size": 2, "--context-parallel-algo": "ulysses_cp_algo"},
        {"--context-parallel-size": 2, "--context-parallel-algo": "kvallgather_cp_algo"},
    ],
    "--use-distributed-optimizer": [True],
    "--overlap-grad-reduce": [True],
    "--overlap-param-gather": [True],
    "--distributed-timeout-minutes": [5.0],
    "--optimizer-cpu-offload": [OFFLOAD],
    "--optimizer-offload-fraction": [{**OFFLOAD, "--optimizer-offload-fraction": 0.5}],
    "--micro-batch-size": [2],
    "--exit-interval": [STOPPED],
    "--use-ascend-coc": [
        {
            "--use-ascend-coc": True,
            "--coc-parallel-num": 2,
            "--tensor-model-parallel-size": 2,
            "--sequence-parallel": True,
        },
    ],
    "--coc-parallel-num": [
        {"--use-ascend-coc": True, "--coc-parallel-num": 4, "--tensor-model-parallel-size": 2},
    ],
    "--coc-fused-kernel": [{"--use-ascend-coc": True, "--coc-fused-kernel": True}],
    "--recompute-granularity": ["selective"],
    "--recompute-method": [
        {**FULL, "--recompute-method": "uniform", "--recompute-num-layers": 1},
        {**FULL, "--recompute-method": "block", "--recompute-num-layers": 1},
    ],
    "--recompute-num-layers": [
        {**FULL, "--recompute-method": "uniform", "--recompute-num-layers": 2},
    ],
    "--recompute-activation-function": [True],
    "--recompute-activation-function-num-layers": [
        {
            "--recompute-activation-function": True,
            "--recompute-activation-function-num-layers": 1,
        },
    ],
    "--recompute-norm": [True],
    "--recompute-norm-num-layers": [{"--recompute-norm": True, "--recompute-norm-num-layers": 1}],
    "--swap-attention": [True],
    "--cross-entropy-chunk-size": [16],
    "--attention-backend": ["unfused", "local", "flash"],
    "--use-flash-attn": [True],
    "--use-fused-rmsnorm": [True],
    "--use-fused-rotary-pos-emb": [True],
    "--use-fused-swiglu": [True],
    "--use-fused-adamw": [True],
    "--no-fused-rmsnorm": [True],
    "--no-fused-rotary-pos-emb": [True],
    "--no-fused-swiglu": [True],
    "--no-fused-adamw": [True],
    "--data-cache-path": [Path(f"{FOLDER}cache")],
    "--num-workers": [1],
    "--save": [SAVE],
    "--save-interval": [{**SAVE, "--save-interval": 1}],
    "--ckpt-format": [{**STOPPED, "--ckpt-format": "torch"}],
    "--async-save": [{**SAVE, "--save-interval": 1, "--async-save": True}],
    "--keep-last": [{**SAVE, "--save-interval": 1, "--keep-last": 1}],
    "--on-save-failure": [{**SAVE, "--on-save-failure": "continue"}],
    "--no-save-rng": [{**STOPPED, "--no-save-rng": True}],
    "--no-load-rng": [{**STOPPED, "--no-load-rng": True}],
    "--tensorboard-dir": [Path(f"{FOLDER}tensorboard")],
    "--profile": [STEPS],
    "--profile-step-start": [{**STEPS, "--profile-step-start": 0}],
    "--profile-step-end": [{**STEPS, "--profile-step-end": 3}],
    "--profile-steps": [{**PROFILE, "--profile-steps": "1:2"}],
    "--profile-ranks": [{**STEPS, "--profile-ranks": (0, 1)}],
    "--profile-dir": [STEPS],
    "--profile-record-shapes": [{**STEPS, "--profile-record-shapes": True}],
    "--profile-with-memory": [{**STEPS, "--profile-with-memory": True}],
    "--profile-with-stack": [{**STEPS, "--profile-with-stack": True}],
    "--profile-level": [{**STEPS, "--profile-level": "level1"}],
    "--no-mindspeed": [True],
    "--deterministic": [True],
    "--manual-gc": [True],
    "--manual-gc-interval": [{"--manual-gc": True, "--manual-gc-interval": 1}],
    "--no-manual-gc-eval": [{"--manual-gc": True, "--no-manual-gc-eval": True}],
    "--exit-signal-handler": [False],
}
"""What must not matter: the same losses with and without."""

LAYOUT = {
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--num-layers-per-virtual-pipeline-stage",
    "--sequence-parallel",
    "--context-parallel-size",
    "--use-distributed-optimizer",
    "--overlap-grad-reduce",
    "--overlap-param-gather",
}

KEPT: dict[str, list[Any]] = {
    "--padded-vocab-size": [320],
    "--make-vocab-size-divisible-by": [96],
    "--global-batch-size": [16],
    "--seq-length": [24],
    "--train-iters": [4],
    "--train-samples": [{"--train-samples": 36, "--train-iters": None}],
    "--lr": [3e-3],
    "--min-lr": [1e-4],
    "--lr-decay-style": ["constant", "cosine", "inverse-square-root"],
    "--lr-decay-iters": [2],
    "--lr-warmup-iters": [1],
    "--lr-warmup-fraction": [0.4],
    "--lr-warmup-init": [{"--lr-warmup-init": 1e-4, "--lr-warmup-iters": 1}],
    "--lr-wsd-decay-style": [
        {"--lr-decay-style": "WSD", "--lr-wsd-decay-iters": 1, "--lr-wsd-decay-style": "linear"}
    ],
    "--lr-wsd-decay-iters": [{"--lr-decay-style": "WSD", "--lr-wsd-decay-iters": 2}],
    "--weight-decay": [0.1],
    "--adam-beta1": [0.8],
    "--adam-beta2": [0.95],
    "--adam-eps": [1e-6],
    "--clip-grad": [0.0, 0.05],
    "--bf16": [True],
    "--fp16": [{"--fp16": True, "--initial-loss-scale": 4096.0}],
    "--reuse-fp32-param": [{"--bf16": True, "--reuse-fp32-param": True}],
    "--o2-gradient": [{"--bf16": True, "--o2-gradient": True}],
    "--o2-optimizer": [{"--bf16": True, "--o2-optimizer": True}],
    "--loss-scale": [{"--fp16": True, "--loss-scale": 128.0}],
    "--initial-loss-scale": [{"--fp16": True, "--initial-loss-scale": 1024.0}],
    "--min-loss-scale": [{"--fp16": True, "--min-loss-scale": 2.0}],
    "--loss-scale-window": [
        {"--fp16": True, "--initial-loss-scale": 512.0, "--loss-scale-window": 1}
    ],
    "--hysteresis": [{"--fp16": True, "--hysteresis": 1}],
    "--on-nonfinite": ["skip"],
    "--eval-interval": [{"--eval-interval": 2, "--eval-iters": 1}],
    "--eval-iters": [{"--eval-interval": 1, "--eval-iters": 2}],
    "--no-save-optim": [{**STOPPED, "--no-save-optim": True}],
    "--no-load-optim": [{**STOPPED, "--no-load-optim": True}],
    "--log-interval": [2],
    "--seed": [7],
}
"""What the reference has too."""

OF_PRETRAINING: dict[str, list[Any]] = {
    "--mock-data": [{"--mock-data": True, "--data-path": ()}],
    "--split": ["60,40,0"],
    "--train-data-path": [
        {
            "--data-path": (),
            "--train-data-path": (f"{DATA}corpus",),
            "--valid-data-path": (f"{DATA}corpus",),
            "--eval-iters": 1,
        }
    ],
    "--data-path": [("0.5", f"{DATA}corpus", "0.5", f"{DATA}corpus")],
    "--eod-token": [{"--eod-token": 0, "--eod-mask-loss": True}],
    "--eod-mask-loss": [{"--eod-mask-loss": True, "--eod-token": 0}],
    "--reset-attention-mask": [{"--reset-attention-mask": True, "--eod-token": 0}],
    "--reset-position-ids": [{"--reset-position-ids": True, "--eod-token": 0}],
    "--no-shared-storage": [True],
}
OF_TUNING: dict[str, list[Any]] = {
    "--num-train-epochs": [{"--num-train-epochs": 3.2, "--train-iters": None}],
    "--split": ["60,40,0"],
    "--train-data-path": [
        {
            "--data-path": (),
            "--train-data-path": (f"{DATA}chats",),
            "--valid-data-path": (f"{DATA}chats",),
            "--eval-iters": 1,
        }
    ],
    "--data-path": [(f"{DATA}chats", f"{DATA}chats")],
    "--pack": [True],
    "--no-shuffle": [True],
    "--lora-r": [2],
    "--lora-alpha": [{"--lora-r": 4, "--lora-alpha": 8.0}],
    "--lora-target-modules": [{"--lora-r": 4, "--lora-target-modules": ("linear_qkv",)}],
    "--use-rslora": [{"--lora-r": 4, "--use-rslora": True}],
    "--save-adapter": [{"--lora-r": 4, "--save-adapter": Path(f"{FOLDER}adapter")}],
}
OF_DPO: dict[str, list[Any]] = {
    "--dpo-beta": [0.5],
    "--dpo-loss-type": ["hinge", "ipo"],
    "--dpo-label-smoothing": [0.1],
    "--pref-ftx": [0.5],
}
TUNING_NEUTRAL: dict[str, list[Any]] = {
    "--variable-seq-lengths": [True],
    "--pad-to-multiple-of": [{"--variable-seq-lengths": True, "--pad-to-multiple-of": 8}],
    "--on-bad-row": ["skip"],
    "--save-hf": [{**SAVE, "--save-hf": Path(f"{FOLDER}tuned")}],
}

NOT_TRIED = {
    "--config": "names the model, as --pretrained-checkpoint does",
    "--load": "comes with --save",
    "--pretrained-checkpoint": "every job has it",
    "--valid-data-path": "comes with --train-data-path",
    "--finetune": "starts anew at every start",
    "--report-dir": "every job has it: the losses are read there",
    "--device": "is chosen when the process starts",
    "--mindspeed": "is activated when the process starts, on an npu",
    "--use-ascend-mc2": "is for an npu; tests/npusim/test_fused_products.py",
    "--log-energy": "needs something that measures energy",
    "--plan": "trains nothing; tests/planning/test_launchers_plan.py",
    "--plan-device": "comes with --plan",
    "--no-log-energy": "every job has it: idle power takes a second to measure",
    "--stage": "makes the kinds of jobs",
    "--tokenizer-name-or-path": "is for files of chats; the data is prepared",
    "--lora-load": "needs an adapter; tests/finetuning/test_lora.py",
    "--lora-dropout": "draws otherwise at each layout; tests/finetuning/test_lora.py",
    "--handler-name": "is for files of chats",
    "--map-keys": "is for files of chats",
    "--prompt-type": "is for files of chats",
    "--chat-template": "is for files of chats",
    "--train-on-prompt": "is for files of chats",
    "--mask-history": "is for files of chats",
}


@dataclass(frozen=True)
class Kind:
    """One kind of job."""

    settings: type
    validate: Callable[..., None]
    base: Mapping[str, Any]
    """What every job of this kind has."""

    @property
    def neutral(self) -> Mapping[str, list[Any]]:
        return NEUTRAL if self.settings is training.PretrainSettings else NEUTRAL | TUNING_NEUTRAL

    @property
    def values(self) -> Mapping[str, list[Any]]:
        """What is tried of each flag."""
        is_pretraining = self.settings is training.PretrainSettings
        own = OF_PRETRAINING if is_pretraining else OF_TUNING | OF_DPO
        tried = {**self.neutral, **KEPT, **own}
        return {flag: values for flag, values in tried.items() if flag not in self.base_only}

    @property
    def base_only(self) -> set[str]:
        """Flags that make the kind, and those that only another stage has."""
        of_pairs = set() if "--stage" in self.base else set(OF_DPO)
        return {"--stage", "--pack"} & set(self.base) | of_pairs


_BASE = {
    "--pretrained-checkpoint": Path(f"{DATA}hf"),
    "--report-dir": Path(f"{FOLDER}report"),
    "--seq-length": 16,
    "--global-batch-size": 8,
    "--train-iters": 3,
    "--lr": 1e-3,
    "--device": "cpu",
    "--no-log-energy": True,
}
_CHATS = {
    **_BASE,
    "--data-path": (f"{DATA}chats",),
    "--split": "80,20,0",
    "--seq-length": 32,
}


def _validate_tuning(settings: Any, config: Any, world_size: int) -> None:
    """Checks settings as the launcher does before it starts."""
    finetuning.validate(settings, config, world_size)
    data = settings.data
    raise_if(packing_faults(settings.tuning.stage, data.pack, data.variable_seq_lengths))


_PRETRAIN = {"--data-path": (f"{DATA}corpus",), "--split": "80,20,0"}

KINDS = {
    "pretrain": Kind(training.PretrainSettings, training.validate, {**_BASE, **_PRETRAIN}),
    "sft": Kind(finetuning.FinetuneSettings, _validate_tuning, _CHATS),
    "lora": Kind(finetuning.FinetuneSettings, _validate_tuning, {**_CHATS, "--lora-r": 4}),
    "packed": Kind(finetuning.FinetuneSettings, _validate_tuning, {**_CHATS, "--pack": True}),
    "dpo": Kind(finetuning.FinetuneSettings, _validate_tuning, {**_CHATS, "--stage": "dpo"}),
}
KNOWN: list[tuple[str, int, Row]] = [
    (
        "pretrain",
        4,
        {
            **OVERLAP,
            "--pipeline-model-parallel-size": 2,
            "--cross-entropy-chunk-size": 16,
        },
    ),
    ("lora", 2, {**OVERLAP, "--save-adapter": Path(f"{FOLDER}adapter")}),
    (
        "pretrain",
        4,
        {"--reset-position-ids": True, "--eod-token": 0, "--pipeline-model-parallel-size": 4},
    ),
    (
        "packed",
        2,
        {
            **STOPPED,
            **STEPS,
            "--profile-step-end": 3,
            "--lr-warmup-iters": 2,
            "--num-train-epochs": 3.0,
            "--train-iters": None,
        },
    ),
    ("lora", 2, {**STOPPED, **O2, "--use-distributed-optimizer": True}),
    ("dpo", 2, {**STOPPED, **O2, "--tensor-model-parallel-size": 2, "--ckpt-format": "torch"}),
]
"""Rows that have been wrong, or that no seed may miss; they are always run."""


def flags_of(settings: type) -> dict[str, tuple[str, str]]:
    """(group, field) of every flag of a settings class."""
    import typing

    hints = typing.get_type_hints(settings)
    return {
        f"--{one.name.replace('_', '-')}": (group.name, one.name)
        for group in fields(settings)
        if is_dataclass(hints[group.name])
        for one in fields(hints[group.name])  # type: ignore[arg-type]
    }


def unknown_flags(kind: Kind) -> list[str]:
    """Flags without values to try and without a reason."""
    return sorted(set(flags_of(kind.settings)) - set(kind.values) - set(NOT_TRIED) - kind.base_only)


def settings_of(kind: Kind, row: Row) -> Any:
    """The settings that a row asks for."""
    places, groups = flags_of(kind.settings), {}
    for flag, value in {**kind.base, **row}.items():
        group, name = places[flag]
        groups.setdefault(group, {})[name] = value
    defaults = {"batch": training.BatchSettings, "optimizer": training.OptimizerSettings}
    made = {name: make(**groups.pop(name)) for name, make in defaults.items()}
    settings = kind.settings(**made)
    return replace(
        settings,
        **{name: replace(getattr(settings, name), **given) for name, given in groups.items()},
    )


def is_allowed(kind: Kind, row: Row, world_size: int) -> bool:
    """Whether the launcher takes the row. Anything but a UserError is a fault of the launcher's."""
    try:
        kind.validate(settings_of(kind, row), tiny_config(), world_size)
    except UserError:
        return False
    return True


def assignments(kind: Kind) -> list[Row]:
    """Every value that is tried, with what it needs beside it."""
    return [
        value if isinstance(value, dict) else {flag: value}
        for flag, values in kind.values.items()
        for value in values
    ]


def merged(one: Row, other: Row) -> Row | None:
    """Both rows in one, or None where they contradict each other."""
    if any(one[flag] != other[flag] for flag in one.keys() & other.keys()):
        return None
    return {**one, **other}


def _rank(values: Row) -> float:
    """Layouts come into most rows, loss scaling, which has many flags, does not."""
    if values.keys() & LAYOUT:
        return 0.3
    return 3.0 if "--fp16" in values else 1.0


def rows(name: str, world_size: int, seed: int, count: int) -> Iterator[Row]:
    """Rows in which all pairs of values meet that are allowed together; `count` of them at most."""
    rng = random.Random(f"{seed} {name} {world_size}")
    kind = KINDS[name]
    values = assignments(kind)
    pairs = list(combinations(range(len(values)), 2))
    rng.shuffle(pairs)
    left = dict.fromkeys(pairs)
    made = 0
    while left and (made < count or not count):
        one, other = next(iter(left))
        del left[one, other]
        row = merged(values[one], values[other])
        if row is None or not is_allowed(kind, row, world_size):
            continue
        held = [one, other]
        for number in sorted(range(len(values)), key=lambda i: _rank(values[i]) * rng.random()):
            more = merged(row, values[number])
            if number not in held and more is not None and is_allowed(kind, more, world_size):
                row = more
                held.append(number)
            if len(held) == 14:
                break
        for pair in combinations(sorted(held), 2):
            left.pop(pair, None)
        made += 1
        yield row
