"""Aligned batches in plain PyTorch: the specification, sequence by sequence."""

import numpy as np
import torch
from torch import Tensor

from bytekernels.align.batch import AlignedBatch, Layout
from bytekernels.pack import reference as pack
from bytekernels.ragged import cu_seqlens_of

_MOST = 2**31 - 1  # that int32 offsets count


def align_pack(
    text: np.ndarray,
    token_ids: np.ndarray,
    token_lengths: np.ndarray,
    spans: np.ndarray,
    ends: np.ndarray | None,
    bos_id: int,
    eos_id: int | None,
    bos: int,
    eos: int,
    targets: bool,
    pin: bool,
    threads: int,
) -> AlignedBatch:
    end = [False] * len(spans) if ends is None else ends.tolist()
    _check_spans(spans, end, len(text), len(token_ids), eos_id)

    documents, ids, lengths = [], [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int32)]
    for s, (first_byte, count, first_token, tokens) in enumerate(spans.tolist()):
        taken = slice(first_token, first_token + tokens)
        _check_lengths(token_lengths[taken], first_token, s, count)
        documents.append(text[first_byte : first_byte + count].tobytes() + bytes([eos] * end[s]))
        ids += [np.array([bos_id]), token_ids[taken].astype(np.int64), np.array([eos_id] * end[s], dtype=np.int64)]
        lengths += [token_lengths[taken].astype(np.int32), np.array([1] * end[s], dtype=np.int32)]

    packed, cu_seqlens = pack.pack_documents(documents, bos)
    tokens_after_bos = torch.from_numpy(spans[:, 3] + np.array(end, dtype=np.int64))  # [S]
    token_end = pack.token_end_mask(
        torch.from_numpy(np.concatenate(lengths)), cu_seqlens_of(tokens_after_bos), cu_seqlens, True, len(packed)
    )
    sections = AlignedBatch(
        ids=packed,
        cu_seqlens=cu_seqlens,
        token_end=token_end,
        token_ids=torch.from_numpy(np.concatenate(ids)),
        token_cu=cu_seqlens_of(tokens_after_bos + 1),
        targets=pack.next_byte_targets(packed, cu_seqlens, token_end) if targets else None,
    )
    return _in_arena(sections, pin)


def _in_arena(sections: AlignedBatch, pin: bool) -> AlignedBatch:
    layout = Layout.of(sections)
    batch = layout.batch(torch.empty(layout.size, dtype=torch.uint8, pin_memory=pin))
    for place, section in zip(batch, sections, strict=True):
        if isinstance(place, Tensor) and isinstance(section, Tensor):
            place.copy_(section)
    return batch


def _check_spans(spans: np.ndarray, end: list[bool], text_bytes: int, token_count: int, eos_id: int | None) -> None:
    rows = tokens = 0
    for s, span in enumerate(spans.tolist()):
        for name, held, part in (("text", text_bytes, 0), ("token_ids", token_count, 2)):
            first, count = span[part : part + 2]
            columns = ("first_byte", "bytes", "first_token", "tokens")[part : part + 2]
            for column, value in zip(columns, (first, count), strict=True):
                if value < 0:
                    raise ValueError(f"spans[{s}] has {column} {value}: give what is at least 0")
            if first + count > held:
                raise ValueError(
                    f"spans[{s}] has {columns[0]} {first} and {columns[1]} {count}, but {name} holds {held}: "
                    f"let each span end within it"
                )
        if end[s] and eos_id is None:
            raise ValueError(f"ends[{s}] is true, but eos_id is None: give the id of the token at EOS")
        rows += 1 + span[1] + end[s]
        tokens += 1 + span[3] + end[s]
        for total, what, offsets in ((rows, "bytes", "cu_seqlens"), (tokens, "tokens", "token_cu")):
            if total > _MOST:
                raise ValueError(
                    f"spans hold more than 2^31 - 1 {what} with BOS and EOS, the most that int32 {offsets} counts, "
                    f"from spans[{s}] on: pack them in several batches"
                )


def _check_lengths(lengths: np.ndarray, first_token: int, s: int, count: int) -> None:
    wrong = (lengths < 1).nonzero()[0]
    if len(wrong):
        raise ValueError(
            f"token_lengths[{first_token + wrong[0]}] is {lengths[wrong[0]]} (spans[{s}]): every token covers at "
            f"least one byte, so leave out those that cover none"
        )
    total = int(lengths.sum(dtype=np.int64))
    if total != count:
        raise ValueError(
            f"token_lengths of spans[{s}] sum to {total}, but it has {count} bytes: cut spans at token ends"
        )
