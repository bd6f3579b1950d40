"""A teacher made on the spot, saved, and loaded again; what cannot be a teacher is refused in one line."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from training import teacher
from training.alignment import TokenBytes
from training.errors import UserError
from training.teacher import END_OF_TEXT, load_teacher, small_llama, train_tokenizer
from training.text import Document, is_held_out

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


@pytest.fixture(scope="module")
def tokenizer():
    words = b"the quick brown fox jumps over the lazy dog, don't it? 1234 "
    return train_tokenizer([Document(str(i), words * 3) for i in range(5)], vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return small_llama(tokenizer, **SIZES)


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_the_tokenizer_encodes_any_text_exactly(tokenizer):
    assert len(tokenizer) <= 300
    assert tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT
    tokens = TokenBytes(tokenizer)
    texts = ["the quick fox", " leading", "日本語 👍🏽\r\n\r\n", "e\u0301\t\t1234567", ""]
    for text, aligned in zip(texts, tokens.encode(texts), strict=True):
        assert tokens.join(aligned.ids).tobytes() == text.encode()
        assert tokenizer.decode(aligned.ids.tolist()) == text
    assert {tokens[i] for i in range(len(tokens))} >= {bytes([b]) for b in range(256)}


def test_the_tokenizer_learns_words_with_their_space(tokenizer):
    tokens = TokenBytes(tokenizer)
    (aligned,) = tokens.encode(["the quick brown the 123456"])
    pieces = [tokens[int(i)] for i in aligned.ids]
    assert b" brown" in pieces
    assert pieces[0] == b"the"
    assert not any(b"34" in piece and len(piece) > 3 for piece in pieces)


def test_the_tokenizer_reads_a_sample_only():
    def endless():
        while True:
            yield Document("a", b"some text " * 100)

    assert len(train_tokenizer(endless(), vocab_size=270, sample_bytes=5000)) <= 270


def test_the_tokenizer_never_sees_held_out_documents(tokenizer):
    held_out = next(name for name in map(str, range(1000)) if is_held_out(name))
    documents = [Document("0", b"some other text"), Document(held_out, b"zyxwv zyxwv zyxwv")]
    assert not is_held_out("0")
    pieces = train_tokenizer(documents, vocab_size=300).get_vocab()
    assert "zy" not in pieces
    assert "te" in pieces or "ex" in pieces


def test_a_vocabulary_without_room_or_text_is_refused():
    with pytest.raises(UserError, match="vocab_size 200 must be ≥ 257"):
        train_tokenizer([Document("a", b"a")], vocab_size=200)
    with pytest.raises(UserError, match="no documents"):
        train_tokenizer([])


def test_small_llama(model, tokenizer):
    assert model.config.vocab_size == len(tokenizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, len(tokenizer))
    untied = small_llama(tokenizer, **SIZES, tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_saved_and_loaded_it_is_the_same(model, tokenizer, folder):
    loaded, loaded_tokenizer = load_teacher(folder)
    ids = torch.tensor([[0, 5, 250, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.dtype == torch.float32
    assert not loaded.training
    assert TokenBytes(loaded_tokenizer).fingerprint == TokenBytes(tokenizer).fingerprint
    assert (loaded_tokenizer.bos_token_id, loaded_tokenizer.eos_token_id) == (0, 0)
    assert load_teacher(str(folder), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_gguf_file(model, tokenizer, tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "teacher.gguf"
    write_gguf(gguf, path, model, tokenizer)
    loaded, loaded_tokenizer = load_teacher(path)
    ids = torch.tensor([[5, 250, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    (aligned,) = TokenBytes(loaded_tokenizer).encode(["the quick 日"])
    assert aligned.lengths.sum() == len("the quick 日".encode())


def write_gguf(gguf, path, model, tokenizer) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([3] + [1] * (len(tokenizer) - 1))
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        values = weight.numpy().astype(np.float32)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, n in heads.items():
            if projection in name:  # GGUF keeps rotary pairs side by side
                values = values.reshape(n, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        load_teacher(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_a_wrong_path_is_refused(tmp_path):
    assert "no teacher at" in refused(tmp_path / "missing")
    assert "has no config.json" in refused(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"x")
    assert "is not a .gguf file" in refused(tmp_path / "a.bin")


def test_a_broken_gguf_is_refused(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF nothing")
    assert "cannot load the tokenizer" in refused(tmp_path / "broken.gguf")


def test_a_folder_without_tokenizer_or_weights_is_refused(folder):
    weights = folder / "model.safetensors"
    weights.rename(folder / "elsewhere")
    assert "cannot load the model" in refused(folder)
    (folder / "elsewhere").rename(weights)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "tokenizer" in refused(folder)


def test_missing_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of its weights (model.norm.weight" in refused(folder)


def test_an_unknown_family_is_refused(folder):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "no-such-family"}))
    assert "no-such-family" in refused(folder)


def test_a_slow_tokenizer_is_refused(folder, monkeypatch):
    class Slow:
        is_fast = False

    monkeypatch.setattr(teacher.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Slow())
    assert "has no fast tokenizer" in refused(folder)


def test_a_family_without_inputs_embeds_is_refused(folder, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, input_ids: input_ids)
    assert "family llama, whose forward takes no inputs_embeds" in refused(folder)
