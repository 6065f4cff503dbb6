"""Two dumps compared array by array, and the verdict."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen2_ascend import __version__
from qwen2_ascend.comparison import tolerances as tolerance
from qwen2_ascend.comparison.dumps import Dump, Stored
from qwen2_ascend.comparison.rules import Rules
from qwen2_ascend.comparison.statistics import (
    FLOATS,
    Difference,
    LogitsAgreement,
    Summary,
    coarser,
    describe,
    difference,
    dtype_name,
    logits_agreement,
)
from qwen2_ascend.comparison.tolerances import Finding, Tolerances
from qwen2_ascend.errors import UserError, raise_if

LOGITS = ("*logits*",)
"""Names of arrays that are logits, whatever their case, where the rules have none."""


GRADIENTS = ("*grad*",)
"""The same of arrays, or of their files, that are gradients."""


@dataclass(frozen=True)
class Pair:
    """The arrays of one name; one of them may be missing."""

    name: str
    ours: Stored | None
    theirs: Stored | None

    @property
    def num_bytes(self) -> int:
        return sum(side.num_bytes for side in (self.ours, self.theirs) if side)

    def load(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Both arrays in one shape; None when they cannot be compared element by element."""
        if self.ours is None or self.theirs is None:
            return None
        if self.ours.load is None or self.theirs.load is None:
            return None
        if _squeezed(self.ours.shape) != _squeezed(self.theirs.shape):
            return None
        theirs = self.theirs.load()
        return self.ours.load().reshape(theirs.shape), theirs


@dataclass(frozen=True, kw_only=True)
class Side:
    """An array as one dump holds it."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    summary: Summary | None
    """None when its dtype is not compared."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One name."""

    pair: Pair
    ours: Side | None
    theirs: Side | None
    findings: tuple[Finding, ...]
    difference: Difference | None = None
    logits: LogitsAgreement | None = None
    tolerances: Tolerances | None = None

    @property
    def name(self) -> str:
        return self.pair.name

    @property
    def passed(self) -> bool:
        return not self.findings


@dataclass(frozen=True, kw_only=True)
class Report:
    """Two dumps."""

    ours: str
    theirs: str
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)

    @property
    def failed(self) -> tuple[Comparison, ...]:
        return tuple(c for c in self.comparisons if not c.passed)

    def to_json(self) -> dict[str, Any]:
        """The report for machines; what JSON has no number for is "nan", "inf" or "-inf"."""
        return {
            "qwen2_ascend": __version__,
            "passed": self.passed,
            "ours": self.ours,
            "theirs": self.theirs,
            "num_compared": sum(c.difference is not None for c in self.comparisons),
            "num_failed": len(self.failed),
            "arrays": [_comparison_json(comparison) for comparison in self.comparisons],
        }


def match(ours: Dump, theirs: Dump, rules: Rules) -> list[Pair]:
    """Pairs the arrays of two dumps by name, in ours' order.

    Two files of one array each are a pair whatever their names. Else the names inside the files
    count, or a file's own name for one array without any; where these are not unique on both sides,
    the file's place in its folder goes before them.

    Raises:
        UserError: no name fits `rules.names`, or what else the rules name; nothing is of logits,
            and the rules have tolerances for them.
    """
    if _is_lone(ours) and _is_lone(theirs):
        (a,), (b,) = ours.arrays, theirs.arrays
        pairs = [Pair(a.inner or b.inner or ours.path.stem, a, b)]
    else:
        x, y = ours.by_short_name(), theirs.by_short_name()
        if x is None or y is None:
            x, y = ours.by_full_name(), theirs.by_full_name()
        pairs = [
            Pair(name, x.get(name), y.get(name)) for name in [*x, *(n for n in y if n not in x)]
        ]
    if rules.names:
        chosen = [pair for pair in pairs if _fits(pair.name, rules.names)]
        if not chosen:
            raise UserError(f"--names {' '.join(rules.names)}: {_none_fits(pairs)}.")
        pairs = chosen
    if rules.common_only:
        common = [pair for pair in pairs if pair.ours and pair.theirs]
        if not common:
            raise UserError(f"{_nothing_in_common(pairs)}; there is nothing to compare.")
        pairs = common
    raise_if(_idle_rules(pairs, rules))
    return pairs


