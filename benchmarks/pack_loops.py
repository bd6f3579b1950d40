"""Packing as one writes it first: a Python loop over bytes, on what Python is fast with, bytes and lists.

Every function takes its op's arguments by name and returns its outputs by name.
"""

from array import array
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from bytekernels import BOS, EOS, IGNORE


def pack(documents: Sequence[bytes], device: torch.device) -> dict[str, Tensor]:
    ids, cu_seqlens = bytearray(), array("i", [0])
    for document in documents:
        ids.append(BOS)
        for byte in document:
            ids.append(byte)
        cu_seqlens.append(len(ids))
    return dict(ids=_tensor(ids, torch.uint8), cu_seqlens=_tensor(cu_seqlens, torch.int32))


def unpack(values: bytes, cu_seqlens: list[int], length: int, row: torch.Size) -> dict[str, Tensor]:
    padded, width = bytearray(), row.numel()
    for begin, end in pairwise(cu_seqlens):
        for place in range(begin * width, end * width):
            padded.append(values[place])
        for _ in range((begin + length - end) * width):
            padded.append(0)
    return dict(padded=_tensor(padded, torch.uint8).view(len(cu_seqlens) - 1, length, *row))


def pack_padded(padded: bytes, cu_seqlens: list[int], length: int, row: torch.Size) -> dict[str, Tensor]:
    values, width = bytearray(), row.numel()
    for s in range(len(cu_seqlens) - 1):
        begin = s * length * width
        for place in range(begin, begin + (cu_seqlens[s + 1] - cu_seqlens[s]) * width):
            values.append(padded[place])
    return dict(values=_tensor(values, torch.uint8).view(cu_seqlens[-1], *row))


def targets(ids: bytes, cu_seqlens: list[int], boundary: bytes) -> dict[str, Tensor]:
    targets = array("q")
    for begin, end in pairwise(cu_seqlens):
        for t in range(begin + 1, end):
            targets.append(ids[t] + 256 if boundary[t] else ids[t])
        if end > begin:
            targets.append(IGNORE)
    return dict(targets=_tensor(targets, torch.int64))


def token_ends(token_lengths: list[int], token_cu: list[int], cu_seqlens: list[int]) -> dict[str, Tensor]:
    mask = bytearray()
    for begin, end in pairwise(token_cu):
        mask.append(1)
        for length in token_lengths[begin:end]:
            for _ in range(length - 1):
                mask.append(0)
            mask.append(1)
    return dict(token_end=_tensor(mask, torch.bool))


def row_index(cu_seqlens: list[int], total: int) -> dict[str, Tensor]:
    sequence, position = array("i"), array("i")
    for s in range(len(cu_seqlens) - 1):
        for t in range(cu_seqlens[s + 1] - cu_seqlens[s]):
            sequence.append(s)
            position.append(t)
    return dict(sequence=_tensor(sequence, torch.int32), position=_tensor(position, torch.int32))


def align_pack(
    text: bytes,
    token_ids: list[int],
    token_lengths: list[int],
    spans: list[list[int]],
    ends: list[bool],
    bos_id: int,
    eos_id: int,
    device: torch.device,
) -> dict[str, Tensor]:
    ids, token_end, targets = bytearray(), bytearray(), array("q")
    tokens, cu_seqlens, token_cu = array("q"), array("i", [0]), array("i", [0])
    for (first_byte, _, first_token, count), ends_text in zip(spans, ends, strict=True):
        ids.append(BOS)
        token_end.append(1)
        tokens.append(bos_id)
        position = first_byte
        for token in range(first_token, first_token + count):
            last = position + token_lengths[token] - 1
            while position <= last:
                byte = text[position]
                ids.append(byte)
                if position == last:
                    token_end.append(1)
                    targets.append(byte + 256)
                else:
                    token_end.append(0)
                    targets.append(byte)
                position += 1
            tokens.append(token_ids[token])
        if ends_text:
            ids.append(EOS)
            token_end.append(1)
            targets.append(EOS + 256)
            tokens.append(eos_id)
        targets.append(IGNORE)
        cu_seqlens.append(len(ids))
        token_cu.append(len(tokens))
    return dict(
        ids=_tensor(ids, torch.uint8),
        cu_seqlens=_tensor(cu_seqlens, torch.int32),
        token_end=_tensor(token_end, torch.bool),
        token_ids=_tensor(tokens, torch.int64),
        token_cu=_tensor(token_cu, torch.int32),
        targets=_tensor(targets, torch.int64),
    )


def _tensor(values: bytearray | array, dtype: torch.dtype) -> Tensor:
    """The values' own memory as a tensor."""
    return torch.frombuffer(values, dtype=dtype)
