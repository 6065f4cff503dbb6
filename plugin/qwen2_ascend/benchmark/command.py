"""`qwen2-ascend benchmark` and tools/benchmark.py."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import tyro

from qwen2_ascend.benchmark import (
    attention,
    checkpoint,
    convert,
    cross_entropy,
    generate,
    train,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv` and measures; SIGTERM ends it as Ctrl-C does, with nothing left behind."""
    signal.signal(signal.SIGTERM, _stop)
    commands = {
        "train": _train,
        "attention": _attention,
        "checkpoint": _checkpoint,
        "generate": _generate,
        "convert": _convert,
        "cross-entropy": _cross_entropy,
    }
    tyro.extras.subcommand_cli_from_dict(commands, args=argv)


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _convert(options: tyro.conf.OmitArgPrefixes[convert.ConvertBenchmark]) -> None:
    convert.run(options)


def _cross_entropy(options: tyro.conf.OmitArgPrefixes[cross_entropy.CrossEntropyBenchmark]) -> None:
    cross_entropy.run(options)


def _generate(options: tyro.conf.OmitArgPrefixes[generate.GenerateBenchmark]) -> None:
    generate.run(options)


def _train(options: tyro.conf.OmitArgPrefixes[train.TrainBenchmark]) -> None:
    train.run(options)


def _attention(options: tyro.conf.OmitArgPrefixes[attention.AttentionBenchmark]) -> None:
    attention.run(options)


def _checkpoint(options: tyro.conf.OmitArgPrefixes[checkpoint.CheckpointBenchmark]) -> None:
    checkpoint.run(options)
