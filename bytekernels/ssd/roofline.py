"""FLOPs and bytes of the scan: T bytes, H heads of P values, N values of state, G groups, S sequences.

With D and a bias of the time step, without initial states; A, D and the bias are float32, dt is in x's dtype. FLOPs are
those of the matrix products in chunks of CHUNK bytes; the recurrence has fewer, but none that a tensor core can take.
"""

import torch

from bytekernels.roofline import Work

CHUNK = 64


def ssd_scan(
    total: int,
    heads: int,
    headdim: int,
    d_state: int,
    groups: int,
    sequences: int,
    dtype: torch.dtype,
    gate: bool = False,
) -> Work:
    """x, dt, B, C and (gate) z in, y and the final states out. FLOPs: C B^T, its product with x, S C and the states."""
    inner = heads * headdim
    rows = (3 if gate else 2) * inner + heads + 2 * groups * d_state
    products = CHUNK * d_state + CHUNK * headdim + 2 * headdim * d_state  # for each byte and head
    return Work(2 * total * heads * products, total * rows * dtype.itemsize + _states(inner, d_state, sequences))


def ssd_scan_backward(
    total: int,
    heads: int,
    headdim: int,
    d_state: int,
    groups: int,
    sequences: int,
    dtype: torch.dtype,
    gate: bool = False,
) -> Work:
    """dy, the final states' gradients and the inputs in, the inputs' gradients out.

    FLOPs: the states again and their gradients; C B^T, dy x^T and the four products that they enter; S C, G B, and
    their counterparts for B and C.
    """
    inner = heads * headdim
    rows = (5 if gate else 3) * inner + 2 * heads + 4 * groups * d_state
    products = 2 * CHUNK * d_state + 2 * CHUNK * headdim + 6 * headdim * d_state
    return Work(2 * total * heads * products, total * rows * dtype.itemsize + _states(inner, d_state, sequences))


def _states(inner: int, d_state: int, sequences: int) -> int:
    return 4 * sequences * inner * d_state + 4 * (sequences + 1)
