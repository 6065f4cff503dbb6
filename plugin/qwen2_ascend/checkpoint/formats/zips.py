"""PyTorch's zip container, byte for byte: where each record lies, and a file's bytes around them.

Reading is strict: stored (never deflated) records that follow each other without a gap, under the
names their own headers repeat, each ended by the sizes that the directory says. So no two readers
can see two different files, and a flipped bit in any length shows: data that would begin elsewhere
would end elsewhere.
Writing gives the layout of torch 2.13's own writer: each record's data at a multiple of 64 bytes
behind a padding field "FB", a data descriptor after it, zip64 fields from 4 GiB on. Only the CRCs
differ: they are zero, as after `torch.serialization.set_crc32_options(False)`, since the records'
bytes are not known when the file is laid out. torch.load never looks at them; unzip would warn.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from qwen2_ascend.checkpoint.formats.stored import FileLayout

ALIGNMENT = 64
"""Bytes; what torch.save aligns the data of every record to."""
MAX_DIRECTORY_BYTES = 1 << 21
"""The largest central directory that is read; a record takes about 60 bytes there."""

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")
_DESCRIPTORS = struct.Struct("<4sIII"), struct.Struct("<4sIQQ")
_U32 = 0xFFFFFFFF
_U16 = 0xFFFF
_ZIP64_FIELD = 1
_UTF8 = 1 << 11
_DESCRIPTOR_FOLLOWS = 1 << 3
_ENCRYPTED = 1


class ZipFault(ValueError):
    """Why a byte range is not a zip of torch.save: a phrase that follows the file's name."""


class Record(NamedTuple):
    """The bytes of one record."""

    offset: int
    """Bytes from the start of the file (of all the file, where the zip is only a part of it)."""
    num_bytes: int
    crc: int = 0
    """CRC-32 of the bytes; 0 where it was not known when the record was written."""


@dataclass(frozen=True, kw_only=True)
class ZipLayout(FileLayout):
    """A zip to be; its segments hold the records that were given as bytes, too."""

    offsets: dict[str, int]
    """Where the data of each record begins."""


def read_zip(file: BinaryIO, start: int, num_bytes: int) -> dict[str, Record]:
    """The records of the zip that is `num_bytes` of `file` from `start`, in directory order.

    Raises:
        ZipFault: it is no zip, or not one that torch.save writes.
    """
    entries = _read_directory(file, start, num_bytes)
    records: dict[str, Record] = {}
    spans = []
    for entry in entries:
        if entry.name in records:
            raise ZipFault(f"holds the record {entry.name!r} twice")
        data = _data_offset(file, start, entry)
        records[entry.name] = Record(start + data, entry.num_bytes, entry.crc)
        spans.append((entry.header, data, entry))
    _check_gapless(file, start, sorted(spans, key=lambda span: span[0]))
    return records


def _check_gapless(file: BinaryIO, start: int, spans: list[tuple[int, int, _Entry]]) -> None:
    """Raises ZipFault unless each record begins where the one before it and its descriptor end."""
    end, previous = 0, ""
    for begin, data, entry in spans:
        if begin < end:
            raise ZipFault(f"has overlapping records {previous!r} and {entry.name!r}")
        if begin > end:
            raise ZipFault(f"is damaged: {begin - end} bytes before record {entry.name!r} are lost")
        stop = data + entry.num_bytes
        if stop > entry.directory:
            limit = entry.directory
            raise ZipFault(f"is damaged: record {entry.name!r} ends at byte {stop}, beyond {limit}")
        end, previous = stop + _descriptor_bytes(file, start + stop, entry), entry.name
    if spans and end != (limit := spans[0][2].directory):
        raise ZipFault(f"is damaged: record {previous!r} ends at byte {end}, not at {limit}")


def _descriptor_bytes(file: BinaryIO, at: int, entry: _Entry) -> int:
    """The length of what follows a record's data and repeats its sizes."""
    if not entry.flags & _DESCRIPTOR_FOLLOWS:
        return 0
    expected = (b"PK\7\x08", entry.crc, entry.num_bytes, entry.num_bytes)
    for form in _DESCRIPTORS[entry.num_bytes > _U32 :]:
        if form.unpack(_read(file, at, form.size)) == expected:
            return form.size
    raise ZipFault(f"is damaged: what follows record {entry.name!r} does not repeat its sizes")


