"""`qwen2-ascend benchmark` and tools/benchmark.py."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from qwen2_ascend.benchmark import convert


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv` and measures."""
    tyro.extras.subcommand_cli_from_dict({"convert": _convert}, args=argv)


def _convert(options: tyro.conf.OmitArgPrefixes[convert.ConvertBenchmark]) -> None:
    convert.run(options)
