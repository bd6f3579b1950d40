"""The command writes what generation writes, byte for byte, and nothing else, to standard output."""

import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bytekernels import EOS
from models import Generation, Sampling, generate
from models.chat import Marker, main
from tests.models.conftest import small_model

RAW = b"na\xc3\xafve \xe6\xbc\xa2 \x80\x00\r\n\xc3"  # ends inside a character


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(path)
    return str(path)


@pytest.fixture
def run(folder, monkeypatch, capfdbinary):
    """Runs the command on given standard input: what it wrote to standard output and error."""

    def run_main(*arguments: str, stdin: bytes = b"", status: int = 0) -> tuple[bytes, bytes]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        assert main([folder, "--max-new-bytes", "24", *arguments]) == status
        return capfdbinary.readouterr()

    return run_main


def expected(prompt: bytes, **settings) -> Generation:
    return generate(small_model(), prompt, **{"max_new_bytes": 24, **settings})


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_raw_bytes_go_in_and_exactly_the_new_ones_come_out(run, stream):
    out, err = run("--prompt-file", "-", *stream, stdin=RAW)
    assert out == expected(RAW).new and len(out) > 5
    assert err == b""


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_chunks_are_marked_in_the_prompt_too(run, stream):
    out, _ = run("--prompt-file", "-", "--show-chunks", *stream, stdin=RAW)
    assert out.decode() == expected(RAW).with_boundaries("|")
    out, _ = run("--prompt", "some text", "--show-chunks", "--mark", "⏎", *stream)
    assert out.decode() == expected(b"some text").with_boundaries("⏎")


def test_a_prompt_may_be_an_argument_or_a_file_or_empty(run, tmp_path):
    (tmp_path / "prompt").write_bytes(RAW)
    assert run("--prompt-file", str(tmp_path / "prompt"))[0] == expected(RAW).new
    assert run("--prompt", os.fsdecode(RAW.replace(b"\x00", b"")))[0] == expected(RAW.replace(b"\x00", b"")).new
    assert run("--prompt", "")[0] == expected(b"").new
    assert run("--prompt-file", "-", "--replace", stdin=b"a\xff")[0] == expected(b"a?").new


def test_each_line_is_a_prompt(run):
    out, err = run(stdin=b"one\n\ntw\x80")
    assert out == b"".join(expected(line).new + b"\n" for line in (b"one", b"", b"tw\x80"))
    assert err == b""
    assert run(stdin=b"one\r\n\r\ntw\x80\r\n") == (out, b"")
    assert run(stdin=b"one\r") == (expected(b"one\r").new + b"\n", b"")


def test_every_setting_reaches_the_draws(run):
    flags = ["--temperature=0.9", "--top-k=40", "--top-p=0.95", "--min-p=0.01", "--repetition-penalty=1.1", "--seed=5"]
    settings = Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=5)
    drawn = expected(b"x", sampling=settings).new
    assert run("--prompt", "x", *flags)[0] == run("--prompt", "x", "--stream", *flags)[0] == drawn
    assert run("--prompt", "x", *flags[:-1], "--seed=6")[0] != drawn


def test_stop_strings_end_the_text(run):
    whole = expected(b"x").new
    first, second = os.fsdecode(whole[9:11]), os.fsdecode(whole[6:8])
    out, _ = run("--prompt", "x", "--stop", first, "--stop", second)
    assert out == expected(b"x", stop=[whole[9:11], whole[6:8]]).new
    assert out == whole[: len(out)] and len(out) <= 6
    assert run("--prompt", "x", "--stream", "--stop", first, "--stop", second)[0] == out


