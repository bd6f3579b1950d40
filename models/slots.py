"""A batch of texts in the making, as tensors: one slot each."""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from bytekernels import BOS

GOING, ENDED, STOPPED, WRITTEN, FULL = range(5)  # WRITTEN: all that was asked for; FULL: the core has no position left
REASONS = (None, "eos", "stop", "length", "length")


@dataclass
class Slots:
    """Where S slots stand, all on the model's device.

    A slot's ``byte`` has been through the encoder, which gave ``h``, and its ``bit`` is known; the core (where the bit
    is set) and the decoder have not seen it.
    """

    byte: Tensor  # uint8 [S]
    bit: Tensor  # bool [S]
    h: Tensor  # [S, d_core]
    active: Tensor  # bool [S], whose turn the next byte step is
    wrote: Tensor  # bool [S], who wrote a byte in the last one
    reason: Tensor  # uint8 [S], GOING, or why not
    count: Tensor  # int64 [S], bytes written
    limit: Tensor  # int64 [S], bytes to write
    stop: Tensor  # int64 [S], which stop string ended the text
    tail: Tensor  # uint8 [S, L], the newest bytes written
    new: Tensor  # uint8 [S, capacity + 1]; the last column takes what is not kept
    bits: Tensor  # bool [S, capacity + 1]

    @classmethod
    def before(cls, byte: Tensor, h: Tensor, used: Tensor, tail: int) -> Self:
        """Slots that have written nothing; unused ones never will."""
        no, zero = torch.zeros_like(used), torch.zeros(used.shape[0], dtype=torch.int64, device=used.device)
        reason = torch.where(used, WRITTEN, FULL).to(torch.uint8)
        tails = byte.new_full((used.shape[0], tail), BOS)
        return cls(
            byte=byte, bit=no, h=h, active=no.clone(), wrote=no.clone(), reason=reason, count=zero, limit=zero.clone(),
            stop=zero.clone(), tail=tails, new=byte[:, None], bits=no[:, None],
        )  # fmt: skip

    def select(self, slots: Tensor) -> Self:
        return type(self)(**{name: tensor[slots] for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def make_room(self, capacity: int) -> bool:
        """Room for this many bytes of each slot or more; whether ``new`` and ``bits`` are other tensors now."""
        room_now = self.new.shape[1] - 1
        if capacity <= room_now:
            return False
        capacity = max(capacity, 2 * room_now)
        for name in ("new", "bits"):
            old = getattr(self, name)[:, :-1]
            room = old.new_zeros(old.shape[0], capacity + 1)
            room[:, :room_now] = old
            setattr(self, name, room)
        return True
