"""Writing bytes: joint boundary prediction, one sequence at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bytekernels import BOS, EOS
from models.byte_lm import ByteLM, DecodingState
from models.byte_tokenizer import ByteTokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next (byte, bit) is drawn.

    Attributes:
        temperature: 0 takes the likeliest pair.
        top_k: draw among this many pairs; None for all.
        top_p: draw among the likeliest pairs that together reach this probability.
        seed: of the draws.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be >= 1 or None, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


@dataclass(frozen=True)
class Generation:
    """A prompt and what the model wrote after it.

    Attributes:
        prompt: the prompt's bytes.
        new: the bytes written, without EOS.
        boundaries: for each byte of prompt and new, whether a chunk ends on it.
        finished: the model ended the document (EOS).
    """

    prompt: bytes
    new: bytes
    boundaries: tuple[bool, ...]
    finished: bool

    @property
    def text(self) -> str:
        return ByteTokenizer().decode(self.prompt + self.new)

    def with_boundaries(self, mark: str = "|") -> str:
        """The text with a mark after each chunk (a chunk that ends inside a character shows as U+FFFD)."""
        chunks, start = [], 0
        content = self.prompt + self.new
        for end, boundary in enumerate(self.boundaries, 1):
            if boundary:
                chunks.append(content[start:end])
                start = end
        chunks.append(content[start:])
        return mark.join(ByteTokenizer().decode(chunk) for chunk in chunks)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw an index from logits [V] (``-inf`` never drawn); on the CPU, where the generator is."""
    logits = logits.cpu()
    if sampling.temperature == 0:
        return int(logits.argmax())
    probs = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    ordered, order = probs.sort(descending=True, stable=True)
    keep = ordered.cumsum(0) - ordered < sampling.top_p
    if sampling.top_k is not None:
        keep[sampling.top_k :] = False
    return int(order[torch.multinomial(ordered * keep, 1, generator=generator)])


def generate_pairs(
    model: ByteLM, state: DecodingState, logits: Tensor, sampling: Sampling, generator: torch.Generator
) -> Iterator[tuple[int, bool]]:
    """Endless (byte, bit) pairs from the model; BOS is never drawn. The state is one sequence's, updated in place."""
    while True:
        row = logits[0].float().clone()
        row[[BOS, BOS + 256]] = -torch.inf
        byte, bit = draw_pair(row, sampling, generator)
        yield byte, bit
        logits = step_one(model, byte, bit, state)


def draw_pair(row: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[int, bool]:
    choice = draw(row, sampling, generator)
    return choice % 256, choice >= 256


def step_one(model: ByteLM, byte: int, bit: bool, state: DecodingState) -> Tensor:
    """Feed one (byte, bit) of one sequence: logits [1, 512]."""
    device = model.device
    return model.step(torch.tensor([byte], dtype=torch.uint8, device=device), torch.tensor([bit], device=device), state)


@torch.no_grad()
def prompt_boundaries(model: ByteLM, ids: bytes) -> list[bool]:
    """The router's boundary bits for a prompt (BOS first); a lookahead router can't know the last one: it is False."""
    flat = torch.tensor(list(ids), dtype=torch.uint8, device=model.device)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32, device=model.device)
    h = model.encoder(flat, cu_seqlens)
    bits = model.router(h, flat, cu_seqlens).boundary.tolist()
    if model.config.lookahead and len(ids) > 1:
        bits[-1] = False
    return bits


@torch.no_grad()
def generate(
    model: ByteLM, prompt: str | bytes, *, max_new_bytes: int = 200, sampling: Sampling | None = None
) -> Generation:
    """Continue a prompt by joint boundary prediction: each byte is drawn together with whether a chunk ends on it.

    The prompt's boundaries are the router's; the bit of its last byte, which a lookahead router can't know yet, comes
    from the two halves of the joint head for that byte.

    Args:
        model: a byte-level model after stage 2, in evaluation mode.
        prompt: text, or bytes without 0xFE and 0xFF; may be empty.
        max_new_bytes: stop after this many, if the model has not ended the document.
        sampling: greedy by default.

    Raises:
        ValueError: the prompt holds a reserved byte, or the model's dechunk weight sees the next byte.
    """
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(sampling.seed)
    content = ByteTokenizer().encode(prompt)
    ids = bytes([BOS]) + content
    bits = prompt_boundaries(model, ids)
    state = model.empty_state(1)
    logits = None
    for position, (byte, bit) in enumerate(zip(ids, bits, strict=True)):
        if logits is not None and position == len(ids) - 1 and model.config.lookahead:
            halves = logits[0, [byte, byte + 256]].float()
            bit = bits[-1] = bool(draw(halves, sampling, generator))
        logits = step_one(model, byte, bit, state)
    assert logits is not None  # BOS is always there
    new, boundaries, finished = bytearray(), bits[1:], False
    if max_new_bytes > 0:
        for byte, bit in generate_pairs(model, state, logits, sampling, generator):
            if byte == EOS:
                finished = True
                break
            new.append(byte)
            boundaries.append(bit)
            if len(new) == max_new_bytes:
                break
    return Generation(content, bytes(new), tuple(boundaries), finished)
