"""Pickles read and written without executing anything: nothing here can import or call a name.

A pickle is a program for a small stack machine, and `pickle.Unpickler` runs it with real imports
and calls. The machine here has no such power: a global is a name that is looked up in a table of
our own makers of inert values, and a name that is not there is reported, never resolved. Every
protocol's container and scalar instructions are known (PyTorch writes protocol 2, MindSpeed-LLM 4,
torch.distributed.checkpoint Python's default), the text instructions of protocol 0 are not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pickletools
import struct
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any, NamedTuple

from qwen2_ascend.errors import UserError, first_of

MAX_INSTRUCTIONS = 10_000_000
"""About 160,000 tensors."""
_FREE_BYTES, _BYTES_PER_BYTE = 8 << 20, 40
"""What objects may take in memory: a little, and so much for each byte of the file. What torch.save
writes for models and optimizers takes 13 to 34 for each."""
_UNKNOWN_COST = 300
_MOST_PICKLES = 5
"""One after the other in a file; torch before 1.6 wrote so many, then the tensors' bytes."""
_CUT_OFF = "it ends in the middle"
_TOO_MUCH = "it makes far more objects than a file of its size describes"
MAX_KEY_PARTS = 16
"""The longest tuple that may be a dictionary's key."""

_SCALARS = (str, int, float, bool, bytes, type(None))


class DType(NamedTuple):
    """torch.bfloat16 and its kin, as a name."""

    name: str


@dataclass
class Inert:
    """An object of a class that is known by name only: what it was made of, never the thing."""

    type_name: str
    """Module and name, such as "megatron.core.transformer.enums.AttnBackend"."""
    args: tuple[Any, ...] = ()
    state: Any = None


@dataclass(eq=False)
class InertKey:
    """An Inert for a class whose objects are dictionary keys; each equals itself alone."""

    type_name: str
    state: Any = None


class Maker(NamedTuple):
    """What the table gives for a class or function: how its calls become inert values."""

    type_name: str
    make: Callable[..., Any]


class PickleFault(ValueError):
    """Why a pickle cannot be read: a phrase."""


Known = Mapping[str, Any]
"""A Maker, or the value that a name itself stands for, by module and name."""


def known_records(names: Mapping[str, Iterable[str]]) -> dict[str, Maker]:
    """A table that makes `Inert` records for all of `names`, which are given by module."""
    known = (f"{module}.{name}" for module, of in names.items() for name in of)
    return {type_name: _record_maker(type_name) for type_name in known}


def _record_maker(type_name: str) -> Maker:
    return Maker(type_name, lambda *args: Inert(type_name, args))


def read_pickle(
    data: bytes, what: str, known: Known, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """The object that `data` describes.

    Args:
        data: the pickle.
        what: its file, for messages.
        known: the names it may use.
        persistent: what a persistent id stands for; without it there may be none.

    Raises:
        UserError: it uses other names (all of them are given), or it is damaged.
    """
    machine = _Machine(data, known, persistent)
    fault, result = None, None
    try:
        result = machine.run()
    except (ValueError, IndexError, TypeError) as error:
        fault = f"{what}: not a pickle that torch.save writes, or a damaged one: {_short(error)}."
    if machine.refused:
        names = [_short(name) for name in sorted(machine.refused)]
        raise UserError(
            f"{what}: the pickle asks for {first_of(names)}; refused, not executed. "
            "Only tensors, plain containers and the records of Megatron's checkpoints are read. If "
            "you trust the file, load it where it was made and save it again with plain values."
        )
    if fault:
        raise UserError(fault)
    return result


def check_size(data: bytes, what: str) -> None:
    """Checks that a pickle for another reader makes no more objects than its size allows.

    Raises:
        UserError: it makes far more. Whatever else is wrong with it is left to the other reader.
    """
    left, stream = _allowance(data), io.BytesIO(data)
    pickles = (pickletools.genops(stream) for _ in range(_MOST_PICKLES))
    with contextlib.suppress(ValueError):  # damaged, or what follows the last one
        for instruction, _, _ in chain.from_iterable(pickles):
            left -= _CODES[instruction.code][1] if instruction.code in _CODES else _UNKNOWN_COST
            if left < 0:
                break
    if left < 0:
        raise UserError(f"{what}: {_TOO_MUCH}.")


def _allowance(data: bytes) -> int:
    return _FREE_BYTES + _BYTES_PER_BYTE * len(data)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:197] + "..."


