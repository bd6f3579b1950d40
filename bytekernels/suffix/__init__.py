"""The longest vocabulary string that ends at each byte: a tokenizer's view of bytes, without the tokenizer."""

from bytekernels.suffix.op import SuffixTrie, longest_suffix, longest_suffix_step
from bytekernels.suffix.state import SuffixState

__all__ = ["SuffixState", "SuffixTrie", "longest_suffix", "longest_suffix_step"]
