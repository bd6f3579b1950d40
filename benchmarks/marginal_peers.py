"""What byte marginals and longest suffixes are measured against.

``eager`` is plain PyTorch. Of byte_marginals it is the short form: one running sum over the sorted vocabulary for each
chunk, in float64, of which every interval is a difference; branches rarer than some 1e-11 it gets wrong. Of the others
it is the specification. ``reference`` is the specification of byte_marginals, which goes level by level from the
longest strings up. ``bytekernels`` is the public functions with the implementation that they choose.

Every function takes its op's arguments by name and returns its outputs by name.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

import bytekernels
from benchmarks.harness import Provider
from bytekernels import SortedVocabulary, SuffixState, SuffixTrie, dispatch

OPS = ("byte_marginals", "token_prefix", "constrain_ends", "longest_suffix", "longest_suffix_step")
PROVIDERS = ("eager", "reference", "bytekernels")
Outputs = dict[str, Tensor]


def running_sums(logits: Tensor, vocabulary: SortedVocabulary, chunk_of: Tensor, prefix: Tensor) -> Outputs:
    scores = logits.index_select(1, vocabulary.order).double()
    sums = F.pad((scores - scores.amax(1, keepdim=True)).exp().cumsum(1), (1, 0)).flatten()  # [M, n + 1]
    out = logits.new_full((len(prefix), 512), -torch.inf, dtype=torch.promote_types(logits.dtype, torch.float32))
    rows = ((chunk_of >= 0) & (prefix >= 0)).nonzero().flatten()
    node = prefix[rows].long()
    first = vocabulary.children[node].long()
    counts = vocabulary.children[node + 1].long() - first
    each = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)  # a child of rows[each]
    child = first[each] + torch.arange(len(each), device=rows.device) - (counts.cumsum(0) - counts)[each]
    byte = (vocabulary.edges[child] & 255).long()
    base = chunk_of[rows].long() * (len(vocabulary.order) + 1)
    whole = sums[base + vocabulary.spans[node, 2]] - sums[base + vocabulary.spans[node, 1]]
    for half, (begin, end) in enumerate(((1, 2), (0, 1))):
        share = sums[base[each] + vocabulary.spans[child, end]] - sums[base[each] + vocabulary.spans[child, begin]]
        out[rows[each], 256 * half + byte] = (share / whole[each]).log().to(out.dtype)
    return dict(marginals=out)


def marginals(logits: Tensor, vocabulary: SortedVocabulary, chunk_of: Tensor, prefix: Tensor) -> Outputs:
    return dict(marginals=bytekernels.byte_marginals(logits, vocabulary, chunk_of, prefix))


def prefixes(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor, vocabulary: SortedVocabulary) -> Outputs:
    return dict(prefix=bytekernels.token_prefix(ids, cu_seqlens, boundary, vocabulary))


def constrained(ids: Tensor, cu_seqlens: Tensor, log_odds: Tensor, vocabulary: SortedVocabulary) -> Outputs:
    return dict(ends=bytekernels.constrain_ends(ids, cu_seqlens, log_odds, vocabulary))


def suffixes(ids: Tensor, cu_seqlens: Tensor, trie: SuffixTrie) -> Outputs:
    return dict(found=bytekernels.longest_suffix(ids, cu_seqlens, trie))


def suffix_step(ids: Tensor, recent: Tensor, counts: Tensor, trie: SuffixTrie) -> Outputs:
    found = bytekernels.longest_suffix_step(ids, SuffixState(recent, counts), trie)
    return dict(found=found, recent=recent, counts=counts)


FUNCTIONS: dict[str, Callable[..., Outputs]] = dict(
    zip(OPS, (marginals, prefixes, constrained, suffixes, suffix_step), strict=True)
)


_by_specification = functools.partial(dispatch.force, "reference")
TRUTH = Provider(FUNCTIONS, settings=_by_specification)
EAGER = Provider(FUNCTIONS | {"byte_marginals": running_sums}, settings=_by_specification)
REFERENCE = Provider({"byte_marginals": marginals}, settings=_by_specification)
OURS = Provider(FUNCTIONS)


def providers(names: Iterable[str], device: torch.device) -> dict[str, Provider]:
    """The providers of these names; all run on any device."""
    made = {"eager": EAGER, "reference": REFERENCE, "bytekernels": OURS}
    return {name: made[name] for name in names}
