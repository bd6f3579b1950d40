"""Text to bytes and back.

A prompt may be any bytes without 0xFE and 0xFF, whether they are UTF-8 or not. These two occur in no UTF-8 text and are
the model's own marks (0xFE begins a sequence, 0xFF ends a document): input that holds one is refused, with its offset,
unless replacement is asked for. Bytes that a model writes are kept as they are; what is not UTF-8 among them shows as
U+FFFD in text only.
"""

import codecs

from bytekernels import BOS, EOS

MARKS = bytes([BOS, EOS])


def to_bytes(text: str | bytes, *, replace: bool = False) -> bytes:
    """The bytes of ``text``, without BOS.

    Args:
        text: a string, or bytes that need not be UTF-8.
        replace: byte 0xFE or 0xFF becomes ``?`` instead of an error.

    Raises:
        ValueError: a byte string holds 0xFE or 0xFF, or a string a lone surrogate.
    """
    if isinstance(text, str):
        try:
            text = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text is not valid Unicode at character {error.start} ({text[error.start]!r}): "
                "lone surrogates have no UTF-8 form; remove them"
            ) from None
    if replace:
        return text.translate(bytes(ord("?") if byte in MARKS else byte for byte in range(256)))
    found = [at for at in map(text.find, MARKS) if at >= 0]
    if found:
        raise ValueError(
            f"byte 0x{text[min(found)]:02X} at offset {min(found)} is reserved for the model's own marks; "
            "remove it or replace it"
        )
    return text


def to_text(data: bytes) -> str:
    """The text of ``data``: the marks 0xFE and 0xFF are dropped and what is not UTF-8 becomes U+FFFD."""
    return data.translate(None, MARKS).decode("utf-8", errors="replace")


class Utf8Stream:
    """Bytes that come in pieces, as text in pieces: joined they equal :func:`to_text` of all the bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes) -> str:
        """The text that ``data`` completes; the bytes of a character that has only begun are held back."""
        return self._decoder.decode(data.translate(None, MARKS))

    def flush(self) -> str:
        """What is held back, as U+FFFD where it will never be a character; the stream is then as new."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
