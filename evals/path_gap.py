"""How far a score lies below the probability of the bytes: paths of bits against the sum over all of them.

``python -m evals.path_gap MODEL`` takes short strings of Python's help topics, scores each with beams of several
widths, and compares with every path there is (a beam as wide, with no margin). All are bits per byte, means over the
strings.
"""

import argparse
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from bytekernels.files import write_json
from models import ByteLM, Scorer
from models.command import add_model_arguments, load_model

BEAMS = (1, 2, 4, 8, 16)


def strings_of(count: int, length: int, seed: int) -> list[bytes]:
    """Random pieces of text, ``length`` bytes long."""
    text = "\n".join(topic for _, topic in sorted(topics.items())).encode()
    generator = random.Random(seed)
    return [text[start : start + length] for start in (generator.randrange(len(text) - length) for _ in range(count))]


def gaps(model: ByteLM, strings: Sequence[bytes]) -> dict[str, float]:
    """Bits per byte below the sum over all paths, and that sum's own bits per byte (``exact``).

    Args:
        model: after stage 2.
        strings: of n bytes, not many: each has 2^(n-1) paths, BOS's bit being given and the last one summed out.
    """

    def bits_per_byte(**settings: object) -> float:
        scores = Scorer(model, **settings).rolling(strings)  # type: ignore[arg-type]
        return -sum(one.log_likelihood for one in scores) / math.log(2) / sum(one.num_bytes for one in scores)

    exact = bits_per_byte(beam=2 ** (max(map(len, strings)) - 1), margin=math.inf)
    found = {"exact": exact}
    for beam in BEAMS:
        for combine in ("sum", "best") if beam > 1 else ("sum",):
            name = "router's path" if beam == 1 else f"beam {beam}, {combine}"
            found[name] = bits_per_byte(beam=beam, combine=combine) - exact
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.path_gap", description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--strings", type=int, default=200)
    parser.add_argument("--length", type=int, default=8, help="bytes of each string (default: 8, at most 12)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.strings < 1 or not 2 <= options.length <= 12:
        parser.error(f"--strings must be >= 1 and --length 2 ... 12, got {options.strings} and {options.length}")
    found = gaps(load_model(options), strings_of(options.strings, options.length, options.seed))
    for name, value in found.items():
        print(f"{name:16} {value:8.4f} bits/byte" + ("" if name == "exact" else " above"))
    if options.json:
        settings = {"strings": options.strings, "length": options.length, "seed": options.seed}
        write_json(options.json, {**settings, "bits_per_byte": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
