"""The byte-level model, its decoding and its likelihood."""

from models.byte_lm import ByteLM, ByteLMOutput
from models.byte_tokenizer import ByteTokenizer
from models.config import ByteLMConfig
from models.generation import Generation, Sampling, generate
from models.likelihood import Score, score, token_score

__all__ = [
    "ByteLM",
    "ByteLMConfig",
    "ByteLMOutput",
    "ByteTokenizer",
    "Generation",
    "Sampling",
    "Score",
    "generate",
    "score",
    "token_score",
]
