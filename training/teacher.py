"""The token-trained teacher: one made on the spot, or one from a local folder or GGUF file."""

from collections.abc import Iterable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from training.errors import UserError
from training.text import Document, is_held_out

END_OF_TEXT = "<|endoftext|>"
# A word with the space or sign before it | up to three digits | signs with a line's end | line ends | spaces.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TOKENIZER_SAMPLE_BYTES = 8_000_000


def train_tokenizer(
    documents: Iterable[Document], vocab_size: int = 4096, *, sample_bytes: int = TOKENIZER_SAMPLE_BYTES
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the first `sample_bytes` of the documents, held-out ones left out.

    `<|endoftext|>` is its BOS, EOS and padding token; no space is put before a text, nothing is normalised, and
    every byte is in the vocabulary, so that any text is encoded exactly.

    Raises:
        UserError: `vocab_size` below 257, or no documents.
    """
    if vocab_size < 257:
        raise UserError(
            f"a byte-level vocabulary holds 256 bytes and {END_OF_TEXT}: vocab_size {vocab_size} must be ≥ 257"
        )
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = list(_sample(documents, sample_bytes))
    if not sample:
        raise UserError("there are no documents to train a tokenizer on: give more text")
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _sample(documents: Iterable[Document], sample_bytes: int) -> Iterator[str]:
    for document in documents:
        if is_held_out(document.source):
            continue
        yield document.text[:sample_bytes].decode(errors="ignore")
        sample_bytes -= len(document.text)
        if sample_bytes <= 0:
            return


def small_config(
    architecture: str,
    vocab_size: int,
    *,
    hidden_size: int = 256,
    num_hidden_layers: int = 4,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 4,
    intermediate_size: int = 688,
    max_position_embeddings: int = 2048,
    tie_word_embeddings: bool = True,
) -> PreTrainedConfig:
    """The configuration of a small teacher: 4.2 million parameters at the default sizes and a vocabulary of 4096.

    The embeddings are tied: at this size a table of their own for the output would be a fifth of all parameters.

    Args:
        architecture: ``llama``, ``qwen3`` or ``olmo2``. All have the same sizes; the last two normalise queries and
            keys, and the last one normalises what leaves a layer, not what enters it.
        vocab_size: of its tokenizer.
    """
    return AutoConfig.for_model(
        architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_attention_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        rms_norm_eps=1e-5,
        pad_token_id=None,
    )


def small_teacher(tokenizer: PreTrainedTokenizerFast, architecture: str, **sizes: Any) -> PreTrainedModel:
    """A fresh teacher for the tokenizer, float32; ``sizes`` are those of :func:`small_config`."""
    config = small_config(architecture, len(tokenizer), **sizes)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return AutoModelForCausalLM.from_config(config)


def small_llama(tokenizer: PreTrainedTokenizerFast, **sizes: Any) -> PreTrainedModel:
    """:func:`small_teacher` of the family ``llama``."""
    return small_teacher(tokenizer, "llama", **sizes)


def load_teacher(
    path: str | Path, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model and tokenizer of a local Hugging Face folder or a GGUF file. Nothing is fetched from a hub.

    Raises:
        UserError: nothing at `path`, a folder without a model or a fast tokenizer, files that cannot be read or lack
            weights, a family that transformers does not know, or one whose forward does not take `inputs_embeds`.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json: give a Hugging Face model folder or a .gguf file")
        folder, source = path, {}
    elif path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"{path} is not a .gguf file: give a Hugging Face model folder or a .gguf file")
        folder, source = path.parent, {"gguf_file": path.name}
    else:
        raise UserError(f"no teacher at {path}: give a Hugging Face model folder or a .gguf file")

    tokenizer = _load(AutoTokenizer, "tokenizer", path, folder, source)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"the teacher at {path} has no fast tokenizer: save one beside it (tokenizer.json)")
    model, info = _load(
        AutoModelForCausalLM, "model", path, folder, {**source, "dtype": dtype, "output_loading_info": True}
    )
    # transformers fills what is missing with random numbers and goes on.
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"the teacher at {path} lacks {len(missing)} of its weights ({missing[0]}, …): give a complete checkpoint"
        )
    if "inputs_embeds" not in signature(model.forward).parameters:
        family = model.config.model_type
        raise UserError(
            f"the teacher at {path} is of the family {family}, whose forward takes no inputs_embeds: "
            "give one that does (Llama, Qwen2/3, OLMo2/3, …)"
        )
    return model.eval(), tokenizer


def _load(factory: Any, what: str, path: Path, folder: Path, options: dict[str, Any]) -> Any:
    try:
        return factory.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # each reader below transformers has exceptions of its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot load the {what} at {path}: {lines[0]}") from error
