"""What two arrays say about each other: moments, relative errors, ULPs, cosines, KL divergence.

Pure numpy, bf16 through ml_dtypes. Arrays are read a block at a time and computed in fp64, so a
mapped file larger than memory is no obstacle: besides the arrays it takes a few megabytes, and 8
bytes per row for the cosines. `ours` is what is judged, `theirs` the reference. A row is what lies
along the last axis: a token's hidden state or its logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from qwen2_ascend.checkpoint.formats.stored import NUMPY_DTYPES

BLOCK = 1 << 16
"""Elements that are looked at together; 512 KB of fp64, so that a block stays in the cache."""

FLOATS = tuple(NUMPY_DTYPES[name] for name in ("bf16", "fp16", "fp32", "fp64"))
"""Floating-point dtypes that are compared, the coarsest first."""
_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One array; the moments are of its finite elements, NaN when there is none."""

    num_elements: int
    num_nan: int
    num_inf: int
    max: float
    min: float
    mean: float
    std: float
    """The population's: divided by n."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """ours - theirs, over the elements that are finite on both sides.

    Relative figures of a reference that is zero are 0 where ours is zero too, else infinite.
    Figures over no elements are 0, cosines 1.
    """

    num_elements: int
    num_compared: int
    """Elements that are finite on both sides."""
    num_equal_nonfinite: int
    """The same infinity, or NaN, on both sides."""
    num_unequal_nonfinite: int
    """NaN or infinity that the other side does not have."""
    max: float
    min: float
    mean: float
    std: float
    max_abs: float
    mean_abs: float
    rms: float
    euclidean: float
    """Length of the difference: msprobe's EucDist."""
    max_relative: float
    """Largest |ours - theirs| / |theirs| where theirs is not zero: msprobe's MaxRelativeErr."""
    relative_to_largest: float
    """max_abs over the largest |theirs|."""
    relative_l2: float
    """Length of the difference over the length of theirs."""
    relative_l2_median: float
    """The same of each row, the median: what a usual token differs by."""
    share_within_1_permille: float
    """Share of elements whose relative error is at most 1e-3."""
    share_within_5_permille: float
    share_equal: float
    ulp_dtype: str
    """The dtype whose units in the last place the next two are in; both sides rounded to it."""
    ulp_max: int
    ulp_mean: float
    cosine_min: float
    cosine_mean: float
    num_beyond: int
    """Elements with |ours - theirs| > atol + rtol * |theirs|, as `difference` was asked."""
    tolerance_used: float
    """Largest |ours - theirs| / (atol + rtol * |theirs|): 1 is the most that is within; infinite
    where something differs and nothing may."""
    worst: tuple[int, ...]
    """Where max_abs is (empty for an array without elements or axes)."""
    worst_ours: float
    worst_theirs: float
    cosines: np.ndarray = field(repr=False, compare=False)
    """Cosine similarity of each row, fp64; 1 where both rows are zero, 0 where one of them is."""
    row_max_abs: np.ndarray = field(repr=False, compare=False)
    """Largest |ours - theirs| of each row, fp64."""
    row_relative_l2: np.ndarray = field(repr=False, compare=False)
    """Length of each row's difference over the length of theirs, fp64."""
    row_lengths: np.ndarray = field(repr=False, compare=False)
    """Length of each of their rows, fp64."""
    row_distances: np.ndarray = field(repr=False, compare=False)
    """Length of each row's difference, fp64."""

    @property
    def usual_length(self) -> float:
        """The median length of their rows that are not zero."""
        return _usual(self.row_lengths)


@dataclass(frozen=True, kw_only=True)
class LogitsAgreement:
    """What two arrays of logits `[..., vocabulary]` make of the next token, over their rows."""

    num_rows: int
    num_skipped: int
    """Rows with a NaN or +infinity, or nothing above -infinity, on either side."""
    kl_mean: float
    """Mean of KL(softmax(theirs) || softmax(ours)), in nats; NaN when no row is left."""
    kl_max: float
    top1: float
    """Share of rows whose argmax is the same token."""
    top5: float
    """Share of theirs' five likeliest tokens that are among ours' five (fewer if there are)."""


