"""What is written after a prompt does not depend on who shares its batch."""

import pytest
import torch

from models import ByteLM, Sampling, generate
from models.byte_lm import core_settings
from models.sampling import Draws
from tests.models.conftest import ABLATED, small_model, small_teacher


@pytest.mark.parametrize("settings", [{}, dict(dechunk="causal"), ABLATED], ids=["hold", "causal", "ablated"])
@pytest.mark.parametrize("mode", ["joint", "multibyte"])
def test_sampled_text_is_the_same_alone_and_in_any_company(mode, settings):
    model = small_model(draft_head=True, **settings)
    prompt, sampling = "Return the ", Sampling(temperature=1.0, top_p=0.95, seed=7)
    alone = generate(model, prompt, max_new_bytes=60, sampling=sampling, mode=mode)
    for place, neighbours in ((0, ["x"]), (2, ["", "a much longer prompt " * 40, "naïve 漢"]), (9, ["y"] * 12)):
        prompts = [*neighbours[:place], prompt, *neighbours[place:]]
        settings = [Sampling(temperature=1.3, seed=i) for i in range(len(prompts))]
        settings[place] = sampling
        together = generate(model, prompts, max_new_bytes=60, sampling=settings, mode=mode)
        assert together[place] == alone


def drawn_from(model: ByteLM, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The logits from which the first of some texts is drawn, byte after byte."""
    rows, pairs = [], Draws.pairs

    def noted(self, logits, active):
        if active[0]:
            rows.append(logits[0].clone())
        return pairs(self, logits, active)

    with monkeypatch.context() as patch:
        patch.setattr(Draws, "pairs", noted)
        generate(model, prompts, max_new_bytes=40, sampling=[Sampling(1.0, seed=5 + i) for i in range(len(prompts))])
    return torch.stack(rows)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX2", reason="measured with AVX2 only")
@pytest.mark.parametrize("heads", [2, 1], ids=["2 queries a key", "4 queries a key"])
@pytest.mark.parametrize("dechunk", ["hold", "causal"])
def test_not_one_bit_of_the_logits_depends_on_long_neighbours_or_many(dechunk, heads, monkeypatch):
    model = small_model(dechunk=dechunk, core=core_settings(small_teacher()) | {"num_key_value_heads": heads})
    alone = drawn_from(model, ["Return the "], monkeypatch)
    for company in (*(["abc def " * size] for size in (15, 30, 60, 120)), ["y"] * 19):
        assert torch.equal(drawn_from(model, ["Return the ", *company], monkeypatch), alone)


def test_the_seed_alone_makes_texts_differ():
    model = small_model()
    texts = generate(model, ["a"] * 4, max_new_bytes=40, sampling=[Sampling(1.0, seed=s) for s in (1, 2, 1, 3)])
    assert texts[0] == texts[2] and len({text.new for text in texts}) == 3
