"""Bytes and text: the marks, what is not UTF-8, text in pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.utf8 import Utf8Stream, to_bytes, to_text


@given(st.text())
def test_text_goes_to_bytes_and_back(text):
    assert to_bytes(text) == text.encode()
    assert to_text(to_bytes(text)) == text


@given(st.binary())
def test_any_bytes_without_marks_are_legal(data):
    data = data.translate(None, b"\xfe\xff")
    assert to_bytes(data) == data
    assert to_text(data) == data.decode(errors="replace")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ab\xfe", "byte 0xFE at offset 2 is reserved"),
        (b"\xff\xfe", "byte 0xFF at offset 0 is reserved"),
        (b"abc\xff", "offset 3 .* remove it or replace it"),
    ],
)
def test_marks_are_refused_with_the_first_offset(data, message):
    with pytest.raises(ValueError, match=message):
        to_bytes(data)


def test_marks_are_replaced_on_request():
    assert to_bytes(b"a\xfeb\xff\x80", replace=True) == b"a?b?\x80"


@pytest.mark.parametrize("replace", [False, True])
def test_a_lone_surrogate_is_refused_with_its_place(replace):
    with pytest.raises(ValueError, match=r"at character 1 \('\\ud800'\)"):
        to_bytes("a\ud800", replace=replace)


def test_text_drops_marks_and_shows_what_is_not_utf8():
    assert to_text(b"\xfena\xc3\xafve\xff") == "naïve"
    assert to_text(b"a\x80b\xe6\xbc") == "a\ufffdb\ufffd"


NEARLY_UTF8 = st.lists(
    st.one_of(st.binary(max_size=3), st.text(max_size=3).map(str.encode), st.sampled_from([b"\xf0\x9f", b"\xfe"]))
).map(b"".join)


@given(NEARLY_UTF8, st.lists(st.integers(0, 5)))
def test_pieces_join_to_the_text(data, sizes):
    stream, parts, start = Utf8Stream(), [], 0
    for size in sizes:
        parts.append(stream.feed(data[start : start + size]))
        start += size
    parts.append(stream.feed(data[start:]))
    parts.append(stream.flush())
    assert "".join(parts) == to_text(data)


def test_half_a_character_is_held_back():
    stream = Utf8Stream()
    assert [stream.feed(bytes([byte])) for byte in "a漢".encode()] == ["a", "", "", "漢"]
    assert stream.feed(b"\xe6\xbc") == ""
    assert stream.flush() == "\ufffd"
    assert stream.feed(b"b") == "b" and stream.flush() == ""
