"""Datasets as text: on disk, in rows; streamed, in their own shards. What is wrong with one is told in one line."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.training.conftest import TINY_RECIPE, documents
from training import parts as module
from training.alignment import TokenBytes
from training.data import Batches, held_out_batches
from training.errors import UserError
from training.parallel import Ranks
from training.parts import Hub, RowsPart, ShardPart, find_parts, read_all
from training.recipe import read_recipe
from training.sources import Sources
from training.stream import StreamBatches
from training.text import Skipped, is_held_out

datasets = pytest.importorskip("datasets")

TEXTS = [f"{i}: {document.text.decode()}" for i, document in enumerate(documents(300, seed=2))]


def anything(number, source):
    return True


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    cache = tmp_path / "datasets-cache"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))  # of worker processes
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    module._load.cache_clear()
    yield
    module._load.cache_clear()


@pytest.fixture
def saved(tmp_path) -> str:
    """A dataset written by save_to_disk."""
    dataset = datasets.Dataset.from_dict({"id": list(range(300)), "text": [*TEXTS[:-1], None]})
    dataset.save_to_disk(tmp_path / "saved")
    return f"hf:{tmp_path / 'saved'}"


@pytest.fixture
def files(tmp_path) -> str:
    """A folder of data files, which is a dataset too."""
    (tmp_path / "files").mkdir()
    for i in range(3):
        lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for text in TEXTS[100 * i : 100 * (i + 1)])
        (tmp_path / "files" / f"train-{i}.jsonl").write_text(lines)
    return f"hf:{tmp_path / 'files'}"


def test_a_saved_dataset_is_read_by_rows(saved):
    parts = find_parts([saved])
    assert all(isinstance(part, RowsPart) for part in parts)
    assert sum(part.stop - part.first for part in parts) == 300
    skipped = Skipped()
    assert [document.text.decode() for document in read_all(parts, skipped)] == TEXTS[:-1]
    assert skipped.counts == {"no text": 1}
    assert skipped.first["no text"] == ["saved:train:300"]


def test_a_range_of_rows_is_entered_anywhere(saved, monkeypatch):
    monkeypatch.setattr(module, "MAX_ROW_PARTS", 2)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    _, second = find_parts([saved])
    numbers = [number for number, _ in second.documents(Skipped(), lambda number, source: number % 3 == 0, start=30)]
    assert numbers == list(range(33, 150, 3))
    number, document = next(second.documents(Skipped(), anything, start=30))
    assert (number, document.text.decode()) == (31, TEXTS[180])
    assert document.source.endswith(":181")


@pytest.mark.parametrize("download", [True, False])
def test_a_folder_of_files_is_read_whole_or_streamed(files, download):
    parts = find_parts([files], download=download)
    assert {type(part) for part in parts} == {RowsPart if download else ShardPart}
    assert len(parts) == (300 if download else 3)
    assert [document.text.decode() for document in read_all(parts, Skipped())] == TEXTS
    _, document = next(parts[-1].documents(Skipped(), anything, start=0 if download else 99))
    assert document.text.decode() == TEXTS[-1]


def test_a_shard_that_breaks_is_counted(monkeypatch):
    def rows(shards):
        for shard in shards:
            for i in range(10):
                if shard == 1 and i == 5:
                    raise OSError("the connection\nwas lost")
                yield {"text": f"{shard} {i}" if i else 7}

    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **__: datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2]}),
    )
    parts = find_parts(["hf:owner/name:config"])
    assert [part.identity for part in parts] == [["owner/name:config:train", shard, 3] for shard in range(3)]
    skipped = Skipped()
    texts = [document.text.decode() for document in read_all(parts, skipped)]
    assert texts == [f"{shard} {i}" for shard in range(3) for i in range(1, 5 if shard == 1 else 10)]
    assert skipped.counts == {"no text": 3, "the rest of it is lost": 1}
    assert skipped.first["the rest of it is lost"] == [
        "cannot read owner/name:config:train:1 after record 5: the connection"
    ]


def test_what_the_name_asks_for(monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_dict({"content": ["one", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    parts = find_parts(["hf:owner/name", "hf:owner/name:en"], split="validation", download=True)
    assert asked == [(("owner/name", config), {"split": "validation", "streaming": False}) for config in (None, "en")]
    assert [document.text for document in read_all(parts, Skipped())] == [b"one", b"two"] * 2


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("processes", [0, 2])
def test_a_stream_of_a_dataset(files, tokenizer, download, processes):
    """An epoch is the documents that are not held out, in processes that load the dataset themselves."""
    parts = find_parts([files], download=download)
    batches = StreamBatches(
        parts,
        TokenBytes(tokenizer),
        window=512,
        batch_bytes=1024,
        seed=0,
        streams=2,
        shuffle_bytes=4000,
        workers=processes,
    )
    found: list[str] = []
    while batches.epoch == 0:  # until all streams have read their text; some have begun again by then
        found += [row.rstrip(b"\xff").decode() for row in bytes(next(batches).ids.tolist()).split(b"\xfe")[1:]]
    batches.close()
    sources = {
        document.text.decode(): document.source for part in parts for _, document in part.documents(Skipped(), anything)
    }
    assert set(found) == {text for text, source in sources.items() if not is_held_out(source)}
    assert 280 < len(set(found)) < 300


def test_wrong_datasets_are_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot load hf:.*missing, split train") as error:
        find_parts([f"hf:{tmp_path}/missing"])
    assert "\n" not in str(error.value)
    datasets.Dataset.from_dict({"body": ["a"]}).save_to_disk(tmp_path / "body")
    with pytest.raises(UserError, match="has no column 'text' or 'content', but body"):
        find_parts([f"hf:{tmp_path}/body"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="reading hf:a/b needs datasets: pip install datasets"):
        find_parts(["hf:a/b"])


# ------------------------------------------------------------------------------------------------ a run's sources


def sources_of(tmp_path: Path, name: str, *settings: str) -> Sources:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY_RECIPE)
    overrides = [f'data.paths=["{name}"]', "data.streams=2", "data.workers=0", *settings]
    return Sources(read_recipe(str(recipe), overrides), tmp_path / "cache", Ranks(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("kind", ["saved", "files", "jsonl"])
def test_the_sources_of_a_streamed_run(kind, request, tmp_path):
    if kind == "jsonl":
        name = str(tmp_path / "text.jsonl")
        Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    else:
        name = request.getfixturevalue(kind)
    sources = sources_of(tmp_path, name, "data.stream=true")
    tokenizer = sources.own_tokenizer()
    corpus = sources.corpus(tokenizer)
    assert corpus.train.documents == 0
    assert 2 <= corpus.held_out.documents <= 12
    assert held_out_batches(corpus, window=64, batch_bytes=512, limit_bytes=1024)
    batches = sources.batches(corpus, tokenizer, batch_bytes=512, seed=0)
    assert isinstance(batches, StreamBatches)
    assert len(next(batches).ids) > 64
    again = sources_of(tmp_path, name, "data.stream=true").corpus(tokenizer)
    assert again.fingerprint == corpus.fingerprint
    prepared = sources_of(tmp_path, name)
    whole = prepared.corpus(tokenizer)
    assert whole.train.documents + whole.held_out.documents >= 299
    assert isinstance(prepared.batches(whole, tokenizer, batch_bytes=512, seed=0), Batches)
    assert whole.fingerprint != corpus.fingerprint


def test_a_stream_needs_text(tmp_path):
    with pytest.raises(UserError, match=r"a stream needs text: give --data files or datasets"):
        _ = sources_of(tmp_path, "x", "data.stream=true", "data.paths=[]").parts


def test_a_hub_is_named_by_what_it_reads():
    assert Hub("owner/name", "en", "train", False).label == "owner/name:en:train"
    assert Hub("owner/name", None, "train", True).label == "owner/name:train"


@pytest.mark.parametrize("kind", ["saved", "files"])
def test_documents_of_a_folder_have_the_same_names_wherever_it_lies(kind, request, tmp_path):
    folder = Path(request.getfixturevalue(kind).removeprefix("hf:"))
    shutil.copytree(folder, tmp_path / "elsewhere" / kind)
    here, there = (
        [document.source for part in find_parts([f"hf:{at}"]) for _, document in part.documents(Skipped(), anything)]
        for at in (folder, tmp_path / "elsewhere" / kind)
    )
    assert here == there
    assert all(source.startswith(f"{kind}:train:") for source in here)
