"""The tokenizer of a byte-level model, as transformers wants one: UTF-8 bytes are the ids."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizer

from bytekernels import BOS, EOS
from models.config import ByteLMConfig
from models.folder import check_descriptions
from models.utf8 import to_bytes, to_text

# A byte's token is the character with its number; the two marks have names.
TOKENS = [chr(byte) for byte in range(BOS)] + ["<bos>", "<eos>"]
IDS = {token: byte for byte, token in enumerate(TOKENS)}


class ByteTokenizer(PreTrainedTokenizer):
    """Text to ids 0 to 255, the bytes of its UTF-8 form, and back.

    A sequence begins with BOS, 0xFE, where special tokens are asked for (the default); EOS, 0xFF, ends a document, and
    pads, on the left. Text is never searched for special tokens: ``"<bos>"`` is five bytes. There is no vocabulary file
    and nothing can be added to the 256 ids.

    A prompt that is not text goes in as a list of its bytes: ``tokenizer(list(data))``.

    Raises:
        ValueError: a token that is none of the 256 is to be added, or to serve as a special one.
    """

    padding_side = "left"

    def __init__(
        self, bos_token: str = TOKENS[BOS], eos_token: str = TOKENS[EOS], pad_token: str = TOKENS[EOS], **options: Any
    ) -> None:
        self.prefix_tokens = [BOS]
        options["special_tokens_pattern"] = "prefix_suffix"
        super().__init__(bos_token=bos_token, eos_token=eos_token, pad_token=pad_token, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, *inputs: Any, **options: Any) -> Self:
        """A tokenizer from a folder, whose files are checked before, or from a repository's name.

        Raises:
            ValueError: a file of the folder's is not JSON.
        """
        folder = Path(pretrained_model_name_or_path, options.get("subfolder") or "")
        if folder.is_dir():
            check_descriptions(folder)
        return super().from_pretrained(pretrained_model_name_or_path, *inputs, **options)

    @property
    def vocab_size(self) -> int:
        return len(TOKENS)

    def get_vocab(self) -> dict[str, int]:
        return dict(IDS)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.SPECIAL_TOKENS_ATTRIBUTES and value is not None:
            _check_token(str(value))
        super().__setattr__(name, value)

    def _add_tokens(self, new_tokens: list[str] | list[AddedToken], special_tokens: bool = False) -> int:
        for token in map(str, new_tokens or ()):
            _check_token(token)
        return super()._add_tokens(new_tokens, special_tokens)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """A token for each byte of ``text`` and of ``pair`` after it; special tokens are not looked for.

        Raises:
            ValueError: the text has a lone surrogate.
        """
        tokens = list(to_bytes(text + (pair or "")).decode("latin-1"))
        return [TOKENS[BOS], *tokens] if add_special_tokens else tokens

    def _convert_token_to_id(self, token: str) -> int | None:
        return IDS.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(TOKENS):
            raise ValueError(_not_a_byte(index))
        return TOKENS[index]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens; the marks show as ``<bos>`` and ``<eos>``."""
        return self._decode([IDS[token] for token in tokens])

    def _decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **options: Any,
    ) -> str:
        """What is not UTF-8 shows as U+FFFD; the marks are dropped, or show as ``<bos>`` and ``<eos>``."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        try:
            data = bytes(ids)
        except ValueError:
            raise ValueError(_not_a_byte(next(i for i in ids if not 0 <= i < len(TOKENS)))) from None
        if skip_special_tokens:
            data = data.translate(None, bytes(self.all_special_ids))
        for mark in (BOS, EOS):
            data = data.replace(bytes([mark]), TOKENS[mark].encode())
        text = to_text(data)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """There is nothing to save: the vocabulary is the bytes."""
        return ()


def _check_token(token: str) -> None:
    if token not in IDS:
        raise ValueError(
            f"token {token!r} can't be added: a byte-level model has the 256 bytes and no other ids; "
            "write the text itself, which is encoded as its bytes"
        )


def _not_a_byte(index: int) -> str:
    return f"id {index} is no byte: ids are 0 to {len(TOKENS) - 1}"


AutoTokenizer.register(ByteLMConfig, ByteTokenizer)
