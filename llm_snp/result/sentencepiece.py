"""A tokenizer's `.model` file of sentencepiece without the places that it was trained at.

Such a file is a protocol buffer, `ModelProto` of sentencepiece_model.proto: beside the pieces it has the settings of
the training, and among them paths. They are needed for nothing, and taken out field by field, so neither sentencepiece
nor protobuf need be installed; every other byte stays, but for those behind the end of a damaged file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

# Field of ModelProto -> fields of the message in it that are paths.
PLACES = {
    2: (1, 2, 54),  # trainer_spec: input, model_prefix, seed_sentencepieces_file
    3: (6,),  # normalizer_spec: normalization_rule_tsv
    5: (6,),  # denormalizer_spec
}
VARINT, FIXED64, LENGTH, BEGIN, END, FIXED32 = range(6)  # wire types; between two of them is a group


def without_places(content: bytes) -> bytes:
    """`content` without the paths of the training; as it is where it has none of them, or is no such file.

    Where one with paths is none from some field on, it ends there: nothing could read it as a whole, or what follows.
    """
    kept, found = [], False
    with suppress(IndexError, ValueError):
        for number, start, value, end in _fields(content):
            if number in PLACES and content[start] & 7 == LENGTH:
                inner = content[value:end]
                fields = [(one, inner[first:last]) for one, first, _, last in _fields(inner)]
                rest = b"".join(part for one, part in fields if one not in PLACES[number])
                found = found or len(rest) < len(inner)
                kept.append(_varint(number << 3 | LENGTH) + _varint(len(rest)) + rest)
            else:
                kept.append(content[start:end])
    return b"".join(kept) if found else content


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Each field's number, and where it, its value and what follows begin. Raises `ValueError`, `IndexError`."""
    position = 0
    while position < len(message):
        start = position
        key, position = _read_varint(message, position)
        number, kind = key >> 3, key & 7
        value, position = _value(message, position, kind)
        groups = [number] if kind == BEGIN else []
        while groups:  # one of unknown fields, which parsers pass over, with others in it
            inner, position = _read_varint(message, position)
            if inner & 7 == BEGIN:
                groups.append(inner >> 3)
            elif inner & 7 != END:
                _, position = _value(message, position, inner & 7)
            elif groups.pop() != inner >> 3:
                raise ValueError(f"group {inner >> 3} ends")
        if not number or position > len(message):
            raise ValueError(f"field {number} at {start}")
        yield number, start, value, position


def _value(message: bytes, position: int, kind: int) -> tuple[int, int]:
    """Where the value of a field and what follows begin. A group has neither."""
    if kind == VARINT:
        return position, _read_varint(message, position)[1]
    if kind == LENGTH:
        size, value = _read_varint(message, position)
        return value, value + size
    if kind not in (FIXED64, FIXED32, BEGIN):
        raise ValueError(f"wire type {kind}")
    return position, position + {FIXED64: 8, FIXED32: 4, BEGIN: 0}[kind]


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("varint")


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
