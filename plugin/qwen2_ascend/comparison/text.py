"""A comparison as text: a table of all arrays, figures of a few, and what was found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from qwen2_ascend.comparison.compare import Comparison, Report, Side
from qwen2_ascend.comparison.statistics import Difference, Summary
from qwen2_ascend.comparison.tolerances import Tolerances, cosine_text, short_rows
from qwen2_ascend.markdown import aligned

HEADINGS = (
    *("name", "shape", "dtype", "Cosine", "MaxAbsErr", "MaxRelativeErr", "RelativeL2"),
    *("ULP", "used", "verdict"),
)
"""Msprobe's words where it has them. Cosine is the least of the rows, ULP the largest distance,
used the share of its tolerance that the worst element takes."""
DETAILED = 3
"""The most arrays whose figures are all shown without being asked for."""
MAX_FINDINGS = 20
"""Lines; the rest are counted."""
MIN_NAME = 16
DISPENSABLE = ("MaxRelativeErr", "ULP", "RelativeL2", "shape", "dtype", "MaxAbsErr")
"""Columns that make room for the names on a narrow terminal, the first first."""


def report_lines(report: Report, *, details: bool = False, width: int | None = None) -> list[str]:
    """The whole report.

    Args:
        report: what `compare` returned.
        details: every figure of every array, not only where there are few.
        width: columns of the terminal, into which names are shortened; None where nothing is.
    """
    lines = [f"ours    {report.ours}", f"theirs  {report.theirs}", ""]
    if len(report.comparisons) > 1:
        lines += [*_table(report.comparisons, width), ""]
    if details or len(report.comparisons) <= DETAILED:
        for comparison in report.comparisons:
            if comparison.difference is not None:
                lines += [*_details(comparison), ""]
    return [*lines, *_findings(report), _verdict(report)]


def number(value: float) -> str:
    """Four digits, in as little room as they take."""
    return f"{value:.4g}"


# -- the table


def _table(comparisons: Sequence[Comparison], width: int | None) -> list[str]:
    rows = [HEADINGS, *map(_row, comparisons)]
    if width is not None:
        for heading in DISPENSABLE:
            if len(_lines(rows)[0]) <= width:
                break
            at = rows[0].index(heading)
            rows = [row[:at] + row[at + 1 :] for row in rows]
        over = len(_lines(rows)[0]) - width
        longest = max(max(len(row[0]) for row in rows) - over, MIN_NAME)
        rows = [(_shorten(row[0], longest), *row[1:]) for row in rows]
    return _lines(rows)


def _lines(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Names and verdicts are flush left; the first line, which ends in "verdict", is longest."""
    return aligned(rows, f"l{'r' * (len(rows[0]) - 2)}l")


def _row(comparison: Comparison) -> tuple[str, ...]:
    both = (comparison.ours, comparison.theirs)
    found = comparison.difference
    verdict = "ok" if comparison.passed else "FAIL"
    figures = ("-",) * 6
    if found is not None:
        figures = (
            cosine_text(found.cosine_min),
            number(found.max_abs),
            number(found.max_relative),
            number(found.relative_l2),
            str(found.ulp_max) if found.ulp_max < 10**7 else f"{found.ulp_max:.1e}",
            f"{found.tolerance_used:.3g}",
        )
    return (
        comparison.name,
        _either([_shape(side) for side in both if side]),
        _either([side.dtype for side in both if side]),
        *figures,
        verdict,
    )


def _either(words: list[str]) -> str:
    return "/".join(dict.fromkeys(words))


def _shape(side: Side) -> str:
    return "x".join(map(str, side.shape)) or "scalar"


def _shorten(name: str, width: int) -> str:
    """Keeps both ends: names differ in layer and in sublayer."""
    if len(name) <= width:
        return name
    tail = (width - 1) * 2 // 3
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"


# -- figures of one array


def _details(comparison: Comparison) -> Iterator[str]:
    ours, theirs, found = comparison.ours, comparison.theirs, comparison.difference
    assert ours and theirs and found
    yield comparison.name
    header = ("", "shape", "dtype", "max", "min", "mean", "std", "NaN", "inf")
    rows = [header, _side_row("ours", ours), _side_row("theirs", theirs)]
    moments = (found.max, found.min, found.mean, found.std)
    rows.append(("ours - theirs", "", "", *map(number, moments), "", ""))
    figures = [*_figures(found), *_judged_by(comparison, found)]
    yield from (f"  {line}" for line in (*aligned(rows), *aligned(figures, "l")))


