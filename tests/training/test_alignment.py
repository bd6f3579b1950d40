"""Token ends are exact: for byte-level BPE and SentencePiece-style tokenizers, on text of every kind."""

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from training.alignment import TokenBytes, byte_alphabet
from training.errors import UserError

TEXTS = {
    "plain": "The quick brown fox, and 12345 more.",
    "emoji": "a 👩\u200d👩\u200d👧\u200d👦 family, a flag 🇯🇵, a thumb 👍🏽!",
    "cjk": "日本語のテキスト。中文字符、한국어 텍스트",
    "arabic": "السَّلامُ عليكم ورحمة الله",
    "combining": "e\u0301 n\u0303 a\u030a\u0323 Z\u0351\u036b\u0343",
    "newlines": "one\r\ntwo\rthree\n\n\nfour\r\n\r\n  five\t\n",
    "spaces": "  two before, two after  ",
    "mark": "a ▁ mark and <0x41> in the text",
    "special": "before <|endoftext|> after</s>",
    "one byte": "x",
    "newline": "\n",
    "space": " ",
    "empty": "",
}
TRAINING = ["The quick brown fox jumps over the lazy dog. 12345 and more, one two three four five.", TEXTS["cjk"]] * 4


def wrap(tokenizer: Tokenizer, eos: str = "<|endoftext|>") -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def byte_level(normalizer=None, add_prefix_space=False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TRAINING, trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    return wrap(tokenizer)


def sentencepiece_bpe(prepend: str = "always") -> PreTrainedTokenizerFast:
    """As Llama-2's: spaces become ▁, unknown characters fall back to bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(TRAINING[:1] * 4, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    vocab = {piece: i for i, piece in enumerate(specials + [p for p in learned if p not in specials])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in learned
        if len(piece) > 1
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return wrap(tokenizer, "</s>")


def sentencepiece_unigram() -> PreTrainedTokenizerFast:
    pieces = [("<unk>", 0.0), ("</s>", 0.0)] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [("▁", -2.0), ("▁the", -3.0), ("▁quick", -3.0), ("e", -4.0), ("o", -4.0), ("日本", -4.0), ("▁two", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return wrap(tokenizer, "</s>")


TOKENIZERS = {
    "byte-level": byte_level,
    "byte-level, prefix space": lambda: byte_level(add_prefix_space=True),
    "sentencepiece BPE": sentencepiece_bpe,
    "sentencepiece BPE, normalizer": lambda: sentencepiece_bpe("normalizer"),
    "sentencepiece BPE, no prefix": lambda: sentencepiece_bpe("never"),
    "sentencepiece unigram": sentencepiece_unigram,
}


UNIGRAM = "sentencepiece unigram"


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokens(request) -> TokenBytes:
    return TokenBytes(TOKENIZERS[request.param]())


@pytest.fixture
def texts(request, tokens) -> dict[str, str]:
    """All texts that the tokenizer aligns; a unigram model sees the special token that is written in one."""
    is_unigram = UNIGRAM in request.node.name
    return {name: text for name, text in TEXTS.items() if not (is_unigram and name == "special")}


@pytest.mark.parametrize("name", TEXTS)
def test_lengths_cover_the_text(tokens, texts, name):
    text = TEXTS[name]
    (aligned,) = tokens.encode([text])
    if name not in texts:
        assert aligned is None
        return
    data = text.encode()
    assert aligned is not None
    assert aligned.ids.dtype == aligned.lengths.dtype == np.int32
    assert len(aligned.ids) == len(aligned.lengths)
    assert (aligned.lengths >= 1).all()
    assert aligned.lengths.sum() == len(data)
    if "▁" in text:
        return  # the tokenizer takes the mark for a space: aligned by offsets, so the tokens' own bytes differ
    pieces = [tokens[int(i)] for i in aligned.ids]
    if pieces and len(pieces[0]) > aligned.lengths[0]:
        assert pieces[0][:1] == b" "  # the tokenizer's own space
        pieces[0] = pieces[0][1:]
    assert b"".join(pieces) == data
    assert [len(piece) for piece in pieces] == aligned.lengths.tolist()


def test_a_batch_gives_what_each_text_gives(tokens, texts):
    together = tokens.encode(list(texts.values()))
    for text, found in zip(texts.values(), together, strict=True):
        (alone,) = tokens.encode([text])
        assert np.array_equal(found.ids, alone.ids)
        assert np.array_equal(found.lengths, alone.lengths)


@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe])
def test_special_tokens_in_a_text_are_text(make):
    tokens = TokenBytes(make())
    (aligned,) = tokens.encode([TEXTS["special"]])
    assert tokens.eos_id not in aligned.ids


def test_a_special_token_that_is_seen_in_a_text_refuses_it():
    tokens = TokenBytes(sentencepiece_unigram())
    assert tokens.encode(["the </s> end", "the end"])[0] is None


def test_join_is_the_bytes_of_each_token(tokens):
    ids = np.random.default_rng(0).integers(0, len(tokens), 500)
    assert tokens.join(ids).tobytes() == b"".join(tokens[int(i)] for i in ids)
    assert tokens.join(np.empty(0, dtype=np.int32)).tobytes() == b""


def test_ids_are_the_tokenizers_own():
    tokenizer = byte_level()
    (aligned,) = TokenBytes(tokenizer).encode([TEXTS["plain"]])
    assert aligned.ids.tolist() == tokenizer(TEXTS["plain"], add_special_tokens=False)["input_ids"]


def test_the_callers_tokenizer_keeps_its_settings():
    tokenizer = byte_level()
    before = tokenizer("a <|endoftext|> b")["input_ids"]
    TokenBytes(tokenizer).encode(["a <|endoftext|> b"])
    assert tokenizer("a <|endoftext|> b")["input_ids"] == before
    assert tokenizer.eos_token_id in before


def test_a_token_that_is_only_the_added_space_is_dropped():
    tokens = TokenBytes(sentencepiece_bpe())
    (aligned,) = tokens.encode(["日"])
    assert [tokens[int(i)] for i in aligned.ids] == [b"\xe6", b"\x97", b"\xa5"]
    assert aligned.lengths.tolist() == [1, 1, 1]


def test_tokens_that_split_a_character_are_kept():
    (aligned,) = TokenBytes(byte_level()).encode(["👍🏽"])
    assert len(aligned.ids) > 2
    assert aligned.lengths.sum() == 8


def test_lower_casing_is_aligned_by_offsets():
    tokens = TokenBytes(byte_level(normalizers.Lowercase()))
    text = "The QUICK Brown fox 👍"
    (aligned,) = tokens.encode([text])
    assert aligned.lengths.sum() == len(text.encode())
    assert tokens.join(aligned.ids).tobytes() == text.lower().encode()


def test_nfkc_is_aligned_where_that_is_exact_and_else_refused():
    tokens = TokenBytes(byte_level(normalizers.NFKC()))
    exact, ligature, plain = tokens.encode(["full width \uff21", "the ﬁ ligature splits in two", "plain"])
    assert exact.lengths.sum() == len("full width \uff21".encode())
    assert ligature is None
    assert tokens.join(plain.ids).tobytes() == b"plain"


def test_text_that_is_removed_is_refused():
    tokens = TokenBytes(byte_level(normalizers.Replace(Regex("o"), "")))
    assert tokens.encode(["brown fox", "quick"])[0] is None


def test_byte_alphabet_is_the_tokenizers():
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_fingerprint_tells_tokenizers_apart():
    tokenizer = byte_level()
    assert TokenBytes(tokenizer).fingerprint == TokenBytes(tokenizer).fingerprint
    assert TokenBytes(tokenizer).fingerprint != TokenBytes(sentencepiece_bpe()).fingerprint


def test_a_slow_tokenizer_is_refused():
    class SlowTokenizer:
        eos_token_id = bos_token_id = 0

    with pytest.raises(UserError, match=r"SlowTokenizer is a slow tokenizer.*tokenizer\.json"):
        TokenBytes(SlowTokenizer())


def test_a_tokenizer_without_bos_and_eos_is_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    with pytest.raises(UserError, match="neither an EOS nor a BOS"):
        TokenBytes(tokenizer)


def test_bos_and_eos_stand_in_for_each_other():
    tokens = TokenBytes(byte_level())
    assert tokens.bos_id == tokens.eos_id == 0
