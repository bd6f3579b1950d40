"""The picture of a text: its numbers are the scorer's, every byte is there once, the page stands alone."""

import io
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytekernels import BOS
from models import score
from models.show import ByteView, TextView, as_page, as_table, as_text, cells, main, summary, view
from tests.models.conftest import small_model

TEXTS = [b"x", b"plain words", "naïve 漢\U0001f642\n\t".encode(), b"cut \xe2\x82, wrong \x80\xc3 \x00"]
HOSTILE = b"<script>alert('&amp;')</script> & \"x\" $name ${size} </span>"
VOID = {"meta", "br", "wbr"}


def text_of(data: bytes, borders: frozenset[int] = frozenset(), ends: bool = True) -> TextView:
    rows = [ByteView(value, 0.25, at in borders, 2.0, 0.5) for at, value in enumerate(data)]
    rows[-1] = rows[-1]._replace(router=None, bit=None, bit_bits=None)
    return TextView(tuple(rows), ends)


class Page(HTMLParser):
    """Collects a page's tags, and insists that they are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.glyphs: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "b":
            self.glyphs.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "b":
            self.glyphs[-1] += data

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


@pytest.mark.parametrize("options", [{}, dict(dechunk="causal"), dict(lookahead=False, dechunk="causal")])
@pytest.mark.parametrize("data", TEXTS)
def test_bits_per_byte_are_the_scorers(options, data):
    model = small_model(**options)
    ids = torch.tensor([BOS, *data], dtype=torch.uint8)
    expected = score(model, ids, torch.tensor([0, len(ids)], dtype=torch.int32)).bits_per_byte()
    found = view(model, data)
    assert found.bits_per_byte == pytest.approx(expected, abs=1e-6)
    assert bytes(byte.value for byte in found.data) == data
    assert f"{expected:.3f} bits per byte" in summary(found)


def test_the_parts_are_the_byte_and_its_bit():
    model, data = small_model(), b"some bytes"
    ids = torch.tensor([BOS, *data], dtype=torch.uint8)
    with torch.no_grad():
        output = model(ids, torch.tensor([0, len(ids)], dtype=torch.int32))
    probs = output.logits.double().softmax(-1)
    for t, byte in enumerate(view(model, data).data):
        halves = float(probs[t, byte.value]), float(probs[t, byte.value + 256])
        assert byte.byte_bits == pytest.approx(-math.log2(sum(halves)), abs=1e-5)
        if t + 1 < len(data):
            assert byte.bit == bool(output.routing.boundary[t + 1])
            assert byte.router == pytest.approx(float(output.routing.prob[t + 1]))
            assert byte.bit_bits == pytest.approx(-math.log2(halves[byte.bit] / sum(halves)), abs=1e-5)
        else:
            assert (byte.router, byte.bit, byte.bit_bits) == (None, None, None)


def test_a_router_of_chunk_starts_knows_the_last_bit():
    model = small_model(lookahead=False, dechunk="causal")
    found = view(model, b"some bytes")
    assert isinstance(found.data[-1].bit, bool) and found.data[-1].router is not None
    assert found.data[-1].bit_bits is None  # summed out, as the scorer does
    starts = [chunk[0] for chunk in found.chunks[1:]]
    assert starts == [byte for byte in found.data[1:] if byte.bit]


@pytest.mark.parametrize(("ends", "expected"), [(True, ["ab", "c", "d"]), (False, ["a", "b", "cd"])])
def test_chunks_end_or_start_on_a_border(ends, expected):
    text = text_of(b"abcd", frozenset({1, 2}), ends)
    assert ["".join(chr(byte.value) for byte in chunk) for chunk in text.chunks] == expected


@given(st.binary(min_size=1, max_size=30) | st.text(min_size=1).map(str.encode), st.sets(st.integers(0, 30)))
@settings(max_examples=200, deadline=None)
def test_every_byte_stands_in_one_cell_and_every_character_is_shown_once(data, borders):
    text = text_of(data, frozenset(borders))
    chunks = list(cells(text))
    assert [byte for chunk in chunks for cell in chunk for byte in cell.data] == list(text.data)
    assert [[byte for cell in chunk for byte in cell.data] for chunk in chunks] == list(map(list, text.chunks))
    plain = [cell.glyph for chunk in chunks for cell in chunk if cell.kind == "plain"]
    characters = [c for c in data.decode("utf-8", errors="ignore") if c.isprintable() and c != " "]
    assert [glyph.removeprefix("◌") or "◌" for glyph in plain] == characters
    assert all(c.isprintable() or c == "\n" for c in as_text(text))


def test_what_cannot_be_seen_is_shown():
    shown = [
        cell.glyph
        for chunk in cells(text_of("a \n\t\x00\x1b\x7f\u200b\u202e\u0301".encode() + b"\x80"))
        for cell in chunk
    ]
    assert shown == ["a", "·", "↵", "⇥", "␀", "␛", "␡", "U+200B", "U+202E", "◌\u0301", "80"]


def test_a_character_that_a_border_cuts_stands_where_it_begins():
    text = text_of("a€b".encode(), frozenset({1}))
    assert [[cell.glyph for cell in chunk] for chunk in cells(text)] == [["a", "€"], ["82 AC", "b"]]
    assert as_text(text) == "a€|<82 AC>b"


def test_the_table_has_a_line_for_each_byte():
    lines = as_table(text_of("a€".encode(), frozenset({0}))).splitlines()
    assert [line[:4].strip() for line in lines] == ["byte", "61", "", "E2", "82", "AC"]
    assert lines[1].split() == ["61", "a", "0.250", "yes", "2.000", "0.500"]
    assert lines[-1].split() == ["AC", "?", "?", "2.000", "?"]


@pytest.mark.parametrize("data", [*TEXTS, HOSTILE])
def test_the_page_holds_every_byte_once_and_reads_as_the_text(data):
    text = view(small_model(), data)
    page = Page(as_page(text, "runs/<&>"))
    bars = [attrs for tag, attrs in page.tags if tag == "i"]
    assert bytes(int(bar["data-byte"] or "", 16) for bar in bars) == data
    assert page.glyphs == [cell.glyph for chunk in cells(text) for cell in chunk]
    assert len(page.of_class("chunk")) == len(text.chunks)
    for bar, byte in zip(bars, text.data, strict=True):
        numbers = dict(re.findall(r"--(\w):([\d.]+)", bar["style"] or ""))
        assert float(numbers["y"]) == pytest.approx(byte.byte_bits, abs=6e-4)
        assert ("p" in numbers, "b" in numbers) == (byte.router is not None, byte.bit_bits is not None)
        assert bar.get("data-bit") == (None if byte.bit is None else str(int(byte.bit)))


def test_the_page_stands_alone_and_runs_no_script_but_its_own():
    page = as_page(view(small_model(), HOSTILE), "name")
    assert not re.search(r"https?:|@import|url\(|\bsrc=|\bhref=", page)
    tags = [tag for tag, _ in Page(page).tags]
    assert tags.count("script") == tags.count("style") == 1 and "link" not in tags and "img" not in tags
    assert "default-src 'none'" in page


def test_the_page_can_be_used_without_a_mouse_and_read_aloud():
    page = Page(as_page(text_of("ab é".encode(), frozenset({1})), "name"))
    chunks = page.of_class("chunk")
    assert [chunk["tabindex"] for chunk in chunks] == ["0", "-1"]
    assert [chunk["role"] for chunk in chunks] == ["option", "option"]
    assert chunks[0]["aria-label"] == "Chunk 1 of 2: “ab”, 2 bytes, 5.00 bits"
    assert chunks[1]["aria-label"] == "Chunk 2 of 2: “ é”, 3 bytes, 7.00 bits, still open"
    assert "“a”, 1 byte, 2.00 bits, still open" in as_page(text_of(b"a"), "name")
    assert summary(text_of(b"a")).startswith("1 byte, 1 chunk (the last is open)")
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs} <= ids
    assert [attrs.get("aria-pressed") for tag, attrs in page.tags if tag == "button"] == ["false"]


def test_a_line_feed_leaves_its_chunk_whole():
    page = as_page(text_of(b"a\n\nb\nc", frozenset({2})), "name")
    first, second = re.findall(r'<span class="chunk.*?(?=<wbr>|</div>)', page, re.DOTALL)
    assert first.endswith("</span></span><br>") and first.count("<br>") == 2
    assert second.count("<br>") == 1 and "<br><span" in second
    (rule,) = re.findall(r"^\.chunk \{.*?\}", page, re.MULTILINE | re.DOTALL)
    assert (
        "; box-decoration-break: clone" in rule
    )  # both parts of a chunk around a line feed have a border of their own


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_have_contrast_in_both_themes(theme):
    page = as_page(text_of(b"x"), "name")
    pairs = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", page)
    colour = {name: _luminance(both[theme]) for name, *both in pairs}
    for ink, papers, least in [
        ("ink", ("paper", "panel", "pick"), 7.0),
        ("soft", ("paper", "panel", "pick"), 4.5),
        ("router", ("paper",), 4.5),
        ("byte", ("paper",), 3.0),
        ("bit", ("paper",), 3.0),
        ("edge", ("paper",), 3.0),
    ]:
        for paper in papers:
            light, dark = sorted((colour[ink], colour[paper]), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= least, (ink, paper)


def _luminance(colour: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# What a reader does: the next chunk by key, then the other theme.
USE = """<script>
document.querySelector("[aria-selected=true]")
  .dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