def layout_zip(records: Mapping[str, bytes | int]) -> ZipLayout:
    """Lays out a zip of `records`: each its bytes, or the number of bytes to be filled in later."""
    segments: list[tuple[int, bytes]] = []
    offsets: dict[str, int] = {}
    directory, cursor, pending = [], 0, b""
    for name, content in records.items():
        size = content if isinstance(content, int) else len(content)
        header, entry, descriptor = _record_bytes(name, size, cursor)
        pending += header
        offsets[name] = cursor + len(header)
        if isinstance(content, int):
            segments.append((offsets[name] - len(pending), pending))
            pending = descriptor
        else:
            pending += content + descriptor
        cursor = offsets[name] + size + len(descriptor)
        directory.append(entry)
    tail = pending + _directory_bytes(directory, cursor)
    segments.append((cursor - len(pending), tail))
    total_bytes = cursor - len(pending) + len(tail)
    return ZipLayout(total_bytes=total_bytes, segments=tuple(segments), offsets=offsets)


class _Entry(NamedTuple):
    """One line of the central directory; offsets are from the zip's start."""

    name: str
    header: int
    num_bytes: int
    crc: int
    flags: int
    directory: int
    """Where the central directory starts."""


def _read(file: BinaryIO, offset: int, num_bytes: int) -> bytes:
    file.seek(offset)
    data = file.read(num_bytes)
    if len(data) < num_bytes:
        raise ZipFault("is truncated")
    return data


def _read_directory(file: BinaryIO, start: int, num_bytes: int) -> list[_Entry]:
    if num_bytes < _END.size:
        raise ZipFault(f"has {num_bytes} bytes, too few for a zip")
    end_at = num_bytes - _END.size
    end = _END.unpack(_read(file, start + end_at, _END.size))
    if end[0] != b"PK\5\6":
        raise ZipFault("does not end as a zip does: truncated, or no zip of torch.save")
    if end[1] or end[2] or end[3] != end[4] or end[7]:
        raise ZipFault("is a zip of several parts or with a comment, which torch.save never writes")
    count, size, offset = end[4], end[5], end[6]
    end_at, values = _read_end64(file, start, end_at)
    if values:
        count, size, offset = values
    if size > MAX_DIRECTORY_BYTES:
        raise ZipFault(f"has a directory of {size} bytes, above {MAX_DIRECTORY_BYTES}")
    if offset + size != end_at:
        raise ZipFault("is damaged: its directory is not where its end says")
    return list(_entries(_read(file, start + offset, size), count, offset))


def _read_end64(file: BinaryIO, start: int, end_at: int) -> tuple[int, tuple[int, int, int] | None]:
    """Where the zip64 end record starts (or `end_at`), and its (count, size, offset)."""
    locator_at = end_at - _LOCATOR64.size
    if locator_at < _END64.size:
        return end_at, None
    locator = _LOCATOR64.unpack(_read(file, start + locator_at, _LOCATOR64.size))
    if locator[0] != b"PK\6\7":
        return end_at, None
    end64_at = locator_at - _END64.size
    end64 = _END64.unpack(_read(file, start + end64_at, _END64.size))
    if locator[2] != end64_at or end64[0] != b"PK\6\6" or end64[1] != _END64.size - 12:
        raise ZipFault("is damaged: its zip64 end record is not where its end says")
    if end64[6] != end64[7]:
        raise ZipFault("is a zip of several parts, which torch.save never writes")
    return end64_at, (end64[7], end64[8], end64[9])


def _entries(directory: bytes, count: int, directory_at: int) -> Iterator[_Entry]:
    cursor = 0
    for _ in range(count):
        if cursor + _CENTRAL.size > len(directory):
            raise ZipFault("is damaged: its directory is cut off")
        fields = _CENTRAL.unpack_from(directory, cursor)
        cursor += _CENTRAL.size
        flags, method, stored, size = fields[3], fields[4], fields[8], fields[9]
        name_bytes, extra_bytes, comment_bytes, header = *fields[10:13], fields[16]
        raw_name = directory[cursor : cursor + name_bytes]
        extra = directory[cursor + name_bytes : cursor + name_bytes + extra_bytes]
        cursor += name_bytes + extra_bytes + comment_bytes
        if fields[0] != b"PK\1\2" or cursor > len(directory):
            raise ZipFault("is damaged: its directory cannot be read")
        name = _decode(raw_name)
        if method or flags & _ENCRYPTED:
            how = "encrypted" if flags & _ENCRYPTED else "compressed"
            raise ZipFault(f"has {how} records ({name!r}); write it again with torch.save")
        size, stored, header = _zip64_values(extra, [size, stored, header], name)
        if size != stored:
            raise ZipFault(f"is damaged: record {name!r} has two sizes, {size} and {stored}")
        yield _Entry(name, header, size, fields[7], flags, directory_at)
    if cursor != len(directory):
        raise ZipFault("is damaged: its directory holds more than its end says")


