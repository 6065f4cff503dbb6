"""Preprocessing: Megatron's bytes, whatever the workers, and nothing half whatever happens."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import active_children
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
from chats import write_rows
from corpora import documents, save_tokenizer, write_documents, write_jsonl
from transformers import AutoTokenizer

from qwen2_ascend.checkpoint.staging import FolderLock
from qwen2_ascend.data.command import preprocess
from qwen2_ascend.data.index_files import token_dtype
from qwen2_ascend.data.indexed import open_indexed
from qwen2_ascend.data.settings import PreprocessSettings
from qwen2_ascend.errors import UserError

SCRIPT = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
TEXTS = documents(300, seed=1)


def run(output: Path, input: Path | list[Path], tokenizer: Path, **settings) -> None:
    paths = [input] if isinstance(input, Path) else input
    settings = {"workers": 1, "append_eod": True, **settings}
    preprocess(
        PreprocessSettings(
            input=tuple(map(str, paths)),
            output_prefix=output,
            tokenizer_name_or_path=str(tokenizer),
            **settings,
        )
    )


def result(output: Path, key: str = "text") -> tuple[bytes, bytes]:
    return tuple(Path(f"{output}_{key}_document{end}").read_bytes() for end in (".bin", ".idx"))


def written_directly(folder: Path, texts: list[str], tokenizer: Path, dtype) -> tuple[bytes, bytes]:
    """What Megatron's builder makes of the same ids, one document after the other."""
    encode = AutoTokenizer.from_pretrained(tokenizer)
    rows = ([*encode(text).input_ids, encode.eos_token_id] for text in texts)
    write_documents(folder / "direct_text_document", rows, dtype)
    return result(folder / "direct")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", TEXTS)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, tokenizer_folder: Path) -> tuple[bytes, bytes]:
    return written_directly(tmp_path_factory.mktemp("direct"), TEXTS, tokenizer_folder, np.uint16)


@pytest.mark.parametrize("save_interval_mb", [256, 0.03])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_bytes_are_megatrons_for_any_number_of_workers_and_parts(
    workers: int, save_interval_mb: float, corpus, expected, tokenizer_folder, tmp_path
) -> None:
    output = tmp_path / "out" / "a"
    run(output, corpus, tokenizer_folder, workers=workers, save_interval_mb=save_interval_mb)
    assert result(output) == expected
    names = sorted(path.name for path in output.parent.iterdir())
    assert names == ["a_text_document.bin", "a_text_document.idx", "a_text_document.json"]


