"""Snapshots: what was saved when it was saved, whole or not there, and errors that name the file."""

import json
import resource
import signal

import pytest
import torch

from training.checkpoint import COMPLETE
from training.errors import UserError
from training.parallel import Ranks
from training.snapshot import Snapshots

ALONE = Ranks(0, 1, torch.device("cpu"))


def blank(saved):
    return {name: torch.full(one.size, -1, dtype=one.dtype) for name, one in saved.items()}


def saved(folder, steps, *, keep=2):
    snapshots = Snapshots(folder, ALONE, keep)
    for step in steps:
        snapshots.save(step, {"x": torch.full((300, 300), float(step)), "n": torch.tensor(step)}, {"step": step})
    snapshots.wait()
    return snapshots


def test_it_holds_what_the_tensors_were(tmp_path):
    snapshots, x = Snapshots(tmp_path / "s", ALONE), torch.randn(500, 500)
    kept = x.clone()
    snapshots.save(3, {"x": x}, {"words": ["a", 1]})
    x.zero_()  # the write goes on beside this
    snapshots.wait()
    tensors, about = snapshots.load(blank)
    assert torch.equal(tensors["x"], kept)
    assert about == snapshots.about() == {"words": ["a", 1]}


def test_nothing_is_found_where_nothing_is(tmp_path):
    snapshots = Snapshots(tmp_path / "none", ALONE)
    assert snapshots.newest() is None
    assert snapshots.load(blank) is None
    assert snapshots.about() == {}


def test_the_newest_ones_are_kept(tmp_path):
    snapshots = saved(tmp_path, [1, 5, 20, 100], keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000020", "step-000000100"]
    assert snapshots.load(blank)[1] == {"step": 100}


def test_a_folder_without_its_mark_is_not_there(tmp_path):
    snapshots = saved(tmp_path, [1, 2])
    (tmp_path / "step-000000002" / COMPLETE).unlink()
    (tmp_path / ".step-000000003.partial").mkdir()
    assert snapshots.load(blank)[1] == {"step": 1}


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "metadata", "mark"])
def test_a_damaged_file_is_named_and_the_older_snapshot_is_whole(tmp_path, damage):
    snapshots = saved(tmp_path, [1, 2])
    newest = snapshots.newest()
    file = newest / {"metadata": ".metadata", "mark": COMPLETE}.get(damage, "__0_0.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content[:-1] if damage == "cut" else content)
    if damage == "remove":
        file.unlink()
    with pytest.raises(UserError) as error:
        snapshots.load(blank)
    assert f"checkpoint {newest} is damaged: {file.name} is missing or not what was written" in str(error.value)
    assert "remove that folder to go on from step-000000001" in str(error.value)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    tensors, about = snapshots.load(blank)
    assert about == {"step": 1}
    assert (tensors["x"] == 1).all()


def test_a_full_disk_is_one_clear_line(tmp_path):
    """A limit on the size of files stands in for the disk's end."""
    snapshots = saved(tmp_path, [1])
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write a checkpoint in .*step-000000001 is whole, and --resume"):
            saved(tmp_path, [2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert snapshots.load(blank)[1] == {"step": 1}


def test_a_failed_write_is_noticed_without_waiting(tmp_path, monkeypatch):
    snapshots = saved(tmp_path, [1])
    monkeypatch.setattr("training.snapshot._Writer.finish", lambda *_: 1 / 0)
    snapshots.save(2, {"x": torch.ones(2)}, {})
    snapshots._writing.exception()
    with pytest.raises(UserError, match="cannot write a checkpoint"):
        snapshots.poll()
    snapshots.poll()  # it is told once


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write a checkpoint in .*/file/s: .*\(there is no older one\)"):
        Snapshots(tmp_path / "file" / "s", ALONE).save(1, {"x": torch.ones(1)}, {})


def test_another_size_does_not_fit(tmp_path):
    snapshots = saved(tmp_path, [1])
    with pytest.raises(UserError, match="checkpoint .*step-000000001 does not fit this run"):
        snapshots.load(lambda saved: {"x": torch.zeros(2, 2)})
    with pytest.raises(UserError, match="does not fit this run: .*y"):
        snapshots.load(lambda saved: {"y": torch.zeros(2, 2)})


def test_every_file_has_its_hash(tmp_path):
    newest = saved(tmp_path, [1]).newest()
    files = json.loads((newest / COMPLETE).read_text().split("\n", 1)[1])["files"]
    assert {path.name for path in newest.iterdir()} == {*files, COMPLETE}
