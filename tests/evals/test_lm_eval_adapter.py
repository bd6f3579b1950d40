"""The lm-eval adapter: tasks on local data get what the scorer and the writer give for the same strings."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from evals import lm_eval_adapter
from evals.lm_eval_adapter import ByteLMEval, Writing, main, read_generation
from models import ByteLM, ByteLMConfig, ContinuationScore, Sampling, Scorer, TokenScorer, generate
from tests.models.conftest import small_model, small_teacher
from tests.training.conftest import documents
from training.alignment import TokenBytes
from training.errors import UserError
from training.teacher import load_teacher, train_tokenizer

ROOT = Path(__file__).parents[2]
OFFLINE = {"OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
QUESTIONS = [
    {"question": "", "choices": ["an empty context", "none"], "answer": 0},
    {"question": "Two and two is", "choices": ["four", "five", "größer als fünf"], "answer": 0},
    {"question": "The sky, when it is clear, is", "choices": ["blue", "a 🙂", "x", "grün"], "answer": 2},
    {"question": "日本の首都は ", "choices": ["東京", "京都"], "answer": 1},
    {"question": "Two and two is", "choices": ["4", "5"], "answer": 1},
]
TEXTS = [{"text": text} for text in ("A short one.", "Zwölf Boxkämpfer jagen Viktor. " * 9, "🙂", "one\n\ntwo three\n")]
CHOICE = {
    "task": "choice",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
ROLLING = {
    "task": "rolling",
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": name} for name in ("bits_per_byte", "byte_perplexity", "word_perplexity")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evals") / "model"
    small_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> ByteLM:
    return ByteLM.from_pretrained(folder).eval()


def evaluate(folder: Path, task: dict, rows: list[dict], **settings) -> dict:
    """One task on rows of data, through lm-eval."""
    task = task | {"custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}}
    settings = {"model_args": {"pretrained": str(folder)}, "device": "cpu", "bootstrap_iters": 0} | settings
    return simple_evaluate(
        "bytekernels", tasks=[task], task_manager=TaskManager(include_defaults=False), verbosity=None, **settings
    )


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, doc={}, arguments=each, idx=0) for each in arguments]


def choices(rows: list[dict]) -> list[list[tuple[str, str]]]:
    return [[(row["question"], f" {choice}") for choice in row["choices"]] for row in rows]


def test_choices_are_the_scorers(folder, model):
    results = evaluate(folder, CHOICE, QUESTIONS, batch_size=3)
    scorer = Scorer(model)
    right = []
    for sample, pairs in zip(results["samples"]["choice"], choices(QUESTIONS), strict=True):
        wanted = scorer.score(pairs)
        got = [answer for (answer,) in sample["resps"]]
        assert [ll for ll, _ in got] == pytest.approx([score.log_likelihood for score in wanted], rel=1e-5)
        assert [greedy for _, greedy in got] == [score.is_greedy for score in wanted]
        best = max(range(len(pairs)), key=lambda i: wanted[i].log_likelihood)
        right.append(best == sample["target"])
    assert results["results"]["choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert results["config"]["model_num_parameters"] == model.num_parameters()


def test_rolling_is_bits_per_byte_of_whole_texts(folder, model):
    results = evaluate(folder, ROLLING, TEXTS)["results"]["rolling"]
    texts = [row["text"] for row in TEXTS]
    scores = Scorer(model).rolling(texts)
    nats = -sum(score.log_likelihood for score in scores)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert num_bytes == sum(score.num_bytes for score in scores)
    assert results["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert results["byte_perplexity,none"] == pytest.approx(math.exp(nats / num_bytes), rel=1e-5)
    words = sum(len(re.split(r"\s+", text)) for text in texts)  # as lm-eval counts them
    assert results["word_perplexity,none"] == pytest.approx(math.exp(nats / words), rel=1e-5)


def test_writing_is_the_writers_and_stops(folder, model):
    prompts = [row["question"] for row in QUESTIONS]
    free = [generation.new_text for generation in generate(model, prompts, max_new_bytes=24)]
    stop = free[1][5]
    wanted = [written.split(stop)[0] for written in free]
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, wanted, strict=True)]
    rows[0]["answer"] = "never written"
    task = {
        "task": "writing",
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["never", "", stop], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    results = evaluate(folder, task, rows, batch_size=3)
    assert [sample["resps"] for sample in results["samples"]["writing"]] == [[[written]] for written in wanted]
    assert results["results"]["writing"]["exact_match,none"] == pytest.approx(0.8)


def assert_same(got: list, wanted: list) -> None:
    """Texts and choices exactly, log-likelihoods within rounding."""
    flat = [[x for answer in answers for x in (answer if isinstance(answer, tuple) else (answer,))]
            for answers in (got, wanted)]  # fmt: skip
    assert flat[0] == [pytest.approx(x, rel=1e-5) if isinstance(x, float) else x for x in flat[1]]


REQUESTS = {
    "loglikelihood": instances("loglikelihood", *(pair for pairs in choices(QUESTIONS) for pair in pairs)),
    "loglikelihood_rolling": instances("loglikelihood_rolling", *((row["text"],) for row in TEXTS)),
    "generate_until": instances(
        "generate_until",
        *((row["question"], {"max_gen_bytes": 9, "until": ["a", "e"]}) for row in QUESTIONS),
        *((row["text"], {"do_sample": True, "max_gen_bytes": 7, "seed": 3}) for row in TEXTS),
    ),
}


@pytest.mark.parametrize("settings", [{"batch_size": 3}, {"batch_size": "64"}, {"batch_bytes": "40"}], ids=str)
@pytest.mark.parametrize("kind", REQUESTS)
def test_answers_depend_neither_on_batches_nor_on_order(model, kind, settings):
    requests = REQUESTS[kind]
    alone = getattr(ByteLMEval(model, batch_size=1, device="cpu"), kind)(requests, disable_tqdm=True)
    lm = ByteLMEval(model, device="cpu", max_batch_size=4, **settings)
    assert_same(getattr(lm, kind)(requests, disable_tqdm=True), alone)
    assert_same(getattr(lm, kind)(requests[::-1], disable_tqdm=True), alone[::-1])


def test_draws_of_one_prompt_differ_and_heed_no_other_request(model):
    lm = ByteLMEval(model, device="cpu")
    sampled = {"temperature": 1.0, "max_gen_bytes": 12}
    first, second = lm.generate_until(instances("generate_until", *[("ab", sampled)] * 2), disable_tqdm=True)
    assert first != second
    among = instances("generate_until", ("ab", sampled), ("cd", sampled), ("ab", sampled))
    assert lm.generate_until(among, disable_tqdm=True)[::2] == [first, second]
    (other,) = lm.generate_until(instances("generate_until", ("ab", sampled | {"seed": 1})), disable_tqdm=True)
    assert other not in (first, second)


@pytest.mark.parametrize("seed", [2**64 - 1, -1, -(2**63), "5"])
def test_any_64_bit_seed_draws(model, seed):
    lm = ByteLMEval(model, device="cpu")
    given = {"do_sample": True, "max_gen_bytes": 9, "seed": seed}
    asked = instances("generate_until", ("ab", given))
    assert lm.generate_until(asked, True) == lm.generate_until(asked, True)


@pytest.fixture(scope="module")
def short_core() -> ByteLM:
    return small_model(core={**small_model().config.core, "max_position_embeddings": 80})


def test_a_context_that_is_too_long_to_write_after_is_cut_from_the_left(short_core):
    context, given = "many words " * 40, {"max_gen_bytes": 40}
    asked = instances("generate_until", ("a", given), (context, given))
    cut = Scorer(short_core, truncate=True).fitted_context(context.encode(), spare=40)
    wanted = generate(short_core, ["a", cut], max_new_bytes=40)
    lm = ByteLMEval(short_core, truncate=True, bytes_per_token=1, device="cpu")
    assert lm.generate_until(asked, True) == [generation.new_text for generation in wanted]
    assert len(wanted[1].new) == 40 and len(cut) < len(context)
    with pytest.raises(UserError, match="^generate_until request 1: .* and 10 to be written .* or use truncate=True"):
        ByteLMEval(short_core, device="cpu").generate_until(asked, True)


def test_a_refused_request_is_named(short_core):
    texts = {
        "loglikelihood": [("a long context", " and"), ("x", "a"), ("y", ""), ("z", "b")],
        "loglikelihood_rolling": [("a long text",), ("x",), ("lone \ud800",), ("y",)],
        "generate_until": [("a long text", {}), ("x", {}), ("y", {"topp": 1}), ("z", {})],
    }
    reasons = ["the continuation is empty", "text is not valid Unicode", "generation argument topp=1 is not known"]
    lm = ByteLMEval(short_core, device="cpu")
    for (kind, arguments), reason in zip(texts.items(), reasons, strict=True):
        requests = [
            Instance(kind, doc={}, arguments=each, idx=i % 2, metadata=("mine", i // 2, 1))
            for i, each in enumerate(arguments)
        ]
        with pytest.raises(UserError, match=f"^task mine, document 1, {kind} request 0: {reason}"):
            getattr(lm, kind)(requests, True)


@pytest.mark.parametrize("kind", REQUESTS)
def test_every_answer_is_cached_once_under_its_own_request(model, kind):
    lm = ByteLMEval(model, batch_size=2, device="cpu")
    kept = []
    lm.cache_hook.add_partial = lambda *each: kept.append(each)
    answers = getattr(lm, kind)(REQUESTS[kind], disable_tqdm=True)
    wanted = [(kind, request.args, answer) for request, answer in zip(REQUESTS[kind], answers, strict=True)]
    assert sorted(kept, key=repr) == sorted(wanted, key=repr)


def test_the_progress_bar_can_be_left_out(model, capsys):
    lm = ByteLMEval(model, device="cpu")
    lm.loglikelihood_rolling(REQUESTS["loglikelihood_rolling"], disable_tqdm=True)
    assert capsys.readouterr().err == ""
    lm.loglikelihood_rolling(REQUESTS["loglikelihood_rolling"])
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"batch_size": "auto", "batch_bytes": 7}, [[9], [5, 2], [1, 1, 1]]),
        ({"batch_size": "auto:4", "batch_bytes": 7}, [[9], [5, 2], [1, 1, 1]]),
        ({"batch_size": None, "batch_bytes": 7, "max_batch_size": "2"}, [[9], [5, 2], [1, 1], [1]]),
        ({"batch_size": 4, "batch_bytes": 7, "max_batch_size": 2}, [[9, 5, 2, 1], [1, 1]]),
    ],
)
def test_batches_fill_a_count_or_the_bytes(model, settings, wanted):
    lm = ByteLMEval(model, device="cpu", **settings)
    sizes = []
    lm.scorer.rolling = lambda texts: (
        sizes.append(list(map(len, texts))) or [ContinuationScore(0.0, 0, True)] * len(texts)
    )
    lm.loglikelihood_rolling(instances("loglikelihood_rolling", *(("x" * n,) for n in (5, 2, 9, 1, 1, 1))), True)
    assert sizes == wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, Writing(1024, (), Sampling())),
        ({"until": "\n", "max_gen_toks": 10}, Writing(40, ("\n",), Sampling())),
        ({"until": ["a", ""], "max_new_tokens": 10, "max_gen_bytes": 7}, Writing(7, ("a",), Sampling())),
        ({"do_sample": False, "temperature": 0.7, "num_beams": 1}, Writing(1024, (), Sampling())),
        ({"temperature": 0.0, "use_cache": False}, Writing(1024, (), Sampling())),
        ({"do_sample": True, "top_k": None}, Writing(1024, (), Sampling(temperature=1.0))),
        (
            {"temperature": "0.5", "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 2, "seed": 4},
            Writing(1024, (), Sampling(0.5, 5, 0.9, 0.1, 2.0, 4)),
        ),
    ],
)
def test_generation_arguments_in_bytes(given, wanted):
    assert read_generation(given, 4.0) == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"topp": 0.9}, "generation argument topp=0.9 is not known; there are until, max_gen_bytes, max_gen_toks"),
        ({"num_beams": 4}, "num_beams=4: a byte-level model writes without beams; use num_beams=1"),
        ({"until": ["a", 3]}, "until=.*: 3 is not a string"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"temperature": "warm"}, "could not convert string to float: 'warm'"),
        ({"max_gen_toks": "many"}, "max_gen_toks='many' is not a number >= 0"),
        ({"max_gen_toks": -1}, "max_gen_toks=-1 is not a number >= 0"),
        ({"do_sample": "yes"}, "do_sample='yes': give True or False"),
        ({"until": 3}, "until=3: 3 is not a string"),
        ({"top_k": 2.7}, "'top_k': 2.7.*as an integer"),
        ({"seed": 2**64}, "seed must be a 64-bit integer"),
    ],
)
def test_generation_arguments_that_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        read_generation(given, 4.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("beem=2", "model argument beem=2 is not known; there are pretrained, teacher, dtype, batch_bytes, beam"),
        ("dtype=int8", "dtype='int8': use one of float32, bfloat16"),
        ("mode=fast", "mode='fast': use one of joint, multibyte"),
        ("beam=0", "beam=0 is not a whole number >= 1"),
        ("batch_bytes=all", "batch_bytes='all' is not a whole number >= 1"),
        ("batch_size=none of it", "batch_size='none of it' is not a whole number >= 1"),
        ("batch_size=auto 4", "batch_size='auto 4' is not a whole number >= 1"),
        ("batch_size=0", "batch_size=0 is not a whole number >= 1"),
        ("batch_size=2.7", "batch_size=2.7 is not a whole number >= 1"),
        ("mode=multibyte", "mode='multibyte' needs a model with a draft head"),
        ("bytes_per_token=few", "bytes_per_token='few' is not a number >= 1"),
        ("bytes_per_token=0", "bytes_per_token=0 is not a number >= 1"),
        ("device=tpu", "--device tpu: use cuda or cpu"),
    ],
)
def test_model_arguments_that_are_refused(folder, given, message):
    with pytest.raises(UserError, match=message):
        ByteLMEval.create_from_arg_string(f"pretrained={folder},{given}")


def test_model_arguments_from_the_command_line(folder):
    text = f"pretrained={folder},dtype=bfloat16,batch_bytes=512,beam=2,combine=best,bytes_per_token=2.5"
    lm = ByteLMEval.create_from_arg_string(text, {"batch_size": "8", "max_batch_size": None, "device": "cpu"})
    info = lm.get_model_info()
    assert (info["model_dtype"], info["likelihood"]) == ("torch.bfloat16", "lower bound, beam=2, combine=best")
    assert (info["bytes_per_token"], lm.batch_size, lm.batch_bytes) == (2.5, 8, 512)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A teacher's folder, and beside it ``stage-1``: a byte-level model with its token head."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = train_tokenizer(documents(), 300)
    found = small_teacher(vocab_size=len(tokenizer))
    for part in (found, tokenizer):
        part.save_pretrained(folder / "teacher")
    config = small_model().config.to_dict() | {"token_head": True}
    ByteLM.from_teacher(found, ByteLMConfig.from_dict(config)).save_pretrained(folder / "stage-1")
    return folder / "teacher"


@pytest.mark.parametrize("which", ["teacher", "stage-1"])
def test_teachers_and_models_of_stage_1_are_scored_in_bytes(teacher, which):
    arguments = {"teacher": str(teacher)}
    scored, tokenizer = load_teacher(teacher)
    if which == "stage-1":
        arguments["pretrained"] = str(teacher.parent / which)
        scored = ByteLM.from_pretrained(arguments["pretrained"]).eval()
    tokens = TokenBytes(tokenizer)
    scores = TokenScorer(scored, tokens.encode, bos_id=tokens.bos_id).rolling([row["text"] for row in TEXTS])
    wanted = ContinuationScore.joined(scores).bits_per_byte
    results = evaluate(teacher, ROLLING, TEXTS, model_args=arguments)
    assert results["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(wanted, rel=1e-5)
    assert results["config"]["likelihood"] == "along the teacher's tokens"
    with pytest.raises(UserError, match="teachers are only scored here"):
        ByteLMEval(**arguments, device="cpu").generate_until(REQUESTS["generate_until"])
    with pytest.raises(UserError, match="beam=2: with teacher=.* bits play no part"):
        ByteLMEval(**arguments, beam=2, device="cpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "no model is given: --model_args pretrained=MODEL"),
        ("pretrained=nowhere", "nowhere"),
        ("teacher=nowhere", "no teacher at nowhere"),
    ],
)
def test_models_that_are_not_there(given, message):
    with pytest.raises(UserError, match=message):
        ByteLMEval.create_from_arg_string(given, {"device": "cpu"})


def test_chat_templates_are_refused(folder):
    with pytest.raises(UserError, match="no chat template: leave out --apply_chat_template"):
        evaluate(folder, CHOICE, QUESTIONS, apply_chat_template=True)


@pytest.fixture
def on_disk(tmp_path) -> Path:
    """The choices as files: a task in YAML on rows in JSON lines."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    (tmp_path / "choice.yaml").write_text(yaml.safe_dump(CHOICE | data))
    return tmp_path


