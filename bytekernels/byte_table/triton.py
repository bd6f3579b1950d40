"""Rows of a table by byte value in Triton.

The gradient's rows are put in order of their bytes by a stable sort, so that a byte's rows are a run. Runs are cut into
tiles of ``ROWS`` rows; one launch sums each tile, another the tiles of each byte, in their order. With R rows a tile,
the tiles of byte b are numbered from ``first[b] // R + b``, which leaves each byte as many as it needs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bytekernels.launch import on_device, row_pieces, with_dense_rows

BYTES = tl.constexpr(256)
ROWS = tl.constexpr(512)  # of a tile


@triton.jit(do_not_specialize=["rows"])
def gather_kernel(
    p_ids, p_table, p_out, rows, stride_table, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out[t] = table[ids[t]]."""
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_t = o_t < rows
    m_out = m_t[:, None] & (o_c < C)
    o_row = tl.load(p_ids + o_t, mask=m_t, other=0).to(tl.int64)
    b_row = tl.load(p_table + o_row[:, None] * stride_table + o_c, mask=m_out, other=0.0)
    tl.store(p_out + o_t[:, None] * C + o_c, b_row, mask=m_out)


@triton.jit
def tile_sums_kernel(
    p_dy, p_order, p_first, p_parts, stride_dy, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """parts[tile] = sum of dy[order[i]] over the tile's places i in the sorted order."""
    i_tile = tl.program_id(0)
    o_byte = tl.arange(0, BYTES)
    b_tile = tl.load(p_first + o_byte) // ROWS + o_byte  # each byte's first tile
    i_byte = tl.sum((b_tile <= i_tile).to(tl.int32), 0) - 1
    o_first = tl.load(p_first + i_byte)
    o_end = tl.load(p_first + i_byte + 1)
    o_first += (i_tile - o_first // ROWS - i_byte) * ROWS
    if o_first < o_end:
        o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        b_sum = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
        for o_i in range(o_first, tl.minimum(o_first + ROWS, o_end), BLOCK_T):
            o_place = o_i + tl.arange(0, BLOCK_T)
            m_place = o_place < o_end
            o_t = tl.load(p_order + o_place, mask=m_place, other=0).to(tl.int64)
            m_dy = m_place[:, None] & (o_c < C)
            b_sum += tl.load(p_dy + o_t[:, None] * stride_dy + o_c, mask=m_dy, other=0.0).to(tl.float32)
        tl.store(p_parts + i_tile.to(tl.int64) * C + o_c, tl.sum(b_sum, 0)[None, :], mask=o_c < C)


@triton.jit
def byte_sums_kernel(p_parts, p_first, p_dtable, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """dtable[b] = sum of the parts of byte b's tiles."""
    i_byte = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_first = tl.load(p_first + i_byte)
    n_tiles = tl.cdiv(tl.load(p_first + i_byte + 1) - o_first, ROWS)
    p_parts += (o_first // ROWS + i_byte).to(tl.int64) * C
    b_sum = tl.zeros([BLOCK_C], dtype=tl.float32)
    for _ in range(n_tiles):
        b_sum += tl.load(p_parts + o_c, mask=o_c < C, other=0.0)
        p_parts += C
    tl.store(p_dtable + i_byte * C + o_c, b_sum, mask=o_c < C)


def byte_table(ids: Tensor, table: Tensor) -> Tensor:
    ids, table = ids.contiguous(), with_dense_rows(table)
    rows, width = len(ids), table.shape[1]
    out = table.new_empty(rows, width)
    block_t, block_c, options = row_pieces(width)
    with on_device(table):
        if rows and width:
            gather_kernel[(triton.cdiv(rows, block_t), triton.cdiv(width, block_c))](
                ids,
                table,
                out,
                rows,
                table.stride(0),
                C=width,
                BLOCK_T=block_t,
                BLOCK_C=block_c,
                **options,
            )
    return out


def byte_table_backward(dy: Tensor, ids: Tensor) -> Tensor:
    dy = with_dense_rows(dy)
    rows, width = dy.shape
    dtable = dy.new_empty(BYTES.value, width)
    block_t, block_c, options = row_pieces(width)
    across = triton.cdiv(width, block_c)
    tiles = rows // ROWS.value + BYTES.value
    parts = dy.new_empty(tiles, width, dtype=torch.float32)
    with on_device(dy):
        if width:
            values, order = torch.sort(ids, stable=True)
            bytes_and_end = torch.arange(BYTES.value + 1, dtype=torch.int32, device=ids.device)
            first = torch.searchsorted(values.to(torch.int32), bytes_and_end, out_int32=True)
            tile_sums_kernel[(tiles, across)](
                dy, order, first, parts, dy.stride(0), C=width, BLOCK_T=block_t, BLOCK_C=block_c, **options
            )
            byte_sums_kernel[(BYTES.value, across)](parts, first, dtable, C=width, BLOCK_C=block_c, **options)
    return dtable
