"""What generation gives: whole texts, and pieces of them as they come."""

from dataclasses import dataclass
from typing import Any, Self

from models.utf8 import to_text


@dataclass(frozen=True)
class Generation:
    """A prompt and what the model wrote after it.

    Attributes:
        prompt: the prompt's bytes.
        new: the bytes written, without EOS and without the stop string that ended them.
        boundaries: for each byte of prompt and new, whether a chunk ends on it.
        finish_reason: ``eos`` (the model ended the document), ``stop`` (a stop string) or ``length``.
        stop: the stop string, where one ended the text.
    """

    prompt: bytes
    new: bytes
    boundaries: tuple[bool, ...]
    finish_reason: str
    stop: bytes | None = None

    def to_json(self) -> dict[str, Any]:
        """As a dictionary of JSON's types, bytes in hexadecimal."""
        stop = None if self.stop is None else self.stop.hex()
        return {
            "prompt": self.prompt.hex(),
            "new": self.new.hex(),
            "boundaries": [int(bit) for bit in self.boundaries],
            "finish_reason": self.finish_reason,
            "stop": stop,
        }

    @classmethod
    def from_json(cls, about: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_json`."""
        prompt, new = bytes.fromhex(about["prompt"]), bytes.fromhex(about["new"])
        stop = None if about["stop"] is None else bytes.fromhex(about["stop"])
        return cls(prompt, new, tuple(bool(bit) for bit in about["boundaries"]), about["finish_reason"], stop)

    @property
    def finished(self) -> bool:
        """The model ended the document."""
        return self.finish_reason == "eos"

    @property
    def text(self) -> str:
        return to_text(self.prompt + self.new)

    @property
    def new_text(self) -> str:
        return to_text(self.new)

    def with_boundaries(self, mark: str = "|") -> str:
        """The text with a mark after each chunk (a chunk that ends inside a character shows as U+FFFD)."""
        chunks, start = [], 0
        content = self.prompt + self.new
        for end, boundary in enumerate(self.boundaries, 1):
            if boundary:
                chunks.append(content[start:end])
                start = end
        chunks.append(content[start:])
        return mark.join(to_text(chunk) for chunk in chunks)


@dataclass(frozen=True)
class Piece:
    """Some of what is being written after one of the prompts.

    Attributes:
        index: of the prompt.
        data: the next bytes; not the beginning of a stop string that may still come, unless all was asked for.
        boundaries: for each of them, whether a chunk ends on it.
        text: the characters that these bytes complete.
        finish_reason: of a call's last piece, as in :class:`Generation`; None before.
    """

    index: int
    data: bytes
    boundaries: tuple[bool, ...]
    text: str
    finish_reason: str | None
