"""Every figure of a comparison equals its definition, computed another way."""

from __future__ import annotations

import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qwen2_ascend.comparison import statistics
from qwen2_ascend.comparison.statistics import (
    coarser,
    describe,
    difference,
    difference_histogram,
    logits_agreement,
    ulp_distance,
)
from qwen2_ascend.comparison.torch_dumps import to_numpy

BF16, FP16, FP32, FP64 = (np.dtype(t) for t in (ml_dtypes.bfloat16, "f2", "f4", "f8"))
TORCH = {BF16: torch.bfloat16, FP16: torch.float16, FP32: torch.float32, FP64: torch.float64}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of these tests span several blocks, of whole rows and of pieces of rows."""
    monkeypatch.setattr(statistics, "BLOCK", 24)


def random_pair(shape, dtype=FP32, noise=1e-2, seed=0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    theirs = random.standard_normal(shape) + 0.3
    ours = theirs + noise * random.standard_normal(shape)
    return np.asarray(ours, dtype), np.asarray(theirs, dtype)


SHAPES = [(), (1,), (7,), (100,), (3, 5), (5, 4, 7), (2, 60), (40, 1), (2, 3, 2, 4)]


# -- moments


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_moments_are_those_of_the_whole_array(shape, dtype) -> None:
    array, _ = random_pair(shape, dtype)
    exact = array.astype(np.longdouble)
    found = describe(array)
    assert (found.num_elements, found.num_nan, found.num_inf) == (exact.size, 0, 0)
    assert (found.max, found.min) == (exact.max(), exact.min())
    assert found.mean == pytest.approx(float(exact.mean()), rel=1e-13)
    assert found.std == pytest.approx(float(exact.std()), rel=1e-13, abs=1e-15)


def test_the_deviation_survives_a_mean_a_billion_times_larger() -> None:
    """Property: the sum of squares minus the square of the sum is not how it is computed."""
    array = 1e9 + np.random.default_rng(0).standard_normal(1000)
    assert describe(array).std == pytest.approx(array.std(), rel=1e-9)


def test_what_is_not_finite_is_counted_and_kept_out_of_the_moments() -> None:
    array = np.array([[1.0, np.nan, 3.0], [np.inf, -np.inf, np.nan]], np.float32)
    found = describe(array)
    assert (found.num_nan, found.num_inf) == (2, 2)
    assert (found.max, found.min, found.mean, found.std) == (3, 1, 2, 1)
    nothing = describe(np.full(3, np.nan))
    assert math.isnan(nothing.max) and math.isnan(nothing.mean)


# -- the difference


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_the_difference_by_its_definitions(shape, dtype) -> None:
    ours, theirs = random_pair(shape, dtype)
    found = difference(ours, theirs, rtol=1e-3, atol=1e-4)
    x, y = (torch.from_numpy(np.asarray(z, FP64)) for z in (ours, theirs))
    d = x - y
    assert found.num_compared == found.num_elements == d.numel()
    assert (found.max, found.min) == (d.max(), d.min())
    assert found.mean == pytest.approx(float(d.mean()), rel=1e-9, abs=1e-16)
    assert found.std == pytest.approx(float(d.std(correction=0)), rel=1e-9, abs=1e-15)
    assert found.max_abs == torch.linalg.vector_norm(d, math.inf)
    assert found.mean_abs == pytest.approx(float(torch.nn.functional.l1_loss(x, y)))
    assert found.rms == pytest.approx(float(torch.nn.functional.mse_loss(x, y).sqrt()))
    assert found.euclidean == pytest.approx(float(torch.dist(x, y)))
    assert found.max_relative == pytest.approx(float((d / y).abs().max()))
    assert found.relative_to_largest == pytest.approx(float(d.abs().max() / y.abs().max()))
    assert found.relative_l2 == pytest.approx(float(torch.dist(x, y) / torch.linalg.norm(y)))
    assert found.num_beyond == int((~torch.isclose(x, y, rtol=1e-3, atol=1e-4)).sum())
    assert found.share_equal == pytest.approx(float((x == y).double().mean()))
    within = (found.share_within_1_permille, found.share_within_5_permille)
    for share, limit in zip(within, (1e-3, 5e-3), strict=True):
        is_close = torch.isclose(x, y, rtol=limit, atol=0)
        assert share == pytest.approx(float(is_close.double().mean()))
    assert abs(d[found.worst]) == found.max_abs
    assert (found.worst_ours, found.worst_theirs) == (x[found.worst], y[found.worst])


@pytest.mark.parametrize("shape", [(7,), (3, 5), (5, 4, 7), (2, 60)], ids=str)
def test_cosines_row_by_row(shape) -> None:
    ours, theirs = random_pair(shape, noise=0.5)
    x, y = (torch.from_numpy(z.astype(FP64)).reshape(-1, shape[-1]) for z in (ours, theirs))
    expected = torch.nn.functional.cosine_similarity(x, y, dim=1)
    found = difference(ours, theirs)
    np.testing.assert_allclose(found.cosines, expected, rtol=1e-12)
    assert found.cosine_min == pytest.approx(float(expected.min()), rel=1e-12)
    assert found.cosine_mean == pytest.approx(float(expected.mean()), rel=1e-12)
    np.testing.assert_array_equal(found.row_max_abs, (x - y).abs().amax(dim=1))
    relative = (torch.linalg.norm(x - y, dim=1) / torch.linalg.norm(y, dim=1)).numpy()
    np.testing.assert_allclose(found.row_relative_l2, relative, rtol=1e-12)
    assert found.relative_l2_median == pytest.approx(np.median(relative), rel=1e-12)


def test_rows_without_a_direction() -> None:
    """Zero beside zero is agreement; zero beside something is none."""
    theirs = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0], [1.0, 2.0]])
    ours = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [-2.0, -4.0]])
    found = difference(ours, theirs)
    np.testing.assert_allclose(found.cosines, [1, 0, 0, -1], atol=1e-15)
    np.testing.assert_allclose(found.row_relative_l2, [0, math.inf, 1, 3])


def test_references_of_zero() -> None:
    """Where theirs is zero a relative error means nothing, and is not 'within' anything."""
    found = difference(np.array([0.0, 1e-9, 2.2]), np.array([0.0, 0.0, 2.0]))
    assert found.max_relative == pytest.approx(0.1)
    assert found.share_within_5_permille == pytest.approx(1 / 3)
    assert difference(np.ones(3), np.zeros(3)).relative_l2 == math.inf
    assert difference(np.zeros(3), np.zeros(3)).relative_to_largest == 0


def test_what_is_not_finite_is_counted_by_place_and_left_out() -> None:
    nan, inf = np.nan, np.inf
    ours = np.array([nan, nan, inf, inf, -inf, 1.0, 2.0, 4.0], np.float32)
    theirs = np.array([nan, 0.0, inf, -inf, -inf, nan, 2.0, 3.0], np.float32)
    found = difference(ours, theirs, rtol=0.01)
    assert (found.num_equal_nonfinite, found.num_unequal_nonfinite) == (3, 3)
    assert (found.num_compared, found.max_abs, found.num_beyond) == (2, 1.0, 1)
    assert (found.mean, found.share_equal, found.share_within_1_permille) == (0.5, 0.5, 0.5)
    assert found.ulp_max == ulp_distance(np.float32([4]), np.float32([3]), FP32)[0]
    assert found.cosine_min == pytest.approx(16 / math.sqrt(20 * 13))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_nothing_to_compare_is_no_difference(shape) -> None:
    found = difference(np.zeros(shape), np.zeros(shape))
    assert (found.num_elements, found.max_abs, found.cosine_min, found.worst) == (0, 0, 1, ())
    assert describe(np.zeros(shape)).num_elements == 0


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 8), (2, 60)], ids=str)
def test_a_tolerance_in_proportion_to_the_row(shape) -> None:
    """Property: rows of large numbers do not lend their tolerance to rows of small ones."""
    ours, theirs = random_pair(shape, FP64)
    scales = 10.0 ** np.arange(math.prod(shape[:-1])).reshape(*shape[:-1], 1)
    ours, theirs = ours * scales, theirs * scales
    bound = 1e-2 * (np.abs(theirs) + np.abs(theirs).max(axis=-1, keepdims=True))
    found = difference(ours, theirs, rtol=1e-2, atol=None)
    used = np.abs(ours - theirs) / bound
    assert found.num_beyond == np.count_nonzero(used > 1)
    assert found.tolerance_used == pytest.approx(used.max())
    assert difference(ours / 1e3, theirs / 1e3, rtol=1e-2, atol=None).num_beyond == found.num_beyond


def test_no_tolerance_is_used_up_by_anything() -> None:
    zero, one = np.zeros(3), np.array([0.0, 0.0, 1.0])
    assert difference(zero, zero).tolerance_used == 0
    assert difference(one, zero).tolerance_used == math.inf
    assert difference(one * 1.5, one, atol=1.0).tolerance_used == 0.5


@pytest.mark.parametrize("shape", [(7,), (5, 4, 7), (2, 60)], ids=str)
def test_the_histogram_counts_every_finite_difference_once(shape) -> None:
    ours, theirs = random_pair(shape)
    ours.flat[0] = np.nan
    counts, edges = difference_histogram(ours, theirs, 11)
    values = (ours.astype(FP64) - theirs.astype(FP64)).ravel()[1:]
    np.testing.assert_array_equal(counts, np.histogram(values, edges)[0])
    assert counts.sum() == values.size
    assert edges[0] == -edges[-1] == -np.abs(values).max()
    assert difference_histogram(theirs, theirs, 11)[0][5] == theirs.size


def test_a_view_with_strides_is_compared_as_it_looks() -> None:
    ours, theirs = random_pair((6, 8))
    turned = difference(ours.T, theirs.T)
    straight = difference(np.ascontiguousarray(ours.T), np.ascontiguousarray(theirs.T))
    np.testing.assert_allclose(turned.cosines, straight.cosines, rtol=1e-14)
    for name in ("worst", "max_abs", "ulp_mean"):
        assert getattr(turned, name) == getattr(straight, name), name


def test_integers_are_compared_exactly() -> None:
    """Property: token ids that fp64 cannot tell apart are still different."""
    theirs = np.array([1, 2, 2**60], np.int64)
    found = difference(theirs + np.array([0, 0, 1]), theirs)
    assert (found.ulp_dtype, found.ulp_max) == ("int64", 1)
    assert difference(np.array([True, False]), np.array([True, True])).ulp_max == 1


def test_memory_does_not_grow_with_the_arrays(monkeypatch) -> None:
    """Property: of 10 MB of fp32, as of any size, a few blocks are held at a time."""
    monkeypatch.setattr(statistics, "BLOCK", 1 << 14)
    ours, theirs = random_pair((128, 20_000))
    assert theirs.nbytes > 9 * 2**20
    for work in (describe, difference, difference_histogram, logits_agreement):
        tracemalloc.start()
        try:
            _ = work(ours) if work is describe else work(ours, theirs)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 3 * 2**20, work.__name__


# -- ULPs


@pytest.mark.parametrize("dtype", list(TORCH), ids=str)
def test_one_step_of_nextafter_is_one_ulp(dtype) -> None:
    """torch.nextafter agrees across zero, subnormals and powers of two; also after many steps."""
    start = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, 1.5e-7, -6e-8, 65504.0, -3.25])
    start = start.to(TORCH[dtype])
    towards = torch.full_like(start, math.inf)
    x = start
    for steps in range(1, 6):
        x = torch.nextafter(x, towards)
        distance = ulp_distance(to_numpy(x)[:7], to_numpy(start)[:7], dtype)
        assert distance.tolist() == [steps] * 7
    assert ulp_distance(to_numpy(x)[8:], to_numpy(start)[8:], dtype).tolist() == [5]


@given(arrays.arrays(FP64, 3, elements=st.floats(allow_nan=False)))
def test_ulps_are_a_distance_even_across_the_whole_of_fp64(values) -> None:
    """Symmetric, zero only for equal numbers, and adding up along the line."""
    low, middle, high = (np.array([v]) for v in sorted(values))
    parts = [int(ulp_distance(a, b, FP64)[0]) for a, b in [(low, middle), (middle, high)]]
    assert int(ulp_distance(high, low, FP64)[0]) == sum(parts)
    assert ulp_distance(low, high, FP64) == ulp_distance(high, low, FP64)
    assert (parts[0] == 0) == bool(low == middle)


def test_ulps_are_counted_at_the_coarser_dtype() -> None:
    """A bf16 array beside the fp32 one that it was rounded from is no ULP away."""
    theirs = np.random.default_rng(0).standard_normal((4, 50)).astype(FP32)
    rounded = difference(theirs.astype(BF16), theirs)
    assert (rounded.ulp_dtype, rounded.ulp_max) == ("bf16", 0)
    assert rounded.max_abs > 0  # the values themselves are not rounded
    assert difference(theirs.astype(BF16), theirs, dtype=FP32).ulp_max > 1000


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (BF16, FP32, BF16),
        (FP16, BF16, BF16),
        (FP64, FP32, FP32),
        (np.dtype("i8"), FP16, FP16),
        (np.dtype("i4"), np.dtype("i8"), np.dtype("i8")),
        (np.dtype("u8"), np.dtype("i8"), np.dtype("i8")),
    ],
)
def test_the_coarser_of_two_dtypes(a, b, expected) -> None:
    assert coarser(a, b) == coarser(b, a) == expected


# -- logits


@pytest.mark.parametrize("shape", [(9,), (6, 11), (2, 3, 50)], ids=str)
def test_divergence_and_agreement_by_torch(shape) -> None:
    ours, theirs = random_pair(shape, noise=0.7)
    x, y = (torch.from_numpy(z).double().reshape(-1, shape[-1]) for z in (ours, theirs))
    kl = torch.nn.functional.kl_div(
        x.log_softmax(-1), y.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    top = [
        len(set(a.tolist()) & set(b.tolist())) / 5
        for a, b in zip(x.topk(5).indices, y.topk(5).indices, strict=True)
    ]
    found = logits_agreement(ours, theirs)
    assert (found.num_rows, found.num_skipped) == (x.shape[0], 0)
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-9)
    assert found.kl_max == pytest.approx(float(kl.max()), rel=1e-9)
    assert found.top1 == pytest.approx(float((x.argmax(-1) == y.argmax(-1)).double().mean()))
    assert found.top5 == pytest.approx(np.mean(top))
    assert found.top5 > found.top1 * 0.2 - 1e-12


def test_masked_logits_and_broken_ones() -> None:
    """-infinity on both sides is a token that both rule out; NaN makes no distribution."""
    inf, nan = math.inf, math.nan
    theirs = np.array([[1.0, 2.0, -inf], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [-inf] * 3])
    ours = np.array([[1.0, 2.0, -inf], [nan, 2.0, 3.0], [1.0, 2.0, -inf], [-inf] * 3])
    found = logits_agreement(ours, theirs)
    assert (found.num_rows, found.num_skipped) == (4, 2)
    assert found.kl_max == inf  # the third: ours rules out theirs' likeliest token
    assert found.top1 == 0.5
    same = logits_agreement(theirs[:3], theirs[:3])
    assert (same.kl_max, same.top1, same.top5) == (0, 1, 1)


FINITE = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(FP32, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=FINITE),
    st.sampled_from([BF16, FP16, FP32]),
)
def test_an_array_equals_itself_and_adding_a_constant_to_logits_changes_nothing(x, dtype) -> None:
    x = x.astype(dtype)
    found = difference(x, x)
    assert (found.max_abs, found.ulp_max, found.num_beyond, found.share_equal) == (0, 0, 0, 1)
    assert found.cosine_min == pytest.approx(1)
    agreement = logits_agreement(x.astype(FP64) + 7.0, x.astype(FP64))
    assert agreement.kl_max < 1e-9


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 40)).flatmap(
        lambda shape: st.tuples(
            *[arrays.arrays(FP32, shape, elements=st.floats(-1e3, 1e3, width=32))] * 2
        )
    )
)
def test_relations_that_hold_for_any_pair(pair) -> None:
    ours, theirs = pair
    there, back = difference(ours, theirs), difference(theirs, ours)
    assert (there.max, there.min) == (-back.min, -back.max)
    assert (there.ulp_max, there.ulp_mean) == (back.ulp_max, back.ulp_mean)
    np.testing.assert_allclose(there.cosines, back.cosines)
    assert there.mean_abs <= there.rms * (1 + 1e-9)
    assert there.rms <= there.max_abs * (1 + 1e-9)
    assert there.rms**2 == pytest.approx(there.mean**2 + there.std**2, rel=1e-6, abs=1e-300)
    assert there.num_beyond == np.count_nonzero(ours != theirs)
    assert logits_agreement(ours, theirs).kl_mean >= 0
