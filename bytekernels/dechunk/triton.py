"""dechunk in Triton.

Programs that carry the moving average own a *tile* of chunks, aligned to its sequence's first. A chunk's influence on
a later one is a product of (1 - w): each tile walks back (forward in the backward pass) over its neighbours' chunks
until that product is below 2^-32 or the sequence ends, and so needs nothing from another program. Tiles of sequence s
are numbered from ``cu_chunks[s] // CHUNKS + s``, which needs no pass over the lengths; S+1st comes the room that a
capacity leaves. With weight None a row of chunks is simply held, and there are no tiles forward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bytekernels.launch import on_device, row_pieces, search_steps, sequence_of_tile, sum_parts

CHUNKS = tl.constexpr(16)  # chunks of a tile
NEGLIGIBLE = tl.constexpr(2.0**-32)  # influence that a float32 sum no longer sees
EDGE_ROWS = 512  # rows that one program searches for bytes without a chunk


@triton.jit
def _tile(p_cu_chunks, sequences, capacity, steps):
    """This program's chunks [first, end), and those of its sequence [start, stop); sequence S is the room left."""
    i_tile = tl.program_id(0)
    i_s = sequence_of_tile(p_cu_chunks, sequences, i_tile, steps, CHUNKS)
    o_start = tl.load(p_cu_chunks + i_s).to(tl.int64)
    o_stop = tl.load(p_cu_chunks + i_s + 1, mask=i_s < sequences, other=capacity).to(tl.int64)
    o_stop = tl.minimum(o_stop, capacity)
    o_first = o_start + (i_tile - o_start // CHUNKS - i_s) * CHUNKS
    return o_first, tl.minimum(o_first + CHUNKS, o_stop), o_start, o_stop, i_s == sequences


@triton.jit
def _average_before(p_chunks, p_weight, o_first, o_start, o_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """z of the chunk before o_first: sum over m of w_m c_m prod of later (1 - w)."""
    b_z = tl.zeros([BLOCK_D], dtype=tl.float32)
    o_m = o_first - 1
    influence = tl.full([], 1.0, dtype=tl.float32)
    while (o_m >= o_start) & (influence > NEGLIGIBLE):
        w = tl.load(p_weight + o_m).to(tl.float32)
        w = tl.where(o_m == o_start, 1.0, w)
        b_z += influence * w * tl.load(p_chunks + o_m * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        influence *= 1.0 - w
        o_m -= 1
    return b_z


@triton.heuristics(
    {
        "HOLD": lambda args: args["p_chunks"] is not None,
        "HAS_NULL": lambda args: args["p_null"] is not None,
        "HAS_RESIDUAL": lambda args: args["p_residual"] is not None,
    }
)
@triton.jit(do_not_specialize=["rows", "capacity"])
def rows_kernel(
    p_chunks,
    p_chunk_of,
    p_null,
    p_residual,
    p_u,
    rows,
    capacity,
    D: tl.constexpr,
    HOLD: tl.constexpr,
    HAS_NULL: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """u_t = c_{chunk_of[t]} (HOLD), null before the first chunk, NaN past the capacity; + residual_t."""
    o_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    m_d = o_d < D
    for i in range(0, ROWS, BLOCK_T):
        o_t = tl.program_id(0).to(tl.int64) * ROWS + i + tl.arange(0, BLOCK_T)
        m_t = o_t < rows
        o_m = tl.load(p_chunk_of + o_t, mask=m_t, other=0).to(tl.int64)
        m_held = (o_m >= 0) & (o_m < capacity)
        m_own = m_t if HOLD else m_t & ~m_held
        if HOLD or tl.sum(m_own.to(tl.int32), 0) > 0:
            m_u = m_own[:, None] & m_d
            b_u = tl.where((o_m >= capacity)[:, None] & m_d, float("nan"), 0.0)
            if HAS_NULL:
                b_null = tl.load(p_null + o_d, mask=m_d, other=0.0).to(tl.float32)
                b_u = tl.where((o_m < 0)[:, None], b_null, b_u)
            if HOLD:
                m_c = (m_held & m_t)[:, None]
                b_c = tl.load(p_chunks + o_m[:, None] * D + o_d, mask=m_c & m_d, other=0.0).to(tl.float32)
                b_u = tl.where(m_c, b_c, b_u)
            if HAS_RESIDUAL:
                b_u += tl.load(p_residual + o_t[:, None] * D + o_d, mask=m_u, other=0.0).to(tl.float32)
            tl.store(p_u + o_t[:, None] * D + o_d, b_u, mask=m_u)


@triton.heuristics({"HAS_RESIDUAL": lambda args: args["p_residual"] is not None})
@triton.jit(do_not_specialize=["rows", "sequences", "capacity", "steps"])
def average_kernel(
    p_chunks,
    p_chunk_of,
    p_index,
    p_cu_chunks,
    p_weight,
    p_residual,
    p_u,
    rows,
    sequences,
    capacity,
    steps,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z_m = w_m c_m + (1 - w_m) z_{m-1}, and u_t = z_m + residual_t over the bytes of each chunk m of the tile."""
    o_first, o_end, o_start, _, m_room = _tile(p_cu_chunks, sequences, capacity, steps)
    if (o_first < o_end) & ~m_room:
        o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        b_z = _average_before(p_chunks, p_weight, o_first, o_start, o_d, D, BLOCK_D)
        for o_m in range(o_first, o_end):
            w = tl.load(p_weight + o_m).to(tl.float32)
            w = tl.where(o_m == o_start, 1.0, w)
            b_c = tl.load(p_chunks + o_m * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
            b_z = w * b_c + (1.0 - w) * b_z
            o_t = tl.load(p_index + o_m).to(tl.int64) + tl.arange(0, BLOCK_T)
            n_rows = BLOCK_T
            while n_rows == BLOCK_T:  # a chunk's bytes follow each other
                m_t = tl.load(p_chunk_of + o_t, mask=o_t < rows, other=-1) == o_m
                m_u = m_t[:, None] & (o_d < D)[None, :]
                b_u = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32) + b_z[None, :]
                if HAS_RESIDUAL:
                    b_u += tl.load(p_residual + o_t[:, None] * D + o_d[None, :], mask=m_u, other=0.0).to(tl.float32)
                tl.store(p_u + o_t[:, None] * D + o_d[None, :], b_u, mask=m_u)
                n_rows = tl.sum(m_t.to(tl.int32), 0)
                o_t += BLOCK_T


@triton.jit
def _sum_of_bytes(
    p_du,
    p_chunk_of,
    p_part,
    o_m,
    o_t,
    b_z,
    o_d,
    rows,
    D: tl.constexpr,
    HAS_CONFIDENCE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of du over the bytes of chunk m, which begin at o_t; stores their <du_t, z_m>."""
    b_dz = tl.zeros([BLOCK_D], dtype=tl.float32)
    o_t += tl.arange(0, BLOCK_T)
    n_rows = BLOCK_T
    while n_rows == BLOCK_T:
        m_t = tl.load(p_chunk_of + o_t, mask=o_t < rows, other=-1) == o_m
        m_du = m_t[:, None] & (o_d < D)[None, :]
        b_du = tl.load(p_du + o_t[:, None] * D + o_d[None, :], mask=m_du, other=0.0).to(tl.float32)
        b_dz += tl.sum(b_du, 0)
        if HAS_CONFIDENCE:
            tl.store(p_part + o_t, tl.sum(b_du * b_z[None, :], 1), mask=m_t)
        n_rows = tl.sum(m_t.to(tl.int32), 0)
        o_t += BLOCK_T
    return b_dz


@triton.heuristics(
    {
        "HAS_WEIGHT": lambda args: args["p_weight"] is not None,
        "HAS_CONFIDENCE": lambda args: args["p_dconfidence"] is not None,
    }
)
@triton.jit(do_not_specialize=["rows", "sequences", "capacity", "steps"])
def backward_kernel(
    p_du,
    p_chunks,
    p_chunk_of,
    p_index,
    p_cu_chunks,
    p_weight,
    p_z,
    p_dchunks,
    p_dweight,
    p_dconfidence,
    rows,
    sequences,
    capacity,
    steps,
    D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_CONFIDENCE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """g_m = sum of du over the bytes of m + (1 - w_{m+1}) g_{m+1}; dc_m = w_m g_m; and this block of D's parts of
    dw_m = <g_m, c_m - z_{m-1}> and dconfidence_t = <du_t, z_m>. Zeros for room that is left."""
    o_first, o_end, o_start, o_stop, m_room = _tile(p_cu_chunks, sequences, capacity, steps)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_zero = tl.zeros([BLOCK_D], dtype=tl.float32)
    p_part = p_dconfidence
    if HAS_CONFIDENCE:
        p_part += tl.program_id(1) * rows.to(tl.int64)
    if HAS_WEIGHT:
        p_dweight += tl.program_id(1) * capacity.to(tl.int64)
    if (o_first < o_end) & m_room:
        for o_m in range(o_first, o_end):
            tl.store(p_dchunks + o_m * D + o_d, b_zero, mask=m_d)
            if HAS_WEIGHT:
                tl.store(p_dweight + o_m, 0.0)
    elif o_first < o_end:
        b_carry = b_zero  # (1 - w_{m+1}) g_{m+1}
        if HAS_WEIGHT:
            b_z = _average_before(p_chunks, p_weight, o_first, o_start, o_d, D, BLOCK_D)
            for o_m in range(o_first, o_end):  # z_{m-1} of each chunk, to be read in reverse
                tl.store(p_z + o_m * D + o_d, b_z, mask=m_d)
                w = tl.where(o_m == o_start, 1.0, tl.load(p_weight + o_m).to(tl.float32))
                b_c = tl.load(p_chunks + o_m * D + o_d, mask=m_d, other=0.0).to(tl.float32)
                b_z = w * b_c + (1.0 - w) * b_z
            tl.debug_barrier()  # what one thread has stored another may read
            o_later = o_end
            influence = 1.0 - tl.load(p_weight + o_later, mask=o_later < o_stop, other=1.0).to(tl.float32)
            while (o_later < o_stop) & (influence > NEGLIGIBLE):
                o_t = tl.load(p_index + o_later).to(tl.int64)
                b_carry += influence * _sum_of_bytes(
                    p_du, p_chunk_of, p_part, o_later, o_t, b_zero, o_d, rows, D, False, BLOCK_T, BLOCK_D
                )
                o_later += 1
                influence *= 1.0 - tl.load(p_weight + o_later, mask=o_later < o_stop, other=1.0).to(tl.float32)
        for i in range(o_end - o_first):
            o_m = o_end - 1 - i
            o_t = tl.load(p_index + o_m).to(tl.int64)
            b_c = b_zero
            if HAS_WEIGHT or HAS_CONFIDENCE:
                b_c = tl.load(p_chunks + o_m * D + o_d, mask=m_d, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                w = tl.where(o_m == o_start, 1.0, tl.load(p_weight + o_m).to(tl.float32))
                b_before = tl.load(p_z + o_m * D + o_d, mask=m_d, other=0.0)
                b_z = w * b_c + (1.0 - w) * b_before
            else:
                b_z = b_c
            b_g = b_carry + _sum_of_bytes(
                p_du, p_chunk_of, p_part, o_m, o_t, b_z, o_d, rows, D, HAS_CONFIDENCE, BLOCK_T, BLOCK_D
            )
            if HAS_WEIGHT:
                tl.store(p_dweight + o_m, tl.where(o_m == o_start, 0.0, tl.sum(b_g * (b_c - b_before), 0)))
                tl.store(p_dchunks + o_m * D + o_d, w * b_g, mask=m_d)
                b_carry = (1.0 - w) * b_g
            else:
                tl.store(p_dchunks + o_m * D + o_d, b_g, mask=m_d)


@triton.heuristics(
    {
        "HAS_NULL": lambda args: args["p_null"] is not None,
        "HAS_CONFIDENCE": lambda args: args["p_dconfidence"] is not None,
    }
)
@triton.jit(do_not_specialize=["rows", "capacity"])
def edge_backward_kernel(
    p_du,
    p_chunk_of,
    p_null,
    p_dnull,
    p_dconfidence,
    rows,
    capacity,
    D: tl.constexpr,
    HAS_NULL: tl.constexpr,
    HAS_CONFIDENCE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Over the bytes without a chunk: this tile's part of dnull = sum of du_t; dconfidence = <du_t, null>, or NaN."""
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_null = tl.zeros([BLOCK_D], dtype=tl.float32)
    if HAS_NULL:
        b_null += tl.load(p_null + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_dnull = tl.zeros([BLOCK_D], dtype=tl.float32)
    for i in range(0, ROWS, BLOCK_T):
        o_t = tl.program_id(0).to(tl.int64) * ROWS + i + tl.arange(0, BLOCK_T)
        o_m = tl.load(p_chunk_of + o_t, mask=o_t < rows, other=0)
        m_edge = (o_t < rows) & ((o_m < 0) | (o_m >= capacity))
        if tl.sum(m_edge.to(tl.int32), 0) > 0:
            m_du = (m_edge & (o_m < 0))[:, None] & (o_d < D)[None, :]
            b_du = tl.load(p_du + o_t[:, None] * D + o_d[None, :], mask=m_du, other=0.0).to(tl.float32)
            b_dnull += tl.sum(b_du, 0)
            if HAS_CONFIDENCE:
                b_part = tl.where(o_m < 0, tl.sum(b_du * b_null[None, :], 1), float("nan"))
                tl.store(p_dconfidence + tl.program_id(1) * rows.to(tl.int64) + o_t, b_part, mask=m_edge)
    if HAS_NULL:
        tl.store(p_dnull + tl.program_id(0).to(tl.int64) * D + o_d, b_dnull, mask=o_d < D)


def dechunk(
    chunks: Tensor,
    chunk_of: Tensor,
    index: Tensor,
    cu_chunks: Tensor,
    weight: Tensor | None,
    null: Tensor | None,
    residual: Tensor | None,
    confidence: Tensor | None,
) -> Tensor:
    rows, (capacity, width) = len(chunk_of), chunks.shape
    dtype = chunks.dtype if residual is None else torch.promote_types(chunks.dtype, residual.dtype)
    u = chunks.new_empty(rows, width, dtype=dtype)
    chunks, chunk_of, index, cu_chunks = (value.contiguous() for value in (chunks, chunk_of, index, cu_chunks))
    weight, null, residual = (None if value is None else value.contiguous() for value in (weight, null, residual))
    block_t, block_d, options = row_pieces(width)
    across = triton.cdiv(width, block_d)
    tile_rows = block_t if weight is None else EDGE_ROWS
    with on_device(chunks):
        if rows and width:
            rows_kernel[(triton.cdiv(rows, tile_rows), across)](
                chunks if weight is None else None,
                chunk_of,
                null,
                residual,
                u,
                rows,
                capacity,
                D=width,
                ROWS=tile_rows,
                BLOCK_T=block_t,
                BLOCK_D=block_d,
                **options,
            )
        if rows and width and weight is not None:
            sequences = len(cu_chunks) - 1
            average_kernel[(_tiles(capacity, sequences), across)](
                chunks,
                chunk_of,
                index,
                cu_chunks,
                weight,
                residual,
                u,
                rows,
                sequences,
                capacity,
                search_steps(sequences),
                D=width,
                BLOCK_T=block_t,
                BLOCK_D=block_d,
                **options,
            )
    return u


def dechunk_backward(
    du: Tensor,
    chunks: Tensor,
    chunk_of: Tensor,
    index: Tensor,
    cu_chunks: Tensor,
    weight: Tensor | None,
    null: Tensor | None,
    confidence: Tensor | None,
) -> list[Tensor]:
    rows, (capacity, width) = len(chunk_of), chunks.shape
    sequences = len(cu_chunks) - 1
    du, chunks, chunk_of, index, cu_chunks = (value.contiguous() for value in (du, chunks, chunk_of, index, cu_chunks))
    weight, null = (None if value is None else value.contiguous() for value in (weight, null))
    block_t, block_d, options = row_pieces(width)
    across = triton.cdiv(width, block_d)
    edge_tiles = triton.cdiv(rows, EDGE_ROWS)

    def parts(needed: Tensor | None, *shape: int) -> Tensor | None:
        return None if needed is None else du.new_empty(*shape, dtype=torch.float32)

    dchunks, z = torch.empty_like(chunks), parts(weight, capacity, width)
    dweight, dnull = parts(weight, across, capacity), parts(null, edge_tiles, width)
    dconfidence = parts(confidence, across, rows)
    with on_device(du):
        if width:
            backward_kernel[(_tiles(capacity, sequences), across)](
                du,
                chunks,
                chunk_of,
                index,
                cu_chunks,
                weight,
                z,
                dchunks,
                dweight,
                dconfidence,
                rows,
                sequences,
                capacity,
                search_steps(sequences),
                D=width,
                BLOCK_T=block_t,
                BLOCK_D=block_d,
                **options,
            )
        if edge_tiles and width and (null is not None or confidence is not None):
            edge_backward_kernel[(edge_tiles, across)](
                du,
                chunk_of,
                null,
                dnull,
                dconfidence,
                rows,
                capacity,
                D=width,
                ROWS=EDGE_ROWS,
                BLOCK_T=block_t,
                BLOCK_D=block_d,
                **options,
            )
        sums = [(dweight, weight), (dnull, null), (dconfidence, confidence)]
        return [dchunks, *(sum_parts(part, like.dtype) for part, like in sums if part is not None and like is not None)]


def _tiles(capacity: int, sequences: int) -> int:
    """Programs that the tiles of all sequences, and of the room left, take at most."""
    return capacity // CHUNKS.value + sequences + 1
