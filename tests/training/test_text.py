"""Documents from files of every kind and from the Python installation; what cannot be read is counted or refused."""

import gzip
import json
import multiprocessing
import signal

import pytest

from training import text
from training.errors import UserError
from training.loop import told_to_stop
from training.text import Skipped, hash_fraction, is_held_out, python_docs, read_documents


def read(*data, skipped=None):
    return [(document.source, document.text.decode()) for document in read_documents([str(d) for d in data], skipped)]


def test_text_files_keep_their_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes("é\r\nb\rc\n".encode())
    (tmp_path / "b.md").write_bytes(b"# title")
    assert read(tmp_path / "a.txt", tmp_path / "b.md") == [("a.txt:1", "é\r\nb\rc\n"), ("b.md:1", "# title")]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_jsonl_and_the_records_it_cannot_read(tmp_path, ending):
    lines = [
        json.dumps({"text": "first\r\n"}).encode(),
        b"{not json",
        b"",
        json.dumps({"content": "second"}).encode(),
        json.dumps({"title": "no text"}).encode(),
        json.dumps(["a list"]).encode(),
        json.dumps({"text": 7}).encode(),
        b'{"text": "\xff\xfe"}',
        b'{"text": "\\ud800"}',
        json.dumps({"text": "  "}).encode(),
        json.dumps({"text": "third"}).encode(),
    ]
    path = tmp_path / f"records{ending}"
    path.write_bytes((gzip.compress if ending.endswith("gz") else bytes)(b"\n".join(lines)))
    skipped = Skipped()
    name = path.name
    assert read(path, skipped=skipped) == [(f"{name}:1", "first\r\n"), (f"{name}:4", "second"), (f"{name}:11", "third")]
    assert skipped.counts == {"bad JSON": 1, "no text": 4, "invalid UTF-8": 2}
    assert skipped.first["bad JSON"] == [f"{path}:2"]
    assert skipped.as_dict()["no text"] == {"count": 4, "first": [f"{path}:{n}" for n in (5, 6, 7)]}


def test_jsonl_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    data = zstandard.compress(b'{"text": "one"}\n{"text": "two"}\n')
    path.write_bytes(data)
    assert read(path) == [("a.jsonl.zst:1", "one"), ("a.jsonl.zst:2", "two")]
    path.write_bytes(data[:5] + b"damage" + data[11:])
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl\.zst"):
        read(path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "content": ["one", None, "drei 👍"]}), path)
    skipped = Skipped()
    assert read(path, skipped=skipped) == [("a.parquet:1", "one"), ("a.parquet:3", "drei 👍")]
    assert skipped.counts == {"no text": 1}
    parquet.write_table(pyarrow.table({"body": ["one"]}), path)
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text' or 'content' \(it has body\)"):
        read(path)
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet"):
        read(path)


def test_globs_are_sorted_and_named_from_their_root(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/er/c.txt"):
        (tmp_path / name).write_text(name)
    assert [source for source, _ in read(tmp_path / "**" / "*.txt")] == ["a.txt:1", "b.txt:1", "deep/er/c.txt:1"]


def test_a_long_text_is_cut_into_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PART_BYTES", 64)
    paragraphs = "\n\n".join(f"paragraph {i} of some length" for i in range(20))
    lines = "\n".join(f"line {i} of some length" for i in range(20))
    (tmp_path / "a.txt").write_text(paragraphs)
    (tmp_path / "b.txt").write_text(lines)
    (tmp_path / "c.txt").write_text("x" + "日本語" * 50)
    for name in ("a.txt", "b.txt", "c.txt"):
        skipped = Skipped()
        parts = [part for _, part in read(tmp_path / name, skipped=skipped)]
        assert "".join(parts) == (tmp_path / name).read_text()
        assert len(parts) > 5
        assert max(len(part.encode()) for part in parts) <= 64
        assert not skipped.counts
        if name != "c.txt":
            assert all(part.endswith("\n") for part in parts[:-1])
        if name == "a.txt":
            assert all(part.startswith("paragraph") for part in parts)


def test_invalid_utf8_is_skipped_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good")
    (tmp_path / "b.txt").write_bytes(b"bad \xff")
    skipped = Skipped()
    assert read(tmp_path / "*.txt", skipped=skipped) == [("a.txt:1", "good")]
    assert skipped.first["invalid UTF-8"] == [f"{tmp_path}/b.txt:1"]
    assert str(skipped) == "invalid UTF-8: 1"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", r"no file .*missing\.txt: check the path"),
        ("*.parquet", r"no file matches .*\*\.parquet: check the pattern"),
        ("a.csv", r"cannot read .*a\.csv: its ending is none of \.txt"),
        ("folder", r"folder is a folder: name its files"),
        ("untitled.jsonl", r"no record of .*untitled\.jsonl has a text: name its column 'text' or 'content'"),
        ("empty.txt", r"no text in .*empty\.txt .*: give files with text"),
        ("broken.jsonl.gz", r"cannot read .*broken\.jsonl\.gz"),
    ],
)
def test_wrong_data_is_one_clear_line(tmp_path, name, message):
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "folder").mkdir()
    (tmp_path / "untitled.jsonl").write_text('{"title": "a"}')
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}' * 99)[:-20])
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_paths_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(UserError):
        read_documents([str(tmp_path / "missing.txt")])
    with pytest.raises(TypeError, match="wrap it in a list"):
        read_documents("a.txt")


