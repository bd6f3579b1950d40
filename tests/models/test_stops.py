"""Stop strings and streams: what ends a text, what is held back, and that nothing is lost where writing goes on."""

import pytest

from models import Sampling, Writer, generate, stream
from tests.models.conftest import PROMPTS, small_model


def test_stop_strings_end_texts_across_chunk_borders():
    model = small_model()
    free = generate(model, "hello", max_new_bytes=60)
    new = free.new
    for size in (1, 2, 5):
        for start in range(0, 40, 7):
            stop = new[start : start + size]
            at = new.find(stop)
            found = generate(model, "hello", max_new_bytes=60, stop=stop)
            assert (found.new, found.finish_reason, found.stop) == (new[:at], "stop", stop)
            assert found.boundaries == free.boundaries[: 5 + at]
    assert any(free.boundaries[5:35])


def test_each_prompt_has_its_own_stops_and_the_longest_match_is_cut():
    model = small_model()
    new = generate(model, "hello", max_new_bytes=60).new
    stops = [[new[10:12], new[8:12]], [], [b"never in there"]]
    found = generate(model, ["hello"] * 3, max_new_bytes=60, stop=stops)
    assert (found[0].new, found[0].stop) == (new[:8], new[8:12]) or new.find(new[10:12]) < 10
    assert found[1].new == found[2].new == new and found[1].finish_reason == "length"


@pytest.mark.parametrize("size", [1, 2])
def test_stop_strings_are_found_after_texts_with_longer_ones_have_left(size):
    """Twelve of twenty texts end on six bytes, so that their slots are left out; the others look for fewer."""
    model, prompts = small_model(), [f"p{i}" for i in range(20)]
    settings = [Sampling(1.0, seed=i) for i in range(20)]
    free = generate(model, prompts, max_new_bytes=60, sampling=settings)
    stay = sorted(range(20), key=lambda i: -len(free[i].new))[:8]
    stops = [[text.new[40 : 40 + size] if i in stay else text.new[2:8]] for i, text in enumerate(free)]
    writer = Writer(model, prompts, sampling=settings, stop=stops)
    together = writer.write(60)
    assert len(writer._index) == 8
    for i in stay:
        assert together[i] == generate(model, prompts[i], max_new_bytes=60, sampling=settings[i], stop=stops[i])
        assert together[i].stop == stops[i][0]


def test_a_stop_string_in_the_prompt_stops_nothing():
    model = small_model()
    plain = generate(model, "hello", max_new_bytes=20)
    stop = b"lo" + plain.new[:1]
    assert generate(model, "hello", max_new_bytes=20, stop=stop) == plain


@pytest.mark.parametrize(
    ("stop", "message"),
    [("", "must not be empty"), (["a", ["b"]], "strings for all prompts"), ([["a"]], "for 2, got")],
)
def test_bad_stops_are_refused(stop, message):
    with pytest.raises(ValueError, match=message):
        generate(small_model(), ["a", "b"], stop=stop)


