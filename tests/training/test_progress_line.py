"""What a person sees of a stage, on a terminal and in a file."""

import contextlib
import fcntl
import io
import math
import os
import pty
import re
import struct
import termios
import textwrap

import pytest

from tests.training.conftest import LOGGED
from training import progress_line
from training.meter import READINGS
from training.progress_line import ProgressLine, described, human


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_file_gets_plain_lines_thirty_seconds_apart_and_one_at_the_end():
    stream, clock = io.StringIO(), Clock()
    line = ProgressLine("2.2 end to end", stream=stream, clock=clock)
    for second in range(101):  # a step and a log each second
        line.show({"loss": float(second)})
        line.move(second / 100)
        clock.now += 1
    line.close()
    line.close()
    assert stream.getvalue() == textwrap.dedent("""\
        2.2 end to end   0%, loss 0
        2.2 end to end  30%, loss 30  ETA 01:10
        2.2 end to end  60%, loss 60  ETA 00:40
        2.2 end to end  90%, loss 90  ETA 00:10
        2.2 end to end 100%, loss 100
        """)
    assert "\r" not in stream.getvalue()


def test_stage_that_logs_nothing_prints_nothing():
    stream = io.StringIO()
    line = ProgressLine("1.1", stream=stream, clock=Clock())
    line.move(0.5)
    line.close()
    assert stream.getvalue() == ""


def test_time_left_counts_from_the_step_resumed_at():
    stream, clock = io.StringIO(), Clock()
    line = ProgressLine("1.1", stream=stream, clock=clock)
    line.move(0.5)
    clock.now += 60
    line.show({"loss": 1.0})
    line.move(0.6)  # a tenth a minute: four minutes to go
    assert stream.getvalue().endswith("ETA 04:00\n")


def on_terminal(columns, values=LOGGED, title="    2.2 end to end"):
    """What a terminal of that width is sent: every state of the line, as drawn."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    clock = Clock()
    with os.fdopen(theirs, "w") as stream:
        line = ProgressLine(title, stream=stream, clock=clock)
        line.move(0.25)
        clock.now += 60
        line.show(values)
        line.move(0.5)
        line._bar.refresh()
        line.show(values)
        line._bar.refresh()
        line.close()
    sent = b""
    with contextlib.suppress(OSError):  # the end of what was sent
        while piece := os.read(ours, 65536):
            sent += piece
    os.close(ours)
    return [state for state in re.split(r"[\r\n]+", sent.decode()) if state.strip()]


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120, 200])
def test_bar_fits_the_terminal(columns):
    states = on_terminal(columns)
    assert len(states) >= 2
    assert all(len(state.rstrip()) <= columns for state in states)


def test_bar_shows_all_that_fits_and_losses_longest():
    wide = on_terminal(200)[-1]
    assert wide.startswith("    2.2 end to end ") and "50%" in wide
    everything = "cross_entropy 2.312  boundary 0.1  lr 2e-05  norm 0.52  825 kB/s  wait 0.3%  MFU 41.2%  12.3 GB"
    assert f"{everything}  ETA 02:00" in wide
    narrow = on_terminal(80)[-1]
    assert "cross_entropy 2.312  boundary 0.1" in narrow and "GB" not in narrow


@pytest.mark.parametrize(
    ("room", "shown"),
    [
        (None, "a 1  b 2  lr 0.1  norm 3  5 kB/s  ETA 00:09"),
        (43, "a 1  b 2  lr 0.1  norm 3  5 kB/s  ETA 00:09"),
        (42, "a 1  b 2  lr 0.1  5 kB/s  ETA 00:09"),
        (30, "a 1  b 2  5 kB/s  ETA 00:09"),
        (20, "a 1  b 2  ETA 00:09"),
        (18, "a 1  b 2"),
        (5, "a 1"),
        (-4, ""),
    ],
)
def test_what_goes_first_where_there_is_no_room(room, shown):
    values = {"a": 1.0, "b": 2.0, "lr": 0.1, "grad_norm": 3.0, "bytes_per_second": 5000.0}
    assert described(values, 9.0, room) == shown


def test_every_reading_has_its_form():
    assert set(READINGS) - {"bytes_per_second_per_device"} <= set(progress_line._FORMS)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0 B/s"),
        (412.3, "412 B/s"),
        (999.7, "1 kB/s"),
        (412_300.0, "412 kB/s"),
        (3_210_000.0, "3.21 MB/s"),
        (1.5e12, "1.5 TB/s"),
        (math.nan, "nan B/s"),
    ],
)
def test_human_units(value, words):
    assert human(value, "B/s") == words
