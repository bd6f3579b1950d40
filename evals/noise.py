"""Noise for robustness tests: what people, keyboards and scanners do to a text without changing what it says.

A *character* is a code point with the combining marks, joiners and emoji modifiers that follow it, so that noise moves
an accent or a family emoji as one. Line breaks (runs of ``\\n`` and ``\\r``) are never changed, and a line that is not
empty never becomes empty: a prompt made of lines keeps its lines.

``antspeak``, ``drop``, ``random_case``, ``repeat`` and ``upper_case`` follow the noises of Pagnoni et al. 2024 (Byte
Latent Transformer, arXiv 2412.09871); their docstrings say where the reading is ours. The others are our own.
"""

import random
import re
import unicodedata
from collections.abc import Callable, Mapping

from evals.draws import generator
from training.errors import UserError

DROP_RATE = 0.10
REPEAT_RATE = 0.20
MOST_COPIES = 3
TYPO_RATE = 0.08
EXTRA_SPACE_RATE = 0.10
MISSING_SPACE_RATE = 0.30
LOOK_ALIKE_RATE = 0.10

_JOINER = "\N{ZERO WIDTH JOINER}"
_EMOJI_MODIFIERS = [chr(code) for code in range(0x1F3FB, 0x1F3FF + 1)]

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _neighbours() -> dict[str, str]:
    """The letters whose keys touch a letter's key on a QWERTY keyboard, lower and upper case apart."""
    touching: dict[str, str] = {}
    for r, row in enumerate(_ROWS):
        above = _ROWS[r - 1] if r > 0 else ""
        below = _ROWS[r + 1] if r + 1 < len(_ROWS) else ""
        for i, letter in enumerate(row):
            # Each row is shifted to the right of the one above: key i lies under keys i and i + 1.
            near = row[max(i - 1, 0) : i] + row[i + 1 : i + 2] + above[i : i + 2] + below[max(i - 1, 0) : i + 1]
            touching[letter], touching[letter.upper()] = near, near.upper()
    return touching


NEIGHBOURS = _neighbours()

LOOK_ALIKES = {
    "a": "\N{CYRILLIC SMALL LETTER A}",
    "c": "\N{CYRILLIC SMALL LETTER ES}",
    "d": "\N{CYRILLIC SMALL LETTER KOMI DE}",
    "e": "\N{CYRILLIC SMALL LETTER IE}",
    "h": "\N{CYRILLIC SMALL LETTER SHHA}",
    "i": "\N{CYRILLIC SMALL LETTER BYELORUSSIAN-UKRAINIAN I}",
    "j": "\N{CYRILLIC SMALL LETTER JE}",
    "o": "\N{CYRILLIC SMALL LETTER O}",
    "p": "\N{CYRILLIC SMALL LETTER ER}",
    "q": "\N{CYRILLIC SMALL LETTER QA}",
    "s": "\N{CYRILLIC SMALL LETTER DZE}",
    "v": "\N{GREEK SMALL LETTER NU}",
    "w": "\N{CYRILLIC SMALL LETTER WE}",
    "x": "\N{CYRILLIC SMALL LETTER HA}",
    "y": "\N{CYRILLIC SMALL LETTER U}",
    "A": "\N{CYRILLIC CAPITAL LETTER A}",
    "B": "\N{CYRILLIC CAPITAL LETTER VE}",
    "C": "\N{CYRILLIC CAPITAL LETTER ES}",
    "E": "\N{CYRILLIC CAPITAL LETTER IE}",
    "H": "\N{CYRILLIC CAPITAL LETTER EN}",
    "I": "\N{CYRILLIC CAPITAL LETTER BYELORUSSIAN-UKRAINIAN I}",
    "J": "\N{CYRILLIC CAPITAL LETTER JE}",
    "K": "\N{CYRILLIC CAPITAL LETTER KA}",
    "M": "\N{CYRILLIC CAPITAL LETTER EM}",
    "N": "\N{GREEK CAPITAL LETTER NU}",
    "O": "\N{CYRILLIC CAPITAL LETTER O}",
    "P": "\N{CYRILLIC CAPITAL LETTER ER}",
    "S": "\N{CYRILLIC CAPITAL LETTER DZE}",
    "T": "\N{CYRILLIC CAPITAL LETTER TE}",
    "X": "\N{CYRILLIC CAPITAL LETTER HA}",
    "Y": "\N{GREEK CAPITAL LETTER UPSILON}",
    "Z": "\N{GREEK CAPITAL LETTER ZETA}",
}


def _characters(text: str) -> list[str]:
    found: list[str] = []
    for point in text:
        follows = unicodedata.category(point).startswith("M") or point == _JOINER or point in _EMOJI_MODIFIERS
        if found and (follows or (found[-1].endswith(_JOINER) and not point.isspace())):
            found[-1] += point
        else:
            found.append(point)
    return found