def test_streamed_text_is_the_unstreamed(model):
    settings = [Sampling(1.0, seed=i) for i in range(len(PROMPTS))]
    free = generate(model, PROMPTS, max_new_bytes=120, sampling=settings)
    third = [len(text.new) // 3 for text in free]
    stops = [[text.new[at : at + 3], text.new[at // 2 :][:2] + b"#"] for text, at in zip(free, third, strict=True)]
    whole_texts = generate(model, PROMPTS, max_new_bytes=120, sampling=settings, stop=stops)
    pieces = list(stream(model, PROMPTS, max_new_bytes=120, sampling=settings, stop=stops))
    for i, text in enumerate(whole_texts):
        mine = [piece for piece in pieces if piece.index == i]
        assert b"".join(piece.data for piece in mine) == text.new
        assert "".join(piece.text for piece in mine) == text.new_text
        assert sum((piece.boundaries for piece in mine), ()) == text.boundaries[len(text.prompt) :]
        assert [piece.finish_reason for piece in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == text.finish_reason
        assert len(mine) > 3
    assert {text.finish_reason for text in whole_texts} >= {"stop"}


def test_writing_goes_on_where_it_stopped(model, tmp_path):
    settings = [Sampling(1.0, seed=i, repetition_penalty=1.1) for i in range(len(PROMPTS))]
    once = Writer(model, PROMPTS, sampling=settings, stop="zq").write(130)
    writer = Writer(model, PROMPTS, sampling=settings, stop="zq")
    first = writer.write(30)
    writer.save(tmp_path / "writer.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["writer.safetensors"]
    loaded = Writer.load(model, tmp_path / "writer.safetensors")
    assert writer.write(100) == once != first
    pieces = list(loaded.stream(100, flush=True))
    rest = [b"".join(piece.data for piece in pieces if piece.index == i) for i in range(len(PROMPTS))]
    assert [a.new + b for a, b in zip(first, rest, strict=True)] == [text.new for text in once]
    assert loaded.write(0) == once


def joined(pieces, index: int = 0) -> tuple[bytes, tuple[bool, ...], str]:
    mine = [piece for piece in pieces if piece.index == index]
    bits = sum((piece.boundaries for piece in mine), ())
    return b"".join(piece.data for piece in mine), bits, "".join(piece.text for piece in mine)


@pytest.mark.parametrize("cut", [21, 23])
@pytest.mark.parametrize("between", ["nothing", "save", "abandon"])
def test_streams_that_are_continued_hold_back_what_may_be_a_stop_string(between, cut, tmp_path):
    model, prompts, sampling = small_model(), ["hello", "x"], Sampling(1.0, seed=5)
    free = generate(model, prompts, max_new_bytes=60, sampling=sampling)
    stops = [[free[0].new[20:24]], [free[1].new[21:23] + b"#"]]  # one is completed, the other broken off
    expected = generate(model, prompts, max_new_bytes=60, sampling=sampling, stop=stops)
    assert (expected[0].new, expected[1].new) == (free[0].new[:20], free[1].new)
    writer, pieces = Writer(model, prompts, sampling=sampling, stop=stops), []
    if between == "abandon":
        given = writer.stream(60)
        while len(pieces) < 2 * cut - 1:
            pieces.append(next(given))
        given.close()
    else:
        pieces += writer.stream(cut)
    assert len(joined(pieces)[0]) <= 20
    if between == "save":
        writer.save(tmp_path / "writer")
        writer = Writer.load(model, tmp_path / "writer")
    pieces += writer.stream(60 - len(writer.write(0)[1].new) if between == "abandon" else 60 - cut, flush=True)
    for i, text in enumerate(expected):
        assert joined(pieces, i) == (text.new, text.boundaries[len(text.prompt) :], text.new_text)


def test_a_stream_never_takes_back_what_was_returned_nor_gives_it_twice():
    model, sampling = small_model(), Sampling(1.0, seed=5)
    new = generate(model, "hello", max_new_bytes=60, sampling=sampling).new
    writer = Writer(model, ["hello"], sampling=sampling, stop=new[20:24])
    assert writer.write(22)[0].new == new[:22]  # the beginning of the stop string too: it may end here
    assert joined(writer.stream(38)) == (b"", (), "")
    assert writer.write(0)[0].new == new[:20]
    writer = Writer(model, ["hello"], sampling=sampling)
    writer.write(7)
    assert joined([*writer.stream(4), *writer.stream(5)])[0] == new[7:16]


def test_a_short_length_may_follow_an_abandoned_long_one():
    model = small_model()
    free = generate(model, "hello", max_new_bytes=60).new
    writer = Writer(model, ["hello"])
    pieces = writer.stream(100)
    for _ in range(5):
        next(pieces)
    pieces.close()
    assert writer.write(1)[0].new == free[:6]
    kept = writer._slots.new.data_ptr()
    assert writer.write(50)[0].new == free[:56]
    assert writer._slots.new.data_ptr() == kept  # so that a captured step goes on
