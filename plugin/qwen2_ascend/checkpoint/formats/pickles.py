"""Pickles read and written without executing anything: nothing here can import or call a name.

A pickle is a program for a small stack machine, and `pickle.Unpickler` runs it with real imports
and calls. The machine here has no such power: a global is a name that is looked up in a table of
our own makers of inert values, and a name that is not there is reported, never resolved. Every
protocol's container and scalar instructions are known (PyTorch writes protocol 2, MindSpeed-LLM 4,
torch.distributed.checkpoint Python's default), the text instructions of protocol 0 are not.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qwen2_ascend.errors import UserError

MAX_INSTRUCTIONS = 10_000_000
"""About 160,000 tensors; bounds what a hostile file can make us allocate."""
MAX_KEY_PARTS = 16
"""Of a tuple that is a dictionary's key."""

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
    """As Inert, for a class whose objects are dictionary keys; each equals itself alone."""

    type_name: str
    state: Any = None


class Maker(NamedTuple):
    """What the table gives for a class or function: how its calls become inert values."""

    type_name: str
    make: Callable[..., Any]


class PickleFault(ValueError):
    """Why a pickle cannot be read: a phrase."""


Known = Mapping[str, Any]
"""By module and name: a Maker, or the value that the name itself stands for."""


def known_records(*type_names: str) -> dict[str, Maker]:
    """A table that makes `Inert` records for all of `type_names`."""
    return {name: Maker(name, _record_maker(name)) for name in type_names}


def _record_maker(type_name: str) -> Callable[..., Inert]:
    return lambda *args: Inert(type_name, args)


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
    machine = _Machine(known, persistent)
    fault, result = None, None
    try:
        result = machine.run(data)
    except (ValueError, IndexError, TypeError, struct.error) as error:
        fault = f"{what}: not a pickle that torch.save writes, or a damaged one: {_short(error)}."
    if machine.refused:
        names = [_short(name) for name in sorted(machine.refused)]
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        raise UserError(
            f"{what}: the pickle asks for {', '.join(names[:20])}{more}; refused, not executed. "
            "Only tensors, plain containers and the records of Megatron's checkpoints are read. If "
            "you trust the file, load it where it was made and save it again with plain values."
        )
    if fault:
        raise UserError(fault)
    return result


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:197] + "..."


class _Mark:
    """Separates the items of a container on the stack."""


_MARK = _Mark()
_FIXED = {
    0x80: ("PROTO", "<B"),
    0x95: ("FRAME", "<Q"),
    ord("K"): ("BININT1", "<B"),
    ord("M"): ("BININT2", "<H"),
    ord("J"): ("BININT", "<i"),
    ord("G"): ("BINFLOAT", ">d"),
    ord("q"): ("BINPUT", "<B"),
    ord("r"): ("LONG_BINPUT", "<I"),
    ord("h"): ("BINGET", "<B"),
    ord("j"): ("LONG_BINGET", "<I"),
}
"""Instructions with a number of fixed size."""
_COUNTED = {
    ord("X"): ("BINUNICODE", "<I"),
    0x8C: ("SHORT_BINUNICODE", "<B"),
    0x8D: ("BINUNICODE8", "<Q"),
    ord("B"): ("BINBYTES", "<I"),
    ord("C"): ("SHORT_BINBYTES", "<B"),
    0x8E: ("BINBYTES8", "<Q"),
    0x96: ("BYTEARRAY8", "<Q"),
    0x8A: ("LONG1", "<B"),
}
"""Instructions with a length and as many bytes."""
_BARE = {
    ord(code): name
    for code, name in {
        "(": "MARK", ".": "STOP", "0": "POP", "1": "POP_MARK", "2": "DUP",
        "N": "NONE", "\x88": "NEWTRUE", "\x89": "NEWFALSE",
        "}": "EMPTY_DICT", "]": "EMPTY_LIST", ")": "EMPTY_TUPLE", "\x8f": "EMPTY_SET",
        "t": "TUPLE", "\x85": "TUPLE1", "\x86": "TUPLE2", "\x87": "TUPLE3",
        "a": "APPEND", "e": "APPENDS", "s": "SETITEM", "u": "SETITEMS",
        "\x90": "ADDITEMS", "\x91": "FROZENSET", "\x94": "MEMOIZE", "\x93": "STACK_GLOBAL",
        "R": "REDUCE", "\x81": "NEWOBJ", "\x92": "NEWOBJ_EX", "b": "BUILD", "Q": "BINPERSID",
    }.items()
}  # fmt: skip
_LINES = {ord("c"): "GLOBAL", ord("i"): "INST"}
"""Instructions with two lines of text."""
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {"BININT", "BININT1", "BININT2", "BINFLOAT", *(name for name, _ in _COUNTED.values())}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
_MEMO_PUTS = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
_MEMO_GETS = {"BINGET", "LONG_BINGET"}


