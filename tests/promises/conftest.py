"""What this project promises, a file for each promise. The models are small and random: a promise holds for any."""

from tests.models.conftest import model

# The fixture: models of every kind that a promise is held for.
__all__ = ["model"]
