"""No pickle makes us import or call anything, run for long, or fill the memory."""

import collections
import contextlib
import enum
import io
import os
import pickle
import pickletools
import subprocess
import sys
import time
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from format_helpers import write_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_ascend.checkpoint.formats import pickles, torch_pt
from qwen2_ascend.checkpoint.formats.pickles import (
    PLAIN,
    Call,
    Name,
    PersistentId,
    known_records,
    read_pickle,
    write_pickle,
)
from qwen2_ascend.checkpoint.formats.zips import layout_zip
from qwen2_ascend.errors import UserError

MARKER = Path("/tmp") / f"qwen2-ascend-payload-{os.getpid()}"
COMMAND = f"touch {MARKER}"


class Payload:
    """Runs COMMAND in any honest unpickler."""

    def __reduce__(self):
        return os.system, (COMMAND,)


class SetState:
    def __reduce__(self):
        return Payload2, (), {"x": Payload()}


class Payload2:
    pass


def short_unicode(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


ARGUMENT = text(COMMAND)
CALL = ARGUMENT + b"\x85R."
NAMESPACE = b"cargparse\nNamespace\n)\x81"
HOSTILE = {
    "REDUCE": (b"\x80\x02cposix\nsystem\n" + ARGUMENT + b"\x85R.", "posix.system"),
    "GLOBAL alone": (b"\x80\x02cos\nsystem\n.", "os.system"),
    "STACK_GLOBAL": (
        b"\x80\x04" + short_unicode("os") + short_unicode("system") + b"\x93" + CALL,
        "os.system",
    ),
    "dotted STACK_GLOBAL": (
        b"\x80\x04" + short_unicode("argparse") + short_unicode("_os.system") + b"\x93" + ARGUMENT
        + b"\x85R.",
        "argparse._os.system",
    ),
    "INST": (b"(" + ARGUMENT + b"ios\nsystem\n.", "os.system"),
    "OBJ": (b"(cos\nsystem\n" + ARGUMENT + b"o.", "os.system"),
    "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n" + ARGUMENT + b"\x85\x81.", "subprocess.Popen"),
    "NEWOBJ_EX": (
        b"\x80\x04csubprocess\nPopen\n" + ARGUMENT + b"\x85}\x92.",
        "subprocess.Popen",
    ),
    "BUILD with __setstate__": (
        b"\x80\x02" + NAMESPACE + b"}" + text("__setstate__") + b"cos\nsystem\nsb}b.",
        "os.system",
    ),
    "eval": (b"\x80\x02c__builtin__\neval\n" + ARGUMENT + b"\x85R.", "builtins.eval"),
    "getattr": (b"\x80\x02c__builtin__\ngetattr\n.", "builtins.getattr"),
    "torch.load inside": (
        b"\x80\x02ctorch.storage\n_load_from_bytes\n" + ARGUMENT + b"\x85R.",
        "torch.storage._load_from_bytes",
    ),
    "nested": (
        b"\x80\x02}(X\x01\x00\x00\x00a](" + b"cos\nsystem\n" + ARGUMENT + b"\x85Reu.",
        "os.system",
    ),
    "in a key": (b"\x80\x02}cos\nsystem\n" + ARGUMENT + b"\x85RK\x01s.", "os.system"),
    "in a persistent id": (b"\x80\x02cos\nsystem\n" + ARGUMENT + b"\x85RQ.", "os.system"),
    "two": (b"\x80\x02]cos\nsystem\nacnt\nunlink\na.", "nt.unlink, os.system"),
    "another function of torch_npu": (
        b"\x80\x02ctorch_npu.utils.storage\n_share_npu_\n" + CALL,
        "torch_npu.utils.storage._share_npu_",
    ),
    "then damage": (b"\x80\x02cos\nsystem\n" + ARGUMENT + b"\x85R", "os.system"),
}  # fmt: skip


def pt_with(path: Path, data_pkl: bytes) -> Path:
    return write_layout(layout_zip({"archive/data.pkl": data_pkl}), path)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_payload_is_named_and_never_runs(tmp_path, case):
    data, name = HOSTILE[case]
    path = pt_with(tmp_path / "x.pt", data)
    with pytest.raises(UserError, match="refused, not executed") as caught:
        torch_pt.read(path)
    assert len(caught.value.faults) == 1
    assert f"asks for {name};" in str(caught.value) and str(path) in str(caught.value)
    assert not MARKER.exists()