def test_large_vocabularies_take_four_bytes_a_token(corpus, tmp_path: Path) -> None:
    """Megatron's rule: uint16 below 65500 tokens, else int32."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer", holes=65_200)
    run(tmp_path / "a", corpus, tokenizer)
    assert result(tmp_path / "a") == written_directly(tmp_path, TEXTS, tokenizer, np.int32)


def test_formats_and_files_mix_in_the_order_given(
    expected, tokenizer_folder: Path, tmp_path: Path
) -> None:
    rows = [{"text": text} for text in TEXTS[:100]]
    parquet = write_rows(tmp_path / "z.parquet", rows)
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS[100:200]):
        (tmp_path / "texts" / f"{i:03d}.txt").write_text(text, encoding="utf-8", newline="")
    last = write_jsonl(tmp_path / "a.jsonl", TEXTS[200:])
    inputs = [parquet, tmp_path / "texts", last]
    run(tmp_path / "out", inputs, tokenizer_folder, workers=2)
    assert result(tmp_path / "out") == expected


def test_every_key_has_its_own_output(tokenizer_folder: Path, tmp_path: Path) -> None:
    rows = [{"q": text, "a": text[::-1]} for text in TEXTS[:20]]
    path = write_rows(tmp_path / "qa.jsonl", rows)
    run(tmp_path / "out", path, tokenizer_folder, json_keys=("q", "a"))
    for key, texts in (("q", TEXTS[:20]), ("a", [text[::-1] for text in TEXTS[:20]])):
        direct = written_directly(tmp_path, texts, tokenizer_folder, np.uint16)
        assert result(tmp_path / "out", key) == direct


def test_summary_counts_what_was_written(corpus, tokenizer_folder, tmp_path, capsys) -> None:
    run(tmp_path / "a", corpus, tokenizer_folder, workers=2, log_interval=100)
    dataset = open_indexed(tmp_path / "a_text_document")
    lengths = dataset.sequence_lengths
    out = capsys.readouterr().out
    assert "documents end with <|endoftext|> (0)" in out
    assert f"  tokens           {lengths.sum():,}\n" in out
    assert f"mean {lengths.mean():,.1f}, shortest {lengths.min()}, longest {lengths.max()}" in out
    assert f"processed 300 documents, {lengths.sum():,} tokens" in out
    about = json.loads((tmp_path / "a_text_document.json").read_text())
    assert about["documents"] == 300
    assert about["tokens"] == lengths.sum()
    assert (about["settings"]["eod"], about["settings"]["dtype"]) == (0, "uint16")


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"append_eod": False}, "documents run into one another"),
        ({}, r"Qwen's own pretraining ends documents with <\|endoftext\|>"),
        ({"eod_token": "<|endoftext|>"}, r"documents end with <\|endoftext\|> \(0\)"),
    ],
)
def test_says_how_documents_end(settings, note, corpus, tmp_path: Path, capsys) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", eos_token="<|im_end|>")
    run(tmp_path / "a", corpus, tokenizer, **settings)
    assert re.search(note, capsys.readouterr().out)


# --- bad rows -------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """TEXTS with two bad rows in between."""
    path = write_jsonl(tmp_path / "spoilt.jsonl", TEXTS)
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[250:250] = ['{"title": "x"}']
    lines[10:10] = ["nonsense"]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_bad_row_stops_and_nothing_is_left(spoilt, tokenizer_folder, tmp_path) -> None:
    with pytest.raises(UserError) as caught:
        run(tmp_path / "out" / "a", spoilt, tokenizer_folder)
    assert f"{spoilt}:11: not JSON" in caught.value.faults[0]
    assert "--on-bad-row skip" in caught.value.faults[-1]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("save_interval_mb", [256, 0.03])
def test_skipped_rows_are_shown_counted_and_listed(
    save_interval_mb, spoilt, expected, tokenizer_folder, tmp_path, capsys
) -> None:
    settings = {"on_bad_row": "skip", "save_interval_mb": save_interval_mb}
    run(tmp_path / "a", spoilt, tokenizer_folder, **settings)
    assert result(tmp_path / "a") == expected
    captured = capsys.readouterr()
    assert f"skipped {spoilt}:11: not JSON" in captured.err
    assert f"skipped {spoilt}:252: has no key 'text'; its keys are 'title'" in captured.err
    assert f"bad rows  2, listed in {tmp_path}/a_bad_rows.tsv" in captured.out
    listed = [line.split("\t") for line in (tmp_path / "a_bad_rows.tsv").read_text().splitlines()]
    assert [where for where, _ in listed] == [f"{spoilt}:11", f"{spoilt}:252"]


def test_only_the_first_bad_rows_are_shown(tokenizer_folder, tmp_path, capsys) -> None:
    lines = ["x"] * 50 + ['{"text": "good"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    run(tmp_path / "a", tmp_path / "a.jsonl", tokenizer_folder, on_bad_row="skip")
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 21
    assert err[-1] == "skipped 30 more rows"


def test_input_without_documents_is_an_error(tokenizer_folder, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\nx\n")
    with pytest.raises(UserError, match="the input holds no document"):
        run(tmp_path / "out" / "a", tmp_path / "a.jsonl", tokenizer_folder, on_bad_row="skip")
    assert list((tmp_path / "out").iterdir()) == []


# --- results that are there already ---------------------------------------------------------------


def test_a_way_to_cut_texts_is_refused_where_none_is_read(
    corpus, tokenizer_folder, tmp_path: Path
) -> None:
    """A row of JSONL is a document whatever the flag says; a text beside it is cut."""
    with pytest.raises(UserError, match="--split-text-on line is for text files"):
        run(tmp_path / "a", corpus, tokenizer_folder, split_text_on="line")
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    files = [corpus, tmp_path / "a.txt"]
    run(tmp_path / "b", files, tokenizer_folder, split_text_on="line")
    assert len(open_indexed(tmp_path / "b_text_document")) == len(TEXTS) + 2


def test_an_existing_result_is_kept_unless_told(corpus, expected, tokenizer_folder, tmp_path):
    run(tmp_path / "a", corpus, tokenizer_folder)
    other = write_jsonl(tmp_path / "other.jsonl", TEXTS[:3])
    with pytest.raises(UserError, match=r"a_text_document\.bin exists; .* --overwrite"):
        run(tmp_path / "a", other, tokenizer_folder)
    with pytest.raises(UserError, match=r"a_text_document\.bin exists; .* --overwrite"):
        run(tmp_path / "a", other, tokenizer_folder, resume=True)
    assert result(tmp_path / "a") == expected
    run(tmp_path / "a", other, tokenizer_folder, overwrite=True)
    direct = written_directly(tmp_path, TEXTS[:3], tokenizer_folder, np.uint16)
    assert result(tmp_path / "a") == direct


def test_resuming_what_is_complete_does_nothing(corpus, tokenizer_folder, tmp_path, capsys) -> None:
    run(tmp_path / "a", corpus, tokenizer_folder)
    before = os.stat(tmp_path / "a_text_document.bin").st_mtime_ns
    run(tmp_path / "a", corpus, tokenizer_folder, resume=True)
    assert "complete already" in capsys.readouterr().out
    left = tmp_path / ".a.preprocessing"
    left.mkdir()  # a run that was killed while it removed this
    run(tmp_path / "a", corpus, tokenizer_folder, resume=True)
    assert "complete already" in capsys.readouterr().out
    assert os.stat(tmp_path / "a_text_document.bin").st_mtime_ns == before
    assert not left.exists()


class Interrupted(Exception):
    """Stands for any end in the middle."""


def interrupt_at(monkeypatch, target: str, nth: int) -> None:
    """Makes the nth call of `target` fail."""
    original, calls = resolve_name(target), iter(range(10**9))

    def failing(*args, **kwargs):
        if next(calls) == nth:
            raise Interrupted(target)
        return original(*args, **kwargs)

    monkeypatch.setattr(target.replace(":", "."), failing)


def test_an_unfinished_run_is_neither_lost_nor_mixed_up(
    corpus, expected, tokenizer_folder, tmp_path, monkeypatch
) -> None:
    settings = {"save_interval_mb": 0.03}
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        interrupt_at(patched, "qwen2_ascend.data.parts:_fsync", 3)
        run(tmp_path / "a", corpus, tokenizer_folder, **settings)
    with pytest.raises(UserError, match=r"an unfinished run lies in \.a\.preprocessing"):
        run(tmp_path / "a", corpus, tokenizer_folder, **settings)
    with pytest.raises(UserError, match=r"had other settings or input \(eod\)"):
        run(tmp_path / "a", corpus, tokenizer_folder, append_eod=False, resume=True)
    other = write_jsonl(tmp_path / "other.jsonl", TEXTS)
    with pytest.raises(UserError, match=r"had other settings or input \(input\)"):
        run(tmp_path / "a", other, tokenizer_folder, resume=True)
    run(tmp_path / "a", corpus, tokenizer_folder, resume=True, **settings)
    assert result(tmp_path / "a") == expected


def test_overwrite_starts_an_unfinished_run_again(
    corpus, expected, tokenizer_folder, tmp_path, monkeypatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        interrupt_at(patched, "qwen2_ascend.data.parts:_fsync", 3)
        run(tmp_path / "a", corpus, tokenizer_folder, save_interval_mb=0.03)
    run(tmp_path / "a", corpus, tokenizer_folder, overwrite=True)
    assert result(tmp_path / "a") == expected


@pytest.mark.parametrize(
    "target",
    [
        "qwen2_ascend.data.parts:_fsync",
        "qwen2_ascend.data.state:fsync_folder",
        "qwen2_ascend.data.output:os.replace",  # also in every file that is written whole
        "qwen2_ascend.data.output:fsync_folder",
        "qwen2_ascend.data.output:shutil.rmtree",
    ],
)
def test_any_interruption_is_gone_on_from(target, tokenizer_folder, tmp_path, monkeypatch) -> None:
    """Property: at no moment data and index of two runs stand side by side, and --resume always
    ends with the bytes of an uninterrupted run."""
    old = write_jsonl(tmp_path / "old.jsonl", TEXTS[:3])
    corpus = write_jsonl(tmp_path / "new.jsonl", TEXTS[:20])
    expected = written_directly(tmp_path, TEXTS[:20], tokenizer_folder, np.uint16)
    run(tmp_path / "old" / "a", old, tokenizer_folder)
    before = result(tmp_path / "old" / "a")
    nth = 0
    while True:
        output = tmp_path / str(nth) / "a"
        shutil.copytree(tmp_path / "old", output.parent)
        settings = {"save_interval_mb": 0.005}
        with monkeypatch.context() as patched:
            interrupt_at(patched, target, nth)
            try:
                run(output, corpus, tokenizer_folder, overwrite=True, **settings)
                break
            except Interrupted:
                pass
        if Path(f"{output}_text_document.idx").exists():
            assert result(output) in (before, expected)
        is_started = (output.parent / ".a.preprocessing").exists()
        run(output, corpus, tokenizer_folder, **settings, **{
            "resume" if is_started else "overwrite": True
        })  # fmt: skip
        assert result(output) == expected
        assert not (output.parent / ".a.preprocessing").exists()
        nth += 1
    assert nth > 0


def test_two_runs_do_not_write_one_result(corpus, tokenizer_folder, tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / ".a.preprocessing")
    lock.acquire()
    try:
        with pytest.raises(UserError, match="another run is writing it"):
            run(tmp_path / "a", corpus, tokenizer_folder, overwrite=True)
    finally:
        lock.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, 524])
def test_a_network_file_system_without_locks_or_with_its_own_is_no_reason_to_stop(
    corpus, expected, tokenizer_folder, tmp_path: Path, monkeypatch, number
) -> None:
    """NFS has EBADF for whoever locks what is not open for writing; some have no locks at all."""

    def flock(fd: int, kind: int) -> None:
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        raise OSError(number if mode == os.O_RDWR else errno.EBADF, "as NFS says it")

    monkeypatch.setattr(fcntl, "flock", flock)
    run(tmp_path / "a", corpus, tokenizer_folder)
    assert result(tmp_path / "a") == expected


# --- processes ------------------------------------------------------------------------------------


def start_script(input: Path, output: Path, tokenizer: Path, *flags: str, **options):
    command = [sys.executable, str(SCRIPT), "--input", str(input), "--output-prefix", str(output)]
    command += ["--tokenizer-name-or-path", str(tokenizer), "--append-eod", *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_until(condition, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return list(map(int, path.read_text().split()))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def num_parts(folder: Path) -> int:
    try:
        return json.loads((folder / "state.json").read_bytes())["num_parts"]
    except FileNotFoundError:
        return 0


def test_kill_9_is_gone_on_from(tokenizer_folder: Path, tmp_path: Path, capsys) -> None:
    """Its workers do not outlive it; gone on from, the result is that of a run nobody disturbed,
    and what was done is not done again."""
    texts = documents(1500, seed=5)
    corpus = write_jsonl(tmp_path / "large.jsonl", texts)
    output, folder = tmp_path / "a", tmp_path / ".a.preprocessing"
    flags = ("--workers", "2", "--save-interval-mb", "0.1")
    process = start_script(corpus, output, tokenizer_folder, *flags)
    try:
        wait_until(lambda: num_parts(folder) > 0 or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        workers = children_of(process.pid)
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert workers
    wait_until(lambda: not any(map(is_running, workers)))
    assert not Path(f"{output}_text_document.idx").exists()
    tokens = json.loads((folder / "state.json").read_bytes())["counts"]["text"]["tokens"]
    run(output, corpus, tokenizer_folder, resume=True)
    assert result(output) == written_directly(tmp_path, texts, tokenizer_folder, np.uint16)
    assert f"; {tokens:,} tokens were there already" in capsys.readouterr().out


def test_ctrl_c_keeps_finished_parts_and_says_so(tokenizer_folder: Path, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "large.jsonl", documents(1500, seed=5))
    folder = tmp_path / ".a.preprocessing"
    flags = ("--workers", "2", "--save-interval-mb", "0.1")
    process = start_script(corpus, tmp_path / "a", tokenizer_folder, *flags, start_new_session=True)
    try:
        wait_until(lambda: num_parts(folder) > 0 or process.poll() is not None)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err.splitlines() == [
        "note: finished parts are kept; go on with --resume.",
        "interrupted",
    ]


def test_a_killed_worker_is_a_failure_with_a_way_out(tokenizer_folder, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "large.jsonl", documents(2000, seed=5))

    def kill_one() -> None:
        wait_until(active_children)
        active_children()[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        with pytest.raises(RuntimeError, match=r"a worker process was killed.*--resume"):
            run(tmp_path / "a", corpus, tokenizer_folder, workers=2)
    finally:
        killer.join()


def test_a_failing_disk_is_one_line_and_the_run_can_go_on(
    corpus, expected, tokenizer_folder: Path, tmp_path: Path
) -> None:
    limit = (20_000, resource.RLIM_INFINITY)
    process = start_script(
        corpus,
        tmp_path / "a",
        tokenizer_folder,
        *("--workers", "1", "--save-interval-mb", "0.02"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = err.splitlines()
    assert "File too large; finished parts are kept; go on with --resume" in line
    run(tmp_path / "a", corpus, tokenizer_folder, resume=True)
    assert result(tmp_path / "a") == expected


def test_script_says_a_users_mistake_without_traceback(tokenizer_folder, tmp_path) -> None:
    process = start_script(tmp_path / "nothing", tmp_path / "a", tokenizer_folder)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err == f"error: --input {tmp_path}/nothing: no such file, folder or match\n"


@pytest.mark.parametrize("num_tokens", [1, 65499, 65500, 151936])
def test_the_dtype_of_tokens_is_megatrons(num_tokens: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(num_tokens) == DType.optimal_dtype(num_tokens).__name__