class _Machine:
    """The stack machine. What an instruction does is a method, or a function of the machine."""

    def __init__(self, data: bytes, known: Known, persistent: Callable[[Any], Any] | None) -> None:
        self.file = io.BytesIO(data)
        self.known = known
        self.persistent = persistent
        self.refused: set[str] = set()
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        """The stacks below each open mark."""
        self.memo: dict[int, Any] = {}
        self.size_left = _allowance(data)
        self.copies_left = 1000 + 2 * len(data)

    def run(self) -> Any:
        """The object that the pickle leaves behind."""
        for _ in range(MAX_INSTRUCTIONS):
            code = self.file.read(1)
            if code == b".":
                break
            if code not in _STEPS:
                raise PickleFault(f"it uses the instruction {code!r}" if code else _CUT_OFF)
            step, cost = _STEPS[code]
            step(self)
            self.size_left -= cost
            if self.size_left < 0:
                raise PickleFault(_TOO_MUCH)
        else:
            raise PickleFault(f"it has more than {MAX_INSTRUCTIONS} instructions")
        if len(self.stack) != 1 or self.below:
            raise PickleFault("it does not end with one object")
        return self.stack[0]

    def line(self) -> str:
        if not (line := self.file.readline()).endswith(b"\n"):
            raise PickleFault(_CUT_OFF)
        return line[:-1].decode()

    # -- the stack

    def top(self) -> Any:
        if not self.stack:
            raise PickleFault("it takes from an empty stack")
        return self.stack[-1]

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def items(self) -> list[Any]:
        """Everything above the topmost mark, which goes too."""
        if not self.below:
            raise PickleFault("it closes a container that it never opened")
        items, self.stack = self.stack, self.below.pop()
        return items

    def proto(self) -> None:
        if not 2 <= (version := pickletools.read_uint1(self.file)) <= 5:
            raise PickleFault(f"it has protocol {version}; 2 to 5 are read")

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise PickleFault(f"it recalls an object {index} that it never stored")
        self.stack.append(self.memo[index])

    # -- containers

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise PickleFault("it takes from an empty stack")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def container(self, kind: type) -> Any:
        value = self.top()
        if type(value) is not kind:
            raise PickleFault(f"it fills a {type(value).__name__} as a {kind.__name__}")
        return value

    def append(self) -> None:
        value = self.pop()
        self.container(list).append(value)

    def extend(self) -> None:
        items = self.items()
        self.container(list).extend(items)

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def set_items(self, items: list[Any]) -> None:
        target = self.container(dict)
        if len(items) % 2:
            raise PickleFault("it gives a dictionary a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if _key(key) in target:
                raise PickleFault(f"it gives a dictionary the key {_short(key)!r} twice")
            target[key] = value

    def add_items(self) -> None:
        items = self.items()
        self.container(set).update(map(_key, items))

    # -- names, and what a real unpickler would call

    def global_by_lines(self) -> None:
        self.stack.append(self.resolve(self.line(), self.line()))

    def global_by_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleFault("it asks for a global whose name is not a string")
        self.stack.append(self.resolve(module, name))

    def instance(self) -> None:
        self.resolve(self.line(), self.line())
        raise PickleFault("it uses the instruction INST of protocol 0")

    def resolve(self, module: str, name: str) -> Any:
        # Python 2's names, which protocol 2 keeps writing
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        type_name = f"{module}.{name}"
        if type_name in self.known:
            return self.known[type_name]
        self.refused.add(type_name)
        return _record_maker(type_name)

    def call(self) -> None:
        args, maker = self.pop(), self.pop()
        if not isinstance(maker, Maker) or type(args) is not tuple:
            raise PickleFault(f"it calls a {type(maker).__name__}")
        for arg in args:
            self.charge(arg)
        self.stack.append(maker.make(*args))

    def call_with_keywords(self) -> None:
        if self.pop() != {}:
            raise PickleFault("it makes an object with keyword arguments")
        self.call()

    def charge(self, value: Any) -> None:
        """Bounds copying: a small file can ask to copy one large object a million times."""
        self.copies_left -= len(value) if hasattr(value, "__len__") else 0
        if self.copies_left < 0:
            raise PickleFault("it makes many copies of large objects")

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, (Inert, InertKey)):
            target.state = state
        elif isinstance(target, argparse.Namespace):
            self.charge(state)
            if type(state) is not dict or not all(type(key) is str for key in state):
                raise PickleFault("it gives a Namespace attributes without names")
            vars(target).update(state)
        elif type(target) is not dict:  # an OrderedDict's own attributes (`_metadata`) are dropped
            raise PickleFault(f"it gives a {type(target).__name__} attributes")

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise PickleFault("it refers to objects outside of itself")
        self.stack.append(self.persistent(self.pop()))


