"""Writing: both halves of a pair are drawn together, batches change nothing, draws repeat, stops stop."""

import dataclasses
import re

import pytest
import torch

from bytekernels import BOS, EOS
from models import ByteLM, Generation, Sampling, Writer, generate, stream
from models.byte_lm import core_settings
from tests.models.conftest import ABLATED, PROMPTS, small_model, small_teacher


def whole(ids, bits):
    return torch.tensor(ids, dtype=torch.uint8), torch.tensor([0, len(ids)], dtype=torch.int32), torch.tensor(bits)


def greedy_by_forward(model, prompt: bytes, steps: int) -> tuple[bytes, list[bool]]:
    """The same continuation from whole forward passes, without any state."""
    ids = [BOS, *prompt]
    bits = model(*whole(ids, [True] * len(ids))[:2]).routing.boundary.tolist()
    if prompt and model.config.lookahead:
        row = model(*whole(ids, bits)).logits[-2]
        bits[-1] = bool(row[ids[-1] + 256] > row[ids[-1]])
    for _ in range(steps):
        row = model(*whole(ids, bits)).logits[-1].clone()
        row[[BOS, BOS + 256]] = -torch.inf
        best = int(row.argmax())
        ids.append(best % 256)
        bits.append(best >= 256)
    return bytes(ids[1 + len(prompt) :]), bits[1:]


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_generation_equals_full_recomputation(model, prompt, lookahead):
    model.config.lookahead = model.router.lookahead = lookahead
    with torch.no_grad():
        expected, bits = greedy_by_forward(model, prompt, 12)
    found = generate(model, prompt, max_new_bytes=12)
    written = expected.split(bytes([EOS]))[0]
    assert len(written) > 5
    assert (found.new, list(found.boundaries)) == (written, bits[: len(prompt) + len(written)])


def multibyte_by_forward(model, prompt: bytes, steps: int) -> tuple[bytes, list[bool]]:
    """Each bit from the router's own forward pass over all bytes so far and the draft."""
    ids, bits = [BOS], [True]
    for position in range(len(prompt) + steps):
        output = model(*whole(ids, bits))
        if position < len(prompt):
            ids.append(prompt[position])
        else:
            halves = output.logits[-1].view(2, 256).logsumexp(0)
            halves[BOS] = -torch.inf
            ids.append(int(halves.argmax()))
        ahead = prompt[position + 1] if position + 1 < len(prompt) else int(output.draft[-1].argmax())
        drafted = [*ids, ahead]
        bits.append(bool(model(*whole(drafted, [True] * len(drafted))[:2]).routing.boundary[-2]))
    return bytes(ids[1 + len(prompt) :]), bits[1:]


