"""`qwen2-ascend compare`: what is found between two dumps, the verdict, and how it is told."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from commands import run_python
from qwen2_ascend import cli
from qwen2_ascend.comparison import statistics, tolerances
from qwen2_ascend.comparison.compare import Comparison, compare, match
from qwen2_ascend.comparison.dumps import open_dump
from qwen2_ascend.comparison.rules import Rules
from qwen2_ascend.comparison.text import report_lines

BF16 = np.dtype(ml_dtypes.bfloat16)
TOOL = Path(__file__).parents[2] / "tools" / "compare_outputs.py"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def random(shape=(6, 32), seed=0, dtype="f4") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def nudge(array: np.ndarray, by: float, seed=1) -> np.ndarray:
    """Every element moved by about `by` of itself."""
    noise = np.random.default_rng(seed).standard_normal(array.shape)
    return (array.astype("f8") * (1 + by * noise)).astype(array.dtype)


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    try:
        status = cli.main(["compare", *words])
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def compared(ours: np.ndarray, theirs: np.ndarray, name="x", **rules) -> Comparison:
    """The comparison of both through files."""
    np.save(f"{name}.npy", ours)
    np.savez("theirs.npz", **{name: theirs})
    report = compare(open_dump(f"{name}.npy"), open_dump("theirs.npz"), Rules(**rules))
    (comparison,) = report.comparisons
    assert comparison.name == name
    return comparison


def kinds(comparison: Comparison) -> list[str]:
    return [finding.kind for finding in comparison.findings]


# -- the verdict


@pytest.mark.parametrize(
    ("dtype", "within", "beyond"),
    [("f8", 1e-12, 1e-8), ("f4", 1e-6, 1e-3), ("f2", 2e-3, 0.2), (BF16, 1e-2, 0.8)],
)
def test_tolerances_depend_on_the_dtype(folder, dtype, within, beyond) -> None:
    theirs = random().astype(dtype)
    assert compared(theirs, theirs).passed
    assert compared(nudge(theirs, within), theirs).passed
    assert "tolerance" in kinds(compared(nudge(theirs, beyond), theirs))


def test_fp32_tolerances_refuse_what_bf16_accepts(folder) -> None:
    theirs = random()
    ours = theirs.astype(BF16)
    assert not compared(ours.astype("f4"), theirs).passed
    assert compared(ours, theirs, any_dtype=True).passed


def test_integers_must_be_equal(folder) -> None:
    """Tolerances do not count either: those are for floating point."""
    ids = np.arange(12).reshape(3, 4)
    assert compared(ids, ids, rtol=0.5, min_cosine=1.0).passed
    found = compared(ids + (ids == 7), ids, rtol=0.5, atol=10.0)
    assert kinds(found) == ["tolerance"]
    assert "1 of 12 elements differ; the most [1, 3]: 8 instead of 7" in found.findings[0].text


def test_one_wrong_row_among_large_ones_is_seen(folder) -> None:
    """Property: a token of small numbers is judged by its own size, as the massive activations of
    Qwen2's first token would hide all others otherwise."""
    theirs = random((8, 64))
    theirs[0] *= 1e5
    ours = theirs.copy()
    ours[5] = np.roll(ours[5], 1)
    found = compared(ours, theirs)
    assert kinds(found) == ["tolerance", "cosine"]
    assert "in 1 of 8 rows" in found.findings[1].text
    assert found.difference is not None and found.difference.worst[0] == 5


def test_a_given_noise_floor_excuses_rows_of_noise(folder) -> None:
    """The gradient of a key's bias is zero but for rounding: its direction means nothing."""
    theirs = random()
    theirs[2] *= 1e-9
    ours = theirs.copy()
    ours[2] = -ours[2]
    assert kinds(compared(ours, theirs)) == ["tolerance", "cosine"]
    assert compared(ours, theirs, atol=1e-7).passed


# -- gradients