def dtype_name(dtype: np.dtype) -> str:
    """bf16, fp32, int64...; numpy's own word for what is not compared."""
    return _NAMES.get(np.dtype(dtype), str(dtype))


def is_comparable(dtype: np.dtype) -> bool:
    """Floating point as in FLOATS, integers and bool."""
    return dtype in FLOATS or dtype.kind in "iub"


def coarser(a: np.dtype, b: np.dtype) -> np.dtype:
    """The dtype at which values of `a` and `b` can be expected to agree: of two, the one with
    fewer digits; the floating-point one beside an integer."""
    floats = [dtype for dtype in (a, b) if dtype in FLOATS]
    if floats:
        return min(floats, key=FLOATS.index)
    return np.result_type(a, b) if np.result_type(a, b).kind in "iub" else np.dtype(np.int64)


def describe(array: np.ndarray) -> Summary:
    """Moments of `array` (any shape, FLOATS or integers), NaN and infinity counted apart."""
    rows = _rows(array)
    moments, num_nan, num_inf = _Moments(), 0, 0
    for block in _blocks(rows.shape):
        values = rows[block].astype(np.float64).ravel()
        finite = np.isfinite(values)
        if not finite.all():
            nans = int(np.isnan(values).sum())
            num_nan += nans
            num_inf += int((~finite).sum()) - nans
            values = values[finite]
        moments.add(values)
    return Summary(
        num_elements=rows.size,
        num_nan=num_nan,
        num_inf=num_inf,
        max=moments.max if moments.count else math.nan,
        min=moments.min if moments.count else math.nan,
        mean=moments.mean if moments.count else math.nan,
        std=moments.std if moments.count else math.nan,
    )