def test_held_out_depends_on_the_name_alone():
    held_out = [name for name in (f"file-{i}" for i in range(10_000)) if is_held_out(name)]
    assert 150 < len(held_out) < 250
    assert held_out[:3] == ["file-47", "file-65", "file-75"]  # the same on every machine
    assert not set(held_out) - {name for name in held_out if is_held_out(name, share=0.5)}
    assert hash_fraction("a", "held-out") != hash_fraction("a", "order")


@pytest.fixture
def installation(tmp_path, monkeypatch):
    files = {
        "stdlib/module.py": (
            '"""The module."""\nclass A:\n    """A class.\n\n    Indented.\n    """\n'
            '    def f(self):\n        "Of f."\n'
        ),
        "stdlib/copy_of.py": 'def f():\n    """The\n    module."""\ndef g():\n    """Its own."""\n',
        "stdlib/broken.py": '"""Never seen."""\ndef',
        "stdlib/test/test_a.py": '"""A test."""',
        "stdlib/site-packages/other.py": '"""Not of the standard library."""',
        "stdlib/generated.py": '# DO NOT EDIT\n"""Generated."""',
        "stdlib/surrogate.py": 'def f():\n    "\\ud800"\n',
        "packages/pkg/mod_pb2.py": '"""Generated."""',
        "packages/pkg/mod.py": "async def f():\n    '''Asynchronous: é.'''\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    paths = {"stdlib": f"{tmp_path}/stdlib", "purelib": f"{tmp_path}/packages", "platlib": f"{tmp_path}/packages"}
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: paths)


def test_python_docs(installation):
    documents = list(python_docs(processes=2))
    topics = [d for d in documents if d.source.startswith("pydoc_data.topics/")]
    assert len(topics) > 50
    assert b"assert" in next(d.text for d in topics if d.source.endswith("/assert"))
    found = {d.source: d.text.decode() for d in documents if d not in topics}
    assert found.keys() == {"stdlib/module.py", "stdlib/copy_of.py", "site-packages/pkg/mod.py"}
    assert found["site-packages/pkg/mod.py"] == "Asynchronous: é.\n"
    # "The module." stands in two files, and is kept in the one that comes first.
    both = [found["stdlib/module.py"], found["stdlib/copy_of.py"]]
    assert sorted(both) in (
        ["A class.\n\nIndented.\n\nOf f.\n", "The\nmodule.\n\nIts own.\n"],
        ["Its own.\n", "The module.\n\nA class.\n\nIndented.\n\nOf f.\n"],
    )
    assert list(python_docs(processes=1)) == documents


def test_python_docs_stop_at_the_limit(installation):
    documents = list(python_docs())
    total = sum(len(d.text) for d in documents)
    fewer = list(python_docs(limit_bytes=total // 2))
    assert fewer == documents[: len(fewer)]
    assert 0 < sum(len(d.text) for d in fewer) <= total // 2


def test_workers_end_when_told_whatever_the_run_does():
    """Or a run that has read enough would wait for ever for a worker that is still writing."""
    with told_to_stop(), multiprocessing.get_context("fork").Pool(1, initializer=text._start_worker) as pool:
        assert pool.apply(signal.getsignal, (signal.SIGTERM,)) == signal.SIG_DFL
