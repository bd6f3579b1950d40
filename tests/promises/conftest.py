"""What this project promises, a file for each promise. The models are small and random: a promise holds for any."""

from tests.models.conftest import model

__all__ = ["model"]  # the fixture: a model that dechunks by ``hold``, and one by ``causal``