def _idle_rules(pairs: list[Pair], rules: Rules) -> Iterator[str]:
    """Rules for logits or gradients by which no pair would be judged."""
    if rules.gradients and not any(_is_gradient(pair, rules) for pair in pairs):
        yield f"--gradients {' '.join(rules.gradients)}: {_none_fits(pairs)}."
    if any(_is_logits(pair, rules) for pair in pairs):
        return
    if rules.logits:
        yield f"--logits {' '.join(rules.logits)}: {_none_fits(pairs)}."
        return
    for flag, value in (("--min-top1", rules.min_top1), ("--max-kl", rules.max_kl)):
        if value is not None:
            yield (
                f"{flag} {value:g} judges logits, which are called {' '.join(LOGITS)}: "
                f"{_none_fits(pairs)}; name them with --logits PATTERN."
            )


def _none_fits(pairs: list[Pair]) -> str:
    examples = ", ".join(repr(pair.name) for pair in pairs[:5])
    return f"none of {len(pairs)} names fits; there are for example {examples}"


def compare(
    ours: Dump,
    theirs: Dump,
    rules: Rules,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> Report:
    """Compares two dumps.

    Args:
        ours: what is judged.
        theirs: the reference.
        rules: what is compared, and what passes.
        progress: called with the bytes of each pair that is done.

    Raises:
        UserError: a file whose data is damaged; no name fits.
    """
    comparisons = []
    for pair in match(ours, theirs, rules):
        comparisons.append(_compare_pair(pair, rules))
        progress(pair.num_bytes)
    return Report(ours=str(ours.path), theirs=str(theirs.path), comparisons=tuple(comparisons))


def _compare_pair(pair: Pair, rules: Rules) -> Comparison:
    findings = list(_findings_of_form(pair, rules))
    arrays = pair.load()
    if arrays is None:
        return Comparison(
            pair=pair,
            ours=_side(pair.ours),
            theirs=_side(pair.theirs),
            findings=tuple(findings),
        )
    a, b = arrays
    ours, theirs = _side(pair.ours, a), _side(pair.theirs, b)
    assert ours and theirs and ours.summary and theirs.summary
    dtype = coarser(a.dtype, b.dtype)
    limits = _tolerances(rules, _computed_in(pair, dtype, rules), _is_gradient(pair, rules))
    found = difference(
        a, b, dtype=dtype, rtol=limits.rtol, atol=limits.atol, usual_rows=limits.usual_rows
    )
    agreement = logits_agreement(a, b) if _is_logits(pair, rules) else None
    findings += _nonfinite(ours.summary, theirs.summary, found, rules)
    findings += tolerance.judge(found, agreement, limits)
    return Comparison(
        pair=pair,
        ours=ours,
        theirs=theirs,
        findings=tuple(findings),
        difference=found,
        logits=agreement,
        tolerances=limits,
    )


def _tolerances(rules: Rules, dtype: str, is_gradient: bool) -> Tolerances:
    """The tolerances of arrays computed in `dtype`."""
    defaults = tolerance.default_tolerances(dtype, gradient=is_gradient)
    if defaults is tolerance.EXACT:
        return defaults
    given = {
        field.name: value
        for field in dataclasses.fields(Tolerances)
        if (value := getattr(rules, field.name, None)) is not None
    }
    if rules.atol is not None:  # it says what is noise; so no row has to
        given["usual_rows"] = False
    return dataclasses.replace(defaults, **given)


def _computed_in(pair: Pair, dtype: np.dtype, rules: Rules) -> str:
    """The coarsest of the pair's dtype and what its files, or the rules, say it was computed in."""
    if dtype not in FLOATS:
        return dtype_name(dtype)
    said = (rules.precision, *(side.precision for side in (pair.ours, pair.theirs) if side))
    coarseness = [dtype_name(x) for x in FLOATS]
    names = [name for name in (dtype_name(dtype), *said) if name in coarseness]
    return min(names, key=coarseness.index)


def _is_logits(pair: Pair, rules: Rules) -> bool:
    """Whether it has rows of logits; a number or an empty array has none."""
    shapes = [side.shape for side in (pair.ours, pair.theirs) if side]
    has_rows = all(shape and 0 not in shape for shape in shapes)
    return has_rows and _fits(pair.name, rules.logits or LOGITS)


def _is_gradient(pair: Pair, rules: Rules) -> bool:
    files = [side.path.stem for side in (pair.ours, pair.theirs) if side]
    return any(_fits(name, rules.gradients or GRADIENTS) for name in (pair.name, *files))


def _findings_of_form(pair: Pair, rules: Rules) -> Iterator[Finding]:
    """What is seen without looking at the data."""
    a, b = pair.ours, pair.theirs
    if a is None or b is None:
        who = "theirs" if a is None else "ours"
        yield Finding("missing", f"only {who} has it (--common-only leaves it out)")
        return
    if a.shape != b.shape:
        same = "" if _squeezed(a.shape) != _squeezed(b.shape) else "; compared without axes of 1"
        yield Finding("shape", f"shape {_shape(a.shape)} is not {_shape(b.shape)}{same}")
    if a.dtype != b.dtype and not rules.any_dtype:
        hint = "; compared as the coarser one (--any-dtype accepts that)"
        known = a.load is not None and b.load is not None
        yield Finding("dtype", f"dtype {a.dtype} is not {b.dtype}{hint if known else ''}")
    for side in (a, b):
        if side.load is None:
            yield Finding("dtype", f"dtype {side.dtype} is not compared")
            break


def _nonfinite(
    ours: Summary, theirs: Summary, found: Difference, rules: Rules
) -> Iterator[Finding]:
    if rules.equal_nonfinite and not found.num_unequal_nonfinite:
        return
    sides = [
        f"{who} has {counts}"
        for who, side in (("ours", ours), ("theirs", theirs))
        if (counts := _counts(side))
    ]
    if sides:
        places = found.num_unequal_nonfinite
        same = "at the same places (--equal-nonfinite accepts that)"
        where = f"{places} of them not at the same place" if places else same
        yield Finding("nonfinite", f"{', '.join(sides)}; {where}")


def _counts(side: Summary) -> str:
    counts = ((side.num_nan, "NaN"), (side.num_inf, "infinite"))
    return " and ".join(f"{count} {what}" for count, what in counts if count)


def _side(stored: Stored | None, array: np.ndarray | None = None) -> Side | None:
    if stored is None:
        return None
    if array is None and stored.load is not None:
        array = stored.load()
    return Side(
        file=str(stored.path),
        shape=stored.shape,
        dtype=stored.dtype,
        summary=None if array is None else describe(array),
    )


def _is_lone(dump: Dump) -> bool:
    return len(dump.arrays) == 1 and not dump.path.is_dir()


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


def _nothing_in_common(pairs: list[Pair]) -> str:
    ours = next((pair.name for pair in pairs if pair.ours), None)
    theirs = next((pair.name for pair in pairs if pair.theirs), None)
    return f"no name is on both sides (ours has for example {ours!r}, theirs {theirs!r})"


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    figures = ("ours", "theirs", "difference", "logits", "tolerances")
    return {
        "name": comparison.name,
        "passed": comparison.passed,
        "findings": [finding._asdict() for finding in comparison.findings],
        **{name: _json(getattr(comparison, name)) for name in figures},
    }


def _json(value: Any) -> Any:
    """Dataclasses as objects (arrays inside are left out), numbers that JSON lacks as words."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {k: _json(v) for k, v in fields.items() if not isinstance(v, np.ndarray)}
    if isinstance(value, Mapping):
        return {k: _json(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