def test_bf16_and_the_draft_head(tmp_path, capfdbinary):
    small_model(draft_head=True).save_pretrained(tmp_path)
    arguments = [str(tmp_path), "--prompt", "x", "--max-new-bytes", "8"]
    assert main([*arguments, "--mode", "multibyte", "--show-chunks"]) == 0
    written = generate(small_model(draft_head=True), b"x", max_new_bytes=8, mode="multibyte")
    assert capfdbinary.readouterr().out.decode() == written.with_boundaries("|")
    assert main([*arguments, "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert 0 < len(capfdbinary.readouterr().out) <= 8


def test_a_marker_never_gives_half_a_character():
    marker = Marker("|")
    fed = [
        marker.feed(bytes([byte]), [bit]) for byte, bit in zip("a漢".encode() + b"\xe6", [0, 0, 0, 1, 0], strict=True)
    ]
    assert fed == [b"a", b"", b"", "漢|".encode(), b""]
    assert marker.flush() == "\ufffd".encode()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--top-p", "2"], r"top_p must be in \(0, 1\], got 2.0"),
        (["--max-new-bytes", "-1"], "whole number >= 0, got '-1'"),
        (["--mode", "multibyte"], "needs a model with a draft head"),
        (["--stop", ""], "a stop string must not be empty"),
        (["--prompt-file", "missing"], "cannot read missing: No such file"),
        (["--prompt", "a", "--prompt-file", "-"], "not allowed with argument --prompt"),
        (["--prompt-file", "-"], "byte 0xFE at offset 2 is reserved.*--replace"),
        ([], "byte 0xFE at offset 2 is reserved"),
        (["--device", "nowhere"], "--device nowhere is no device"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, arguments, reason, capfdbinary, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xfe\n")))
    with pytest.raises(SystemExit) as stopped:
        main([folder, *arguments])
    out, err = capfdbinary.readouterr()
    assert stopped.value.code == 2 and out == b""
    assert err.count(b"\n") == 1 and re.search(reason, err.decode()), err


@pytest.mark.parametrize("arguments", [[], ["--prompt-file", "-"]])
def test_a_closed_standard_input_is_told_in_one_line(folder, arguments):
    command = [sys.executable, "-m", "models.chat", folder, *arguments]
    told = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command], cwd=Path(__file__).parents[2], capture_output=True, timeout=120
    )
    assert told.returncode == 2 and told.stdout == b""
    assert re.fullmatch(rb"models.chat: standard input is closed: give the text as an argument.*\n", told.stderr)


def test_a_folder_without_a_model_is_refused(tmp_path, capfdbinary):
    for path, reason in [(tmp_path / "none", "is no folder"), (tmp_path, "config.json is not there")]:
        with pytest.raises(SystemExit):
            main([str(path), "--prompt", "x"])
        err = capfdbinary.readouterr().err
        assert err.count(b"\n") == 1 and reason in err.decode()


@pytest.fixture(scope="module")
def tireless(tmp_path_factory) -> str:
    """A model that never ends a document of its own accord, when the likeliest byte is taken."""
    model, path = small_model(), tmp_path_factory.mktemp("tireless")
    with torch.no_grad():
        model.decoder.head.weight[[EOS, EOS + 256]] = 0.0
    model.save_pretrained(path)
    return str(path)


@contextmanager
def started(folder: str, *arguments: str, **streams: int) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "models.chat", folder, "--stream", "--max-new-bytes", "1000000", *arguments]
    environment = {**os.environ, "TERM": "dumb"}
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="pipes break in another way here")
def test_a_closed_pipe_ends_it_quietly(tireless):
    with started(tireless, "--prompt", "x", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert len(process.stdout.read(3)) == 3
        process.stdout.close()
        assert process.wait(timeout=120) == -signal.SIGPIPE
        assert process.stderr.read() == b""


@pytest.mark.skipif(os.name != "posix", reason="terminals are opened in another way here")
def test_on_a_terminal_ctrl_c_stops_the_text_and_ctrl_d_ends(tireless):
    keyboard, terminal = os.openpty()
    with started(tireless, stdin=terminal, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        assert b"Ctrl-D ends" in assert_shows(keyboard, b"> ")
        os.write(keyboard, b"ab\n")
        assert_shows(keyboard, b"ab\r\n", more=30)
        process.send_signal(signal.SIGINT)
        assert_shows(keyboard, b"\r\n> ")
        os.write(keyboard, b"\x04")
        assert process.wait(timeout=60) == 0
    os.close(keyboard)


def assert_shows(keyboard: int, wanted: bytes, more: int = 0) -> bytes:
    """Read a terminal until it shows something, and so many bytes after it."""
    shown, until = b"", time.monotonic() + 120
    while wanted not in shown or len(shown.split(wanted, 1)[1]) < more:
        ready, _, _ = select.select([keyboard], [], [], max(0.0, until - time.monotonic()))
        assert ready, shown
        shown += os.read(keyboard, 4096)
    return shown