def _by_line(text: str, change: Callable[[str], str]) -> str:
    """The text with every line that is not empty changed."""
    return re.sub(r"[^\r\n]+", lambda line: change(line[0]), text)


def _substituted(text: str, table: Mapping[str, str], rate: float, rng: random.Random) -> str:
    """Each code point that the table has becomes, with probability ``rate``, one of those listed for it."""
    return "".join(rng.choice(table[c]) if c in table and rng.random() < rate else c for c in text)


def antspeak(text: str, rng: random.Random) -> str:
    """Upper case with one space between the characters of a line, of which spaces are some: "a b" is "A   B".

    Nothing is random. The source puts a space after every character; here a line's last one has none, so that a
    continuation that begins with a space can follow. A text that begins with a space is taken to go on from another and
    gets one more, so that a noised context and a noised continuation are, together, what noise makes of the whole.
    """
    spaced = _by_line(text.upper(), lambda line: " ".join(_characters(line)))
    return " " + spaced if text.startswith(" ") else spaced


def random_case(text: str, rng: random.Random) -> str:
    """Each letter becomes upper or lower case by the toss of a fair coin.

    Python's full case mappings apply: "ß" becomes "SS" or stays. The source turns half of the characters to upper case
    and half to lower.
    """
    return "".join(c.upper() if rng.random() < 0.5 else c.lower() for c in text)


def upper_case(text: str, rng: random.Random) -> str:
    """Every letter becomes upper case. Nothing is random."""
    return text.upper()


def drop(text: str, rng: random.Random) -> str:
    """Each character but line breaks is left out with probability 10 %.

    Of a line that would become empty or white space alone, one character that is not white space is kept, where it has
    one. The source drops 10 % of the characters.
    """

    def thinned(line: str) -> str:
        characters = _characters(line)
        kept = "".join(c for c in characters if rng.random() >= DROP_RATE)
        return kept if kept.strip() else rng.choice([c for c in characters if not c.isspace()] or characters)

    return _by_line(text, thinned)


def repeat(text: str, rng: random.Random) -> str:
    """Each character but line breaks is followed, with probability 20 %, by 1, 2 or 3 copies, equally likely.

    The source repeats 20 % of the characters up to four times, which is taken for four in all.
    """

    def stuttered(line: str) -> str:
        return "".join(
            c * (1 + rng.randint(1, MOST_COPIES) if rng.random() < REPEAT_RATE else 1) for c in _characters(line)
        )

    return _by_line(text, stuttered)


def typos(text: str, rng: random.Random) -> str:
    """Each letter a-z becomes, with probability 8 %, a letter beside it on a QWERTY keyboard; case is kept."""
    return _substituted(text, NEIGHBOURS, TYPO_RATE, rng)


def extra_space(text: str, rng: random.Random) -> str:
    """Between two neighbouring characters of a word a space is put with probability 10 %.

    Words are runs without white space.
    """

    def broken(word: re.Match[str]) -> str:
        first, *others = _characters(word[0])
        return first + "".join(" " + c if rng.random() < EXTRA_SPACE_RATE else c for c in others)

    return re.sub(r"\S+", broken, text)


def missing_space(text: str, rng: random.Random) -> str:
    """Each run of white space between two words of a line is left out with probability 30 %.

    White space at either end of a line, such as indentation or a continuation's first space, stays.
    """
    between_words = r"(?<=\S)[^\S\r\n]+(?=\S)"
    return re.sub(between_words, lambda run: "" if rng.random() < MISSING_SPACE_RATE else run[0], text)


def look_alikes(text: str, rng: random.Random) -> str:
    """Each Latin letter that has a Cyrillic or Greek look-alike becomes it with probability 10 %.

    They are the letters of ``LOOK_ALIKES``: 15 of the 26 small ones and 17 of the 26 capitals.
    """
    return _substituted(text, LOOK_ALIKES, LOOK_ALIKE_RATE, rng)


NOISES: dict[str, Callable[[str, random.Random], str]] = {
    "antspeak": antspeak,
    "random_case": random_case,
    "upper_case": upper_case,
    "drop": drop,
    "repeat": repeat,
    "typos": typos,
    "extra_space": extra_space,
    "missing_space": missing_space,
    "look_alikes": look_alikes,
}


def noised(text: str, name: str, seed: int) -> str:
    """The text with a noise of ``NOISES``; what is drawn depends on the noise's name, the seed and the text alone.

    Args:
        text: any Unicode text; an empty one stays empty.
        name: of the noise.
        seed: another seed draws other noise.

    Raises:
        UserError: there is no such noise.
    """
    if name not in NOISES:
        raise UserError(f"noise {name!r} is not known; there are {', '.join(NOISES)}")
    return NOISES[name](text, generator(name, seed, text))
