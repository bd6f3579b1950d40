"""The byte-level model, its decoding and its likelihood."""

from models.byte_lm import ByteLM, ByteLMOutput
from models.byte_tokenizer import ByteTokenizer
from models.config import ByteLMConfig
from models.generation import generate, stream
from models.likelihood import Score, score, token_score
from models.sampling import Sampling
from models.scoring import ContinuationScore, Scorer
from models.token_scoring import TokenScorer
from models.token_writer import TokenHeadWriter
from models.writer import Writer
from models.written import Generation, Piece

__all__ = [
    "ByteLM",
    "ByteLMConfig",
    "ByteLMOutput",
    "ByteTokenizer",
    "ContinuationScore",
    "Generation",
    "Piece",
    "Sampling",
    "Score",
    "Scorer",
    "TokenHeadWriter",
    "TokenScorer",
    "Writer",
    "generate",
    "score",
    "stream",
    "token_score",
]
