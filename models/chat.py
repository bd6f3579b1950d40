"""Write on after a prompt. This is a base model, without a chat template: it continues a text, it does not answer.

Without --prompt or --prompt-file each line that is read is a prompt of its own. Standard output gets nothing but text.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from models.byte_lm import ByteLM
from models.command import (
    CommandParser,
    add_model_arguments,
    add_replace_argument,
    end_quietly_with_the_pipe,
    input_bytes,
    load_model,
    standard_input,
    whole_number,
)
from models.sampling import Sampling
from models.utf8 import Utf8Stream
from models.writer import Writer


class Marker:
    """Bytes and their bits as text with a mark after each chunk, as :meth:`models.Generation.with_boundaries` has it.

    Args:
        mark: what follows a chunk.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._utf8 = Utf8Stream()

    def feed(self, data: bytes, boundaries: Sequence[bool]) -> bytes:
        """The marked text that these bytes complete, in UTF-8."""
        parts = []
        for byte, ends in zip(data, boundaries, strict=True):
            parts.append(self._utf8.feed(bytes([byte])))
            if ends:
                parts += [self._utf8.flush(), self._mark]
        return "".join(parts).encode()

    def flush(self) -> bytes:
        """What is left of a character that the text has cut off."""
        return self._utf8.flush().encode()


def write_on(model: ByteLM, prompt: bytes, options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Write a continuation to standard output; with ``--show-chunks`` the prompt before it."""
    out = sys.stdout.buffer
    writer = Writer(model, [prompt], **settings)
    marker = Marker(options.mark) if options.show_chunks else None
    if marker is not None:
        _put(out, marker.feed(prompt, writer.write(0)[0].boundaries))
    for data, boundaries in _pieces(writer, options):
        _put(out, data if marker is None else marker.feed(data, boundaries))
    if marker is not None:
        _put(out, marker.flush())


def _pieces(writer: Writer, options: argparse.Namespace) -> Iterator[tuple[bytes, Sequence[bool]]]:
    if options.stream:
        for piece in writer.stream(options.max_new_bytes, flush=True):
            yield piece.data, piece.boundaries
    else:
        written = writer.write(options.max_new_bytes)[0]
        yield written.new, written.boundaries[len(written.prompt) :]


def _put(out: BinaryIO, data: bytes) -> None:
    out.write(data)
    out.flush()


def lines() -> Iterator[bytes]:
    """The lines of standard input, edited where it is a terminal."""
    if not sys.stdin.isatty():
        for line in sys.stdin.buffer:
            yield line[:-2] if line.endswith(b"\r\n") else line.removesuffix(b"\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input edits lines once it is imported)
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    print("A line is the beginning of a text, and the model writes on. Ctrl-C stops it, Ctrl-D ends.", file=sys.stderr)
    while True:
        if not sys.stdout.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            yield os.fsencode(input("> " if sys.stdout.isatty() else ""))
        except EOFError:
            print(file=sys.stderr)
            return


def converse(model: ByteLM, options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Write on after each line, until there are no more.

    Raises:
        ValueError: a line that is no prompt, where nobody is there to be told and to type another.
        KeyboardInterrupt: Ctrl-C while no text is being written.
    """
    is_terminal = sys.stdin.isatty()
    for line in lines():
        try:
            write_on(model, input_bytes(line, None, replace=options.replace), options, settings)
        except ValueError as error:
            if not is_terminal:
                raise
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
        _put(sys.stdout.buffer, b"\n")


def parse(arguments: Sequence[str] | None) -> tuple[CommandParser, argparse.Namespace]:
    parser = CommandParser(prog="models.chat", description=__doc__, allow_abbrev=False)
    add_model_arguments(parser)
    add_replace_argument(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="write on after this text, once")
    prompt.add_argument("--prompt-file", metavar="PATH", help="write on after the bytes of this file; - for stdin")
    parser.add_argument("--stream", action="store_true", help="write bytes as they come")
    parser.add_argument("--show-chunks", action="store_true", help="show the prompt too, and a mark after each chunk")
    parser.add_argument("--mark", default="|", help="the mark of --show-chunks (default: |)")
    parser.add_argument("--max-new-bytes", type=whole_number, default=200, metavar="N", help="at most (default: 200)")
    parser.add_argument("--stop", action="append", default=[], metavar="STRING", help="end before it; may be repeated")
    parser.add_argument("--mode", choices=["joint", "multibyte"], default="joint", help="how chunk ends are found")
    drawing = parser.add_argument_group("drawing", "the likeliest byte is taken unless --temperature is given")
    drawing.add_argument("--temperature", type=float, default=0.0, metavar="X")
    drawing.add_argument("--top-k", type=int, metavar="N", help="among this many pairs of byte and chunk end")
    drawing.add_argument("--top-p", type=float, default=1.0, metavar="X", help="among the likeliest, up to this sum")
    drawing.add_argument("--min-p", type=float, default=0.0, metavar="X", help="at least this share of the likeliest")
    drawing.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    drawing.add_argument("--seed", type=int, default=0, metavar="N", help="of each prompt's draws (default: 0)")
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status: 0, 2 after a mistake, 130 after Ctrl-C."""
    parser, options = parse(arguments)
    drawing = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    try:
        settings = dict(
            sampling=Sampling(**{name: getattr(options, name) for name in drawing}),
            stop=[os.fsencode(stop) for stop in options.stop],
            mode=options.mode,
        )
        once = options.prompt is not None or options.prompt_file is not None
        if once:
            prompt = input_bytes(options.prompt, options.prompt_file, replace=options.replace)
        else:
            standard_input()  # refused before a model is loaded
        model = load_model(options)
        if once:
            write_on(model, prompt, options, settings)
        else:
            Writer(model, [b""], **settings)  # refuses settings before a line is typed
            converse(model, options, settings)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    end_quietly_with_the_pipe()
    sys.exit(main())
