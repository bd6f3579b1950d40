"""Under torchrun: two processes train a small Llama, and in one step of one of them the loss is not finite.

Each writes `rank-<rank>.json`, a file of its own since two processes that print share a line now and then: its
progress, and a sum over all weights that says whether they are finite.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models.core import use_packed
from training import loop, parallel
from training.context import Context, Learner
from training.corpus import Corpus
from training.data import Batches
from training.objectives import next_token
from training.recipe import OptimizerRecipe, StageRecipe
from training.snapshot import Snapshots
from training.stages import TEACHER

BAD_STEP = 3


class Silent:
    every = 1000

    def log(self, step, progress, rate):
        pass

    def progress(self, fraction):
        pass


def main(corpus: Path, folder: Path) -> None:
    ranks = parallel.start("cpu")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, intermediate_size=24)  # fmt: skip
    model = use_packed(LlamaForCausalLM(config))
    TEACHER.freeze_others(model)
    learner = Learner(Context(model, None, StageRecipe(lr=1e-2, bytes=6000)))
    parallel.shard_(learner, ranks.mesh(0), None, keep=())
    named = list(model.named_parameters())
    calls = []

    def objective(batch):
        loss = learner(next_token, batch)
        calls.append(batch)
        bad = ranks.rank == 1 and len(calls) == BAD_STEP
        return loss._replace(total=loss.total * torch.nan) if bad else loss

    progress = loop.train(
        learner, named, objective,
        Batches(Corpus.open(corpus), window=64, batch_bytes=512, seed=3, rank=ranks.rank, world_size=ranks.size),
        stage=StageRecipe(lr=1e-2, bytes=6000), optimizer=OptimizerRecipe(), accumulation=1, ranks=ranks,
        precision=contextlib.nullcontext(), snapshots=Snapshots(folder, ranks), checkpoint_seconds=1e9,
        log=lambda progress: contextlib.nullcontext(Silent()),
    )  # fmt: skip
    total = sum(float(parameter.full_tensor().abs().sum()) for _, parameter in named)
    found = {"steps": progress.step, "skipped": progress.skipped, "weights": total}
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(found))
    parallel.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
