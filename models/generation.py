"""Writing after prompts: whole texts, or pieces as they come."""

from collections.abc import Iterator, Sequence
from typing import overload

from models.byte_lm import ByteLM
from models.sampling import Sampling
from models.stops import Stops
from models.writer import Mode, Writer
from models.written import Generation, Piece


@overload
def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too
    model: ByteLM,
    prompts: str | bytes,
    *,
    max_new_bytes: int = ...,
    sampling: Sampling | Sequence[Sampling] | None = ...,
    stop: Stops = ...,
    mode: Mode = ...,
) -> Generation: ...


@overload
def generate(
    model: ByteLM,
    prompts: Sequence[str | bytes],
    *,
    max_new_bytes: int = ...,
    sampling: Sampling | Sequence[Sampling] | None = ...,
    stop: Stops = ...,
    mode: Mode = ...,
) -> list[Generation]: ...


def generate(
    model: ByteLM,
    prompts: str | bytes | Sequence[str | bytes],
    *,
    max_new_bytes: int = 200,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop: Stops = (),
    mode: Mode = "joint",
) -> Generation | list[Generation]:
    """Continue a prompt, or a batch of them.

    Args:
        model: a byte-level model after stage 2, in evaluation mode.
        prompts: text, or bytes without 0xFE and 0xFF, valid UTF-8 or not; may be empty. One, or a sequence of them.
        max_new_bytes: for each prompt, unless its text ends before.
        sampling: for all prompts (alike prompts then get alike texts), or one for each; greedy by default.
        stop: strings that end a text, for all prompts, or a sequence of them for each.
        mode: ``joint`` draws each byte together with whether a chunk ends on it; ``multibyte`` lets the router decide,
            on a draft of the byte after (:class:`models.Writer`).

    Returns:
        A text for one prompt, a list for a sequence of them.

    Raises:
        ValueError: as :class:`models.Writer` and :meth:`models.Writer.write`.
    """
    one = isinstance(prompts, str | bytes)
    writer = Writer(model, _as_list(prompts), sampling=sampling, stop=stop, mode=mode)
    written = writer.write(max_new_bytes)
    return written[0] if one else written


def stream(
    model: ByteLM,
    prompts: str | bytes | Sequence[str | bytes],
    *,
    max_new_bytes: int = 200,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop: Stops = (),
    mode: Mode = "joint",
) -> Iterator[Piece]:
    """As :func:`generate`, giving pieces as they are written; those of a prompt join to its text (``new_text``)."""
    return Writer(model, _as_list(prompts), sampling=sampling, stop=stop, mode=mode).stream(max_new_bytes, flush=True)


def _as_list(prompts: str | bytes | Sequence[str | bytes]) -> list[str | bytes]:
    if isinstance(prompts, bytearray):
        raise TypeError("prompts must be str, bytes or a sequence of them, got bytearray: use bytes(prompt)")
    return [prompts] if isinstance(prompts, str | bytes) else list(prompts)
