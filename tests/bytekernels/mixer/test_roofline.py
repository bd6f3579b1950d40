"""The mixer's rooflines against numbers counted by hand, and against the tensors that a call takes and gives."""

import pytest
import torch

from bytekernels import MixerState
from bytekernels.mixer import roofline

SHAPE = (10, 2, 3, 5, 1, 4, 2, torch.bfloat16)  # T, H, P, N, G, K, S: inner 6, C 16, W 24


def test_a_table_in_place_of_rows():
    """Forward: conv reads 256 rows for T, z and dt are gathered; backward: the sum of W columns besides."""
    rows, table = (roofline.mamba2_mixer(*SHAPE, table=given) for given in (False, True))
    gathered = 2 * 10 + (256 + 10) * (6 + 2) * 2
    assert table.bytes - rows.bytes == 10 + 256 * 16 * 2 - 10 * 16 * 2 + gathered
    assert table.flops == rows.flops
    rows, table = (roofline.mamba2_mixer_backward(*SHAPE, table=given) for given in (False, True))
    assert table.bytes - rows.bytes == gathered + 10 + (256 + 10) * 24 * 2
    assert table.flops - rows.flops == 10 * 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_step_are_those_of_its_tensors(dtype):
    sequences, heads, headdim, d_state, groups, taps = 3, 4, 5, 6, 2, 4
    inner, channels = heads * headdim, heads * headdim + 2 * groups * d_state
    state = MixerState.empty(sequences, channels, taps, heads, headdim, d_state)
    rows = [torch.empty(sequences, width, dtype=dtype) for width in (inner + channels + heads, inner)]
    parameters = [torch.empty(size) for size in (channels * taps, channels, heads, heads, heads, inner)]
    ring = state.conv.nbytes  # K - 1 slots read, one written
    states = 2 * state.ssm.nbytes + ring + 2 * state.position.nbytes
    work = roofline.mamba2_mixer_step(sequences, heads, headdim, d_state, groups, taps, dtype)
    assert work.bytes == states + sum(tensor.nbytes for tensor in (*rows, *parameters))
    assert work.flops == sequences * (5 * inner * d_state + 2 * channels * taps)