def _instructions(data: bytes) -> Iterator[tuple[str, Any]]:
    """(name, argument) of each instruction up to STOP."""
    at, name = 0, ""
    while name != "STOP":
        if at >= len(data):
            raise PickleFault("it ends in the middle")
        code, argument = data[at], None
        at += 1
        if code in _BARE:
            name = _BARE[code]
        elif code in _FIXED:
            name, form = _FIXED[code]
            (argument,) = struct.unpack_from(form, data, at)
            at += struct.calcsize(form)
        elif code in _COUNTED:
            name, form = _COUNTED[code]
            (count,) = struct.unpack_from(form, data, at)
            at += struct.calcsize(form)
            if at + count > len(data):
                raise PickleFault("it ends in the middle")
            argument = _literal(name, data[at : at + count])
            at += count
        elif code in _LINES:
            name = _LINES[code]
            first = data.index(b"\n", at)
            second = data.index(b"\n", first + 1)
            argument = (data[at:first].decode(), data[first + 1 : second].decode())
            at = second + 1
        else:
            raise PickleFault(f"it uses the instruction {bytes([code])!r}")
        yield name, argument


def _literal(name: str, raw: bytes) -> Any:
    if "UNICODE" in name:
        return raw.decode("utf-8", "surrogatepass")
    if name == "LONG1":
        return int.from_bytes(raw, "little", signed=True)
    return bytearray(raw) if name == "BYTEARRAY8" else raw


