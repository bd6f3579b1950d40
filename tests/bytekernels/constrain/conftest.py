"""The implementations are asked for as those of longest suffixes are."""

from tests.bytekernels.suffix.conftest import each

__all__ = ["each"]
