"""How a model reads a text: its chunks, the router's probability and the surprise of every byte.

``python -m models.show MODEL TEXT`` prints the text with ``|`` between chunks; ``--html out.html`` writes a page that
needs nothing but a browser.
"""

import argparse
import math
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

import torch
from torch.nn import functional as F

from bytekernels import BOS
from models.byte_lm import ByteLM
from models.command import (
    CommandParser,
    add_model_arguments,
    add_replace_argument,
    end_quietly_with_the_pipe,
    input_bytes,
    load_model,
    whole_number,
)
from models.likelihood import path_log_probs, refuse_leaks

MAX_BYTES = 16384
LONG_CHUNK = 24  # characters; a longer chunk may be broken across lines


class ByteView(NamedTuple):
    """One byte of a text as the model reads it.

    Attributes:
        value: 0..255.
        router: the router's probability of a chunk border at this byte; None where it needs the byte after the last.
        bit: whether there is one; None where it is not known.
        byte_bits: ``-log2 P(byte | what came before)``, both of its halves summed.
        bit_bits: ``-log2 P(bit | byte, what came before)``; None at the last byte, whose bit is summed out. Only both
            parts together, along the router's path of bits, are a likelihood.
    """

    value: int
    router: float | None
    bit: bool | None
    byte_bits: float
    bit_bits: float | None

    @property
    def bits(self) -> float:
        return self.byte_bits + (self.bit_bits or 0.0)


class TextView(NamedTuple):
    """A text as the model reads it: at least one byte, cut into chunks by the router.

    Attributes:
        data: its bytes.
        ends: True for a router of chunk ends (lookahead), False for one of chunk starts.
    """

    data: tuple[ByteView, ...]
    ends: bool

    @property
    def chunks(self) -> list[tuple[ByteView, ...]]:
        """The bytes, chunk by chunk; whether the last chunk ends where the text does is never known."""
        size = len(self.data)
        if self.ends:
            cuts = [at + 1 for at, byte in enumerate(self.data[:-1]) if byte.bit]
        else:
            cuts = [at for at, byte in enumerate(self.data) if at and byte.bit]
        return [self.data[start:end] for start, end in zip([0, *cuts], [*cuts, size], strict=True)]

    @property
    def side(self) -> str:
        """What the router decides on."""
        return "end" if self.ends else "start"

    @property
    def bits_per_byte(self) -> float:
        """What :meth:`models.Score.bits_per_byte` says of the text: ``-log2 P(bytes, bits) / bytes`` along the path."""
        return math.fsum(byte.bits for byte in self.data) / len(self.data)

    @property
    def bit_bits_per_byte(self) -> float:
        """The bits' part of :attr:`bits_per_byte`."""
        return math.fsum(byte.bit_bits or 0.0 for byte in self.data) / len(self.data)


@torch.no_grad()
def view(model: ByteLM, data: bytes) -> TextView:
    """Read a text in one forward pass over BOS and its bytes.

    Args:
        model: a byte-level model after stage 2, in evaluation mode.
        data: bytes without 0xFE and 0xFF.

    Raises:
        ValueError: no bytes, or a dechunk weight that sees the next byte, so that there is no surprise to speak of.
    """
    refuse_leaks(model)
    if not data:
        raise ValueError("the text is empty: give at least one byte")
    ids = torch.tensor([BOS, *data], dtype=torch.uint8, device=model.device)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32, device=model.device)
    output = model(ids, cu_seqlens)
    boundary, prob = output.routing.boundary, output.routing.prob
    # Row t predicts byte t+1: the rows of all bytes but BOS are those of all but the last.
    path = path_log_probs(output.logits, ids, cu_seqlens, boundary)[:-1].cpu() / -math.log(2)
    log_probs = F.log_softmax(output.logits[:-1].float(), dim=-1).double().view(-1, 2, 256).logsumexp(dim=1)
    byte_bits = log_probs.gather(1, ids[1:, None].long())[:, 0].cpu() / -math.log(2)
    routers: list[float | None] = prob[1:].tolist()
    bits: list[bool | None] = boundary[1:].tolist()
    bit_bits: list[float | None] = (path - byte_bits).clamp(min=0).tolist()
    bit_bits[-1] = None
    if model.config.lookahead:
        routers[-1] = bits[-1] = None
    rows = zip(data, routers, bits, byte_bits.tolist(), bit_bits, strict=True)
    return TextView(tuple(ByteView(*row) for row in rows), model.config.lookahead)