@pytest.mark.parametrize("settings", [{}, ABLATED], ids=["", "ablated"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_multibyte_prediction_routes_on_the_draft_and_forgets_it(prompt, settings):
    model = small_model(draft_head=True, **settings)
    with torch.no_grad():
        expected, bits = multibyte_by_forward(model, prompt, 12)
    found = generate(model, prompt, max_new_bytes=12, mode="multibyte")
    written = expected.split(bytes([EOS]))[0]
    assert len(written) > 5 and True in bits[len(prompt) :] and False in bits[len(prompt) :]
    assert (found.new, list(found.boundaries)) == (written, bits[: len(prompt) + len(written)])


def test_multibyte_prediction_needs_a_draft_head():
    with pytest.raises(ValueError, match="needs a model with a draft head"):
        generate(small_model(), "x", mode="multibyte")
    with pytest.raises(ValueError, match="mode must be 'joint' or 'multibyte', got 'greedy'"):
        generate(small_model(), "x", mode="greedy")


def with_draft_head(model: ByteLM) -> ByteLM:
    """A small model of the same sizes that can draft."""
    names = ("dechunk", "encoder", "attention_window", "router", "router_layers")
    return small_model(draft_head=True, **{name: getattr(model.config, name) for name in names})


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("mode", "temperature"),
    [
        ("multibyte", 0.0),
        *(pytest.param(*which, marks=SLOW) for which in (("joint", 0.0), ("joint", 1.0), ("multibyte", 1.0))),
    ],
)
def test_a_text_does_not_depend_on_its_batch(model, mode, temperature):
    if mode == "multibyte":
        model = with_draft_head(model)
    settings = [Sampling(temperature, seed=i, min_p=0.01 * i) for i in range(len(PROMPTS))]
    together = generate(model, PROMPTS, max_new_bytes=80, sampling=settings, mode=mode)
    backwards = generate(model, PROMPTS[::-1], max_new_bytes=80, sampling=settings[::-1], mode=mode)
    alone = [
        generate(model, prompt, max_new_bytes=80, sampling=one, mode=mode)
        for prompt, one in zip(PROMPTS, settings, strict=True)
    ]
    assert together == alone == backwards[::-1]
    assert len({text.new for text in together}) == len(PROMPTS) or temperature == 0


def test_texts_that_end_make_room(monkeypatch):
    """Slots of ended texts are left out; the others go on as if nothing had been."""
    model, sizes = small_model(), []
    step = Writer._step
    monkeypatch.setattr(Writer, "_step", lambda self: (sizes.append(len(self._index)), step(self)))
    settings = [Sampling(1.0, seed=i) for i in range(20)]
    together = generate(model, ["ab"] * 20, max_new_bytes=600, sampling=settings)
    assert sizes[0] == 24 and sizes[-1] == 8
    assert together[13] == generate(model, "ab", max_new_bytes=600, sampling=settings[13])
    assert together[2] == generate(model, "ab", max_new_bytes=600, sampling=settings[2])
    assert {text.finish_reason for text in together} <= {"eos", "length"}


def test_the_last_bit_of_a_prompt_is_the_models(model):
    with torch.no_grad():
        model.decoder.head.weight.zero_()
        model.decoder.head.weight[256:] += 1e-3 * torch.randn(256, 24)
        bits = {generate(model, bytes([b]), max_new_bytes=0).boundaries[-1] for b in range(97, 123)}
    assert bits == {True, False}


def test_draws_repeat_with_their_seed_and_differ_between_seeds():
    texts = [
        generate(small_model(), "x", max_new_bytes=20, sampling=Sampling(1.0, seed=s)).new for s in (1, 1, 2, 2**64 - 1)
    ]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def ends_at_once():
    """A model that ends every document where it begins."""
    model = small_model()
    with torch.no_grad():
        for embedding in (model.encoder.embed, model.decoder.embed):
            embedding.weight.copy_(embedding.weight[:1].expand(256, -1))
        state = model.empty_state(1)
        row = model.step(torch.tensor([BOS], dtype=torch.uint8), torch.tensor([True]), state)[0]
        model.decoder.head.weight[EOS] = 2 * model.decoder.head.weight[row.argmax()]
    return model


def test_eos_ends_the_document():
    model = ends_at_once()
    found = generate(model, "", max_new_bytes=50)
    assert found.finished and found.new == b"" and found.finish_reason == "eos"
    assert [(piece.data, piece.finish_reason) for piece in stream(model, "", max_new_bytes=50)] == [(b"", "eos")]


def test_a_repetition_penalty_bars_what_the_text_has():
    model = small_model()
    heavy = Sampling(repetition_penalty=1e9)
    plain, found = (generate(model, b"abc", max_new_bytes=30, sampling=s) for s in (None, heavy))
    assert len(set(plain.new)) < len(plain.new)  # without it bytes come twice
    assert len(set(b"abc" + found.new)) == len(b"abc" + found.new)
    batch = generate(model, [b"abc", b"abc"], max_new_bytes=30, sampling=[Sampling(), heavy])
    assert batch == [plain, found]


def test_a_step_of_the_core_sees_no_more_keys_than_the_longest_text_has(monkeypatch):
    model, surplus = small_model(), []
    close = type(model).close_chunks

    def close_chunks(self, h, closed, state):
        surplus.append(state.cache.longest - int(state.cache.lengths.max()))
        close(self, h, closed, state)

    monkeypatch.setattr(type(model), "close_chunks", close_chunks)
    prompts, sampling = ["hello " * 20, "x"], Sampling(1.0)
    first = generate(model, prompts, max_new_bytes=1, sampling=sampling)[0].new
    generate(model, prompts, max_new_bytes=80, sampling=sampling, stop=[[first], []])  # the longer one ends at once
    assert len(surplus) > 10 and set(surplus) == {0}


@pytest.mark.parametrize("settings", [{}, ABLATED], ids=["", "ablated"])
def test_saved_multibyte_writers_go_on_too(tmp_path, settings):
    model = small_model(draft_head=True, **settings)
    writer = Writer(model, [b"ab", b"c"], mode="multibyte")
    writer.write(10)
    writer.save(tmp_path / "writer")
    assert Writer.load(model, tmp_path / "writer").write(20) == writer.write(20)


def test_files_that_are_no_whole_writer_are_refused(tmp_path):
    model, path = small_model(), tmp_path / "writer"
    with pytest.raises(FileNotFoundError):
        Writer.load(model, path)
    writer = Writer(model, ["ab"])
    writer.save(path)
    with pytest.raises(ValueError, match="must be .* got .* saved by another model"):
        Writer.load(small_model(width=48), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Writer.load(model, path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no writer"):
        Writer.load(model, tmp_path / "model.safetensors")


def test_texts_end_at_the_cores_last_position():
    model = small_model()
    model.core.backbone.config.max_position_embeddings = 80
    found = generate(model, ["", "hello world", "x"], max_new_bytes=900)
    full = [text for text in found if text.finish_reason == "length"]
    assert full
    for text in full:
        assert 0 < len(text.new) < 900
        assert 1 + sum(text.boundaries) == 81  # BOS's chunk, and one that is never read
    assert found[1] == generate(model, "hello world", max_new_bytes=900)
    with pytest.raises(ValueError, match="longer than the core's 80 positions"):
        generate(model, "abc " * 200)


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(temperature=1e39),
        dict(top_k=0),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(min_p=-0.1),
        dict(repetition_penalty=0.0),
        dict(repetition_penalty=1e-50),
        dict(repetition_penalty=1e39),
        dict(seed=2**64),
    ],
)
def test_sampling_refuses_values_out_of_range(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{name} must be .* got {re.escape(str(value))}"):
        Sampling(**settings)


def test_bad_calls_are_refused():
    model = small_model()
    with pytest.raises(ValueError, match="one for each of 2 prompts, got 1"):
        generate(model, ["a", "b"], sampling=[Sampling()])
    with pytest.raises(ValueError, match="max_new_bytes must be >= 0, got -1"):
        generate(model, "a", max_new_bytes=-1)
    with pytest.raises(ValueError, match="byte 0xFF at offset 1 is reserved"):
        generate(model, [b"a", b"a\xff"])
    for one in ("a", bytearray(b"a")):
        with pytest.raises(TypeError, match=r"use \[prompt\]"):
            Writer(model, one)
    for prompts in (bytearray(b"a"), [b"a", bytearray(b"a")], [97]):
        with pytest.raises(TypeError, match=r"must be str.* got (bytearray|int): use bytes\(prompt\)"):
            generate(model, prompts)
    for stop in (None, 7, bytearray(b"ab"), [bytearray(b"ab")], [None], [[bytearray(b"ab")]], [[97]]):
        with pytest.raises(TypeError, match="stop strings must be str or bytes"):
            generate(model, ["a"], stop=stop)
    with pytest.raises(ValueError, match="train with dechunk='hold' or 'causal'"):
        generate(small_model(dechunk="lookahead"), "a")


def test_no_prompts_give_no_texts(tmp_path):
    assert generate(small_model(), []) == [] == list(stream(small_model(), []))
    Writer(small_model(), []).save(tmp_path / "writer")
    assert Writer.load(small_model(), tmp_path / "writer").write(5) == []


def test_a_top_k_of_more_than_there_is_keeps_all():
    texts = [generate(small_model(), "x", max_new_bytes=20, sampling=Sampling(1.0, top_k=k)) for k in (None, 10**10)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("positions", [1, 5, 40])
def test_a_core_may_have_few_positions(positions):
    model = small_model(core=core_settings(small_teacher()) | {"max_position_embeddings": positions})
    found = generate(model, ["", "a"], max_new_bytes=400, sampling=[Sampling(1.0, seed=s) for s in (3, 4)])
    assert found[0].new and all(1 + sum(text.boundaries) <= positions + 1 for text in found)
    assert found[0] == generate(model, "", max_new_bytes=400, sampling=Sampling(1.0, seed=3))
    with pytest.raises(ValueError, match=rf"sequence 1 of the batch, of \d+ chunks, .* core's {positions} positions"):
        generate(model, ["a", "abc " * 200, "b"])


def test_boundaries_are_shown_between_chunks():
    found = generate(small_model(), "hello world", max_new_bytes=0)
    assert found.with_boundaries("").replace("\ufffd", "") == found.text == "hello world"
    assert found.with_boundaries("|").count("|") == sum(found.boundaries)


def test_a_generation_survives_json():
    found = Generation(b"a\x80", b"\xc3", (True, False, True), "stop", b"zz")
    assert Generation.from_json(found.to_json()) == found
    assert Generation.from_json(dataclasses.replace(found, stop=None).to_json()).stop is None


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["joint", "multibyte"])
def test_captured_steps_equal_eager_ones_on_gpu(mode, monkeypatch):
    model = small_model(draft_head=True).cuda()
    settings = [Sampling(1.0, seed=i) for i in range(len(PROMPTS))]
    captured = generate(model, PROMPTS, max_new_bytes=80, sampling=settings, mode=mode)
    monkeypatch.setattr(Writer, "_take_step", Writer._step)
    assert generate(model, PROMPTS, max_new_bytes=80, sampling=settings, mode=mode) == captured


@pytest.mark.gpu
def test_one_capture_serves_several_calls_on_gpu(monkeypatch):
    captures, capture = [], Writer._capture
    monkeypatch.setattr(Writer, "_capture", lambda self: (captures.append(1), capture(self))[1])
    writer = Writer(small_model().cuda(), ["hello"])
    first = writer.write(40)
    list(writer.stream(0))
    graph = writer._graph
    again = Writer(small_model().cuda(), ["hello"]).write(60)
    for _ in range(20):
        last = writer.write(1)
    assert last == again and last[0].new.startswith(first[0].new)
    assert len(captures) == 3 and writer._graph is not graph  # once for each writer, once for more room


@pytest.mark.gpu
def test_a_model_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = generate(small_model().to("cuda:0"), PROMPTS, max_new_bytes=40)
    assert generate(small_model().to("cuda:1"), PROMPTS, max_new_bytes=40) == expected
