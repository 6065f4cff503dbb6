"""How far apart two arrays of a dtype may be and still count as the same computation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qwen2_ascend.comparison.statistics import Difference, LogitsAgreement


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """What a verdict asks for."""

    rtol: float
    """An element may differ by atol + rtol * |theirs|: numpy.allclose's rule."""
    atol: float | None = None
    """None: rtol times the largest |theirs| of the element's row. Sums round in proportion to their
    largest terms, so a small element among large ones is not expected to be precise itself. Not the
    largest of the array: a few tokens of Qwen2 have hidden states 200 times those of the others."""
    min_cosine: float = -1.0
    """The least cosine of every row. Rows that differ by at most a given atol are not asked for it,
    nor counted by the next."""
    max_relative_l2: float = math.inf
    """The median row's length of the difference over the length of theirs. It sees what changes
    every row a little, such as a wrong scale, where a cosine sees nothing."""
    max_kl: float = 0.0
    """The largest KL divergence of logits in nats, mean over the rows."""
    min_top1: float = 0.0
    """The least share of rows whose logits agree on the likeliest token."""
    usual_rows: bool = False
    """Rows that are shorter than their tensor's median row are held to that one's size in place of
    their own. So it is with gradients: a row of a weight's is a sum over all tokens, and where its
    terms cancel (a key's, whose softmax does not see what all keys share) what is left is smaller
    than what the terms round. Such a row has no direction to speak of, so not its cosine is judged
    but the length of its difference, by as much of the median row as the cosine allows of its own;
    a fault in it still shows when it is larger than the rounding of its neighbours."""

    @property
    def max_row_distance(self) -> float:
        """Length of a row's difference over its own that has the least cosine allowed."""
        return math.sqrt(2 * (1 - self.min_cosine))


DEFAULTS = {
    "fp64": Tolerances(rtol=1e-10, min_cosine=1 - 1e-12, max_relative_l2=1e-10, max_kl=1e-12),
    "fp32": Tolerances(rtol=1e-5, min_cosine=1 - 1e-10, max_relative_l2=3e-6, max_kl=1e-10),
    "fp16": Tolerances(rtol=3e-2, min_cosine=0.9995, max_relative_l2=1e-2, max_kl=1e-4),
    "bf16": Tolerances(rtol=0.2, min_cosine=0.98, max_relative_l2=0.08, max_kl=5e-3),
}
"""The tolerances for the coarser dtype of a pair; integers must be equal.

A few times the noise of a whole model. Qwen2.5-Coder-0.5B in transformers on a CPU, eager attention
against SDPA, 64 tokens of code, every hidden state and the logits, in fp32, fp16 and bf16:
the largest difference over the largest of its row is 2.6e-6, 0.014, 0.12; the least cosine
1 - 1.2e-12, 1 - 6.8e-5, 0.994; the median row's relative L2 8.9e-7, 3.9e-3, 0.033; the mean KL
divergence 1.7e-12, 1.9e-5, 1.4e-3. fp64 agrees only where nothing inside goes through fp32, which
transformers' norms, softmax and rotary tables do. One operator's output should do much better than
a model's: --rtol and its like are there for it."""

GRADIENTS = {
    "fp64": Tolerances(rtol=1e-9, min_cosine=1 - 1e-12, max_relative_l2=1e-9, usual_rows=True),
    "fp32": Tolerances(rtol=2e-3, min_cosine=1 - 2e-6, max_relative_l2=1e-4, usual_rows=True),
    "fp16": Tolerances(rtol=0.25, min_cosine=0.97, max_relative_l2=0.1, usual_rows=True),
    "bf16": Tolerances(rtol=2.0, min_cosine=0.3, max_relative_l2=0.5, usual_rows=True),
}
"""The same for gradients, by the coarser precision in which the pair was computed.

Qwen2.5-Coder-0.5B, 32 tokens of code, one process against TP2, in fp32 and (layers 0 and 3) bf16:
the largest difference over the largest of its row or of the median row is 7.6e-4, 0.8; the least
cosine 1 - 4.1e-7, 0.57; the most that a short row differs by 4.8e-4, 0.63; the median row's
relative L2 2.4e-5, 0.18. Most of these are a query's or key's of layer 0. fp16's tolerances are
bf16's by the ratio of their roundings, fp64's a guess. In 16 bits only gross faults show between
two gradients: align_qwen2.py, which measures each one's noise, sees more."""