Step = Callable[[_Machine], Any]


def _pushes(make: Step) -> Step:
    def step(machine: _Machine) -> None:
        value = make(machine)  # which may change the stack
        machine.stack.append(value)

    return step


def _reads(read: Callable[[IO[bytes]], Any]) -> Step:
    return lambda machine: machine.stack.append(read(machine.file))


_CODES: dict[str, tuple[Step, int]] = {
    "\x80": (_Machine.proto, 0),
    "\x95": (lambda m: pickletools.read_uint8(m.file), 0),  # FRAME
    "0": (_Machine.pop, 8),
    "1": (_Machine.items, 8),
    "2": (lambda m: m.stack.append(m.top()), 8),
    "(": (_Machine.mark, 90),
    "N": (_pushes(lambda m: None), 8),
    "\x88": (_pushes(lambda m: True), 8),
    "\x89": (_pushes(lambda m: False), 8),
    "K": (_reads(pickletools.read_uint1), 8),
    "M": (_reads(pickletools.read_uint2), 40),
    "J": (_reads(pickletools.read_int4), 40),
    "G": (_reads(pickletools.read_float8), 40),
    "\x8a": (_reads(pickletools.read_long1), 60),
    "X": (_reads(pickletools.read_unicodestring4), 60),
    "\x8c": (_reads(pickletools.read_unicodestring1), 60),
    "\x8d": (_reads(pickletools.read_unicodestring8), 60),
    "B": (_reads(pickletools.read_bytes4), 40),
    "C": (_reads(pickletools.read_bytes1), 40),
    "\x8e": (_reads(pickletools.read_bytes8), 40),
    "\x96": (_reads(lambda file: bytearray(pickletools.read_bytes8(file))), 60),
    "q": (lambda m: m.put(pickletools.read_uint1(m.file)), 100),
    "r": (lambda m: m.put(pickletools.read_uint4(m.file)), 100),
    "\x94": (lambda m: m.put(len(m.memo)), 100),
    "h": (lambda m: m.get(pickletools.read_uint1(m.file)), 8),
    "j": (lambda m: m.get(pickletools.read_uint4(m.file)), 8),
    "}": (_pushes(lambda m: {}), 240),
    "]": (_pushes(lambda m: []), 100),
    "\x8f": (_pushes(lambda m: set()), 240),
    ")": (_pushes(lambda m: ()), 8),
    "\x85": (lambda m: m.tuple_of(1), 60),
    "\x86": (lambda m: m.tuple_of(2), 60),
    "\x87": (lambda m: m.tuple_of(3), 60),
    "t": (_pushes(lambda m: tuple(m.items())), 60),
    "\x91": (_pushes(lambda m: frozenset(map(_key, m.items()))), 240),
    "a": (_Machine.append, 8),
    "e": (_Machine.extend, 8),
    "s": (_Machine.set_item, 60),
    "u": (lambda m: m.set_items(m.items()), 8),
    "\x90": (_Machine.add_items, 8),
    "c": (_Machine.global_by_lines, 120),
    "\x93": (_Machine.global_by_stack, 120),
    "i": (_Machine.instance, 0),
    "R": (_Machine.call, 300),
    "\x81": (_Machine.call, 300),
    "\x92": (_Machine.call_with_keywords, 300),
    "b": (_Machine.build, 8),
    "Q": (_Machine.persistent_id, 120),
}
"""Every instruction that is read: what it does, and about how many bytes it takes."""
_STEPS = {code.encode("latin1"): step for code, step in _CODES.items()}


