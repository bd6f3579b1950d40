"""Suffix features against a loop over strings, and an encoder that begins as the teacher's embeddings."""

from itertools import pairwise

import pytest
import torch

from bytekernels import BOS, EOS, pack_bytes, routing_of
from models import ByteLM, ByteLMConfig
from models.byte_lm import core_settings
from models.suffix import SuffixFeatures, Vocabulary
from tests.models.conftest import CHUNK, PROMPTS, STRINGS, SUFFIX, small_model, small_teacher

VOCABULARY = Vocabulary(STRINGS, bos_id=48, eos_id=49)


def longest(text: bytes) -> int | None:
    """The first id of the longest string that ends the text."""
    found = [(len(string), -i) for i, string in enumerate(STRINGS) if string and text.endswith(string)]
    return -max(found)[1] if found else None


def feature(suffix: SuffixFeatures, text: bytes) -> torch.Tensor:
    token = {BOS: 48, EOS: 49}.get(text[-1], longest(text))
    return suffix.map(torch.zeros(32) if token is None else suffix.table[token])


@torch.no_grad()
def test_a_feature_is_the_embedding_of_the_longest_string():
    model = small_model(**SUFFIX)
    suffix = model.encoder.suffix
    ids, cu_seqlens = pack_bytes([*PROMPTS, b"hello hell\xff"])
    found, state = suffix(ids, cu_seqlens), suffix.empty_state(len(PROMPTS) + 1)
    for start, stop in pairwise(cu_seqlens):
        for end in range(start + 1, stop + 1):
            expected = feature(suffix, bytes(ids[start:end].tolist()))
            torch.testing.assert_close(found[end - 1], expected)
    rows = torch.tensor([5, 0, 7], dtype=torch.int32)
    torch.testing.assert_close(suffix(ids, cu_seqlens, rows), found[rows])
    position = torch.zeros(len(PROMPTS) + 1, dtype=torch.long)
    while (active := cu_seqlens[:-1] + position < cu_seqlens[1:]).any():
        at = (cu_seqlens[:-1] + position).clamp(max=len(ids) - 1)
        stepped = suffix.step(ids[at], state, active)
        torch.testing.assert_close(stepped[active], found[at[active]])
        position += active


@torch.no_grad()
def test_a_fresh_encoder_is_the_teachers_embeddings_where_the_string_is_the_token():
    torch.manual_seed(0)
    teacher = small_teacher()
    config = ByteLMConfig(width=24, head_dim=12, state_size=8, bridge_inner=40, router_inner=20, **SUFFIX)
    model = ByteLM.from_teacher(teacher, config, VOCABULARY)
    ids, cu_seqlens = pack_bytes([b"hell" + b"o" + b" wor" + b"h"])
    ends = torch.zeros(len(ids), dtype=torch.bool)
    ends[[0, 4, 5, 9, 10]] = True
    h = model.encoder(ids, cu_seqlens, ends_of=routing_of(ends, cu_seqlens))
    torch.testing.assert_close(h, teacher.get_input_embeddings().weight[[48, 2, 3, 4, 0]])


@torch.no_grad()
def test_of_scope_chunk_a_chunk_that_is_a_string_has_its_embedding():
    """In the midst of any text, where of scope "sequence" a longer string would end there."""
    torch.manual_seed(0)
    teacher = small_teacher()
    sizes = dict(width=24, head_dim=12, state_size=8, bridge_inner=40, router_inner=20)
    model = ByteLM.from_teacher(teacher, ByteLMConfig(**sizes, **SUFFIX, suffix_scope="chunk"), VOCABULARY)
    texts = [b"h" + b"el" + b"hell" + b"o", b"h", b"xyz" + b" wor"]  # x, y, z end no chunk: the last is no string
    ids, cu_seqlens = pack_bytes(texts)
    starts, ends = cu_seqlens[:-1].tolist(), torch.zeros(len(ids), dtype=torch.bool)
    ends[[*starts, *(starts[0] + place for place in (1, 3, 7, 8)), starts[1] + 1, starts[2] + 7]] = True
    found = model.encoder.chunks(ids, cu_seqlens, routing_of(ends, cu_seqlens))
    wanted = [48, 0, 1, 2, 3, 48, 0, 48, 4]
    torch.testing.assert_close(found, teacher.get_input_embeddings().weight[wanted])
    h = model.encoder(ids, cu_seqlens)
    torch.testing.assert_close(h, torch.zeros_like(h))  # nothing of it reaches the router
    assert torch.equal(model.encoder.chunks(ids, cu_seqlens, routing_of(ends, cu_seqlens), h), found)


