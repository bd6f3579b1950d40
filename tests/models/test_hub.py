"""transformers' generate, streamers and pipelines on a byte-level model."""

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer, pipeline, set_seed
from transformers.generation import BaseStreamer, StopStringCriteria

from models import ByteLM, ByteTokenizer
from models.sampling import Sampling
from models.writer import Writer
from tests.models.conftest import small_model

BOS, EOS = 0xFE, 0xFF
TOKENIZER = ByteTokenizer()
PROMPTS = ["a bc", "", "naïve text"]


@pytest.fixture(scope="module")
def model() -> ByteLM:
    return small_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "model"
    model.save_pretrained(path)
    return path


def encode(prompts, side="left"):
    return TOKENIZER(prompts, return_tensors="pt", padding=True, padding_side=side)


def new_bytes(model, prompts, count, sampling=None):
    return [list(one.new) for one in Writer(model, prompts, sampling=sampling or Sampling()).write(count)]


def ends_soon(model: ByteLM) -> ByteLM:
    """The model, with EOS much likelier."""
    bias = torch.zeros(512)
    bias[[EOS, EOS + 256]] = 4.0
    model.decoder.head.register_forward_hook(lambda head, inputs, logits: logits + bias)
    return model


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_continues_padded_prompts_as_the_writer_does(model, side):
    batch = encode(PROMPTS, side)
    out = model.generate(**batch, max_new_tokens=12)
    assert out.dtype == torch.int64 and torch.equal(out[:, :-12], batch["input_ids"])
    assert out[:, -12:].tolist() == new_bytes(model, PROMPTS, 12)


def test_bos_and_mask_may_be_left_out(model):
    ids = encode(["a bc", "naïve text"])["input_ids"]
    wanted = model.generate(**encode(["a bc", "naïve text"]), max_new_tokens=8)
    assert torch.equal(model.generate(ids, max_new_tokens=8), wanted)
    bare = TOKENIZER("a bc", add_special_tokens=False, return_tensors="pt")
    assert torch.equal(model.generate(**bare, max_new_tokens=8)[:, 4:], wanted[:1, -8:])


def test_no_prompt_is_an_empty_one(model):
    assert model.generate(max_new_tokens=5).tolist() == [[BOS, *new_bytes(model, [""], 5)[0]]]
    assert model.generate(max_new_tokens=5, input_ids=torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)


def test_without_a_limit_two_hundred_bytes_are_written(model):
    assert model.generate(**encode(["a"])).shape[1] <= 2 + 200
    assert model.generate(**encode(["a"]), max_length=20).shape[1] <= 20


def test_texts_end_with_eos_and_padding():
    model = ends_soon(small_model())
    torch.manual_seed(0)
    out = model.generate(**encode(["a bc"]), max_new_tokens=60, do_sample=True, num_return_sequences=6, pad_token_id=0)
    new = out[:, 5:].tolist()
    ends = [row.index(EOS) for row in new if EOS in row]
    assert len(set(ends)) > 1 and max(ends) + 1 == out.shape[1] - 5
    assert all(set(row[row.index(EOS) + 1 :]) <= {0} for row in new if EOS in row)


def test_torchs_seed_repeats_a_run_and_each_sequence_has_its_own(model):
    def run() -> torch.Tensor:
        return model.generate(**encode(["a", "bcd"]), max_new_tokens=16, do_sample=True, num_return_sequences=3)

    set_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), first) and not torch.equal(first, second)
    assert len({tuple(row) for row in first[:, -16:].tolist()}) == 6
    seeds = torch.Generator().manual_seed(3)
    sampling = [
        Sampling(temperature=1.0, seed=seed) for seed in torch.randint(2**63 - 1, (6,), generator=seeds).tolist()
    ]
    prompts = ["a"] * 3 + ["bcd"] * 3
    written = [list(one.new) for one in Writer(model, prompts, sampling=sampling).write(16)]
    assert [text + [EOS] * (16 - len(text)) for text in written] == first[:, -16:].tolist()


