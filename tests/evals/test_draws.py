"""Random draws that repeat: by their key alone."""

import os
import subprocess
import sys
from pathlib import Path

from evals.draws import generator


def test_the_key_alone_decides():
    first, other, again = generator("task", 0, 1), generator("task", 0, 2), generator("task", 0, 1)
    drawn, others = [first.random() for _ in range(3)], [other.random() for _ in range(3)]
    assert drawn == [again.random() for _ in range(3)] != others


def test_keys_that_look_alike_are_different():
    keys = [("a", 1), ("a", "1"), ("a1",), ("a", 1, ""), (1, "a"), ("a", -1), ("a\x001",)]
    assert len({generator(*key).random() for key in keys}) == len(keys)


def test_draws_are_those_of_other_processes():
    code = "from evals.draws import generator; print(generator('task', 3).random())"
    root = Path(__file__).parents[2]
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {f"{generator('task', 3).random()}\n"}


def test_any_text_is_a_key():
    keys = [("\ud800",), ("\udc00",), ("\N{GRINNING FACE}",), ("",), ()]
    assert len({generator(*key).random() for key in keys}) == len(keys)
