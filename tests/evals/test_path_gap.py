"""The gap between a score and the sum over all paths: never negative, smaller for wider beams."""

import json

import pytest

from evals.path_gap import BEAMS, gaps, main, strings_of
from tests.models.conftest import small_model


def test_wider_beams_come_closer():
    found = gaps(small_model(), strings_of(6, 6, seed=1))
    sums = [found["router's path"], *(found[f"beam {beam}, sum"] for beam in BEAMS[1:])]
    assert sums == sorted(sums, reverse=True) and sums[-1] >= -1e-6 and sums[0] > 0
    for beam in BEAMS[1:]:
        assert found[f"beam {beam}, sum"] <= found[f"beam {beam}, best"] <= sums[0] + 1e-9


def test_strings_repeat_with_their_seed():
    assert strings_of(5, 8, 0) == strings_of(5, 8, 0) != strings_of(5, 8, 1)
    assert {len(one) for one in strings_of(5, 8, 0)} == {8}


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    small_model().save_pretrained(tmp_path / "model")
    assert main([str(tmp_path / "model"), "--strings", "3", "--length", "4", "--json", str(tmp_path / "gap.json")]) == 0
    report = json.loads((tmp_path / "gap.json").read_text())
    assert report["strings"] == 3
    assert f"{report['bits_per_byte']['exact']:.4f} bits/byte" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(tmp_path / "model"), "--length", "40"])
