"""What this project promises, a file for each promise. The models are small and random: a promise holds for any."""

from tests.models.conftest import model

# The fixture: a model that dechunks by ``hold``, one by ``causal``, and one of windowed attention and a split router.
__all__ = ["model"]
