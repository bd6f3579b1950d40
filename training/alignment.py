"""Token ends, exactly: which bytes of a text each token of the teacher's tokenizer stands for.

Alignment is in bytes, because tokens may split a character. The bytes of a token are known from the tokenizer
itself; a text is aligned when the bytes of its tokens, one after another, are the bytes of the text.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from training.errors import UserError

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE_MARK = "▁"


@dataclass(frozen=True)
class Aligned:
    """A text as tokens: `ids` int32 [n] and `lengths` int32 [n] in bytes, each ≥ 1, whose sum is the text's length."""

    ids: np.ndarray
    lengths: np.ndarray


def byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: printable Latin-1 for itself, the rest from U+0100 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


class TokenBytes:
    """The bytes of every token of a fast tokenizer, and the exact alignment of texts.

    Byte-level BPE tokens are read through the byte alphabet, SentencePiece tokens through ▁ (a space) and <0xNN>
    (a byte); added tokens stand for their literal content.

    Attributes:
        flat: uint8, the bytes of all tokens one after another.
        starts: int64 [V], where each token begins in `flat`.
        sizes: int32 [V], bytes of each token; 0 for ids that the tokenizer does not have.
        special: bool [V], tokens that no text is cut into.
        bos_id, eos_id: the tokenizer's, each standing in for the other where only one is there.
        fingerprint: a hash of the whole tokenizer.

    Raises:
        UserError: for a slow tokenizer, or one with neither a BOS nor an EOS token.
    """

    def __init__(self, tokenizer: Any) -> None:
        # A copy, so that the caller's tokenizer keeps its settings.
        self._tokenizer = Tokenizer.from_str(_backend(tokenizer).to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        serialized = self._tokenizer.to_str()
        self.fingerprint = hashlib.blake2b(serialized.encode(), digest_size=16).hexdigest()
        # "<|endoftext|>" written in a document is thirteen characters of text, not the end of a text.
        self._tokenizer.encode_special_tokens = True

        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        if eos is None and bos is None:
            raise UserError("the tokenizer has neither an EOS nor a BOS token: set eos_token in tokenizer_config.json")
        self.eos_id: int = bos if eos is None else eos
        self.bos_id: int = eos if bos is None else bos

        pieces = self._pieces(json.loads(serialized))
        # Unigram models match a special token's text even so: such a text is refused.
        self.special = np.zeros(len(pieces), dtype=bool)
        for i, token in self._tokenizer.get_added_tokens_decoder().items():
            self.special[i] = token.special and i != tokenizer.unk_token_id

        self.sizes = np.array([len(piece) for piece in pieces], dtype=np.int32)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])[:-1]
        self.flat = np.frombuffer(b"".join(pieces), dtype=np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": self._tokenizer.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer = Tokenizer.from_str(state["_tokenizer"])
        self._tokenizer.encode_special_tokens = True  # which its JSON does not hold

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, token_id: int) -> bytes:
        start = int(self.starts[token_id])
        return self.flat[start : start + int(self.sizes[token_id])].tobytes()

    def join(self, ids: np.ndarray) -> np.ndarray:
        """The bytes of the tokens `ids` [n], one after another: uint8."""
        sizes = self.sizes[ids]
        ends = np.cumsum(sizes, dtype=np.int64)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)
        return self.flat[np.repeat(self.starts[ids], sizes) + within]

    def encode(self, texts: Sequence[str]) -> list[Aligned | None]:
        """Tokenizes texts, without special tokens, and finds the bytes of each token; None where that is not exact.

        The space that some tokenizers put before a text is taken off its first token; a token that stands for
        nothing else is dropped, so that every token that is left ends on a byte of its own.

        Where the tokens' bytes are not the text's (a tokenizer that normalises), lengths come from the tokenizer's
        character offsets, if these cover the text without a gap and the bytes of tokens that share a character are
        the character's. A text in which the tokenizer sees a special token is not aligned either.
        """
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        aligned = [self._by_bytes(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]
        failed = [i for i, found in enumerate(aligned) if found is None]
        # encode_batch_fast keeps no offsets.
        retried = self._tokenizer.encode_batch([texts[i] for i in failed], add_special_tokens=False)
        for i, encoding in zip(failed, retried, strict=True):
            aligned[i] = self._by_offsets(texts[i], encoding)
        return [None if found is None or self.special[found.ids].any() else found for found in aligned]

    def _by_bytes(self, text: str, encoding: Encoding) -> Aligned | None:
        ids = np.array(encoding.ids, dtype=np.int32)
        lengths = self._fit(ids, np.frombuffer(text.encode(), dtype=np.uint8), begins_text=True)
        return None if lengths is None else Aligned(ids[lengths > 0], lengths[lengths > 0])

    def _by_offsets(self, text: str, encoding: Encoding) -> Aligned | None:
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        ids = np.array(encoding.ids, dtype=np.int32)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        # Byte position of each character, and of the end: a byte that is no continuation begins a character.
        position = np.append(np.flatnonzero((data & 0xC0) != 0x80), len(data))
        begin, end = position[offsets[:, 0]], position[offsets[:, 1]]
        lengths = (end - begin).astype(np.int32)

        # Tokens that share a character form a group, and their own bytes must be the group's.
        reached = np.concatenate([[0], np.maximum.accumulate(end)])  # [n + 1], the end of what precedes each token
        first = begin >= reached[:-1]
        if not np.array_equal(begin[first], reached[:-1][first]) or reached[-1] != len(data):
            return None
        bounds = np.append(np.flatnonzero(first), len(ids))
        for group in np.flatnonzero(np.diff(bounds) > 1):
            start, stop = bounds[group], bounds[group + 1]
            fitted = self._fit(ids[start:stop], data[begin[start] : reached[stop]], begins_text=start == 0)
            if fitted is None:
                return None
            lengths[start:stop] = fitted
        return Aligned(ids[lengths > 0], lengths[lengths > 0])

    def _fit(self, ids: np.ndarray, data: np.ndarray, begins_text: bool) -> np.ndarray | None:
        """Lengths [n] of tokens whose bytes are `data`, with the space put before a text taken off; else None."""
        lengths = self.sizes[ids]
        extra = int(lengths.sum()) - len(data)
        if extra not in ((0, 1) if begins_text else (0,)):
            return None
        joined = self.join(ids)
        if not np.array_equal(joined[extra:], data) or (extra and joined[0] != ord(" ")):
            return None
        lengths[np.flatnonzero(lengths)[:extra]] -= 1
        return lengths

    def _pieces(self, config: dict[str, Any]) -> list[bytes]:
        kinds = set(_component_types(config["pre_tokenizer"])) | set(_component_types(config["decoder"]))
        if "ByteLevel" in kinds:
            alphabet = byte_alphabet()

            def piece_bytes(piece: str) -> bytes:
                if all(c in alphabet for c in piece):
                    return bytes(alphabet[c] for c in piece)
                return piece.encode()
        else:

            def piece_bytes(piece: str) -> bytes:
                if byte := BYTE_PIECE.fullmatch(piece):
                    return bytes([int(byte[1], 16)])
                return piece.replace(SPACE_MARK, " ").encode()

        added = {i: token.content for i, token in self._tokenizer.get_added_tokens_decoder().items()}
        vocabulary = {i: piece for piece, i in self._tokenizer.get_vocab(with_added_tokens=False).items()}
        pieces = [b""] * (max(vocabulary.keys() | added.keys()) + 1)
        for i, piece in vocabulary.items():
            pieces[i] = piece_bytes(piece)
        for i, content in added.items():
            pieces[i] = content.encode()
        return pieces


def _backend(tokenizer: Any) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(
            f"{type(tokenizer).__name__} is a slow tokenizer, whose token ends cannot be had exactly: "
            "give the teacher a tokenizer.json"
        )
    return backend


def _component_types(component: Any) -> Iterator[str]:
    """The types of a tokenizer's component and of all inside it."""
    if isinstance(component, dict):
        if isinstance(component.get("type"), str):
            yield component["type"]
        for value in component.values():
            yield from _component_types(value)
    elif isinstance(component, list):
        for value in component:
            yield from _component_types(value)