def test_the_payloads_are_real():
    """The same bytes do run in Python's unpickler, or the test above would show nothing."""
    for case in ("REDUCE", "STACK_GLOBAL", "INST", "OBJ", "nested"):
        pickle.loads(HOSTILE[case][0])
        assert MARKER.exists(), case
        MARKER.unlink()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_payloads_of_pythons_own_pickler(tmp_path, protocol):
    tree = {"model": {"w": torch.ones(2)}, "args": [Payload(), SetState()]}
    torch.save(tree, tmp_path / "x.pt", pickle_protocol=protocol)
    with pytest.raises(UserError, match="refused, not executed") as caught:
        torch_pt.read(tmp_path / "x.pt")
    assert "posix.system" in str(caught.value) and "Payload2" in str(caught.value)
    assert not MARKER.exists()


BROKEN = {
    "protocol 0": (b"(dp0\n.", "instruction b'd'"),
    "protocol 6": (b"\x80\x06}.", "has protocol 6"),
    "an allowed class by INST": (b"(iargparse\nNamespace\n.", "instruction INST"),
    "extension": (b"\x80\x02\x82\x01.", "instruction b'\\x82'"),
    "text integer": (b"\x80\x02I12\n.", "instruction b'I'"),
    "huge integer": (b"\x80\x02\x8b\x00\x10\x00\x00" + b"\1" * 4096 + b".", "instruction b'\\x8b'"),
    "never stored": (b"\x80\x02h\x05.", "never stored"),
    "empty stack": (b"\x80\x020.", "empty stack"),
    "pops the mark": (b"\x80\x02(0.", "empty stack"),
    "no mark": (b"\x80\x02t.", "never opened"),
    "two objects": (b"\x80\x02}}.", "one object"),
    "nothing": (b"\x80\x02.", "one object"),
    "no end": (b"\x80\x02}", "ends in the middle"),
    "key twice": (b"\x80\x02}(K\x01K\x02K\x01K\x03u.", "key '1' twice"),
    "key without value": (b"\x80\x02}(K\x01u.", "key without a value"),
    "list as key": (b"\x80\x02}]K\x01s.", "list as a key"),
    "deep key": (b"\x80\x02})" + b"\x85" * 10 + b"K\x01s.", "tuple as a key"),
    "wide key": (b"\x80\x02}(" + b"K\x01" * 17 + b"tK\x01s.", "tuple as a key"),
    "appends to a dict": (b"\x80\x02}K\x01a.", "fills a dict as a list"),
    "calls a string": (b"\x80\x02X\x01\0\0\0a)R.", "calls a str"),
    "calls with a list": (b"\x80\x02cargparse\nNamespace\n]R.", "calls a Maker"),
    "attributes of a list": (b"\x80\x02]}b.", "gives a list attributes"),
    "attributes of a class": (b"\x80\x02cargparse\nNamespace\n}b.", "gives a Maker attributes"),
    "slots": (b"\x80\x02" + NAMESPACE + b"N}\x86b.", "attributes without names"),
    "number as attribute": (b"\x80\x02" + NAMESPACE + b"}K\x01K\x01sb.", "without names"),
    "wrong arguments": (b"\x80\x02cargparse\nNamespace\nK\x01\x85R.", "takes 0 positional"),
    "other codec": (
        b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0zip\x86R.",
        "encodes text otherwise",
    ),
    "a tensor on an NPU without a storage": (
        b"\x80\x02ctorch_npu.utils.storage\n_rebuild_npu_tensor\n(K\x00K\x00))\x89}K\x02tR.",
        "on something other than a storage",
    ),
    "keywords": (
        b"\x80\x04cargparse\nNamespace\n)}X\x01\0\0\0aK\x01s\x92.",
        "keyword arguments",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_pickles_are_one_error(tmp_path, case):
    data, words = BROKEN[case]
    with pytest.raises(UserError) as caught:
        torch_pt.read(pt_with(tmp_path / "x.pt", data))
    assert words in str(caught.value)


def tensor_call(storage, start, shape, strides) -> bytes:
    args = (PersistentId(storage), start, shape, strides, False, None)
    return write_pickle(Call(Name("torch._utils", "_rebuild_tensor_v2"), args))


FLOATS = Name("torch", "FloatStorage")
LYING = {
    "too short": (("storage", FLOATS, "0", "cpu", 5), 0, (5,), (1,), "has 16 bytes, not 20"),
    "too long": (("storage", FLOATS, "0", "cpu", 3), 0, (3,), (1,), "has 16 bytes, not 12"),
    "absent": (("storage", FLOATS, "7", "cpu", 4), 0, (4,), (1,), "data/7 is missing"),
    "beyond": (("storage", FLOATS, "0", "cpu", 4), 1, (4,), (1,), "at 4 needs more bytes"),
    "bigger": (("storage", FLOATS, "0", "cpu", 4), 0, (2, 4), (4, 1), "needs more bytes"),
    "huge": (("storage", FLOATS, "0", "cpu", 4), 0, (2**62, 2**62), (2**62, 1), "more bytes"),
    "negative": (("storage", FLOATS, "0", "cpu", 4), -1, (4,), (1,), "impossible shape"),
    "negative size": (("storage", FLOATS, "0", "cpu", 4), 0, (-4,), (1,), "impossible shape"),
    "few strides": (("storage", FLOATS, "0", "cpu", 4), 0, (4,), (), "impossible shape"),
    "many axes": (("storage", FLOATS, "0", "cpu", 4), 0, (1,) * 65, (1,) * 65, "impossible shape"),
    "bool size": (("storage", FLOATS, "0", "cpu", 4), 0, (True,), (1,), "impossible shape"),
    "no storage": (("module", FLOATS, "0", "cpu", 4), 0, (4,), (1,), "not written as torch.save"),
    "no type": (("storage", "FloatStorage", "0", "cpu", 4), 0, (4,), (1,), "not written as"),
    "short id": (("storage", FLOATS, "0"), 0, (4,), (1,), "not written as torch.save"),
    "negative numel": (("storage", FLOATS, "0", "cpu", -4), 0, (4,), (1,), "not written as"),
}


@pytest.mark.parametrize("case", LYING)
def test_tensors_that_contradict_their_storage(tmp_path, case):
    *call, words = LYING[case]
    records = {"archive/data.pkl": tensor_call(*call), "archive/data/0": bytes(16)}
    with pytest.raises(UserError) as caught:
        torch_pt.read(write_layout(layout_zip(records), tmp_path / "x.pt"))
    assert words in str(caught.value)


def test_big_endian_files_are_refused(tmp_path):
    records = {"archive/data.pkl": b"\x80\x02}.", "archive/byteorder": b"big"}
    with pytest.raises(UserError, match="big-endian"):
        torch_pt.read(write_layout(layout_zip(records), tmp_path / "x.pt"))


def test_a_huge_data_pkl_is_not_read(tmp_path):
    layout = layout_zip({"archive/data.pkl": 2**40})
    with pytest.raises(UserError, match="record of 1099511627776 bytes"):
        torch_pt.read(write_layout(layout, tmp_path / "x.pt"))


MANY = 200_000
NUMBERS = b"](" + b"K\x01" * MANY + b"e"
BOMBS = {
    "deep tuples": b")" + b"\x85" * 3 * MANY,
    "deep lists": b"]" * 5 * MANY + b"a" * (5 * MANY - 1),
    "shared lists": NUMBERS + b"q\x000(" + b"h\x00" * MANY + b"t",
    "itself": b"]q\x00h\x00a",
    # each of the following would copy something large many times
    "sets of one list": NUMBERS
    + b"q\x00c__builtin__\nset\nq\x01("
    + b"h\x01h\x00\x85R" * MANY
    + b"t",
    "bytes of one string": text("a" * (1 << 22))
    + b"q\x00"
    + text("latin1")
    + b"q\x01c_codecs\nencode\nq\x02("
    + b"h\x02h\x00h\x01\x86R" * MANY
    + b"t",
    "one state many times": b"}("
    + b"".join(text(f"{i:06}") + b"N" for i in range(MANY))
    + b"uq\x000"
    + NAMESPACE
    + b"h\x00b" * MANY,
}
PROBE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from qwen2_ascend.checkpoint.formats import torch_pt
from qwen2_ascend.errors import UserError
try:
    torch_pt.read(sys.argv[1])
except UserError as error:
    print("refused", error)
else:
    print("read")
"""


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_end_soon_and_in_bounded_memory(tmp_path, case):
    path = pt_with(tmp_path / "x.pt", b"\x80\x02" + BOMBS[case] + b".")
    result = subprocess.run(
        [sys.executable, "-c", PROBE, path], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    copies = case in ("sets of one list", "bytes of one string", "one state many times")
    assert ("many copies of large objects" in result.stdout) is copies


ABOUT_BYTES = {
    "empty sets": lambda n: b"(" + b"\x8f" * n + b"t",
    "empty dicts": lambda n: b"(" + b"}" * n + b"t",
    "dicts of one": lambda n: b"(" + b"}NNs" * (n // 4) + b"t",
    "empty lists": lambda n: b"(" + b"]" * n + b"t",
    "memo": lambda n: b"(" + b"N\x94" * (n // 2) + b"t",
    "memo of tuples": lambda n: b"(" + b")\x94" * (n // 2) + b"t",
    "memo far away": lambda n: b"N" + b"r\xff\xff\xff\xff" * (n // 5),
    "lists in each other": lambda n: b"]" * (n // 2) + b"a" * (n // 2 - 1),
    "marks over items": lambda n: b"(" + b"N" * (n // 50) + b"(1" * (n // 2) + b"t",
    "marks": lambda n: b"(" * (n // 2) + b"t" * (n // 2),
    "tuples of one": lambda n: b"(" + b"K\1\x85" * (n // 3) + b"t",
    "nothing": lambda n: b"(" + b"N0" * (n // 2) + b"t",
    "copies of the top": lambda n: b"(N" + b"2" * n + b"t",
    "frozen sets": lambda n: b"(" + b"(\x91" * (n // 2) + b"t",
    "records": lambda n: b"ctorch\nSize\nq\0(" + b"h\0)R" * (n // 4) + b"t",
    "numbers": lambda n: b"(" + b"J\1\2\3\4" * (n // 5) + b"t",
    "refused names": lambda n: b"(" + b"".join(b"ca\n%d\n" % i for i in range(n // 9)) + b"t",
}


def read_bomb(case: str, size: int) -> None:
    data = b"\x80\x04" + ABOUT_BYTES[case](size) + b"."
    assert len(data) < 1.1 * size
    with contextlib.suppress(UserError):
        read_pickle(data, "bomb", PLAIN | torch_pt.TORCH_VALUES)


@pytest.mark.parametrize("case", ABOUT_BYTES)
def test_a_megabyte_takes_megabytes_and_less_than_a_second(case):
    started = time.process_time()
    read_bomb(case, 1_000_000)
    assert time.process_time() - started < 2  # a second where nothing else runs
    tracemalloc.start()
    read_bomb(case, 100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20, peak


def test_the_number_of_instructions_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_INSTRUCTIONS", 1000)
    with pytest.raises(UserError, match="more than 1000 instructions"):
        torch_pt.read(pt_with(tmp_path / "x.pt", b"\x80\x04(" + b"\x8f" * 1000 + b"t."))


def test_flips_and_cuts_give_an_error_or_an_object(tmp_path):
    tree = {
        "args": torch_pt.argparse.Namespace(tensor_model_parallel_size=2, dtype=torch.bfloat16),
        "model": {"a.weight": torch.ones(3, 5), "b": torch.ones(4, dtype=torch.bfloat16)},
        "rng": [{"np": np.random.get_state(), "set": {1, 2}, "raw": b"\xff"}],
    }
    path, rng = tmp_path / "x.pt", np.random.default_rng(0)
    counts = {"read": 0, "refused": 0}
    for protocol in (2, 4):
        buffer = io.BytesIO()
        torch.save(tree, buffer, pickle_protocol=protocol)
        good = buffer.getvalue()
        for round_ in range(1500):
            changed = bytearray(good)
            if round_ % 5 == 0:
                del changed[rng.integers(len(good)) :]
            else:
                # most of the file is tensor data and padding: aim at the pickle and the directory
                end = len(good) if round_ % 2 else 1200
                begin = len(good) - 900 if round_ % 2 else 0
                for _ in range(rng.integers(1, 4)):
                    changed[rng.integers(begin, end)] = rng.integers(256)
            path.write_bytes(changed)
            try:
                torch_pt.read(path)
            except UserError as error:
                assert str(error).startswith(str(path))
                counts["refused"] += 1
            else:
                counts["read"] += 1
    assert counts["refused"] > 1000 and counts["read"] > 100


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*pickletools.opcodes]), max_size=30), st.binary(max_size=40))
def test_random_programs_give_an_error_or_an_object(opcodes, arguments):
    data = b"\x80\x04"
    for number, opcode in enumerate(opcodes):
        data += opcode.code.encode("latin1")
        if opcode.arg is not None:
            data += arguments[number % 7 :][: max(opcode.arg.n, 0)] + b"\n"
    try:
        read_pickle(data + b".", "program", PLAIN | known_records({"a": ["b"]}))
    except UserError as error:
        assert str(error).startswith("program: ")


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda child: st.one_of(
        st.lists(child), st.lists(child).map(tuple), st.dictionaries(st.text(), child)
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(values)
def test_what_we_write_python_reads(value):
    data = write_pickle(value)
    assert pickle.loads(data) == value
    assert read_pickle(data, "ours", PLAIN) == value


@settings(max_examples=200, deadline=None)
@given(values, st.sampled_from([2, 3, 4, 5]))
def test_what_python_writes_we_read(value, protocol):
    assert read_pickle(pickle.dumps(value, protocol), "theirs", PLAIN) == value


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_containers_that_make_their_own_items_are_plain_ones(tmp_path, protocol):
    """MindSpeed-LLM saves its model as a defaultdict of dicts."""
    tree = collections.defaultdict(dict)
    tree["model"]["w"] = torch.ones(2)
    tree["lists"] = collections.defaultdict(list, {"a": [1, 2]})
    tree["none"] = collections.defaultdict(None, {"a": 1})
    torch.save(tree, tmp_path / "x.pt", pickle_protocol=protocol)
    found = torch_pt.read(tmp_path / "x.pt")
    assert type(found) is dict and found["model"]["w"].shape == (2,)
    assert found["lists"] == {"a": [1, 2]} and found["none"] == {"a": 1}
    torch.save(collections.defaultdict(os.getcwd), tmp_path / "x.pt", pickle_protocol=protocol)
    with pytest.raises(UserError, match=r"asks for posix\.getcwd"):
        torch_pt.read(tmp_path / "x.pt")


def test_values_beside_the_weights_are_read(tmp_path):
    tree = {
        "size": torch.ones(2, 3).size(),
        "device": torch.device("cpu"),
        "buffer": io.BytesIO(b"abc"),
        "scalar": np.float64(0.5),
        "loss": np.float32(1),
        "count": np.int64(3),
    }
    torch.save(tree, tmp_path / "x.pt")
    found = torch_pt.read(tmp_path / "x.pt")
    assert found["size"] == (2, 3)
    assert (
        found["device"].type_name == "torch.device" and found["buffer"].type_name == "_io.BytesIO"
    )
    assert all("scalar" in found[key].type_name for key in ("scalar", "loss", "count"))


# -- what torch_npu writes


class OnNpu:
    """A tensor on an NPU, as releases of torch_npu pickle it: a copy on the host and its format."""

    def __init__(self, tensor: torch.Tensor, kind: object) -> None:
        self.tensor, self.kind = tensor, kind

    def __reduce__(self):
        rebuild = vars(sys.modules["torch_npu.utils.storage"])["_rebuild_npu_tensor"]
        tensor = self.tensor
        shape = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        return rebuild, (
            tensor._typed_storage(),
            *shape,
            False,
            collections.OrderedDict(),
            self.kind,
        )


@pytest.fixture
def npu_format(monkeypatch) -> type[enum.IntEnum]:
    """torch_npu's class of formats; its modules are there by name, as a pickler asks for them."""
    for name in ("torch_npu", "torch_npu.utils", "torch_npu.npu"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    storage = types.ModuleType("torch_npu.utils.storage")
    formats = types.ModuleType("torch_npu.npu._format")
    monkeypatch.setitem(sys.modules, storage.__name__, storage)
    monkeypatch.setitem(sys.modules, formats.__name__, formats)

    def _rebuild_npu_tensor(*arguments):
        raise AssertionError("called")

    _rebuild_npu_tensor.__module__ = storage.__name__
    _rebuild_npu_tensor.__qualname__ = "_rebuild_npu_tensor"
    vars(storage)["_rebuild_npu_tensor"] = _rebuild_npu_tensor
    vars(formats)["Format"] = enum.IntEnum("Format", {"ND": 2, "NZ": 29}, module=formats.__name__)
    return vars(formats)["Format"]


@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_that_lay_on_an_npu_are_read(tmp_path, protocol, npu_format):
    """MindSpeed-LLM's training checkpoints of those releases hold nothing else."""
    values = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    kinds = {"older": 29, "newer": npu_format.NZ, "oldest": True}
    tree = {"model": {name: OnNpu(values[1:], kind) for name, kind in kinds.items()}}
    torch.save(tree, tmp_path / "x.pt", pickle_protocol=protocol)
    found = torch_pt.read(tmp_path / "x.pt")["model"]
    for name in kinds:
        assert (found[name].shape, found[name].dtype) == ((2, 4), "bf16")
        data = (tmp_path / "x.pt").read_bytes()[found[name].offset :][: found[name].num_bytes]
        assert data == values[1:].contiguous().view(torch.uint8).numpy().tobytes()
