"""The longest vocabulary string that ends at each byte: a tokenizer's view of bytes, without the tokenizer."""

from bytekernels.suffix.op import SuffixTrie, longest_suffix

__all__ = ["SuffixTrie", "longest_suffix"]