def _key(key: Any) -> Hashable:
    """`key` if it is a scalar, an InertKey or a flat tuple of scalars.

    Hashing deep tuples would overflow C's stack.

    Raises:
        PickleFault: it is not.
    """
    if isinstance(key, InertKey):
        return key
    parts = key if isinstance(key, tuple) else (key,)
    sound = len(parts) <= MAX_KEY_PARTS
    if not sound or not all(isinstance(part, (*_SCALARS, DType)) for part in parts):
        raise PickleFault(f"it uses a {type(key).__name__} as a key")
    return key


def _dict(items: Any = ()) -> dict[Any, Any]:
    """An OrderedDict, which is pickled empty and then filled."""
    if type(items) is not tuple or items:
        raise PickleFault("it makes a dictionary of something")
    return {}


def _default_dict(factory: Any = None) -> dict[Any, Any]:
    """A defaultdict, which is pickled empty and then filled; what it makes by itself is dropped."""
    if factory is not None and factory not in (PLAIN["builtins.dict"], PLAIN["builtins.list"]):
        raise PickleFault("it makes a defaultdict of something other than dicts or lists")
    return {}


def _list(items: Any = ()) -> list[Any]:
    if type(items) not in (list, tuple):
        raise PickleFault("it makes a list of something else")
    return list(items)


def _keys(items: Any) -> Iterable[Hashable]:
    if type(items) not in (list, tuple):
        raise PickleFault("it makes a set of something other than a list")
    return map(_key, items)


def _encode(text: Any, encoding: Any) -> bytes:
    """_codecs.encode, which is how protocol 2 writes bytes."""
    if type(text) is not str or encoding != "latin1":
        raise PickleFault("it encodes text otherwise than protocol 2 encodes bytes")
    return text.encode("latin1")


def _bytearray(data: Any = b"") -> bytearray:
    if type(data) not in (bytes, bytearray):
        raise PickleFault("it makes a bytearray of something other than bytes")
    return bytearray(data)


PLAIN: dict[str, Any] = {
    maker.type_name: maker
    for maker in (
        Maker("argparse.Namespace", lambda: argparse.Namespace()),
        Maker("collections.OrderedDict", _dict),
        Maker("collections.defaultdict", _default_dict),
        Maker("builtins.dict", _dict),
        Maker("builtins.list", _list),
        Maker("_codecs.encode", _encode),
        Maker("builtins.bytearray", _bytearray),
        Maker("builtins.set", lambda items=(): set(_keys(items))),
        Maker("builtins.frozenset", lambda items=(): frozenset(_keys(items))),
    )
}
"""Python's own containers, where a protocol makes them by name."""


# -- writing


class Call(NamedTuple):
    """Pickled as a call: the reader gets `function(*args)`."""

    function: Name
    args: tuple[Any, ...]


