"""Whatever a folder holds, it is opened as a regular file or refused, soon and in little memory."""

import ast
import os
import socket
import time
import tracemalloc
from pathlib import Path

import pytest

from qwen2_ascend import files
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import (
    links_out,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    require_regular,
)

PACKAGE = Path(files.__file__).parent


def fifo(path):
    os.mkfifo(path)


def listening(path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.close()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (fifo, "a FIFO"),
        (listening, "a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (lambda path: (fifo(path.with_name("f")), path.symlink_to("f")), "a FIFO"),
    ],
)
@pytest.mark.parametrize("read", [open_regular, read_bytes, read_text, read_json])
def test_only_regular_files_are_opened(make, words, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make(Path("x"))
    started = time.monotonic()
    with pytest.raises(UserError, match=f"x: is {words}, not a regular file"):
        read(Path("x"))
    assert time.monotonic() - started < 1


def test_what_is_missing_or_a_folder_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "x")
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(tmp_path / "loop")


@pytest.mark.parametrize("read", [open_regular, require_regular, read_json, read_text])
def test_what_stands_for_a_file_of_git_lfs_is_not_taken_for_it(read, tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "x").write_bytes(pointer)
    with pytest.raises(UserError, match="x: is a Git LFS pointer, "):
        read(tmp_path / "x")
    (tmp_path / "y").write_bytes(b"about " + pointer)
    (tmp_path / "z").write_bytes(pointer + b"and what they are" * 100)
    for name in "yz":
        require_regular(tmp_path / name)


def test_a_file_is_read_whole_up_to_its_bound(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"a\r\nb\n")
    assert read_bytes(path, 5) == b"a\r\nb\n"
    assert read_text(path) == path.read_text(encoding="utf-8") == "a\nb\n"
    with pytest.raises(UserError, match="longer than the 4 bytes"):
        read_bytes(path, 4)
    os.truncate(path, 1 << 40)  # a hole; nothing of it is read beyond the bound
    with pytest.raises(UserError, match="longer than"):
        read_bytes(path, 1000)