def _zip64_values(extra: bytes, values: list[int], name: str) -> list[int]:
    """`values` with those that are all ones replaced by the zip64 field's, in its order."""
    wanted = [i for i, value in enumerate(values) if value == _U32]
    cursor = 0
    while wanted and cursor + 4 <= len(extra):
        tag, size = struct.unpack_from("<HH", extra, cursor)
        field = extra[cursor + 4 : cursor + 4 + size]
        if tag == _ZIP64_FIELD:
            if len(field) < 8 * len(wanted):
                break
            numbers = struct.unpack_from(f"<{len(wanted)}Q", field)
            for i, number in zip(wanted, numbers, strict=True):
                values[i] = number
            return values
        cursor += 4 + size
    if wanted:
        raise ZipFault(f"is damaged: record {name!r} lacks its zip64 sizes")
    return values


def _data_offset(file: BinaryIO, start: int, entry: _Entry) -> int:
    """Where a record's data begins, from its own header, which must agree with the directory."""
    if entry.header + _LOCAL.size > entry.directory:
        raise ZipFault(f"is damaged: record {entry.name!r} starts beyond the last one")
    fields = _LOCAL.unpack(_read(file, start + entry.header, _LOCAL.size))
    name_bytes, extra_bytes = fields[9], fields[10]
    raw_name = entry.name.encode()
    sound = fields[0] == b"PK\3\4" and name_bytes == len(raw_name) and not fields[3]
    sound = sound and fields[2] == entry.flags
    # with a descriptor the header may leave them zero, or say that zip64's field has them
    sound = sound and fields[6] in (0, entry.crc)
    sound = sound and all(n in (0, _U32, entry.num_bytes) for n in fields[7:9])
    if not sound or _read(file, start + entry.header + _LOCAL.size, name_bytes) != raw_name:
        raise ZipFault(f"is damaged: the header of record {entry.name!r} contradicts the directory")
    return entry.header + _LOCAL.size + name_bytes + extra_bytes


def _decode(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise ZipFault(f"has a record name that is not UTF-8: {name!r}") from None


def _record_bytes(name: str, size: int, cursor: int) -> tuple[bytes, bytes, bytes]:
    """A record's local header with its padding, its directory entry and its data descriptor."""
    raw_name = name.encode()
    big, far = size >= _U32, cursor >= _U32
    flags = _UTF8 | (_DESCRIPTOR_FOLLOWS if size else 0)
    # torch's writer leaves the stored size zero in the local header
    local_extra = _zip64_field([size, 0] * big + [cursor] * far)
    padded = cursor + _LOCAL.size + len(raw_name) + len(local_extra) + 4
    padding = -padded % ALIGNMENT
    local_extra += b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    header = _LOCAL.pack(
        b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(raw_name), len(local_extra)
    )  # fmt: skip
    descriptor = struct.pack("<4sI2Q" if big or far else "<4sI2I", b"PK\7\x08", 0, size, size)
    extra = _zip64_field([size, size] * big + [cursor] * far)
    short_size, short_offset = min(size, _U32), min(cursor, _U32)
    entry = _CENTRAL.pack(
        b"PK\1\2", 0, 0, flags, 0, 0, 0, 0, short_size, short_size,
        len(raw_name), len(extra), 0, 0, 0, 0, short_offset,
    )  # fmt: skip
    return header + raw_name + local_extra, entry + raw_name + extra, descriptor if size else b""


def _zip64_field(values: list[int]) -> bytes:
    if not values:
        return b""
    return struct.pack(f"<HH{len(values)}Q", _ZIP64_FIELD, 8 * len(values), *values)


def _directory_bytes(entries: list[bytes], offset: int) -> bytes:
    directory = b"".join(entries)
    count, size = len(entries), len(directory)
    end64 = _END64.pack(b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, size, offset)
    locator = _LOCATOR64.pack(b"PK\6\7", 0, offset + size, 1)
    short_count = min(count, _U16)
    end = _END.pack(
        b"PK\5\6", 0, 0, short_count, short_count, min(size, _U32), min(offset, _U32), 0
    )
    return directory + end64 + locator + end
