"""A tokenizer's `.model` file of sentencepiece without the places that it was trained at.

Such a file is a protocol buffer, `ModelProto` of sentencepiece_model.proto: beside the pieces it has the settings of
the training, and among them paths. They are needed for nothing, and taken out field by field, so neither sentencepiece
nor protobuf need be installed; every other byte stays.
"""

from __future__ import annotations

from collections.abc import Iterator

# Field of ModelProto -> fields of the message in it that are paths.
PLACES = {
    2: (1, 2, 54),  # trainer_spec: input, model_prefix, seed_sentencepieces_file
    3: (6,),  # normalizer_spec: normalization_rule_tsv
    5: (6,),  # denormalizer_spec
}
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types


def without_places(content: bytes) -> bytes:
    """`content` without the paths of the training; as it is where it is no protocol buffer or has none of them."""
    kept = []
    try:
        for number, start, value, end in _fields(content):
            if number in PLACES and content[start] & 7 == LENGTH:
                inner = content[value:end]
                fields = [(one, inner[first:last]) for one, first, _, last in _fields(inner)]
                rest = b"".join(part for one, part in fields if one not in PLACES[number])
                kept.append(_varint(number << 3 | LENGTH) + _varint(len(rest)) + rest)
            else:
                kept.append(content[start:end])
    except (IndexError, ValueError):
        return content
    return b"".join(kept)


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Each field's number, and where it, its value and what follows begin. Raises `ValueError`, `IndexError`."""
    position = 0
    while position < len(message):
        start = position
        key, position = _read_varint(message, position)
        number, kind = key >> 3, key & 7
        value = position
        if kind == VARINT:
            _, position = _read_varint(message, position)
        elif kind == LENGTH:
            size, value = _read_varint(message, position)
            position = value + size
        elif kind in (FIXED64, FIXED32):
            position += 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if not number or position > len(message):
            raise ValueError(f"field {number} at {start}")
        yield number, start, value, position


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
