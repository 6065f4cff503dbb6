"""`qwen2-ascend benchmark` and tools/benchmark.py."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from qwen2_ascend.benchmark import convert, cross_entropy, generate


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv` and measures."""
    commands = {"convert": _convert, "cross-entropy": _cross_entropy, "generate": _generate}
    tyro.extras.subcommand_cli_from_dict(commands, args=argv)


def _convert(options: tyro.conf.OmitArgPrefixes[convert.ConvertBenchmark]) -> None:
    convert.run(options)


def _cross_entropy(options: tyro.conf.OmitArgPrefixes[cross_entropy.CrossEntropyBenchmark]) -> None:
    cross_entropy.run(options)


def _generate(options: tyro.conf.OmitArgPrefixes[generate.GenerateBenchmark]) -> None:
    generate.run(options)
