"""What a tokenizer's `.model` file says of where it was trained does not travel, and nothing else in it changes."""

from __future__ import annotations

import random

import pytest

from llm_snp.result.sentencepiece import without_places

pytestmark = [pytest.mark.cpu]


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def text(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def whole(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


PIECE = text(1, text(1, b"<unk>") + b"\x15\x00\x00\x80\x3f" + whole(3, 2))
# What is not a place: type and size of the vocabulary, a piece that is like a path, special pieces.
KEPT = whole(3, 2) + whole(4, 500) + text(31, b"/home/x/y") + text(45, b"<unk>")


def model(trainer: bytes, normalizer: bytes) -> bytes:
    return 200 * PIECE + text(2, trainer) + text(3, text(1, b"nmt_nfkc") + normalizer) + text(5, normalizer)


def test_paths_of_the_training_are_taken_out_and_nothing_else() -> None:
    paths = text(1, b"/home/ann/corpus/a.txt") + text(1, b"/home/ann/b.txt") + text(2, b"/home/ann/tokenizer")
    seeds = text(54, b"/home/ann/seeds.tsv")
    found = without_places(model(paths + KEPT + seeds, text(6, b"/home/ann/rules.tsv")))
    assert found == model(KEPT, b"")
    assert without_places(found) == found


@pytest.mark.parametrize(
    "content", [b"", b"IQ== 0\nIg== 1\n", b"\xff" * 40, b"\x12\x80", b"\n\nIQ== 0\n", b"*IQ== 0\n"]
)
def test_what_is_no_such_file_stays(content: bytes) -> None:
    assert without_places(content) == content


# Of wire types that nobody uses any more: with a field of each kind in it, and one in one.
GROUP = b"\xa3\x06" + whole(1, 300) + text(2, b"/x") + b"\x1d1234" + b"\x2b" + whole(1, 1) + b"\x2c" + b"\xa4\x06"


def test_a_file_may_begin_with_any_field() -> None:
    assert without_places(text(4, b"x") + text(2, text(1, b"/home/ann/c.txt") + KEPT)) == text(4, b"x") + text(2, KEPT)


def test_what_follows_a_group_is_read() -> None:
    trainer = text(1, b"/home/ann/corpus.txt")
    assert without_places(PIECE + GROUP + text(2, trainer + KEPT)) == PIECE + GROUP + text(2, KEPT)


@pytest.mark.parametrize("broken", [b"\x00", b"\xa3\x06", b"\xa3\x06\xac\x06", b"\x12\x80", text(2, b"\x0a\x7f/home")])
def test_a_file_ends_where_it_is_none_any_more(broken: bytes) -> None:
    """No parser takes it, and what follows may have any place in it."""
    places = text(2, text(1, b"/home/ann/corpus.txt"))
    assert without_places(PIECE + places + broken + places) == PIECE + text(2, b"")


def test_any_bytes_are_read() -> None:
    generator = random.Random(0)
    whole_file = model(text(1, b"/home/ann/corpus/a.txt") + KEPT, b"")
    for _ in range(300):
        content = bytearray(whole_file)
        for _ in range(generator.randrange(1, 6)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        assert len(without_places(bytes(content[: generator.randrange(len(content))]))) <= len(content)