def gradients(seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of a query's weight: rows of many sizes, all rounded like the large ones."""
    rng = np.random.default_rng(seed)
    sizes = np.concatenate([np.full(40, 1.0), np.logspace(0, -6, 24)])[:, None]
    theirs = (rng.standard_normal((64, 32)) * sizes).astype("f4")
    return theirs + (1e-5 * rng.standard_normal(theirs.shape)).astype("f4"), theirs


def test_rows_of_a_gradient_may_be_nothing_but_rounding(folder, capsys) -> None:
    """Two layouts' gradients pass at the defaults; activations of that kind would not."""
    ours, theirs = gradients()
    assert set(kinds(compared(ours, theirs, name="hidden"))) >= {"tolerance", "cosine"}
    assert compared(ours, theirs, name="hidden", gradients=("hid*",)).passed
    found = compared(ours, theirs, name="q_proj.grad")
    assert found.passed and found.tolerances == tolerances.GRADIENTS["fp32"]
    status, out, _ = run("q_proj.grad.npy", "theirs.npz", capsys=capsys)
    assert status == 0
    assert re.search(r"short rows +\d+ of 64 are shorter than the median row and held to", out)


@pytest.mark.parametrize(
    ("row", "fault", "kind"),
    [
        (45, lambda row: row * 0, "short_rows"),  # 0.05 of the usual row's size
        (50, lambda row: -row, "short_rows"),  # 0.0025
        (43, lambda row: row * 1.05, "short_rows"),  # 0.16
        (5, lambda row: row * 1.01, "tolerance"),
        (5, lambda row: np.roll(row, 1), "cosine"),
        (slice(None), lambda rows: rows * 1.0003, "relative_l2"),
    ],
)
def test_a_fault_in_a_row_of_a_gradient_is_found(folder, row, fault, kind) -> None:
    """It is larger than the rounding of the rows around it."""
    ours, theirs = gradients()
    ours[row] = fault(ours[row])
    assert kind in kinds(compared(ours, theirs, name="grad"))


def test_rows_that_are_all_small_are_held_to_themselves(folder) -> None:
    """Most rows of a tied embedding have tiny gradients, and one token's hides none of them."""
    theirs = random((64, 32)) * np.float32(1e-7)
    theirs[3] *= 1e7
    ours = nudge(theirs, 1e-6)
    assert compared(ours, theirs, name="grad").passed
    ours[40] *= 2
    assert "cosine" not in kinds(found := compared(ours, theirs, name="grad"))
    assert {"tolerance", "relative_l2", "short_rows"} & set(kinds(found))


def test_gradients_that_are_zero_on_one_side_fail(folder) -> None:
    zero = np.zeros((4, 8), "f4")
    assert compared(zero, zero, name="grad").passed
    assert not compared(random((4, 8)), zero, name="grad").passed
    assert not compared(zero, random((4, 8)), name="grad").passed


def test_what_was_computed_in_16_bits_is_judged_so_whatever_it_is_kept_in(folder) -> None:
    """Megatron adds up the gradients of a bf16 model in fp32."""
    theirs = random((16, 64))
    ours = nudge(theirs, 2e-2)
    assert not compared(ours, theirs, name="grad").passed
    assert compared(ours, theirs, name="grad", precision="bf16").passed
    assert not compared(-ours, theirs, name="grad", precision="bf16").passed
    for name, array in (("ours", ours), ("theirs", theirs)):
        save_file({"w": array}, f"{name}.safetensors", {"computed_in": "bf16"})
    files = (open_dump("ours.safetensors"), open_dump("theirs.safetensors"))
    found = compare(*files, Rules(gradients=("*",)))
    assert found.passed and found.comparisons[0].tolerances == tolerances.GRADIENTS["bf16"]


def test_each_tolerance_can_be_set(folder) -> None:
    theirs = random()
    ours = nudge(theirs, 1e-2)
    loose = {"rtol": 0.1, "min_cosine": 0.9, "max_relative_l2": 0.1}
    assert kinds(compared(ours, theirs)) == ["tolerance", "cosine", "relative_l2"]
    assert compared(ours, theirs, **loose).passed
    for name, kind in zip(loose, ["tolerance", "cosine", "relative_l2"], strict=True):
        rest = {key: value for key, value in loose.items() if key != name}
        assert kinds(compared(ours, theirs, **rest)) == [kind]


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", BF16])
def test_a_wrong_scale_has_a_perfect_cosine_and_fails(folder, dtype) -> None:
    """Attention without its scale, a norm of the wrong width: every element a tenth too large."""
    theirs = random().astype(dtype)
    ours = (theirs.astype("f8") * 1.1).astype(dtype)
    assert "relative_l2" in kinds(compared(ours, theirs))


def test_logits_are_judged_as_distributions(folder) -> None:
    theirs = random((5, 50))
    ours = theirs + 3.0  # every token's logit moved alike: the same distribution
    loose = {"rtol": 1e3, "min_cosine": -1.0, "max_relative_l2": 1e3}
    assert compared(ours, theirs, name="Logits", **loose, max_kl=1e-12).passed
    ours = theirs[:, ::-1]
    assert kinds(compared(ours, theirs, name="Logits", **loose)) == ["kl"]
    found = compared(ours, theirs, name="Logits", **loose, max_kl=100.0, min_top1=0.5)
    assert kinds(found) == ["top1"]
    assert found.logits is not None and found.logits.top1 < 0.5
    assert compared(ours, theirs, name="hidden", **loose).logits is None
    assert compared(ours, theirs, name="hidden", logits=("hid*",), **loose).logits is not None


def test_the_help_states_the_tolerances_that_hold() -> None:
    """Property: figures in the help are those of the table."""
    texts = inspect.getsource(Rules)
    for dtype, defaults in tolerances.DEFAULTS.items():
        for name in ("rtol", "min_cosine", "max_relative_l2", "max_kl"):
            text = texts[texts.index(f"    {name}: float") :].split('"""')[1]
            word = re.search(rf"{dtype}\s+((?:1 - )?[\d.e-]+\d)", text)
            assert word, (dtype, name)
            first, _, second = word[1].partition(" - ")
            stated = float(first) - float(second or 0)
            assert stated == pytest.approx(getattr(defaults, name), rel=1e-15), (dtype, name)


# -- findings


def test_what_is_not_finite_is_a_finding(folder) -> None:
    theirs = random()
    ours = theirs.copy()
    ours[1, 2], ours[3, 4] = np.nan, np.inf
    found = compared(ours, theirs)
    assert kinds(found) == ["nonfinite"]
    assert (
        "ours has 1 NaN and 1 infinite; 2 of them not at the same place" in found.findings[0].text
    )
    assert kinds(compared(ours, theirs, equal_nonfinite=True)) == ["nonfinite"]
    assert kinds(compared(ours, ours)) == ["nonfinite"]
    assert compared(ours, ours, equal_nonfinite=True).passed


def test_arrays_of_nothing_but_nan(folder) -> None:
    nothing = np.full((2, 3), np.nan, "f4")
    found = compared(nothing, nothing, name="logits")
    assert kinds(found) == ["nonfinite"]
    assert found.logits is not None and found.logits.num_skipped == 2
    assert kinds(compared(nothing, random((2, 3)))) == ["nonfinite"]


def test_dtypes_that_differ_are_compared_at_the_coarser(folder) -> None:
    theirs = random()
    found = compared(theirs.astype(BF16), theirs)
    assert kinds(found) == ["dtype"]
    assert found.difference is not None
    assert (found.difference.ulp_dtype, found.difference.ulp_max) == ("bf16", 0)
    assert found.tolerances == tolerances.DEFAULTS["bf16"]


def test_shapes_that_differ_are_a_finding(folder) -> None:
    found = compared(random((4, 8)), random((8, 4)))
    assert kinds(found) == ["shape"]
    assert found.difference is None
    assert found.ours is not None and found.ours.summary is not None  # its moments are told still
    theirs = random((4, 8))
    found = compared(theirs[:, None], theirs)
    assert kinds(found) == ["shape"]
    assert found.difference is not None and found.difference.max_abs == 0


def test_what_cannot_be_compared_is_a_finding(folder) -> None:
    assert kinds(compared(np.zeros(2, complex), np.zeros(2))) == ["dtype", "dtype"]
    assert kinds(compared(np.array(["a"]), np.array(["a"]))) == ["dtype"]
    assert compared(np.zeros((0, 3)), np.zeros((0, 3)), name="logits").passed
    assert compared(np.float32(2.5), np.float32(2.5)).passed


# -- names


def names(ours: Path, theirs: Path, **rules) -> list[str]:
    pairs = match(open_dump(ours), open_dump(theirs), Rules(**rules))
    return [
        f"{pair.name}{'' if pair.ours else ' <'}{'' if pair.theirs else ' >'}" for pair in pairs
    ]


def test_names_on_one_side_only(folder, capsys) -> None:
    x = random()
    np.savez("ours.npz", a=x, b=x, c=x)
    save_file({"b": x, "c": x, "d": x}, "theirs.safetensors")
    files = Path("ours.npz"), Path("theirs.safetensors")
    assert names(*files) == ["a >", "b", "c", "d <"]
    assert names(*files, common_only=True) == ["b", "c"]
    assert names(*files, names=("[ab]",)) == ["a >", "b"]
    status, out, _ = run(*map(str, files), capsys=capsys)
    assert status == 1
    assert "a: only ours has it" in out and "d: only theirs has it" in out
    assert run(*map(str, files), "--common-only", capsys=capsys)[0] == 0
    words = ["--names", "b", "--names", "c", "--logits", "c", *map(str, files)]
    status, out, _ = run(*words, capsys=capsys)
    assert status == 0 and out.count("KL divergence") == 1 and "2 arrays within" in out


def test_a_folder_of_files_matches_one_file_of_many(folder) -> None:
    x = random((2, 3))
    Path("ours/deep").mkdir(parents=True)
    np.save("ours/layers.0.npy", x)
    torch.save({"layers.1": torch.zeros(1)}, "ours/deep/rest.pt")
    np.savez("theirs.npz", **{"layers.0": x, "layers.1": np.zeros(1)})
    assert sorted(names(Path("ours"), Path("theirs.npz"))) == ["layers.0", "layers.1"]


def test_names_that_repeat_are_told_apart_by_their_files(folder) -> None:
    for side in ("ours", "theirs"):
        Path(side).mkdir()
        for i in (2, 10):
            np.savez(f"{side}/step{i}.npz", out=np.zeros(1))
    assert names(Path("ours"), Path("theirs")) == ["step2/out", "step10/out"]


def test_two_lone_arrays_need_no_common_name(folder) -> None:
    np.save("gpu.npy", random())
    np.savez("npu.npz", whatever=random())
    assert names(Path("gpu.npy"), Path("npu.npz")) == ["whatever"]


# -- the command


def test_the_report_for_people(folder, capsys) -> None:
    theirs = random((4, 16))
    np.savez("ours.npz", good=theirs, logits=theirs * 2, empty=theirs[:0])
    np.savez("theirs.npz", good=theirs, logits=theirs, empty=theirs[:0])
    status, out, err = run("ours.npz", "theirs.npz", capsys=capsys)
    assert (status, err) == (1, "")
    lines = out.splitlines()
    verdicts = {line.split()[0]: line.split()[-1] for line in lines[4:7]}
    assert verdicts == {"good": "ok", "logits": "FAIL", "empty": "ok"}
    assert lines[-1] == "FAIL: 1 of 3 arrays, the first is logits."
    for word in ("KL divergence", "top-1", "EucDist", "ULP (fp32)", "1 - cosine", "std"):
        assert (word in out) == (word != "1 - cosine")
    assert f"{np.abs(theirs).max():.4g}" in out


def test_long_names_are_shortened_on_a_terminal_only(folder) -> None:
    name = "decoder.layers.17.self_attention.core_attention.very_long_indeed.output"
    arrays = {f"{name}.{i}": random() for i in range(5)}
    np.savez("x.npz", **arrays)
    dump = open_dump("x.npz")
    report = compare(dump, dump, Rules())
    whole = "\n".join(report_lines(report))
    assert f"{name}.4" in whole and "…" not in whole
    narrow = report_lines(report, width=120)
    assert all(len(line) <= 120 for line in narrow)
    assert sum(f"indeed.output.{i}" in "\n".join(narrow) for i in range(5)) == 5


def test_findings_that_many_arrays_share_are_told_once(folder, capsys) -> None:
    x = random()
    np.savez("ours.npz", **{f"l{i}": x.astype("f2") for i in range(40)})
    np.savez("theirs.npz", **{f"l{i}": x for i in range(40)})
    _, out, _ = run("ours.npz", "theirs.npz", capsys=capsys)
    assert out.count("dtype fp16 is not fp32") == 1
    assert "40 arrays (l0, l1, ... l39): dtype" in out


def test_json_has_every_figure(folder, capsys) -> None:
    """Property: valid JSON, also with infinities; all fields of the statistics; text on stderr."""
    theirs = random((4, 16))
    ours = theirs.copy()
    ours[0, 0] = np.inf
    np.savez("ours.npz", logits=ours, more=theirs, zero=np.ones(2))
    np.savez("theirs.npz", logits=theirs, zero=np.zeros(2))
    status, out, err = run("ours.npz", "theirs.npz", "--json", "-", capsys=capsys)
    told = json.loads(out, parse_constant=lambda word: pytest.fail(word))
    assert status == 1 and "FAIL" in err and told["passed"] is False
    logits, more, zero = told["arrays"]
    assert logits["findings"][0]["kind"] == "nonfinite"
    assert more["findings"][0]["kind"] == "missing" and more["theirs"] is None
    assert zero["difference"]["relative_l2"] == "inf"
    fields = {field.name for field in dataclasses.fields(statistics.Difference)}
    arrays = {"cosines", "row_max_abs", "row_relative_l2", "row_lengths", "row_distances"}
    assert set(logits["difference"]) == fields - arrays
    assert logits["ours"]["summary"]["num_inf"] == 1
    assert logits["logits"]["num_skipped"] == 1
    run("ours.npz", "theirs.npz", "--json", "report.json", capsys=capsys)
    assert json.loads(Path("report.json").read_text()) == told


def test_the_tool_is_the_command(folder) -> None:
    np.save("a.npy", random())
    np.save("b.npy", random() + 1)
    for other, status in [("a.npy", 0), ("b.npy", 1), ("c.npy", 2)]:
        ended = run_python(TOOL, "a.npy", other, status=status)
    assert ended.err == "error: c.npy: no such file or folder.\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.npy", "a.npy", "--rtol", "-1"], "--rtol -1.0 must be at least 0."),
        (["a.npy", "a.npy", "--min-cosine", "2"], "--min-cosine 2.0 must be between -1 and 1."),
        (["a.npy", "a.npy", "--min-top1", "nan"], "--min-top1 nan must be between 0 and 1."),
        (["a.npy", "a.npy", "--png-name", "x"], "--png-name chooses what --png draws"),
        (["a.npy", "a.npy", "--json", "no/x.json"], "there is no folder"),
        (["a.npy", "a.npy", "--png", "."], "--png .: is a folder; name a file in it."),
        (["a.npy", "a.npy", "--names", "b*"], "none of 1 names fits; there are for example 'a'."),
        (["a.npy", "a.npy", "--logits", "b*"], "--logits b*: none of 1 names fits; there are for"),
        (["a.npy", "a.npy", "--gradients", "b*"], "--gradients b*: none of 1 names fits; there"),
        (["a.npy", "a.npy", "--min-top1", "1"], "'a'; name them with --logits PATTERN."),
        (["a.npy", "a.npy", "--max-kl", "1e-3"], "--max-kl 0.001 judges logits, which are called"),
        (["logits.npy", "logits.npy", "--min-top1", "1"], "none of 1 names fits"),
        (["a.npy", "a.npy", "--png", "x.png", "--png-name", "b"], "there are for example 'a'."),
        (["a.npy", "z.npz", "--common-only"], "no name is on both sides (ours has for example 'a'"),
        (["bad.pt", "bad.npy"], "error: bad.npy: not a readable .npy file"),
    ],
)
def test_mistakes_end_with_2_and_say_the_way_out(folder, capsys, words, message) -> None:
    np.save("a.npy", np.zeros(2))
    np.save("logits.npy", np.zeros((0, 2)))
    np.savez("z.npz", z=np.zeros(2), y=np.zeros(2))
    Path("bad.pt").write_bytes(b"bad")
    Path("bad.npy").write_bytes(b"bad")
    status, out, err = run(*words, capsys=capsys)
    assert status == 2
    assert message in err and out == ""
    assert "Traceback" not in err


