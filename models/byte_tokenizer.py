"""Text to bytes and back: the only tokenizer a byte-level model needs."""

from bytekernels import BOS, EOS


class ByteTokenizer:
    """UTF-8 bytes are the ids. 0xFE begins a sequence and 0xFF ends a document; neither occurs in UTF-8.

    Args:
        replace: byte 0xFE or 0xFF in the input becomes ``?`` instead of an error.
    """

    bos_token_id = BOS
    eos_token_id = EOS
    vocab_size = 256

    def __init__(self, *, replace: bool = False) -> None:
        self.replace = replace

    def encode(self, text: str | bytes) -> bytes:
        """The bytes of ``text``, without BOS.

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
        if self.replace:
            return text.replace(bytes([BOS]), b"?").replace(bytes([EOS]), b"?")
        for reserved in (BOS, EOS):
            at = text.find(reserved)
            if at >= 0:
                raise ValueError(
                    f"byte 0x{reserved:02X} at offset {at} is reserved for the model's own marks; "
                    "remove it or use ByteTokenizer(replace=True)"
                )
        return text

    def decode(self, ids: bytes) -> str:
        """The text of ``ids``; marks are dropped and what is not UTF-8 becomes U+FFFD."""
        return bytes(b for b in ids if b not in (BOS, EOS)).decode("utf-8", errors="replace")
