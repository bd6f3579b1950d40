"""What a token model says about the next byte: its exact (byte, chunk end) distribution inside a token."""

from bytekernels.marginals.op import SortedVocabulary, byte_marginals, token_prefix

__all__ = ["SortedVocabulary", "byte_marginals", "token_prefix"]