JSON_BOMBS = {
    "lists": (b"[" + b"[]," * 10**7 + b"1]", "more than 500000 values"),
    "objects": (b"[" + b"{}," * 10**7 + b"1]", "more than 500000 values"),
    "numbers": (b"[" + b"1," * 10**7 + b"1]", "more than 500000 values"),
    "depth": (b"[" * 10**5, "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "nested too deeply"),
    "digits": (b"1" * 10**7, "not valid JSON"),
    "cut": (b'{"a"', "not valid JSON"),
    "no UTF-8": (b'"\xff"', "not valid JSON"),
    "nothing": (b"", "not valid JSON"),
}


@pytest.mark.parametrize("case", JSON_BOMBS)
def test_json_bombs(case):
    data, words = JSON_BOMBS[case]
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(UserError, match=words):
        parse_json(data)
    used = time.process_time() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 3 and peak < 3 * len(data) + (64 << 20), (used, peak)


def test_links(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    (folder / "inner").mkdir(parents=True)
    for path in (outside / "a", folder / "a", tmp_path / "folder-2"):
        path.write_text("")
    (folder / "good").mkdir()
    inside = {"link": "a", "inner/up": "../a", "absolute": folder / "a", "dir": "good"}
    leading = {"b": "../outside/a", "c": outside, "inner/d": "../../folder-2", "e": "/etc"}
    for name, target in (inside | leading).items():
        (folder / name).symlink_to(target)
    assert not list(links_out(folder, [folder / "a", *(folder / name for name in inside)]))
    for name in leading:
        (fault,) = links_out(folder, [folder / name])
        assert fault.startswith(f"{folder / name}: a link that leads out of {folder}")
    assert len(list(links_out(folder, [folder / "c/a", folder / "e/passwd"]))) == 2
    (folder / "good/around").symlink_to("..")  # and round and round, by way of all that is there
    assert len(list(links_out(folder, [folder / "dir"]))) == 4
    (tmp_path / "linked").symlink_to(folder)  # the folder itself may be one
    assert not list(links_out(tmp_path / "linked", [tmp_path / "linked/inner/up"]))


def test_only_a_hub_caches_own_blobs_are_outside_and_allowed(tmp_path):
    snapshot = tmp_path / "models--a/snapshots/abc"
    (snapshot / "sub").mkdir(parents=True)
    for blobs in ("models--a/blobs", "models--b/blobs", "models--a/blobs/deeper"):
        (tmp_path / blobs).mkdir(parents=True)
        (tmp_path / blobs / "hash").write_text("")
    (snapshot / "x").symlink_to("../../blobs/hash")
    (snapshot / "sub/y").symlink_to("../../../blobs/hash")
    (snapshot / "other").symlink_to("../../../models--b/blobs/hash")
    (snapshot / "deeper").symlink_to("../../blobs/deeper/hash")
    assert not list(links_out(snapshot, [snapshot / "x", snapshot / "sub/y"]))
    assert not list(links_out(snapshot / "sub", [snapshot / "sub/y"]))
    assert len(list(links_out(snapshot, [snapshot / "other", snapshot / "deeper"]))) == 2


# -- no other way to open a file that is read

OPENERS = {"open", "read_text", "read_bytes", "fdopen", "mmap", "memmap", "open_memmap", "fromfile"}
OPENERS |= {"load_file", "safe_open", "ZipFile", "ParquetFile", "copyfile", "copytree", "copy2"}
NAMED_BY_USER = "its path is a flag's value; a shell's <(...) is a FIFO and is welcome there"
SYSTEM = "the system's own files, not a folder's"
CHECKED = "opened with open_regular before, or found by is_file()"
ALLOWED = {
    "alignment/align.py": {"_text_tokens": NAMED_BY_USER},
    "comparison/dumps.py": {"load": CHECKED, "_read_npz": CHECKED},
    "comparison/torch_dumps.py": {"_load_pt": CHECKED},
    "alignment/record.py": {"_tensors": CHECKED},
    "benchmark/checkpoint_side.py": {"*": "the benchmark's own files"},
    "benchmark/measure.py": {"*": SYSTEM},
    "chat_template.py": {"_limit_memory": SYSTEM},
    "benchmark/transformers_side.py": {"*": "the benchmark's own files"},
    "board/benchmark.py": {"*": "the benchmark's own files"},
    "board/job.py": {"_catches_stop": SYSTEM},
    "board/server.py": {"_pages": "the package's own files"},
    "checkpoint/copying.py": {"_open": "of a descriptor from open_descriptor"},
    "data/helpers_cpp.py": {"*": "a source file of megatron-core's"},
    "data/indexed.py": {"fingerprint": CHECKED},
    "data/inputs.py": {"opened": CHECKED, "parquet_file": CHECKED},
    "data/parts.py": {"_link": "its own part"},
    "doctor/machine.py": {"*": SYSTEM},
    "evaluation/evaluate.py": {"_read_texts": NAMED_BY_USER},
    "data/chat/rendering.py": {"given_template": NAMED_BY_USER},
    "files.py": {"*": "the place for it"},
    "finetuning/deepspeed/checkpoint.py": {"load": "of a file that DeepSpeed has looked for"},
    "finetuning/deepspeed/config.py": {"_read": NAMED_BY_USER},
    "finetuning/deepspeed/lora.py": {"*": "held_tensors has read its header"},
    "finetuning/dpo.py": {"read": CHECKED},
    "inference/prompts.py": {"_read_file": NAMED_BY_USER, "_find_done": "its own output"},
    "runtime/device.py": {"*": SYSTEM},
    "runtime/mindspeed.py": {"*": "an installed package's"},
    "runtime/power_rapl.py": {"*": SYSTEM},
    "training/logging.py": {"*": "its own metrics"},
}


def openings(path: Path):
    """(function, line) of every call that opens a file to read it, by its name."""

    def visit(node, function):
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            opens = name in OPENERS or ast.unparse(node.func) in ("torch.load", "np.load")
            if opens and not writes(node) and not ours(node, imported):
                yield function, node.lineno
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "qwen2_ascend.files"
        for alias in node.names
    }
    yield from visit(tree, "")


def writes(call: ast.Call) -> bool:
    """Whether a mode or flags say that the file is made or changed."""
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    text = " ".join(map(ast.unparse, given))
    constants = [n.value for a in given for n in ast.walk(a) if isinstance(n, ast.Constant)]
    modes = [text for text in constants if isinstance(text, str) and len(text) <= 3]
    return any(set(mode) & set("wxa+") for mode in modes) or "O_CREAT" in text or "O_WR" in text


def ours(call: ast.Call, imported: set[str]) -> bool:
    """The functions of files.py, and methods that happen to be called `open`."""
    if isinstance(call.func, ast.Name):
        return call.func.id in imported
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    return owner in ("EnergyLog", "output", "archive")


def test_files_that_are_read_are_opened_in_one_place():
    unknown = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        allowed = ALLOWED.get(name, {})
        unknown += [
            f"{name}:{line} in {function}()"
            for function, line in openings(path)
            if not {"*", function} & allowed.keys()
        ]
    assert not unknown, f"open these with qwen2_ascend.files, or say why not: {unknown}"


def test_the_walk_finds_what_it_should(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "from qwen2_ascend.files import read_bytes\n"
        "def f(p):\n"
        "    open(p); p.read_text(); np.memmap(p); os.open(p, os.O_RDONLY); p.open('rb')\n"
        "    open(p, 'wb'); p.open(mode='a'); read_bytes(p); os.open(p, os.O_RDWR | os.O_CREAT)\n"
    )
    assert [function for function, _ in openings(path)] == ["f"] * 5


def test_what_makes_an_output_impossible_depends_on_how_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is replaced needs a folder that can be written, another one itself."""
    path = tmp_path / "out.json"
    path.touch()
    for locked, is_renamed in ((path, False), (tmp_path, True)):
        monkeypatch.setattr(os, "access", lambda asked, mode, locked=locked: asked != locked)
        assert "permissions" in next(files.output_faults("--out", path, is_renamed=is_renamed))
        assert not list(files.output_faults("--out", path, is_renamed=not is_renamed))
