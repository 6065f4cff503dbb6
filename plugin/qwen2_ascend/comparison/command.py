"""`qwen2-ascend compare` and tools/compare_outputs.py."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from qwen2_ascend.comparison.compare import compare, match
from qwen2_ascend.comparison.dumps import open_dumps
from qwen2_ascend.comparison.picture import draw
from qwen2_ascend.comparison.rules import Rules
from qwen2_ascend.comparison.text import report_lines
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.figures import report_faults
from qwen2_ascend.files import output_faults
from qwen2_ascend.progress import Progress

if TYPE_CHECKING:
    from qwen2_ascend.comparison.compare import Report
    from qwen2_ascend.comparison.dumps import Dump

EXIT_DIFFERENT = 1
PROGRESS_BYTES = 1 << 29
"""Dumps from this size on show how far the comparison is."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Rules):
    """Compare dumped arrays of two runs: figures, a verdict, JSON and a picture.

    A dump is a .npy, .npz, .pt or .safetensors file, or a folder of them. Arrays are matched by
    name. Exit status: 0 when all agree, 1 when something does not, 2 when nothing was compared
    because of a mistake in what was asked.
    """

    ours: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OURS")]
    """The dump that is judged."""
    theirs: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="THEIRS")]
    """The reference."""
    details: bool = False
    """Print all figures of every array."""
    json: Path | None = None
    """Write the report for machines; - for standard output, where the text then is not."""
    png: Path | None = None
    """Draw the differences; needs matplotlib."""
    png_name: str | None = None
    """The array to draw in detail; without it the worst one."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv`, compares, reports; exits with 1 when something does not agree."""
    options = tyro.cli(CompareOptions, args=argv)
    raise_if(_faults(options))
    # imported once the flags are right: --help answers sooner

    ours, theirs = open_dumps(options.ours, options.theirs)
    report = _compare(ours, theirs, options)
    if options.json is not None:
        _write_json(report, options.json)
    _print(report, options)
    if options.png is not None:
        draw(report, options.png, options.png_name)
    sys.stdout.flush()
    if not report.passed:
        raise SystemExit(EXIT_DIFFERENT)


def _faults(options: CompareOptions) -> Iterator[str]:
    for flag, value, high in [
        ("--rtol", options.rtol, float("inf")),
        ("--atol", options.atol, float("inf")),
        ("--max-relative-l2", options.max_relative_l2, float("inf")),
        ("--max-kl", options.max_kl, float("inf")),
        ("--min-top1", options.min_top1, 1.0),
    ]:
        if value is not None and not 0 <= value <= high:
            bound = "at least 0" if high > 1 else "between 0 and 1"
            yield f"{flag} {value} must be {bound}."
    if options.min_cosine is not None and not -1 <= options.min_cosine <= 1:
        yield f"--min-cosine {options.min_cosine} must be between -1 and 1."
    if options.png_name is not None and options.png is None:
        yield "--png-name chooses what --png draws; say where to: --png FILE."
    if options.png is not None:
        yield from report_faults("--png", "matplotlib")
    yield from output_faults("--json", None if _is_stdout(options.json) else options.json)
    yield from output_faults("--png", options.png)


def _compare(ours: Dump, theirs: Dump, options: CompareOptions) -> Report:
    pairs, png_name = match(ours, theirs, options), options.png_name
    if png_name is not None and png_name not in {pair.name for pair in pairs}:
        examples = ", ".join(repr(pair.name) for pair in pairs[:5])
        raise UserError(
            f"--png-name {png_name!r} is not among the names; there are for example {examples}."
        )
    total = sum(pair.num_bytes for pair in pairs)
    if total < PROGRESS_BYTES:
        return compare(ours, theirs, options)
    with Progress("comparing", total) as progress:
        return compare(ours, theirs, options, progress)


def _write_json(report: Report, path: Path) -> None:
    text = json.dumps(report.to_json(), indent=2, allow_nan=False)
    if _is_stdout(path):
        print(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")


def _print(report: Report, options: CompareOptions) -> None:
    out = sys.stderr if _is_stdout(options.json) else sys.stdout
    width = shutil.get_terminal_size().columns if out.isatty() else None
    print("\n".join(report_lines(report, details=options.details, width=width)), file=out)


def _is_stdout(path: Path | None) -> bool:
    return path is not None and str(path) == "-"
