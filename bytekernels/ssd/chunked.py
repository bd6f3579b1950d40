"""The scan in chunks of matrix products, in plain PyTorch: what serves any device where no kernel does.

Within a chunk, with ``cs`` the running sum of ``Delta A`` from its first byte and S0 the state before it,
``y_t = exp(cs_t) S0 C_t + sum_{s<=t} exp(cs_t - cs_s) (C_t . B_s) Delta_s x_s`` (Dao & Gu 2024, section 6).
Chunks begin at sequence starts, so none holds two sequences, and every exponent is a difference that is <= 0.
"""

import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.ragged import accumulation_dtype, lengths_of, positions, segment_ids
from bytekernels.ssd.reference import skip_and_gate, time_step

CHUNK = 32


class Chunks:
    """A packed batch cut into chunks, ordered so that the j-th chunks of all sequences lie together.

    Attributes:
        order: int64 [S], the sequences by falling length.
        active: for each j, how many sequences have a j-th chunk: the first ones in that order.
        rows: int64 [M, Q], the row that each place of each chunk holds; places after the end repeat the last row.
        valid: bool [M, Q], false for places after the end.
        place: int64 [T], where each row is in the flattened ``rows``.
    """

    def __init__(self, cu_seqlens: Tensor, total: int) -> None:
        cu, lengths = cu_seqlens.to(torch.int64), lengths_of(cu_seqlens).to(torch.int64)
        counts, self.order = ((lengths + CHUNK - 1) // CHUNK).sort(descending=True, stable=True)
        steps = torch.arange(int(counts.max()) if counts.numel() else 0, device=cu.device)
        active = (counts[None] > steps[:, None]).sum(1)  # [J]
        self.active: list[int] = active.tolist()
        first = active.cumsum(0) - active  # where the j-th chunks begin

        step = steps.repeat_interleave(active)  # [M]
        sequence = self.order[torch.arange(step.numel(), device=cu.device) - first[step]]
        rows = (cu[sequence] + CHUNK * step)[:, None] + torch.arange(CHUNK, device=cu.device)
        ends = cu[sequence + 1][:, None]
        self.valid = rows < ends
        self.rows = torch.minimum(rows, ends - 1)

        rank = torch.empty_like(self.order).index_copy(0, self.order, torch.arange(len(self.order), device=cu.device))
        position = positions(cu_seqlens, total)
        chunk = first[position // CHUNK] + rank[segment_ids(cu_seqlens, total)]
        self.place = chunk * CHUNK + position % CHUNK

    def take(self, values: Tensor) -> Tensor:
        """[T, ...] -> [M, Q, ...]."""
        return values[self.rows.flatten()].unflatten(0, self.rows.shape)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    initial_states: Tensor | None,
) -> tuple[Tensor, Tensor]:
    total, heads, headdim = x.shape
    groups, d_state = B.shape[1:]
    wide = accumulation_dtype(x.dtype)
    sequences, split = cu_seqlens.numel() - 1, (groups, heads // groups)
    if initial_states is None:
        initial_states = x.new_zeros(sequences, heads, headdim, d_state, dtype=wide)
    if total == 0:
        return torch.zeros_like(x), initial_states.to(wide).clone()

    chunks = Chunks(cu_seqlens, total)
    delta = chunks.take(time_step(dt, dt_bias, dt_softplus, dt_min, dt_max).to(wide)) * chunks.valid[..., None]
    inflow = delta[..., None] * chunks.take(x).to(wide)  # [M, Q, H, P]: Delta x
    inflow = inflow.transpose(1, 2).unflatten(1, split)  # [M, G, H/G, Q, P]
    B, C = (chunks.take(value).to(wide).transpose(1, 2) for value in (B, C))  # [M, G, Q, N]
    # In float64, where the large sums whose differences decays (and their gradients) are leave no error behind.
    cs = (delta * A.to(wide)).double().cumsum(1).transpose(1, 2).unflatten(1, split)  # [M, G, H/G, Q]

    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).triu(1)
    decay = (cs[..., :, None] - cs[..., None, :]).to(wide).masked_fill(later, float("-inf")).exp()
    y = ((C @ B.mT)[:, :, None] * decay) @ inflow  # [M, G, H/G, Q, P]

    to_end = (cs[..., -1:] - cs).to(wide).exp()[..., None]
    gain = ((inflow * to_end).mT @ B[:, :, None]).flatten(1, 2)  # [M, H, P, N]
    keep = cs[..., -1].to(wide).exp().flatten(1, 2)[..., None, None]  # [M, H, 1, 1]
    carry, before, ended = initial_states.to(wide)[chunks.order], [], []
    gains, keeps = gain.split(chunks.active), keep.split(chunks.active)
    for j, count in enumerate(chunks.active):
        ended.append(carry[count:])
        before.append(carry[:count])
        carry = keeps[j] * carry[:count] + gains[j]
    states = torch.cat([carry, *reversed(ended)])  # by rank
    final_states = torch.zeros_like(states).index_copy(0, chunks.order, states)

    start = torch.cat(before).unflatten(1, split)  # [M, G, H/G, P, N]
    y = y + cs.to(wide).exp()[..., None] * (C[:, :, None] @ start.mT)
    y = y.flatten(1, 2).transpose(1, 2).flatten(0, 1)[chunks.place]  # [T, H, P]
    return skip_and_gate(y, x, D, z), final_states


def ssd_scan_backward(dy: Tensor, dfinal_states: Tensor, *args: object) -> list[Tensor]:
    return dispatch.vjp(ssd_scan, args, (dy, dfinal_states))
