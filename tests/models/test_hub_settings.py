"""transformers' generation arguments: which are honoured, which weigh more, which are refused."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, MaxLengthCriteria, TopKLogitsWarper

from models.hub_settings import DEFAULT_NEW_BYTES, HubSettings
from models.sampling import Sampling


def settings(*levels: GenerationConfig, **arguments) -> HubSettings:
    return HubSettings.of(levels, arguments)


def test_nothing_given_is_greedy_to_the_default_length():
    found = settings()
    assert found.sampling == Sampling() and found.new_bytes(5) == DEFAULT_NEW_BYTES
    assert (found.stop, found.copies, found.pad, found.max_time, found.as_dict) == ((), 1, 0xFF, None, False)


def test_sampling_draws_among_all_bytes_unless_told_otherwise():
    assert settings(do_sample=True).sampling == Sampling(temperature=1.0)
    assert settings(do_sample=True, top_k=0).sampling.top_k is None
    found = settings(do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    assert found.sampling == Sampling(0.7, 5, 0.9, 0.1, 1.2)
    assert settings(repetition_penalty=1.2).sampling == Sampling(repetition_penalty=1.2)


def test_stronger_levels_win_and_the_rest_stays():
    weak = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=0.5, top_p=0.9)
    strong = GenerationConfig(max_length=30, temperature=0.6)
    found = settings(weak, strong, temperature=0.7)
    assert found.sampling == Sampling(temperature=0.7, top_p=0.9) and found.new_bytes(10) == 20
    assert settings(weak, strong, max_new_tokens=3, max_length=30).new_bytes(10) == 3
    assert settings(weak, max_length=None, temperature=None).new_bytes(10) == 5


def test_ends_of_text():
    assert settings(eos_token_id=0xFF).stop == ()
    assert settings(eos_token_id=torch.tensor([10, 0xFF])).stop == (b"\n",)
    assert settings(eos_token_id=10, stop_strings=["漢", "ab"]).stop == ("漢".encode(), b"ab", b"\n")
    assert settings(stop_strings="ab").stop == (b"ab",)


def test_values_that_ask_for_nothing_are_accepted():
    found = settings(
        GenerationConfig(num_beams=1, typical_p=1.0, use_cache=True),
        **dict(num_beams=1, min_length=0, logits_processor=LogitsProcessorList(), stopping_criteria=[]),
        **dict(assistant_model=None, output_scores=False, synced_gpus=None, use_cache=False, num_assistant_tokens=20),
    )
    assert found == settings()


@pytest.mark.parametrize(
    "arguments",
    [
        dict(num_beams=2),
        dict(min_new_tokens=3),
        dict(no_repeat_ngram_size=2),
        dict(typical_p=0.9),
        dict(output_scores=True),
        dict(logits_processor=[TopKLogitsWarper(5)]),
        dict(prefix_allowed_tokens_fn=lambda batch, ids: [1]),
        dict(assistant_model="small"),
        dict(cache_implementation="static"),
        dict(max_new_token=3),
        dict(inputs_embeds=torch.zeros(1, 1, 1)),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"can't honour {name}="):
        settings(**arguments)


def test_a_long_value_is_refused_in_short():
    with pytest.raises(ValueError, match="can't honour inputs_embeds=") as refused:
        settings(inputs_embeds=torch.zeros(30, 30, 30))
    assert len(str(refused.value).split(": leave it out")[0]) < 100


def test_numpys_integers_are_integers():
    found = settings(max_new_tokens=np.int64(7), pad_token_id=np.uint8(3))
    assert (found.new_bytes(5), found.pad) == (7, 3)


def test_configurations_are_read_as_strictly():
    with pytest.raises(ValueError, match="can't honour num_beams=2"):
        settings(GenerationConfig(num_beams=2))
    with pytest.raises(ValueError, match="can't honour stopping_criteria with MaxLengthCriteria"):
        settings(stopping_criteria=[MaxLengthCriteria(5)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens must be an int of at least 1, got 0"),
        (dict(max_new_tokens=2.0), "max_new_tokens must be an int of at least 1, got 2.0"),
        (dict(do_sample="yes"), "do_sample must be True or False, got 'yes'"),
        (dict(do_sample=True, temperature=0.0), "temperature must be above 0 with do_sample=True, got 0.0"),
        (dict(do_sample=True, top_k=-1), "top_k must be an int of at least 0, got -1"),
        (dict(do_sample=True, top_p=1.5), r"top_p must be in \(0, 1\], got 1.5"),
        (dict(num_return_sequences=2), "num_return_sequences=2 needs do_sample=True"),
        (dict(eos_token_id=[256]), "eos_token_id must be bytes, .* got 256"),
        (dict(eos_token_id=0xFE), "eos_token_id must be bytes, .* got 254"),
        (dict(pad_token_id=-1), "pad_token_id must be an int from 0 to 255, got -1"),
        (dict(pad_token_id=256), "pad_token_id must be an int from 0 to 255, got 256"),
        (dict(max_new_tokens=True), "max_new_tokens must be an int of at least 1, got True"),
        (dict(bos_token_id=1), "bos_token_id must be 254, got 1"),
        (dict(max_time=0), "max_time must be seconds above 0, got 0"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        settings(**arguments)


def test_sampling_settings_without_sampling_are_pointed_out():
    with pytest.warns(UserWarning, match="'temperature': 0.7.* change nothing without do_sample=True"):
        assert settings(temperature=0.7).sampling == Sampling()
