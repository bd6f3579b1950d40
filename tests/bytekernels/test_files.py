"""Files are whole or not there."""

import json

import pytest

from bytekernels.files import write_json, write_whole


def test_a_write_that_fails_leaves_what_stood_there(tmp_path):
    path = tmp_path / "a" / "file"
    write_whole(path, lambda partial: partial.write_text("whole"))

    def fail(partial):
        partial.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_whole(path, fail)
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "made" / "report.json"
    write_json(path, {"rows": [1]})
    assert json.loads(path.read_text()) == {"rows": [1]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"rows": [float("nan")]})
    with pytest.raises(TypeError):
        write_json(path, {"rows": object()})
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]