def test_a_tolerance_for_logits_holds_where_there_are_some(folder, capsys) -> None:
    """The dumps of two runs, one with other logits and the same in all else."""
    x = random((4, 8))
    np.savez("ours.npz", a=x, out=x)
    np.savez("theirs.npz", a=x, out=-x)
    words = "--min-cosine -1 --rtol 99 --max-relative-l2 99 --max-kl 99 --min-top1 0.5"
    loose = words.split()
    status, out, _ = run("ours.npz", "theirs.npz", *loose, "--logits", "out", capsys=capsys)
    assert status == 1 and "top-1" in out
    assert run("ours.npz", "theirs.npz", *loose, capsys=capsys)[0] == 2


# -- the picture


def test_the_picture_is_drawn_whatever_was_found(folder, capsys, monkeypatch) -> None:
    """One array, many, NaN, equal ones, integers, nothing to compare: always a PNG of some size."""
    x = random((3, 300))
    odd = x.copy()
    odd[0, 0] = np.nan
    np.savez("ours.npz", a=x, odd=odd, ids=np.arange(5), gone=x, flat=x[:2], empty=x[:0])
    np.savez("theirs.npz", a=x * 1.5, odd=x, ids=np.arange(5), flat=x[:3], empty=x[:0])
    np.save("one.npy", x)
    np.save("other.npy", np.zeros(3))
    for ours, theirs, *words in [
        ("ours.npz", "theirs.npz"),
        ("ours.npz", "theirs.npz", "--png-name", "empty"),
        ("ours.npz", "theirs.npz", "--png-name", "flat"),
        ("one.npy", "other.npy"),
    ]:
        Path("x.png").unlink(missing_ok=True)
        status, _, err = run(ours, theirs, "--png", "x.png", *words, capsys=capsys)
        assert (status, err) == (1, "")
        data = Path("x.png").read_bytes()
        width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        assert data.startswith(b"\x89PNG") and width > 1000 and height > 400


def test_without_matplotlib_nothing_is_begun(folder, capsys, monkeypatch) -> None:
    np.save("a.npy", np.zeros(2))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = run("a.npy", "a.npy", "--png", "x.png", capsys=capsys)
    assert (status, out) == (2, "")
    assert "pip install 'qwen2-ascend[report]'" in err