def _side_row(who: str, side: Side) -> tuple[str, ...]:
    summary = side.summary
    assert isinstance(summary, Summary)
    moments = (summary.max, summary.min, summary.mean, summary.std)
    counts = (str(summary.num_nan), str(summary.num_inf))
    return (who, _shape(side), side.dtype, *map(number, moments), *counts)


def _figures(found: Difference) -> Iterator[tuple[str, str]]:
    where = f" at [{', '.join(map(str, found.worst))}]" if found.worst else ""
    values = f": {found.worst_ours:.9g} instead of {found.worst_theirs:.9g}"
    worst = f"{where}{values}" if found.max_abs else ""
    yield "MaxAbsErr", f"{number(found.max_abs)}{worst}"
    yield "mean, rms", f"{number(found.mean_abs)}, {number(found.rms)}"
    of_largest = f"of the largest |theirs| {number(found.relative_to_largest)}"
    yield "MaxRelativeErr", f"{number(found.max_relative)}; {of_largest}"
    relative = f"{number(found.relative_l2)}, of the median row {number(found.relative_l2_median)}"
    yield "EucDist", f"{number(found.euclidean)}; relative L2 {relative}"
    yield f"ULP ({found.ulp_dtype})", f"max {found.ulp_max}, mean {number(found.ulp_mean)}"
    yield (
        "elements",
        f"{found.share_equal:.2%} equal, {found.share_within_1_permille:.2%} within 1e-3, "
        f"{found.share_within_5_permille:.2%} within 5e-3",
    )
    yield (
        "Cosine",
        f"min {cosine_text(found.cosine_min)}, mean {cosine_text(found.cosine_mean)} "
        f"of {found.cosines.size} rows",
    )


def _judged_by(comparison: Comparison, found: Difference) -> Iterator[tuple[str, str]]:
    limits, logits = comparison.tolerances, comparison.logits
    if limits is not None and limits.usual_rows:
        yield "short rows", _short_rows(found)
    if logits is not None:
        yield "KL divergence", f"mean {number(logits.kl_mean)}, max {number(logits.kl_max)}"
        skipped = f"; {logits.num_skipped} rows without a softmax" if logits.num_skipped else ""
        agreement = f"top-1 {logits.top1:.2%}, top-5 {logits.top5:.2%}"
        yield "next token", f"{agreement} of {logits.num_rows} rows{skipped}"
    if limits is not None:
        yield "used", f"{number(found.tolerance_used)} of its tolerance by the worst element"
        yield "tolerances", _tolerances(limits, logits is not None)


def _short_rows(found: Difference) -> str:
    short = short_rows(found)
    if not short.any():
        return "none"
    most = float(found.row_distances[short].max()) / found.usual_length
    return (
        f"{int(short.sum())} of {short.size} are shorter than the median row and held to its "
        f"length: they differ by at most {number(most)} of it; the cosine of the others is at "
        f"least {cosine_text(float(found.cosines[~short].min()))}"
    )


def _tolerances(limits: Tolerances, is_logits: bool) -> str:
    atol = "row's largest" if limits.atol is None else number(limits.atol)
    words = [f"rtol {number(limits.rtol)}", f"atol {atol}"]
    if not math.isclose(limits.min_cosine, -1):
        words.append(f"cosine {cosine_text(limits.min_cosine)}")
    if math.isfinite(limits.max_relative_l2):
        words.append(f"median relative L2 {number(limits.max_relative_l2)}")
    if is_logits:
        words.append(f"KL {number(limits.max_kl)}")
        words += [f"top-1 {limits.min_top1:.2%}"] if limits.min_top1 else []
    return ", ".join(words)


# -- what was found


def _findings(report: Report) -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for comparison in report.failed:
        for finding in comparison.findings:
            names.setdefault(finding.text, []).append(comparison.name)
    for text, where in list(names.items())[:MAX_FINDINGS]:
        yield f"{_some(where)}: {text}."
    if (more := len(names) - MAX_FINDINGS) > 0:
        yield f"... and {more} more findings; --json has all."
    if names:
        yield ""


def _some(names: list[str]) -> str:
    """One name, or a few of many that share a finding."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{len(names)} arrays ({names[0]}, {names[1]}, ... {names[-1]})"


def _verdict(report: Report) -> str:
    total, failed = len(report.comparisons), report.failed
    arrays = "1 array" if total == 1 else f"{total} arrays"
    if not failed:
        return f"PASS: {arrays} within the tolerances."
    compared = any(comparison.difference is not None for comparison in report.comparisons)
    none = "" if compared else " Nothing could be compared."
    first = f", the first is {failed[0].name}" if total > 1 else ""
    return f"FAIL: {len(failed)} of {arrays}{first}.{none}"