# lm-eval's command line without the thousands of its own tasks, which take seconds to list.
PROGRAM = """
import functools, sys
import lm_eval.tasks
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
from evals.lm_eval_adapter import main
main(sys.argv[1:])
"""


def test_the_command_under_torchrun_gives_what_one_process_gives(folder, on_disk):
    (on_disk / "program.py").write_text(PROGRAM)
    given = ["--model_args", f"pretrained={folder},batch_bytes=40", "--tasks", "choice", "--include_path", on_disk]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, on_disk / "program.py", *given, "--output_path", on_disk / "out.json", "--log_samples"],
        cwd=ROOT,
        env={**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT), "HF_HOME": str(on_disk / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (written,) = on_disk.glob("**/out_*.json")
    results = json.loads(written.read_text())
    (samples,) = on_disk.glob("**/samples_choice_*.jsonl")
    wanted = evaluate(folder, CHOICE, QUESTIONS)
    assert results["config"]["processes"] == 2
    assert results["results"]["choice"]["acc,none"] == wanted["results"]["choice"]["acc,none"]
    for line, sample in zip(samples.read_text().splitlines(), wanted["samples"]["choice"], strict=True):
        got = [float(log_likelihood) for ((log_likelihood, _),) in json.loads(line)["resps"]]
        assert got == pytest.approx([log_likelihood for ((log_likelihood, _),) in sample["resps"]], rel=1e-5)


def test_the_command_tells_a_mistake_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(lm_eval_adapter, "cli_evaluate", lambda: ByteLMEval("nowhere", beem=2))
    with pytest.raises(SystemExit) as end:
        main(["--tasks", "choice"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: model argument beem=2 is not known; there are pretrained")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--tasks", "x"], ["--model", "bytekernels", "--device", "cpu", "--batch_size", "auto", "--tasks", "x"]),
        (["run", "--config=c.yaml"], ["run", "--model", "bytekernels", "--config=c.yaml"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        (["--help"], ["--help"]),
    ],
)
def test_what_the_command_hands_to_lm_eval(monkeypatch, given, wanted):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(lm_eval_adapter.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(lm_eval_adapter, "cli_evaluate", lambda: None)
    main(given)
    assert sys.argv[1:] == wanted
