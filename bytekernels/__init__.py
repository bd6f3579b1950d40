"""Kernels for byte-level language models on packed, variable-length batches."""

from importlib.util import find_spec

if find_spec("torch") is not None:  # the extension alone, bytekernels._C, does without
    from bytekernels.align import AlignedBatch, align_pack
    from bytekernels.byte_table import byte_table
    from bytekernels.constrain import constrain_ends
    from bytekernels.conv import byte_conv1d, causal_conv1d, causal_conv1d_step
    from bytekernels.dechunk import dechunk
    from bytekernels.linear_kl import linear_kl
    from bytekernels.marginals import SortedVocabulary, byte_marginals, token_prefix
    from bytekernels.mixer import MixerState, MixerStates, mamba2_mixer, mamba2_mixer_step
    from bytekernels.norm import gated_rms_norm, rms_norm
    from bytekernels.pack import next_byte_targets, pack_bytes, pack_padded, row_index, token_end_mask, unpack
    from bytekernels.ragged import BOS, EOS, IGNORE
    from bytekernels.route import Routing, chunk_layout, gather_chunks, route, routing_of
    from bytekernels.sample import sample, uniform
    from bytekernels.ssd import mamba2_step, ssd_scan
    from bytekernels.suffix import SuffixState, SuffixTrie, longest_suffix, longest_suffix_step

__all__ = [
    "BOS",
    "EOS",
    "IGNORE",
    "AlignedBatch",
    "MixerState",
    "MixerStates",
    "Routing",
    "SortedVocabulary",
    "SuffixState",
    "SuffixTrie",
    "align_pack",
    "byte_conv1d",
    "byte_marginals",
    "byte_table",
    "causal_conv1d",
    "causal_conv1d_step",
    "chunk_layout",
    "constrain_ends",
    "dechunk",
    "gated_rms_norm",
    "gather_chunks",
    "linear_kl",
    "longest_suffix",
    "longest_suffix_step",
    "mamba2_mixer",
    "mamba2_mixer_step",
    "mamba2_step",
    "next_byte_targets",
    "pack_bytes",
    "pack_padded",
    "rms_norm",
    "route",
    "routing_of",
    "row_index",
    "sample",
    "ssd_scan",
    "token_end_mask",
    "token_prefix",
    "uniform",
    "unpack",
]
