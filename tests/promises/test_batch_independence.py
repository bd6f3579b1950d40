"""What is written after a prompt does not depend on who shares its batch."""

import pytest

from models import Sampling, generate
from tests.models.conftest import small_model


@pytest.mark.parametrize("mode", ["joint", "multibyte"])
def test_sampled_text_is_the_same_alone_and_in_any_company(mode):
    model = small_model(draft_head=True)
    prompt, sampling = "Return the ", Sampling(temperature=1.0, top_p=0.95, seed=7)
    alone = generate(model, prompt, max_new_bytes=60, sampling=sampling, mode=mode)
    for place, neighbours in ((0, ["x"]), (2, ["", "a much longer prompt " * 4, "naïve 漢"]), (9, ["y"] * 12)):
        prompts = [*neighbours[:place], prompt, *neighbours[place:]]
        settings = [Sampling(temperature=1.3, seed=i) for i in range(len(prompts))]
        settings[place] = sampling
        together = generate(model, prompts, max_new_bytes=60, sampling=settings, mode=mode)
        assert together[place] == alone


def test_the_seed_alone_makes_texts_differ():
    model = small_model()
    texts = generate(model, ["a"] * 4, max_new_bytes=40, sampling=[Sampling(1.0, seed=s) for s in (1, 2, 1, 3)])
    assert texts[0] == texts[2] and len({text.new for text in texts}) == 3