class Cell(NamedTuple):
    """A character, or what a chunk border or broken UTF-8 leaves of one.

    Attributes:
        glyph: what stands for it on the page.
        plain: what stands for it between words: a space is a space.
        kind: ``plain``, ``space``, ``mark`` (a control's picture), ``code`` (a code point's number) or ``hex``.
        data: its bytes.
    """

    glyph: str
    plain: str
    kind: str
    data: tuple[ByteView, ...]


def cells(text: TextView) -> Iterator[list[Cell]]:
    """The characters of each chunk. A character that a border cuts stands where it begins; the rest is shown in hex."""
    data = bytes(byte.value for byte in text.data)
    position, character_end, character = 0, 0, None
    for chunk in text.chunks:
        found, chunk_end = [], position + len(chunk)
        while position < chunk_end:
            begins = position >= character_end
            if begins:
                character, character_end = character_at(data, position)
            end = min(character_end, chunk_end)
            if begins and character is not None:
                glyph, plain, kind = visible(character)
            else:
                glyph, kind = data[position:end].hex(" ").upper(), "hex"
                plain = f"<{glyph}>"
            found.append(Cell(glyph, plain, kind, text.data[position:end]))
            position = end
        yield found


def character_at(data: bytes, position: int) -> tuple[str | None, int]:
    """The character that begins at a position, None for a byte that is not UTF-8 there, and where it ends."""
    for end in range(position + 1, min(position + 4, len(data)) + 1):
        try:
            return data[position:end].decode("utf-8"), end
        except UnicodeDecodeError:
            continue
    return None, position + 1


def visible(character: str) -> tuple[str, str, str]:
    """Glyph, plain text and kind of a character; nothing that is not printed stays unseen."""
    code, category = ord(character), unicodedata.category(character)
    if character == " ":
        return "·", " ", "space"
    if code < 0x20 or code == 0x7F:
        picture = {"\n": "↵", "\t": "⇥", "\x7f": "␡"}.get(character) or chr(0x2400 + code)
        return picture, picture, "mark"
    if category[0] in "CZ":  # formats, separators, private and unassigned
        return f"U+{code:04X}", f"<U+{code:04X}>", "code"
    if category[0] == "M":  # combines with what comes before, which has a cell of its own
        return "◌" + character, character, "plain"
    return character, character, "plain"


