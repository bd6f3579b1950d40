"""A streamed text is the unstreamed one, and never shows half a character."""

import torch

from models import Sampling, Writer, generate, stream
from tests.models.conftest import small_model


def writes_characters():
    """A model that writes a and the two bytes of é, in any order."""
    model = small_model()
    model.decoder.head = torch.nn.Linear(24, 512)
    with torch.no_grad():
        model.decoder.head.weight.zero_()
        model.decoder.head.bias.fill_(-20)
        for byte in b"a\xc3\xa9":
            model.decoder.head.bias[[byte, byte + 256]] = 0
    return model


def test_pieces_join_to_the_text(model):
    for written_by in (model, writes_characters()):
        sampling = Sampling(temperature=1.0, seed=3)
        text = generate(written_by, "naïve ", max_new_bytes=100, sampling=sampling, stop="é!")
        pieces = list(stream(written_by, "naïve ", max_new_bytes=100, sampling=sampling, stop="é!"))
        assert "".join(piece.text for piece in pieces) == text.new_text
        assert b"".join(piece.data for piece in pieces) == text.new
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [text.finish_reason]


def test_a_character_comes_whole():
    pieces = list(stream(writes_characters(), "", max_new_bytes=200, sampling=Sampling(temperature=1.0, seed=1)))
    written = b"".join(piece.data for piece in pieces)
    assert written.count("é".encode()) == sum(piece.text.count("é") for piece in pieces) > 0
    assert any(piece.data == b"\xc3" and piece.text == "" for piece in pieces)


def test_a_stream_that_is_continued_shows_no_half_characters_either():
    model, sampling = writes_characters(), Sampling(temperature=1.0, seed=1)
    text = generate(model, "", max_new_bytes=100, sampling=sampling)
    writer = Writer(model, [""], sampling=sampling)
    pieces = [piece for n in (1, 2, 3, 1, 0, 5) * 8 for piece in writer.stream(n)]
    pieces += writer.stream(4, flush=True)
    assert "".join(piece.text for piece in pieces) == text.new_text
    assert b"".join(piece.data for piece in pieces) == text.new
    assert text.new_text.count("é") > 5
