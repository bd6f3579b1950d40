"""Writing: both halves of a pair are drawn together, prompts are any bytes, draws repeat."""

import pytest
import torch

from bytekernels import BOS, EOS
from models import ByteTokenizer, Sampling, generate
from models.generation import draw, prompt_boundaries
from tests.models.conftest import small_model


def greedy_by_forward(model, prompt: bytes, steps: int) -> tuple[bytes, list[bool]]:
    """The same continuation from whole forward passes, without any state."""
    ids, bits = [BOS, *prompt], prompt_boundaries(model, bytes([BOS]) + prompt)
    for step in range(steps + 1):
        flat = torch.tensor(ids, dtype=torch.uint8)
        if step == 0:
            if len(ids) == 1:
                continue
            row = model(flat, torch.tensor([0, len(ids)], dtype=torch.int32), torch.tensor(bits)).logits[-2]
            bits[-1] = bool(row[ids[-1] + 256] > row[ids[-1]])
            continue
        row = model(flat, torch.tensor([0, len(ids)], dtype=torch.int32), torch.tensor(bits)).logits[-1].clone()
        row[[BOS, BOS + 256]] = -torch.inf
        best = int(row.argmax())
        ids.append(best % 256)
        bits.append(best >= 256)
    return bytes(ids[1 + len(prompt) :]), bits[1:]


@pytest.mark.parametrize("prompt", [b"", b"a", "naïve 漢".encode()])
def test_greedy_generation_equals_full_recomputation(model, prompt):
    with torch.no_grad():
        expected, bits = greedy_by_forward(model, prompt, 12)
    found = generate(model, prompt, max_new_bytes=12)
    written = expected.split(bytes([EOS]))[0]
    assert len(written) > 5
    assert (found.new, list(found.boundaries)) == (written, bits[: len(prompt) + len(written)])


def test_the_last_bit_of_a_prompt_is_the_models(model):
    with torch.no_grad():
        model.decoder.head.weight.zero_()
        model.decoder.head.weight[256:] += 1e-3 * torch.randn(256, 24)
        bits = {generate(model, bytes([b]), max_new_bytes=0).boundaries[-1] for b in range(97, 123)}
    assert bits == {True, False}


def test_draws_repeat_with_their_seed_and_differ_between_seeds():
    model = small_model()
    texts = [generate(model, "x", max_new_bytes=20, sampling=Sampling(1.0, seed=s)).new for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_eos_ends_the_document():
    model = small_model()
    with torch.no_grad():
        for embedding in (model.encoder.embed, model.decoder.embed):
            embedding.weight.copy_(embedding.weight[:1].expand(256, -1))
        state = model.empty_state(1)
        row = model.step(torch.tensor([BOS], dtype=torch.uint8), torch.tensor([True]), state)[0]
        best = model.decoder.head.weight[row.argmax()].clone()
        model.decoder.head.weight[EOS] = 2 * best
    found = generate(model, "", max_new_bytes=50)
    assert found.finished and found.new == b""


def test_draw_respects_top_k_and_top_p():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings):
        return {draw(logits, Sampling(1.0, **settings), generator) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.6) == {0, 1}
    assert drawn(top_p=0.5) == {0}
    assert {draw(logits, Sampling(), generator)} == {0}


@pytest.mark.parametrize("settings", [dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)])
def test_sampling_refuses_values_out_of_range(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
        Sampling(**settings)


def test_boundaries_are_shown_between_chunks():
    model = small_model()
    found = generate(model, "hello world", max_new_bytes=0)
    assert found.with_boundaries("").replace("\ufffd", "") == found.text == "hello world"
    assert found.with_boundaries("|").count("|") == sum(found.boundaries)


def test_byte_tokenizer_refuses_its_own_marks():
    with pytest.raises(ValueError, match="byte 0xFE at offset 2 is reserved"):
        ByteTokenizer().encode(b"ab\xfe")
    with pytest.raises(ValueError, match="lone surrogates"):
        ByteTokenizer().encode("a\ud800")
    assert ByteTokenizer(replace=True).encode(b"ab\xfe\xff") == b"ab??"
    assert ByteTokenizer().decode(ByteTokenizer().encode("naïve 漢")) == "naïve 漢"