def summary(text: TextView) -> str:
    """The numbers of a text in one line."""
    size, chunks, bit_part = len(text.data), len(text.chunks), text.bit_bits_per_byte
    return (
        f"{_counted(size, 'byte')}, {_counted(chunks, 'chunk')} (the last is open), "
        f"{size / chunks:.2f} bytes per chunk, {text.bits_per_byte:.3f} bits per byte "
        f"({text.bits_per_byte - bit_part:.3f} for bytes + {bit_part:.3f} for chunk {text.side}s)"
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def as_text(text: TextView) -> str:
    """The text with ``|`` between chunks; what can't be printed is shown by a picture, a number or hex."""
    return "|".join("".join(_with_line(cell) for cell in chunk) for chunk in cells(text))


def _with_line(cell: Cell) -> str:
    return cell.plain + "\n" if cell.glyph == "↵" and cell.kind == "mark" else cell.plain


def as_table(text: TextView) -> str:
    """A line for each byte, an empty one between chunks."""
    side = text.side
    lines = [f"byte  char      router  {side:<5}  byte bits  {side} bits"]
    for chunk in cells(text):
        for cell in chunk:
            for at, byte in enumerate(cell.data):
                bit = "?" if byte.bit is None else "yes" if byte.bit else "no"
                lines.append(
                    f"  {byte.value:02X}  {'' if at else cell.glyph:<8}  {_number(byte.router, 3):>6}  {bit:<5}  "
                    f"{byte.byte_bits:9.3f}  {_number(byte.bit_bits, 3):>{len(side) + 5}}"
                )
        lines.append("")
    return "\n".join(lines[:-1])


def _number(value: float | None, digits: int) -> str:
    return "?" if value is None else f"{value:.{digits}f}"


def as_page(text: TextView, name: str) -> str:
    """A page of HTML that stands alone.

    Args:
        text: what to show.
        name: of the model.
    """
    chunks = text.chunks
    size, side = len(text.data), text.side
    chosen = [_chunk(number, len(chunks), chunk) for number, chunk in enumerate(cells(text), 1)]
    template = Template(Path(__file__).with_name("show_page.html").read_text(encoding="utf-8"))
    return template.substitute(
        name=escape(name),
        size=size,
        chunks=len(chunks),
        bytes_per_chunk=f"{size / len(chunks):.2f}",
        bits_per_byte=f"{text.bits_per_byte:.3f}",
        byte_part=f"{text.bits_per_byte - text.bit_bits_per_byte:.3f}",
        bit_part=f"{text.bit_bits_per_byte:.3f}",
        side=side,
        Side=side.capitalize(),
        text="<wbr>".join(chosen),
    )


def _chunk(number: int, total: int, chunk: list[Cell]) -> str:
    data = [byte for cell in chunk for byte in cell.data]
    bits = math.fsum(byte.bits for byte in data)
    label = (
        f"Chunk {number} of {total}: “{''.join(cell.plain for cell in chunk)}”, "
        f"{_counted(len(data), 'byte')}, {bits:.2f} bits{', still open' if number == total else ''}"
    )
    kinds = "chunk" + " open" * (number == total) + " long" * (len(chunk) > LONG_CHUNK)
    content = "".join(map(_cell, chunk))
    after = (
        "<br>" if content.endswith("<br>") else ""
    )  # outside, or an empty part of the chunk would begin the next line
    return (
        f'<span class="{kinds}" role="option" tabindex="{-1 if number > 1 else 0}" '
        f'aria-selected="false" aria-label="{escape(label)}">{content.removesuffix("<br>")}</span>{after}'
    )


def _cell(cell: Cell) -> str:
    bars = "".join(map(_bar, cell.data))
    line = "<br>" if cell.kind == "mark" and cell.glyph == "↵" else ""
    return f'<span class="cell {cell.kind}"><b>{escape(cell.glyph)}</b><span class="bars">{bars}</span></span>{line}'


def _bar(byte: ByteView) -> str:
    """A byte's bars. Their heights are the numbers that the page's table shows, and are nowhere else."""
    router = "" if byte.router is None else f"--p:{byte.router:.3f};"
    bit_bits = "" if byte.bit_bits is None else f";--b:{byte.bit_bits:.3f}"
    bit = "" if byte.bit is None else f' data-bit="{int(byte.bit)}"'
    return f'<i data-byte="{byte.value:02X}"{bit} style="{router}--y:{byte.byte_bits:.3f}{bit_bits}"></i>'


def parse(arguments: Sequence[str] | None) -> tuple[CommandParser, argparse.Namespace]:
    parser = CommandParser(prog="models.show", description=__doc__, allow_abbrev=False)
    add_model_arguments(parser)
    add_replace_argument(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("text", nargs="?", metavar="TEXT", help="the text; - for standard input")
    source.add_argument("--file", metavar="PATH", help="a file with the text, of any bytes")
    parser.add_argument("--html", type=Path, metavar="PATH", help="write a page here and print the summary alone")
    parser.add_argument("--table", action="store_true", help="also print a line for each byte")
    parser.add_argument(
        "--max-bytes", type=whole_number, default=MAX_BYTES, metavar="N", help=f"at most (default: {MAX_BYTES})"
    )
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    parser, options = parse(arguments)
    try:
        from_stdin = options.text == "-"
        file = "-" if from_stdin else options.file
        data = input_bytes(None if from_stdin else options.text, file, replace=options.replace)
        if len(data) > options.max_bytes:
            raise ValueError(f"the text has {len(data)} bytes: give {options.max_bytes} at most, or raise --max-bytes")
        text = view(load_model(options), data)
        if options.html:
            options.html.write_text(as_page(text, str(options.model)), encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not options.html:
        print(as_text(text), end="\n\n")
    print(summary(text))
    if options.table:
        print("\n" + as_table(text))
    return 0


if __name__ == "__main__":
    end_quietly_with_the_pipe()
    sys.exit(main())