class _Machine:
    """The stack machine. Each instruction with an effect of its own is a method `_NAME`."""

    def __init__(self, known: Known, persistent: Callable[[Any], Any] | None) -> None:
        self.known = known
        self.persistent = persistent
        self.refused: set[str] = set()
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copies_left = 0

    def run(self, data: bytes) -> Any:
        self.copies_left = 4 * len(data)
        for count, (name, arg) in enumerate(_instructions(data)):
            if count >= MAX_INSTRUCTIONS:
                raise PickleFault(f"it has more than {MAX_INSTRUCTIONS} instructions")
            self._step(name, arg)
        if len(self.stack) != 1 or self.stack[0] is _MARK:
            raise PickleFault("it does not end with one object")
        return self.stack[0]

    def _step(self, name: str, arg: Any) -> None:
        if name in _MEMO_PUTS:
            self.memo[len(self.memo) if arg is None else arg] = self._top()
        elif name in _LITERALS:
            self.stack.append(arg)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _MEMO_GETS:
            if arg not in self.memo:
                raise PickleFault(f"it recalls an object {arg} that it never stored")
            self.stack.append(self.memo[arg])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        else:
            getattr(self, f"_{name}")(arg)

    # -- the stack

    def _top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleFault("it takes from an empty stack")
        return self.stack[-1]

    def _pop(self) -> Any:
        value = self._top()
        self.stack.pop()
        return value

    def _items(self) -> list[Any]:
        """Everything above the topmost mark, which goes too."""
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                items = self.stack[at + 1 :]
                del self.stack[at:]
                return items
        raise PickleFault("it closes a container that it never opened")

    def _PROTO(self, version: int) -> None:
        if not 2 <= version <= 5:
            raise PickleFault(f"it has protocol {version}; 2 to 5 are read")

    def _FRAME(self, num_bytes: int) -> None:
        pass

    def _STOP(self, _: None) -> None:
        pass

    def _MARK(self, _: None) -> None:
        self.stack.append(_MARK)

    def _POP(self, _: None) -> None:
        self._pop()

    def _POP_MARK(self, _: None) -> None:
        self._items()

    def _DUP(self, _: None) -> None:
        self.stack.append(self._top())

    # -- containers

    def _TUPLE(self, _: None) -> None:
        self.stack.append(tuple(self._items()))

    def _TUPLE1(self, _: None) -> None:
        self.stack.append((self._pop(),))

    def _TUPLE2(self, _: None) -> None:
        second, first = self._pop(), self._pop()
        self.stack.append((first, second))

    def _TUPLE3(self, _: None) -> None:
        third, second, first = self._pop(), self._pop(), self._pop()
        self.stack.append((first, second, third))

    def _APPEND(self, _: None) -> None:
        value = self._pop()
        self._container(list).append(value)

    def _APPENDS(self, _: None) -> None:
        items = self._items()
        self._container(list).extend(items)

    def _SETITEM(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _SETITEMS(self, _: None) -> None:
        self._set_items(self._items())

    def _set_items(self, items: list[Any]) -> None:
        target = self._container(dict)
        if len(items) % 2:
            raise PickleFault("it gives a dictionary a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if _key(key) in target:
                raise PickleFault(f"it gives a dictionary the key {_short(key)!r} twice")
            target[key] = value

    def _ADDITEMS(self, _: None) -> None:
        items = self._items()
        self._container(set).update(map(_key, items))

    def _FROZENSET(self, _: None) -> None:
        self.stack.append(frozenset(map(_key, self._items())))

    def _container(self, kind: type) -> Any:
        value = self._top()
        if type(value) is not kind:
            raise PickleFault(f"it fills a {type(value).__name__} as a {kind.__name__}")
        return value

    # -- names, and what a real unpickler would call

    def _GLOBAL(self, arg: tuple[str, str]) -> None:
        self.stack.append(self._resolve(*arg))

    def _STACK_GLOBAL(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleFault("it asks for a global whose name is not a string")
        self.stack.append(self._resolve(module, name))

    def _INST(self, arg: tuple[str, str]) -> None:
        self._resolve(*arg)
        raise PickleFault("it uses the instruction INST of protocol 0")

    def _resolve(self, module: str, name: str) -> Any:
        # Python 2's names, which protocol 2 keeps writing
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        type_name = f"{module}.{name}"
        if type_name in self.known:
            return self.known[type_name]
        self.refused.add(type_name)
        return Maker(type_name, _record_maker(type_name))

    def _REDUCE(self, _: None) -> None:
        args, maker = self._pop(), self._pop()
        self._make(maker, args)

    _NEWOBJ = _REDUCE

    def _NEWOBJ_EX(self, _: None) -> None:
        keywords, args, maker = self._pop(), self._pop(), self._pop()
        if keywords != {}:
            raise PickleFault("it makes an object with keyword arguments")
        self._make(maker, args)

    def _make(self, maker: Any, args: Any) -> None:
        if not isinstance(maker, Maker) or type(args) is not tuple:
            raise PickleFault(f"it calls a {type(maker).__name__}")
        for arg in args:
            self._charge(arg)
        self.stack.append(maker.make(*args))

    def _charge(self, value: Any) -> None:
        """Bounds copying: a small file can ask to copy one large object a million times."""
        self.copies_left -= len(value) if hasattr(value, "__len__") else 0
        if self.copies_left < 0:
            raise PickleFault("it makes many copies of large objects")

    def _BUILD(self, _: None) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, (Inert, InertKey)):
            target.state = state
        elif isinstance(target, argparse.Namespace):
            self._charge(state)
            if type(state) is not dict or not all(type(key) is str for key in state):
                raise PickleFault("it gives a Namespace attributes without names")
            vars(target).update(state)
        elif type(target) is not dict:  # an OrderedDict's own attributes (`_metadata`) are dropped
            raise PickleFault(f"it gives a {type(target).__name__} attributes")

    def _BINPERSID(self, _: None) -> None:
        if self.persistent is None:
            raise PickleFault("it refers to objects outside of itself")
        self.stack.append(self.persistent(self._pop()))


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
        raise PickleFault("it makes an OrderedDict of something")
    return {}


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
        Maker("_codecs.encode", _encode),
        Maker("builtins.bytearray", _bytearray),
        Maker("builtins.set", lambda items=(): set(_keys(items))),
        Maker("builtins.frozenset", lambda items=(): frozenset(_keys(items))),
    )
}
"""Python's own containers, where a protocol makes them by name."""


# -- writing


class Call(NamedTuple):
    """To be pickled as a call: the reader gets `function(*args)`."""

    function: Name
    args: tuple[Any, ...]


class Record(NamedTuple):
    """To be pickled as an object of a class, made without a call and given `state`."""

    type_name: Name
    state: Any


class Name(NamedTuple):
    """To be pickled as a global."""

    module: str
    name: str


class DictItems(NamedTuple):
    """To be pickled as a dictionary; its keys need not be hashable here."""

    items: Sequence[tuple[Any, Any]]


class PersistentId(NamedTuple):
    """To be pickled as a persistent id."""

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
