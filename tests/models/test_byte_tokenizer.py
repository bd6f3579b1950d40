"""The tokenizer: bytes are the ids, and transformers' own machinery works on it."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from models import ByteTokenizer
from models.utf8 import to_text

TOKENIZER = ByteTokenizer()


@given(st.text())
def test_text_becomes_its_bytes_after_bos_and_comes_back(text):
    ids = TOKENIZER(text)["input_ids"]
    assert ids == [0xFE, *text.encode()]
    assert TOKENIZER.encode(text, add_special_tokens=False) == list(text.encode())
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


@given(st.lists(st.integers(0, 255)))
def test_any_ids_decode_to_their_text(ids):
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == to_text(bytes(ids))
    tokens = TOKENIZER.convert_ids_to_tokens(ids)
    assert TOKENIZER.convert_tokens_to_ids(tokens) == ids
    assert TOKENIZER.convert_tokens_to_string(tokens) == TOKENIZER.decode(ids)


def test_the_vocabulary_is_the_bytes():
    assert TOKENIZER.vocab_size == len(TOKENIZER) == 256
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(256))
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (0xFE, 0xFF, 0xFF)


def test_incomplete_characters_show_and_marks_have_names():
    assert TOKENIZER.decode([0xFE, *b"a\xe6\xbc", 0xFF]) == "<bos>a\ufffd<eos>"
    assert TOKENIZER.decode([0xFE, 0xC3, 0xFF, 0xA9], skip_special_tokens=True) == "é"
    assert TOKENIZER.decode(0x61) == "a"


def test_special_tokens_are_not_looked_for_in_text():
    assert TOKENIZER("<bos>a<eos>")["input_ids"] == [0xFE, *b"<bos>a<eos>"]
    assert TOKENIZER.tokenize("a<eos>") == list("a<eos>")


def test_batches_are_padded_on_the_left():
    batch = TOKENIZER(["a", "bcd"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[0xFF, 0xFF, 0xFE, 0x61], [0xFE, 0x62, 0x63, 0x64]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert TOKENIZER.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["a", "bcd"]


def test_a_pair_is_one_sequence():
    encoded = TOKENIZER("ab", "cd", return_special_tokens_mask=True)
    assert encoded["input_ids"] == [0xFE, *b"abcd"] and encoded["special_tokens_mask"] == [1, 0, 0, 0, 0]


def test_truncation_keeps_bos():
    assert TOKENIZER("abcdef", truncation=True, max_length=4)["input_ids"] == [0xFE, *b"abc"]


def test_bytes_that_are_not_text_go_in_as_a_list():
    assert TOKENIZER(list(b"a\x80"))["input_ids"] == [0xFE, 0x61, 0x80]


def test_what_has_no_bytes_is_refused():
    with pytest.raises(ValueError, match="lone surrogates"):
        TOKENIZER("a\ud800")
    with pytest.raises(ValueError, match="id 256 is no byte: ids are 0 to 255"):
        TOKENIZER.decode([97, 256])
    with pytest.raises(ValueError, match="id -1 is no byte"):
        TOKENIZER.convert_ids_to_tokens([-1])


def test_nothing_can_be_added_to_the_vocabulary():
    with pytest.raises(ValueError, match="token '<tool>' can't be added"):
        ByteTokenizer().add_tokens("<tool>")
    with pytest.raises(ValueError, match="token '<mask>' can't be added"):
        ByteTokenizer(mask_token="<mask>")
    tokenizer = ByteTokenizer()
    with pytest.raises(ValueError, match="token '<pad>' can't be added"):
        tokenizer.pad_token = "<pad>"
    tokenizer.pad_token = "a"
    assert tokenizer.pad_token_id == 0x61


def test_there_is_no_chat_template():
    with pytest.raises(ValueError, match="chat_template is not set"):
        TOKENIZER.apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("load", [ByteTokenizer.from_pretrained, AutoTokenizer.from_pretrained])
def test_saved_tokenizer_comes_back(load, tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is ByteTokenizer and len(loaded) == 256 and loaded.padding_side == "left"
    assert loaded("naïve<eos>")["input_ids"] == TOKENIZER("naïve<eos>")["input_ids"]
    assert loaded.special_tokens_map == TOKENIZER.special_tokens_map


def test_a_long_text_takes_no_time_to_speak_of():
    text = "naïve 漢字\n" * 7000  # 119 kB
    begin = time.perf_counter()
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"], skip_special_tokens=True) == text
    assert time.perf_counter() - begin < 2  # 0.08 s on an idle core