document.getElementById("dark").click();
</script></body>"""


def test_a_browser_shows_the_chunks_without_complaint(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    data = "naïve\n".encode() + HOSTILE
    text = view(small_model(), data)
    page = as_page(text, "name").replace("</body>", USE)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    url = (tmp_path / "page.html").as_uri() + "#2"
    command = [browser, *flags, "--enable-logging=stderr", "--dump-dom", url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in ran.stderr.splitlines() if "CONSOLE" in line] == []
    chunks = Page(ran.stdout).of_class("chunk")
    assert len(chunks) == len(text.chunks)
    assert [chunk["aria-selected"] for chunk in chunks].index("true") == 2
    assert ran.stdout.count("<tr>") == 1 + len(text.chunks[2])  # the page's script has filled its table
    assert 'aria-pressed="true"' in ran.stdout and "color-scheme: dark" in ran.stdout.split("<head>")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(path)
    return path


def test_the_command_prints_text_and_writes_a_page(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.html"
    assert main([str(folder), "Return the", "--table"]) == 0
    printed = capsys.readouterr().out
    assert printed.split("\n\n")[0].replace("|", "") == "Return the"
    assert "10 bytes" in printed and len(printed.splitlines()) > 13
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Return the\x80")))
    assert main([str(folder), "-", "--html", str(out)]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert 'data-byte="80"' in out.read_text(encoding="utf-8")
    (tmp_path / "in").write_bytes(b"\xfe\xff")
    assert main([str(folder), "--file", str(tmp_path / "in"), "--replace"]) == 0
    assert capsys.readouterr().out.split("\n\n")[0].replace("|", "") == "??"


def test_mistakes_are_told_in_one_line(folder, tmp_path, capsys):
    (tmp_path / "marked").write_bytes(b"ab\xff")
    small_model(dechunk="lookahead").save_pretrained(tmp_path / "leaky")
    for arguments, reason in [
        ([str(tmp_path / "none"), "x"], "none is no folder"),
        ([str(folder), ""], "the text is empty"),
        ([str(folder)], "TEXT --file is required"),
        ([str(folder), "--file", str(tmp_path / "missing")], "cannot read .*missing: No such file"),
        ([str(folder), "--file", str(tmp_path / "marked")], r"byte 0xFF at offset 2 is reserved.*--replace"),
        ([str(folder), "long", "--max-bytes", "3"], "the text has 4 bytes: give 3 at most"),
        ([str(tmp_path / "leaky"), "x"], "dechunk='lookahead'"),
        ([str(folder), "x", "--device", "cuda:99"], "--device cuda:99"),
        ([str(folder), "x", "--html", str(tmp_path / "no" / "out.html")], "No such file or directory"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        told = capsys.readouterr()
        assert stopped.value.code == 2 and told.out == ""
        assert told.err.count("\n") == 1 and re.search(reason, told.err), told.err