EXACT = Tolerances(rtol=0.0, atol=0.0)


class Finding(NamedTuple):
    """Why a pair does not agree."""

    kind: str
    """What machines read: shape, dtype, nonfinite, missing, tolerance, cosine, short_rows,
    relative_l2, kl, top1."""
    text: str


def default_tolerances(dtype: str, *, gradient: bool = False) -> Tolerances:
    """Those of `dtype`; equality for integers."""
    return (GRADIENTS if gradient else DEFAULTS).get(dtype, EXACT)


def judge(
    difference: Difference,
    agreement: LogitsAgreement | None,
    tolerances: Tolerances,
) -> Iterator[Finding]:
    """What exceeds the tolerances.

    Args:
        difference: made with these tolerances' rtol and atol.
        agreement: for logits.
        tolerances: what is asked for.
    """
    if difference.num_beyond:
        yield Finding("tolerance", _beyond(difference, tolerances))
    judged, lengths = difference.cosines, difference.row_relative_l2
    if tolerances.usual_rows:
        short = short_rows(difference)
        if text := _short_rows_beyond(difference, short, tolerances):
            yield Finding("short_rows", text)
        usual = np.maximum(difference.row_lengths, difference.usual_length)
        lengths = np.divide(difference.row_distances, usual, out=lengths.copy(), where=usual > 0)
        judged = judged[~short]
    elif tolerances.atol is not None:
        beyond = difference.row_max_abs > tolerances.atol
        judged, lengths = judged[beyond], lengths[beyond]
    if judged.size and not judged.min() >= tolerances.min_cosine:
        count = int((~(judged >= tolerances.min_cosine)).sum())
        yield Finding(
            "cosine",
            f"cosine below {cosine_text(tolerances.min_cosine)} in {count} of "
            f"{judged.size} rows; the least is {cosine_text(float(judged.min()))}",
        )
    if lengths.size and not (median := float(np.median(lengths))) <= tolerances.max_relative_l2:
        limit = f"{tolerances.max_relative_l2:.3g}"
        yield Finding("relative_l2", f"the median row's relative L2 {median:.3g} is above {limit}")
    if agreement is None or agreement.num_rows == agreement.num_skipped:
        return
    if not agreement.kl_mean <= tolerances.max_kl:
        yield Finding(
            "kl", f"KL divergence {agreement.kl_mean:.3g} is above {tolerances.max_kl:.3g}"
        )
    if agreement.top1 < tolerances.min_top1:
        yield Finding(
            "top1",
            f"the likeliest token agrees in {agreement.top1:.2%} of the rows, not "
            f"{tolerances.min_top1:.2%}",
        )


def short_rows(difference: Difference) -> np.ndarray:
    """Which rows of theirs are shorter than the median one, bool."""
    return difference.row_lengths < difference.usual_length


def _short_rows_beyond(
    difference: Difference, short: np.ndarray, tolerances: Tolerances
) -> str | None:
    limit = tolerances.max_row_distance
    relative = difference.row_distances[short] / (difference.usual_length or 1.0)
    count = int((~(relative <= limit)).sum())
    if not count:
        return None
    return (
        f"{count} of {relative.size} rows shorter than the median one differ by more than "
        f"{limit:.2g} of its length; the most by {relative.max():.3g}"
    )


def _beyond(difference: Difference, tolerances: Tolerances) -> str:
    many = f"{difference.num_beyond} of {difference.num_elements} elements"
    where = f"[{', '.join(map(str, difference.worst))}]" if difference.worst else "the scalar"
    values = f"{difference.worst_ours:.9g} instead of {difference.worst_theirs:.9g}"
    rtol, atol = tolerances.rtol, tolerances.atol
    if not atol and not rtol:
        return f"{many} differ; the most {where}: {values}"
    row = " and of their row's largest"
    if tolerances.usual_rows:
        row += ", or the median row's"
    limit = (
        f"{rtol:.3g} of |theirs|{row}" if atol is None else f"{atol:.3g} + {rtol:.3g} * |theirs|"
    )
    return f"{many} differ by more than {limit}; the most {where}: {values}"


def cosine_text(cosine: float) -> str:
    """The cosine, or its distance from 1 where digits would say 1: 1-2e-12."""
    away = 1 - cosine
    return f"1-{away:.2g}" if 0 < away < 1e-5 else f"{cosine:.6g}"
