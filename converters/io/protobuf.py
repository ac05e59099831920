"""The parts of Protocol Buffers that TensorFlow's and ONNX's files use."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import FormatError, truncated
from ..values import is_list_of


def read_varint(data: bytes, position: int, where: str) -> tuple[int, int]:
    """An unsigned varint of at most 64 bits, and the position after it."""
    value = 0
    # Ten bytes of seven bits hold 64 bits.
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise truncated(where, "a number that is not complete")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, position
    raise FormatError(f"{where}: a number that does not fit into 64 bits")


class Fields:
    """The fields of one protobuf message."""

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        self.values: dict[int, list[int | bytes]] = {}
        position = 0
        while position < len(data):
            tag, position = read_varint(data, position, where)
            value: int | bytes
            if tag & 7 == 0:
                value, position = read_varint(data, position, where)
            elif tag & 7 in (1, 2, 5):
                n = 8 if tag & 7 == 1 else 4
                if tag & 7 == 2:
                    n, position = read_varint(data, position, where)
                if position + n > len(data):
                    raise truncated(where, "a field that is not complete")
                value, position = data[position : position + n], position + n
            else:
                raise FormatError(f"{where}: unknown wire type {tag & 7}")
            self.values.setdefault(tag >> 3, []).append(value)

    def has(self, field: int) -> bool:
        return field in self.values

    def numbers(self, field: int) -> list[int]:
        values = self.values.get(field, [])
        packed = [v for v in values if isinstance(v, bytes)]  # repeated numbers may be packed
        if packed:
            return [n for data in packed for n in _unpack(data, self.where)]
        return [v for v in values if isinstance(v, int)]

    def number(self, field: int) -> int:
        # Of a field that is there several times, protobuf takes the last. One that is not there is 0.
        value = self.values.get(field, [0])[-1]
        if not isinstance(value, int):
            raise FormatError(f"{self.where}: field {field} is not a number")
        return value

    def signed(self, field: int) -> int:
        value = self.number(field)
        return value - 2**64 if value >= 2**63 else value

    def all_bytes(self, field: int) -> list[bytes]:
        values = self.values.get(field, [])
        if not is_list_of(values, bytes):
            raise FormatError(f"{self.where}: field {field} is not a message")
        return values

    def bytes(self, field: int) -> bytes:
        return b"".join(self.all_bytes(field))  # parts of a message are merged by concatenation

    def fixed32(self, field: int) -> int:
        data = (self.all_bytes(field) or [bytes(4)])[-1]
        if len(data) != 4:
            raise FormatError(f"{self.where}: field {field} is not four bytes")
        return int.from_bytes(data, "little")


def _unpack(data: bytes, where: str) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = read_varint(data, position, where)
        yield value


def varint(value: int) -> bytes:
    """An unsigned varint."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field_number(field: int, value: int) -> bytes:
    # proto3 leaves out a field that is 0.
    return varint(field << 3) + varint(value) if value else b""


def field_bytes(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value