def difference(
    ours: np.ndarray,
    theirs: np.ndarray,
    *,
    dtype: np.dtype | None = None,
    rtol: float = 0.0,
    atol: float | None = 0.0,
    usual_rows: bool = False,
) -> Difference:
    """Compares two arrays of one shape.

    Args:
        ours: what is judged.
        theirs: the reference.
        dtype: at which ULPs are counted; the coarser of the two without it.
        rtol: with `atol`, what `num_beyond` counts: numpy.allclose's rule.
        atol: absolute; None for rtol times the largest |theirs| of the element's row.
        usual_rows: with `atol` None, of the median row where that is larger.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, f"shapes {ours.shape} and {theirs.shape} differ"
    dtype = coarser(ours.dtype, theirs.dtype) if dtype is None else np.dtype(dtype)
    a, b = _rows(ours), _rows(theirs)
    if atol is None:
        largest = _row_largest(b)
        scale = rtol * (np.maximum(largest, _usual(largest)) if usual_rows else largest)
    else:
        scale = np.full(a.shape[0], atol, np.float64)
    sums = _DifferenceSums(rtol, scale)
    for block in _blocks(a.shape):
        sums.add(block, a[block], b[block], dtype)
    return sums.result(ours, theirs, dtype)


def ulp_distance(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """How many numbers of `dtype` lie from `a` to `b` (uint64), after both are rounded to it.

    Zero and minus zero are one number. Of an integer dtype it is |a - b|. NaN has no meaning here.
    """
    first, second = _ordinals(a, dtype), _ordinals(b, dtype)
    if dtype.itemsize < 8:
        return np.abs(first - second).view(np.uint64)
    low, high = np.minimum(first, second), np.maximum(first, second)
    # the distance of two int64 needs 64 bits without a sign; wrapping subtraction gives them
    return high.view(np.uint64) - low.view(np.uint64)


def logits_agreement(ours: np.ndarray, theirs: np.ndarray) -> LogitsAgreement:
    """Compares the distributions of the next token that two arrays of logits stand for."""
    a, b = _rows(ours), _rows(theirs)
    assert a.shape == b.shape, f"shapes {np.shape(ours)} and {np.shape(theirs)} differ"
    height = max(1, BLOCK // max(a.shape[1], 1))
    divergences, firsts, fives = [np.empty(0)], [np.empty(0)], [np.empty(0)]
    for start in range(0, a.shape[0], height):
        x = a[start : start + height].astype(np.float64)
        y = b[start : start + height].astype(np.float64)
        sound = _is_distribution(x) & _is_distribution(y)
        x, y = x[sound], y[sound]
        divergences.append(_kl_divergence(y, x))
        firsts.append(x.argmax(axis=1) == y.argmax(axis=1))
        fives.append(_top_overlap(x, y, 5))
    kl, first, five = (np.concatenate(parts) for parts in (divergences, firsts, fives))
    return LogitsAgreement(
        num_rows=a.shape[0],
        num_skipped=a.shape[0] - kl.size,
        kl_mean=float(kl.mean()) if kl.size else math.nan,
        kl_max=float(kl.max()) if kl.size else math.nan,
        top1=float(first.mean()) if kl.size else math.nan,
        top5=float(five.mean()) if kl.size else math.nan,
    )


# -- blocks


def _rows(array: np.ndarray) -> np.ndarray:
    """`[rows, columns]` of any array; a scalar is one row of one."""
    array = np.asarray(array)
    assert is_comparable(array.dtype), f"dtype {array.dtype} is not compared"
    if array.size == 0:
        return array.reshape(-1)[:0].reshape(0, 1)
    return array.reshape(-1, array.shape[-1] if array.ndim else 1)


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Row by row, or several short rows, or pieces of a long one; in the order of memory."""
    num_rows, num_columns = shape
    width = min(num_columns, BLOCK)
    height = max(1, BLOCK // width)
    for row in range(0, num_rows, height):
        for column in range(0, num_columns, width):
            yield slice(row, row + height), slice(column, column + width)


class _Moments:
    """Running count, extremes, mean and squared deviation, merged by Chan's formula."""

    def __init__(self) -> None:
        self.count = 0
        self.max, self.min, self.mean, self._squares = -math.inf, math.inf, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        """Takes in finite fp64 `values`."""
        if not values.size:
            return
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(values.mean())
            centred = values - mean
            squares = float(np.vdot(centred, centred))
            shift, total = mean - self.mean, self.count + values.size
            self._squares += squares + shift * shift * (self.count / total) * values.size
            self.mean += shift * (values.size / total)
        self.count = total
        self.max = max(self.max, float(values.max()))
        self.min = min(self.min, float(values.min()))

    @property
    def std(self) -> float:
        return math.sqrt(self._squares / self.count) if self.count else 0.0


class _DifferenceSums:
    """What `difference` gathers from block to block."""

    def __init__(self, rtol: float, row_atol: np.ndarray) -> None:
        self.rtol, self.row_atol = rtol, row_atol
        self.moments = _Moments()
        self.num_nonfinite = [0, 0]
        """Unequal and equal."""
        self.abs_sum = 0.0
        self.largest = self.max_relative = 0.0
        self.within = [0, 0]
        self.num_equal = self.num_beyond = 0
        self.used = 0.0
        self.ulp_max, self.ulp_sum = 0, 0.0
        self.worst = (-1.0, 0, 0)
        """|difference|, row, column."""
        sums = np.zeros((5, row_atol.size))
        self.dot, self.ours_squares, self.theirs_squares, self.squares, self.row_max_abs = sums

    def add(
        self, place: tuple[slice, slice], a: np.ndarray, b: np.ndarray, dtype: np.dtype
    ) -> None:
        """Takes in one block of ours and of theirs, `[rows, columns]`, in their own dtypes."""
        x, y = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        everything = bool(finite.all())
        if not everything:
            odd_x, odd_y = x[~finite], y[~finite]
            equal = int(((odd_x == odd_y) | (np.isnan(odd_x) & np.isnan(odd_y))).sum())
            self.num_nonfinite[1] += equal
            self.num_nonfinite[0] += odd_x.size - equal
            x, y = np.where(finite, x, 0.0), np.where(finite, y, 0.0)
            a, b = np.where(finite, a, a.dtype.type(0)), np.where(finite, b, b.dtype.type(0))
        ulps = ulp_distance(a, b, dtype)
        self.ulp_max = max(self.ulp_max, int(ulps.max()))
        self.ulp_sum += float(ulps.sum(dtype=np.float64))
        with np.errstate(over="ignore", invalid="ignore"):
            self._add_rows(place[0], x, y)
            self._add_elements(place, x, y, None if everything else finite)

    def _add_rows(self, rows: slice, x: np.ndarray, y: np.ndarray) -> None:
        self.dot[rows] += np.einsum("ij,ij->i", x, y)
        self.ours_squares[rows] += np.einsum("ij,ij->i", x, x)
        self.theirs_squares[rows] += np.einsum("ij,ij->i", y, y)

    def _add_elements(
        self, place: tuple[slice, slice], x: np.ndarray, y: np.ndarray, finite: np.ndarray | None
    ) -> None:
        difference = x - y
        distance, reference = np.abs(difference), np.abs(y)
        at = int(distance.argmax())
        if distance.flat[at] > self.worst[0]:
            row, column = divmod(at, distance.shape[1])
            self.worst = (
                float(distance.flat[at]),
                place[0].start + row,
                place[1].start + column,
            )
        self.row_max_abs[place[0]] = np.maximum(self.row_max_abs[place[0]], distance.max(axis=1))
        self.abs_sum += float(distance.sum())
        self.squares[place[0]] += np.einsum("ij,ij->i", difference, difference)
        self.largest = max(self.largest, float(reference.max()))
        is_zero = reference == 0
        relative = distance / np.where(is_zero, np.inf, reference)
        self.max_relative = max(self.max_relative, float(relative.max()))

        hidden = 0 if finite is None else _count(~finite)  # they count as equal zeros below
        infinite = _count(distance[is_zero]) + hidden if is_zero.any() else 0
        bound = self.rtol * reference + self.row_atol[place[0], None]
        with np.errstate(divide="ignore"):
            used = distance / bound
        self.num_beyond += _count(used > 1)
        # fmax: nothing of nothing is NaN, and within
        self.used = max(self.used, float(np.fmax.reduce(used, axis=None, initial=0.0)))
        self.num_equal += distance.size - _count(distance) - hidden
        for i, share in enumerate((1e-3, 5e-3)):
            self.within[i] += _count(relative <= share) - infinite
        self.moments.add(difference.ravel() if finite is None else difference[finite])

    def result(self, ours: np.ndarray, theirs: np.ndarray, dtype: np.dtype) -> Difference:
        moments, count = self.moments, self.moments.count
        shared = max(count, 1)
        cosines = _cosines(self.dot, self.ours_squares, self.theirs_squares)
        where: tuple[int, ...] = ()
        worst = (0.0, 0.0)
        if count and ours.ndim:
            flat = self.worst[1] * ours.shape[-1] + self.worst[2]
            where = tuple(int(i) for i in np.unravel_index(flat, ours.shape))
        if count:
            worst = (float(ours[where]), float(theirs[where]))
        max_abs = max(self.worst[0], 0.0)
        length, reference = math.sqrt(self.squares.sum()), math.sqrt(self.theirs_squares.sum())
        row_relative = _row_ratios(self.squares, self.theirs_squares)
        return Difference(
            num_elements=ours.size,
            num_compared=count,
            num_unequal_nonfinite=self.num_nonfinite[0],
            num_equal_nonfinite=self.num_nonfinite[1],
            max=moments.max if count else 0.0,
            min=moments.min if count else 0.0,
            mean=moments.mean,
            std=moments.std,
            max_abs=max_abs,
            mean_abs=self.abs_sum / shared,
            rms=length / math.sqrt(shared),
            euclidean=length,
            max_relative=self.max_relative,
            relative_to_largest=_ratio(max_abs, self.largest),
            relative_l2=_ratio(length, reference),
            relative_l2_median=float(np.median(row_relative)) if row_relative.size else 0.0,
            share_within_1_permille=self.within[0] / shared if count else 1.0,
            share_within_5_permille=self.within[1] / shared if count else 1.0,
            share_equal=self.num_equal / shared if count else 1.0,
            ulp_dtype=dtype_name(dtype),
            ulp_max=self.ulp_max,
            ulp_mean=self.ulp_sum / shared,
            cosine_min=float(cosines.min()) if cosines.size else 1.0,
            cosine_mean=float(cosines.mean()) if cosines.size else 1.0,
            num_beyond=self.num_beyond,
            tolerance_used=self.used,
            worst=where,
            worst_ours=worst[0],
            worst_theirs=worst[1],
            cosines=cosines,
            row_max_abs=self.row_max_abs,
            row_relative_l2=row_relative,
            row_lengths=np.sqrt(self.theirs_squares),
            row_distances=np.sqrt(self.squares),
        )


def _usual(sizes: np.ndarray) -> float:
    """The median of those that are not zero; 0 without any."""
    sizes = sizes[sizes > 0]
    return float(np.median(sizes)) if sizes.size else 0.0


def _row_largest(rows: np.ndarray) -> np.ndarray:
    """Largest finite magnitude of each row, fp64."""
    largest = np.zeros(rows.shape[0])
    for block in _blocks(rows.shape):
        sizes = np.abs(rows[block].astype(np.float64))
        sizes[~np.isfinite(sizes)] = 0.0
        largest[block[0]] = np.maximum(largest[block[0]], sizes.max(axis=1))
    return largest


def _ratio(part: float, whole: float) -> float:
    if whole:
        return part / whole
    return math.inf if part else 0.0


def _row_ratios(squares: np.ndarray, reference_squares: np.ndarray) -> np.ndarray:
    ratios = np.where(squares > 0, np.inf, 0.0)
    has_length = reference_squares > 0
    np.divide(squares, reference_squares, out=ratios, where=has_length)
    return np.sqrt(ratios)


def _count(condition: np.ndarray) -> int:
    return int(np.count_nonzero(condition))


def _cosines(dot: np.ndarray, a_squares: np.ndarray, b_squares: np.ndarray) -> np.ndarray:
    lengths = np.sqrt(a_squares) * np.sqrt(b_squares)
    cosines = np.divide(dot, lengths, out=np.zeros_like(dot), where=lengths != 0)
    cosines[(a_squares == 0) & (b_squares == 0)] = 1.0
    return np.clip(cosines, -1.0, 1.0)


def difference_histogram(
    ours: np.ndarray, theirs: np.ndarray, num_bins: int = 101
) -> tuple[np.ndarray, np.ndarray]:
    """How ours - theirs is distributed, over the elements that are finite on both sides.

    Returns:
        Counts `[num_bins]` and edges `[num_bins + 1]`, symmetric about zero so that one bin is
        around it (if `num_bins` is odd).
    """
    a, b = _rows(ours), _rows(theirs)
    found = difference(ours, theirs)
    reach = found.max_abs or 1.0
    edges = np.linspace(-reach, reach, num_bins + 1)
    counts = np.zeros(num_bins, np.int64)
    for block in _blocks(a.shape):
        with np.errstate(invalid="ignore"):
            values = a[block].astype(np.float64) - b[block].astype(np.float64)
        counts += np.histogram(values[np.isfinite(values)], edges)[0]
    return counts, edges


# -- ULPs


def _ordinals(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Numbers of `dtype` counted from zero, int64: neighbours are neighbours."""
    if dtype not in FLOATS:
        assert dtype.kind in "iub", f"ULPs of {dtype}"
        return values.astype(np.int64)
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(values.astype(dtype, copy=False))
    bits = rounded.view(f"i{dtype.itemsize}")
    # A negative number is the sign bit and its magnitude; this makes it minus its magnitude.
    sign = bits >> (8 * dtype.itemsize - 1)
    return ((bits ^ (sign & np.iinfo(bits.dtype).max)) - sign).astype(np.int64)


# -- logits


def _is_distribution(logits: np.ndarray) -> np.ndarray:
    """Rows whose softmax exists."""
    return np.isfinite(logits.max(axis=1))


def _kl_divergence(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """KL(softmax(p) || softmax(q)) of each row, in nats; infinite where q rules out what p has."""
    p, q = _log_softmax(p_logits), _log_softmax(q_logits)
    weights = np.exp(p)
    with np.errstate(invalid="ignore"):
        terms = np.where(weights > 0, weights * (p - q), 0.0)
    # exact arithmetic is never negative
    return np.maximum(terms.sum(axis=1), 0.0)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _top_overlap(x: np.ndarray, y: np.ndarray, count: int) -> np.ndarray:
    """Share of the `count` largest columns of `y` that are among those of `x`, for each row."""
    count = min(count, x.shape[1])
    first, second = (np.argpartition(-z, count - 1, axis=1)[:, :count] for z in (x, y))
    return (first[:, :, None] == second[:, None, :]).any(axis=1).mean(axis=1)