@torch.no_grad()
def test_open_chunks_close_as_in_a_whole_text():
    model = small_model(**CHUNK)
    encoder, suffix = model.encoder, model.encoder.suffix
    texts = [b"hello world hell", b"", b"o", b"helloel"]
    ids, cu_seqlens = pack_bytes(texts)
    draw = torch.Generator().manual_seed(0)
    boundary = (torch.rand(len(ids), generator=draw) < 0.3) | (ids == BOS)
    boundary[cu_seqlens[1:].long() - 1] = True
    expected = suffix.of_chunks(ids, cu_seqlens, routing_of(boundary, cu_seqlens))
    row = 0
    state = encoder.empty_state(1)[-1]
    for start, stop in pairwise(cu_seqlens.tolist()):
        state.counts.zero_()
        for at in range(start, stop):
            suffix.take(ids[at : at + 1], state)
            if boundary[at]:
                torch.testing.assert_close(suffix.close(state, torch.tensor([True]))[0], expected[row])
                row += 1
    assert row == len(expected)
    opened = suffix.open_chunks(ids, cu_seqlens, boundary)
    last = routing_of(boundary, cu_seqlens).cu_chunks[1:].long() - 1
    torch.testing.assert_close(suffix.close(opened, torch.ones(4, dtype=torch.bool)), expected[last])
    assert not opened.counts.any()


def test_strings_and_table_are_saved_and_never_trained(tmp_path):
    model = small_model(**SUFFIX)
    names = {name for name, _ in model.named_parameters() if "suffix" in name}
    assert names == {"encoder.suffix.map.weight"}
    model.save_pretrained(tmp_path)
    again = ByteLM.from_pretrained(tmp_path)
    assert again.encoder.suffix.strings() == [*STRINGS, *[b""] * (50 - len(STRINGS))]
    ids, cu_seqlens = pack_bytes(PROMPTS)
    with torch.no_grad():
        assert torch.equal(again.encoder(ids, cu_seqlens), model.encoder(ids, cu_seqlens))


def test_other_weights_bring_their_own_strings():
    model, other = small_model(**SUFFIX), small_model(**SUFFIX)
    ids, cu_seqlens = pack_bytes([b"hello world"])
    swapped = [*STRINGS]
    swapped[0], swapped[2] = swapped[2], swapped[0]
    other.encoder.suffix.fill(Vocabulary(swapped, 48, 49), other.encoder.suffix.table.clone())
    with torch.no_grad():
        before = model.encoder(ids, cu_seqlens)  # it has its tree now
        model.load_state_dict(other.state_dict())
        after = model.encoder(ids, cu_seqlens)
        assert not torch.equal(before, after)
        assert torch.equal(after, other.encoder(ids, cu_seqlens))


def test_features_without_a_vocabulary_say_so_and_take_over_another_models():
    config = ByteLMConfig(width=24, head_dim=12, state_size=8, core=core_settings(small_teacher()), **SUFFIX)
    model, (ids, cu_seqlens) = ByteLM(config), pack_bytes(PROMPTS)
    with pytest.raises(ValueError, match="no vocabulary yet: make the model by from_teacher, or fill them"):
        model.encoder(ids, cu_seqlens)
    other = small_model(**SUFFIX).encoder.suffix
    model.encoder.suffix.fill_from(other)
    assert model.encoder.suffix.strings() == other.strings()
    assert torch.equal(model.encoder.suffix.table, other.table)
    assert torch.equal(model.encoder.suffix.map.weight, torch.eye(32))


def test_a_vocabulary_of_other_sizes_is_refused():
    teacher = small_teacher()
    config = ByteLMConfig(width=24, head_dim=12, state_size=8, suffix_bytes=7, core=core_settings(teacher))
    with pytest.raises(ValueError, match=r"strings have \d+ bytes, but .* suffix_bytes 7: set suffix_bytes to"):
        ByteLM.from_teacher(teacher, config, VOCABULARY)
    with pytest.raises(ValueError, match="suffix_bytes=7 needs the vocabulary of the teacher's tokenizer"):
        ByteLM.from_teacher(teacher, config)
    long = Vocabulary([*STRINGS, *[b"a"] * 60], 48, 49)
    with pytest.raises(ValueError, match="the tokenizer has 108 ids, but the model's vocabulary 50: resize"):
        small_model(**SUFFIX).encoder.suffix.fill(long, torch.zeros(50, 32))