def test_greedy_writing_leaves_torchs_generator_alone(model):
    before = torch.get_rng_state()
    model.generate(**encode(["a"]), max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_ends_of_text_stay_in_the_result(model):
    (new,) = new_bytes(model, ["a bc"], 12)
    out = model.generate(**encode(["a bc"]), max_new_tokens=12, eos_token_id=[EOS, new[4]])
    assert out[0, 5:].tolist() == new[: new.index(new[4]) + 1]


def test_settings_are_taken_from_the_call_then_its_configuration_then_the_model(folder):
    model = ByteLM.from_pretrained(folder)
    model.generation_config.max_new_tokens = 7
    ids = encode(["a bc"])
    assert model.generate(**ids).shape[1] == 5 + 7
    assert model.generate(**ids, generation_config=GenerationConfig(max_length=9)).shape[1] == 9
    assert model.generate(**ids, generation_config=GenerationConfig(max_length=9), max_new_tokens=2).shape[1] == 5 + 2


def test_result_as_a_dictionary(model):
    ids = encode(["a"])
    out = model.generate(**ids, max_new_tokens=3, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(**ids, max_new_tokens=3))


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.prompt, self.new, self.ended = None, [], 0

    def put(self, value: torch.Tensor) -> None:
        if self.prompt is None:
            self.prompt = value
        else:
            self.new += value.tolist()

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("seed", range(4))
def test_streamers_get_all_that_is_written(seed):
    model, ids = ends_soon(small_model()), encode(["a bc"])
    recorder, texts = Recorder(), TextIteratorStreamer(TOKENIZER, skip_special_tokens=True)
    for streamer in (recorder, texts):
        torch.manual_seed(seed)
        out = model.generate(**ids, max_new_tokens=40, do_sample=True, streamer=streamer)
    assert torch.equal(recorder.prompt, ids["input_ids"]) and recorder.ended == 1
    assert recorder.new == out[0, 5:].tolist()
    assert "".join(texts) == TOKENIZER.decode(out[0], skip_special_tokens=True)


def test_a_streamer_gets_the_stop_string_too(model):
    (new,) = new_bytes(model, ["a bc"], 12)
    recorder = Recorder()
    out = model.generate(**encode(["a bc"]), max_new_tokens=12, eos_token_id=new[5], streamer=recorder)
    assert recorder.new == out[0, 5:].tolist() == new[: new.index(new[5]) + 1]


def test_time_runs_out(model):
    ids = encode(["a", "bcd"])
    out = model.generate(**ids, max_new_tokens=500, max_time=1e-6)
    assert ids["input_ids"].shape[1] <= out.shape[1] < 100
    assert torch.equal(model.generate(**ids, max_new_tokens=9, max_time=600), model.generate(**ids, max_new_tokens=9))


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([0x61], {}, r"must be integers \[B, L\], got torch.int64 \[1\]"),
        ([[0x61, 256]], {}, "must be bytes, 0 to 255, got 97 to 256"),
        ([[-1]], {}, "must be bytes"),
        ([[BOS, 0x61, EOS, 0x61]], {}, "row 0: .*byte 0xFF at offset 1"),
        ([[0x61, 0x62], [0x61, BOS]], {}, "row 1: .*byte 0xFE at offset 1"),
        ([[0x61]], dict(attention_mask=torch.ones(1, 2)), r"attention_mask must be \[1, 1\]"),
        ([[0x61], [0x62]], dict(streamer=Recorder()), "a streamer takes one sequence, got 2"),
        ([[0x61]], dict(input_ids=torch.tensor([[1]])), "inputs and input_ids are the same"),
        ([[0x61]], dict(max_length=1), "max_length=1 leaves no room after 1 ids"),
        ([[0x61]], dict(num_beams=4), "can't honour num_beams=4"),
        ([[0x61]], dict(mode="fast"), "fast"),
    ],
)
def test_what_is_no_prompt_or_cannot_be_honoured_is_refused(model, ids, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor(ids), **options)


def test_ids_that_are_no_tensor_are_refused(model):
    with pytest.raises(TypeError, match=r"input_ids must be a tensor \[B, L\], got list: use torch.tensor"):
        model.generate([[97]])
    with pytest.raises(TypeError, match="attention_mask must be a tensor"):
        model.generate(torch.tensor([[97]]), attention_mask=[[1]])


def test_an_error_advises_nothing_that_the_call_lacks(model):
    with pytest.raises(ValueError, match="row 0: .*byte 0xFE at offset 0 .* remove it or replace it$"):
        model.generate(torch.tensor([[BOS, BOS, 0x61]]))


def test_stop_criteria_of_strings_are_honoured(model):
    ids = encode(["a bc"])
    plain = model.generate(**ids, max_new_tokens=30)
    (new,) = plain[:, 5:].tolist()
    stop = next(chr(byte) for byte in new[3:] if byte < 128)
    out = model.generate(
        **ids, max_new_tokens=30, stopping_criteria=[StopStringCriteria(tokenizer=TOKENIZER, stop_strings=[stop])]
    )
    assert out[0, 5:].tolist() == new[: new.index(ord(stop)) + 1]
    assert torch.equal(out, model.generate(**ids, max_new_tokens=30, stop_strings=stop, tokenizer=TOKENIZER))


@pytest.fixture(scope="module")
def writer(folder):
    return pipeline("text-generation", model=str(folder))


def test_pipeline_works_from_the_folder_alone(writer, model):
    (new,) = new_bytes(model, ["a bc"], 9)
    text = TOKENIZER.decode(new, skip_special_tokens=True)
    assert writer("a bc", do_sample=False, max_new_tokens=9) == [{"generated_text": "a bc" + text}]
    assert writer("a bc", do_sample=False, max_new_tokens=9, return_full_text=False) == [{"generated_text": text}]


def test_pipeline_takes_batches(writer, model):
    wanted = [TOKENIZER.decode(new, skip_special_tokens=True) for new in new_bytes(model, PROMPTS, 9)]
    for size in (1, 2):
        out = writer(PROMPTS, do_sample=False, max_new_tokens=9, batch_size=size, return_full_text=False)
        assert [one["generated_text"] for (one,) in out] == wanted


def test_pipeline_passes_settings_on(writer):
    torch.manual_seed(0)
    out = writer("a", max_new_tokens=8, temperature=1.3, top_k=20, top_p=0.9, num_return_sequences=3)
    assert len({one["generated_text"] for one in out}) == 3
    torch.manual_seed(0)
    assert out == writer("a", max_new_tokens=8, temperature=1.3, top_k=20, top_p=0.9, num_return_sequences=3)
    with pytest.raises(ValueError, match="can't honour num_beams=2"):
        writer("a", num_beams=2)
