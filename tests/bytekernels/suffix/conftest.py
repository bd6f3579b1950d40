"""Vocabularies and texts of few letters, and the search that defines what is found in them."""

import pytest
from hypothesis import strategies as st

from bytekernels import dispatch

STRINGS = st.text("ab\xe9", max_size=6).map(lambda text: text.encode("latin-1"))
VOCABULARIES = st.lists(STRINGS, min_size=1, max_size=12).filter(any)


@pytest.fixture(params=["native", "cuda", "reference"])  # cuda: its kernels' bodies, on the host
def each(request):
    """Each implementation by name, the specification too, asked for throughout the test."""
    with dispatch.force(request.param):
        yield request.param


def by_search(document, vocabulary):
    """The id for each byte of a document."""
    found = []
    for end in range(1, len(document) + 1):
        matches = [(-len(s), i) for i, s in enumerate(vocabulary) if s and document[:end].endswith(s)]
        found.append(min(matches)[1] if matches else -1)
    return found
