"""A small corpus, teacher and recipe that the training tests share, and the command."""

import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from models.core import use_packed
from training.corpus import Corpus, Split, prepare
from training.teacher import small_llama, train_tokenizer
from training.text import Document

WORDS = [
    "the",
    "function",
    "returns",
    "a",
    "value",
    "if",
    "its",
    "argument",
    "is",
    "given",
    "and",
    "raises",
    "an",
    "error",
    "where",
    "it",
    "is",
    "not",
]


def documents(count: int = 60, seed: int = 0) -> list[Document]:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) + ".\n" for _ in range(count)]
    return [Document(f"doc{i}", text.encode()) for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(documents(), 300)


@pytest.fixture(scope="session")
def corpus(tokenizer, tmp_path_factory) -> Corpus:
    return prepare(documents(), tokenizer, tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def mixed_documents() -> list[Document]:
    """Documents of several scripts and of 1 byte and more."""
    rng = np.random.default_rng(0)
    words = ["the", "kernel", "byte", "日本語", "👍🏽", "naïve", "returns", "\r\n", "x = 1"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 60))) for _ in range(200)]
    return [Document(f"file-{i}", text.encode()) for i, text in enumerate(["x", *texts[1:]])]


@pytest.fixture(scope="session")
def mixed_tokenizer(mixed_documents):
    return train_tokenizer(mixed_documents, vocab_size=300)


@pytest.fixture(scope="session")
def mixed_corpus(mixed_documents, mixed_tokenizer, tmp_path_factory) -> Corpus:
    return prepare(mixed_documents, mixed_tokenizer, tmp_path_factory.mktemp("mixed"))


def texts_of(split: Split) -> list[bytes]:
    return [split.text[a:b].tobytes() for a, b in pairwise(split.doc_offsets)]


def assert_same_batch(found, expected) -> None:
    for name, one, other in zip(expected._fields, found, expected, strict=True):
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one.cpu(), other.cpu()), name


@pytest.fixture
def teacher(tokenizer):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48
    )
    return use_packed(small_llama(tokenizer, **sizes)).eval().requires_grad_(False)


# What a step's log may hold.
LOGGED = {
    "cross_entropy": 2.31234, "boundary": 0.1, "lr": 2e-5, "grad_norm": 0.52, "bytes_per_second": 824_600.0,
    "bytes_per_second_per_device": 412_300.0, "data_wait": 0.0031, "mfu": 0.4123, "peak_memory_bytes": 12.34e9,
}  # fmt: skip

TINY_RECIPE = """
checkpoint_seconds = 0
precision = "fp32"
[log]
every = 1
[teacher]
vocab_size = 300
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2
intermediate_size = 48
seconds = 1.0
[data]
window = 64
batch_bytes = 256
global_batch_bytes = 512
measure_bytes = 1024
score_bytes = 2048
[model]
width = 16
encoder_layers = 1
decoder_layers = 1
state_size = 8
head_dim = 16
bridge_inner = 32
router_inner = 16
[stage."1.1"]
lr = 3e-3
bytes = 2048
[stage."1.2"]
lr = 3e-4
bytes = 2048
[stage."1.3"]
lr = 3e-3
bytes = 2048
[stage."2.1"]
lr = 3e-3
bytes = 2048
[stage."2.2"]
lr = 1e-3
bytes = 2048
lr_scale = {core = 0.5}
distill_weight = 0.1
[control]
lr = 1e-3
"""

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "training/stage.py"]


def run(command, *arguments, expect=0):
    """A command from the repository's root, on one thread; its output."""
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=one_thread(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
