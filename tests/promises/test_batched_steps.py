"""Eight texts together take fewer than half the steps of eight texts apart.

That is with the chunks of a random model, whose lengths differ most, so that texts wait most for each other; what a
trained model gains by the clock is for benchmarks/bench_decode.py to say.
"""

from models import Sampling, Writer
from tests.models.conftest import small_model


def test_a_batch_of_eight_takes_fewer_than_half_of_the_steps(monkeypatch):
    steps = []
    step = Writer._step
    monkeypatch.setattr(Writer, "_step", lambda self: (steps.append(1), step(self)))
    model, settings = small_model(), [Sampling(temperature=1.0, top_p=0.5, seed=i) for i in range(8)]
    prompts = [f"prompt {i} " for i in range(8)]
    apart = [Writer(model, [p], sampling=s).write(96)[0] for p, s in zip(prompts, settings, strict=True)]
    steps_apart = len(steps)
    together = Writer(model, prompts, sampling=settings).write(96)
    assert together == apart
    assert 2 * (len(steps) - steps_apart) < steps_apart