class Record(NamedTuple):
    """Pickled as an object of a class, made without a call and given `state`."""

    type_name: Name
    state: Any


class Name(NamedTuple):
    """Pickled as a global."""

    module: str
    name: str


class DictItems(NamedTuple):
    """Pickled as a dictionary; its keys need not be hashable here."""

    items: Sequence[tuple[Any, Any]]


class PersistentId(NamedTuple):
    """Pickled as a persistent id."""

    value: Any


def write_pickle(obj: Any, expand: Callable[[Any], Any] = lambda leaf: leaf) -> bytes:
    """`obj` as a protocol 2 pickle.

    Args:
        obj: dicts, lists, tuples, argparse.Namespace, scalars, strings, DType, and Call, Record,
            Name, DictItems and PersistentId.
        expand: what to write for a leaf of another kind.

    Raises:
        TypeError: a leaf that even `expand` leaves unknown.
    """
    writer = _Writer(expand)
    writer.write(obj)
    return b"\x80\x02" + b"".join(writer.parts) + b"."


class _Writer:
    """Appends the instructions for one object after the other; only names are memoized."""

    def __init__(self, expand: Callable[[Any], Any]) -> None:
        self.expand = expand
        self.parts: list[bytes] = []
        self.memo: dict[Name, int] = {}

    def write(self, obj: Any) -> None:
        put = self.parts.append
        if obj is None or obj is True or obj is False:
            put({None: b"N", True: b"\x88", False: b"\x89"}[obj])
        elif type(obj) is int:
            put(_int_bytes(obj))
        elif type(obj) is float:
            put(b"G" + struct.pack(">d", obj))
        elif isinstance(obj, str):
            raw = obj.encode("utf-8", "surrogatepass")
            put(b"X" + struct.pack("<I", len(raw)) + raw)
        elif isinstance(obj, Name):
            self._name(obj)
        elif isinstance(obj, DType):
            self._name(Name("torch", obj.name))
        elif isinstance(obj, Call):
            self.write(obj.function)
            self.write(obj.args)
            put(b"R")
        elif isinstance(obj, PersistentId):
            self.write(obj.value)
            put(b"Q")
        elif isinstance(obj, Record):
            self.write(obj.type_name)
            put(b")\x81")
            self.write(obj.state)
            put(b"b")
        else:
            self._container(obj)

    def _container(self, obj: Any) -> None:
        if type(obj) is tuple:
            self._sequence(b"(", obj, b"t")
        elif type(obj) is list:
            self._sequence(b"](", obj, b"e")
        elif isinstance(obj, dict):
            self._container(DictItems(tuple(obj.items())))
        elif isinstance(obj, DictItems):
            self._sequence(b"}(", (part for item in obj.items for part in item), b"u")
        elif isinstance(obj, argparse.Namespace):
            self.write(Record(Name("argparse", "Namespace"), vars(obj)))
        else:
            expanded = self.expand(obj)
            if expanded is obj:
                raise TypeError(f"cannot pickle a {type(obj).__name__}: {obj!r}")
            self.write(expanded)

    def _sequence(self, start: bytes, items: Iterable[Any], end: bytes) -> None:
        self.parts.append(start)
        for item in items:
            self.write(item)
        self.parts.append(end)

    def _name(self, name: Name) -> None:
        if name in self.memo:
            self.parts.append(b"j" + struct.pack("<I", self.memo[name]))
            return
        self.memo[name] = len(self.memo)
        self.parts.append(f"c{name.module}\n{name.name}\n".encode())
        self.parts.append(b"r" + struct.pack("<I", self.memo[name]))


def _int_bytes(number: int) -> bytes:
    if -(2**31) <= number < 2**31:
        return b"J" + struct.pack("<i", number)
    raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    assert len(raw) < 256, f"{number} is above 2**2000"
    return b"\x8a" + bytes([len(raw)]) + raw
