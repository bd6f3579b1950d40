"""Noise: each kind does what it says, at its rate, to any text, and draws nothing from what else is noised."""

import math
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evals.noise import (
    DROP_RATE,
    EXTRA_SPACE_RATE,
    LOOK_ALIKE_RATE,
    LOOK_ALIKES,
    MISSING_SPACE_RATE,
    MOST_COPIES,
    NEIGHBOURS,
    NOISES,
    REPEAT_RATE,
    TYPO_RATE,
    noised,
)
from evals.questions import Question
from training.errors import UserError

FAMILY = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}"
THUMB = "\N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4}"
ACCENTED = "e\N{COMBINING ACUTE ACCENT}"
PROMPT = "Question: Why is the sky blue?\nAnswer: It scatters light.\n\nQuestion: What is a byte?\nAnswer:"
LONG = "The quick brown Fox jumps over the lazy Dog, while 5 wizards box. " * 400

# Ordinary letters, and what a text function stumbles over.
texts = st.text(
    st.one_of(st.sampled_from("abcXYZ  \n\r\té\N{COMBINING ACUTE ACCENT}ßİ" + FAMILY + THUMB), st.characters())
)
every_noise = pytest.mark.parametrize("name", NOISES)


def is_subsequence(part: str, whole: str) -> bool:
    rest = iter(whole)
    return all(c in rest for c in part)


def without_space(text: str) -> str:
    return re.sub(r"\s", "", text)


def assert_rate(found: int, of: int, rate: float) -> None:
    """Within four standard deviations of a binomial count."""
    assert abs(found - of * rate) <= 4 * math.sqrt(of * rate * (1 - rate))


# ------------------------------------------------------------------------------------------------- all of them


@every_noise
@given(text=texts, seed=st.integers(0, 3))
@example(text="a\rb\r\nc\n\rd\n" * 20, seed=0)
def test_lines_stay(name, text, seed):
    found = noised(text, name, seed)
    assert re.findall(r"[\r\n]+", found) == re.findall(r"[\r\n]+", text)
    for before, after in zip(re.split(r"[\r\n]+", text), re.split(r"[\r\n]+", found), strict=True):
        assert bool(after) == bool(before) and bool(after.strip()) == bool(before.strip())


@every_noise
@given(text=texts)
def test_the_same_text_gets_the_same_noise(name, text):
    first = noised(text, name, 1)
    noised("another text", name, 1)
    assert noised(text, name, 1) == first


@every_noise
def test_a_prompt_keeps_its_structure(name):
    lines = noised(PROMPT, name, 0).split("\n")
    assert len(lines) == 5 and lines[2] == "" and not lines[-1].endswith(" ")


@pytest.mark.parametrize("name", [name for name in NOISES if name != "drop"])
@given(text=texts)
def test_no_space_is_added_to_the_end(name, text):
    assert noised(text, name, 0)[-1:].isspace() == text[-1:].isspace()


@every_noise
def test_nothing_comes_of_nothing(name):
    assert noised("", name, 0) == ""


@every_noise
def test_the_seed_and_the_text_matter(name):
    if name in ("antspeak", "upper_case"):
        assert noised(LONG, name, 0) == noised(LONG, name, 1)
    else:
        assert noised(LONG, name, 0) != noised(LONG, name, 1)
        # Where the text goes on differently, what it begins with is noised differently too.
        assert noised(LONG, name, 0)[:400] != noised(LONG + "x", name, 0)[:400]


def test_noises_draw_apart(monkeypatch):
    for name in ("one", "two"):
        monkeypatch.setitem(NOISES, name, lambda text, rng: str(rng.random()))
    assert len({noised(text, name, seed) for text in ("", "a") for name in ("one", "two") for seed in (0, 1)}) == 8


def test_a_noise_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="noise 'dorp' is not known; there are antspeak, .*drop.*look_alikes"):
        noised("text", "dorp", 0)


def test_a_question_is_noised_by_itself():
    question = Question("task", 0, ((PROMPT, " 8 bits"), (PROMPT, " a fish")), gold=0)
    changed = question.with_contexts(lambda text: noised(text, "drop", 0))
    contexts = [context for context, _ in changed.pairs]
    assert contexts[0] == contexts[1] == noised(PROMPT, "drop", 0)
    assert [continuation for _, continuation in changed.pairs] == [" 8 bits", " a fish"]


# ------------------------------------------------------------------------------------------------- one by one


def test_antspeak():
    assert noised("Answer:", "antspeak", 0) == "A N S W E R :"
    assert noised("to be\nor  not", "antspeak", 0) == "T O   B E\nO R     N O T"
    assert noised(" Paris", "antspeak", 0) == "   P A R I S"
    assert noised(f"{FAMILY}{THUMB}{ACCENTED}ß", "antspeak", 0) == f"{FAMILY} {THUMB} E\N{COMBINING ACUTE ACCENT} S S"


@given(text=texts)
def test_antspeak_only_adds_spaces(text):
    found = noised(text, "antspeak", 0)
    assert found.replace(" ", "") == text.upper().replace(" ", "")
    assert found.endswith(" ") == text.endswith(" ")


@example(context="a\N{ZERO WIDTH JOINER}", continuation="b")
@given(context=texts.filter(lambda text: text and text[-1] not in "\r\n"), continuation=texts)
def test_antspeak_of_the_parts_is_antspeak_of_the_whole(context, continuation):
    continuation = " " + continuation
    whole = noised(context + continuation, "antspeak", 0)
    assert noised(context, "antspeak", 0) + noised(continuation, "antspeak", 0) == whole


@pytest.mark.parametrize("name", ["random_case", "upper_case"])
@given(text=texts)
def test_case_is_all_that_changes(name, text):
    found = noised(text, name, 0)
    if all(c.upper().casefold() == c.lower().casefold() == c.casefold() for c in text):
        assert found.casefold() == text.casefold()
    assert name == "random_case" or found == text.upper()


def test_random_case_tosses_a_fair_coin():
    found = noised(LONG, "random_case", 0)
    letters = [c for c in found if c.isalpha()]
    assert_rate(sum(c.isupper() for c in letters), len(letters), 0.5)


@given(text=texts)
def test_drop_leaves_a_subsequence(text):
    assert is_subsequence(noised(text, "drop", 0), text)


def test_drop_leaves_whole_characters():
    assert set(noised(FAMILY * 200, "drop", 0).split(FAMILY)) == {""}
    for seed in range(30):  # one of them would be dropped, and the line be white space, in three of thirty
        assert "x" in noised("  x", "drop", seed)
        assert noised("a\nb\n\nc", "drop", seed) == "a\nb\n\nc"


def test_drop_has_its_rate():
    assert_rate(len(LONG) - len(noised(LONG, "drop", 0)), len(LONG), DROP_RATE)


def runs(text: str) -> list[str]:
    return [run[0] for run in re.finditer(r"(.)\1*", text, re.DOTALL)]


def test_repeat_has_its_rate_and_its_lengths():
    text = re.sub(r"(.)\1+", r"\1", LONG)
    found = runs(noised(text, "repeat", 0))
    assert "".join(run[0] for run in found) == text
    lengths = [len(run) for run in found]
    assert_rate(sum(length > 1 for length in lengths), len(text), REPEAT_RATE)
    for copies in range(1, MOST_COPIES + 1):
        assert_rate(lengths.count(1 + copies), len(text), REPEAT_RATE / MOST_COPIES)


@given(text=texts)
def test_repeat_only_adds(text):
    found = noised(text, "repeat", 0)
    assert is_subsequence(text, found) and set(found) == set(text)


def test_repeat_repeats_whole_characters():
    assert set(noised(ACCENTED * 200, "repeat", 0).split(ACCENTED)) == {""}
    assert len(noised(ACCENTED * 200, "repeat", 0)) > 2 * 200


@given(text=texts)
def test_typos_are_neighbours(text):
    found = noised(text, "typos", 0)
    assert len(found) == len(text)
    assert all(old == new or new in NEIGHBOURS[old] for old, new in zip(text, found, strict=True))


def test_typos_have_their_rate_and_keep_the_case():
    found = noised(LONG, "typos", 0)
    letters = sum(c.isalpha() for c in LONG)
    assert_rate(sum(old != new for old, new in zip(LONG, found, strict=True)), letters, TYPO_RATE)
    assert [c.isupper() for c in found] == [c.isupper() for c in LONG]


def test_keys_touch_each_other():
    assert set(NEIGHBOURS["g"]) == set("fhtyvb") and set(NEIGHBOURS["Q"]) == set("WA") and len(NEIGHBOURS) == 52
    assert all(letter in NEIGHBOURS[near] for letter, touching in NEIGHBOURS.items() for near in touching)
    assert all(letter not in touching for letter, touching in NEIGHBOURS.items())


@given(text=texts)
def test_extra_space_adds_single_spaces_inside_words(text):
    found = noised(text, "extra_space", 0)
    assert without_space(found) == without_space(text) and is_subsequence(text, found)
    # What stands at either end of a word is as it was.
    assert re.match(r"\s*", found)[0] == re.match(r"\s*", text)[0]
    assert re.search(r"\s*\Z", found)[0] == re.search(r"\s*\Z", text)[0]


def test_extra_space_has_its_rate_and_breaks_no_character():
    places = sum(len(word) - 1 for word in LONG.split())
    assert_rate(len(noised(LONG, "extra_space", 0)) - len(LONG), places, EXTRA_SPACE_RATE)
    assert set(noised(FAMILY * 200, "extra_space", 0).split(" ")) <= {FAMILY * count for count in range(1, 200)}


@given(text=texts)
def test_missing_space_only_removes_white_space_between_words(text):
    found = noised(text, "missing_space", 0)
    assert is_subsequence(found, text) and without_space(found) == without_space(text)
    edges = r"^[^\S\r\n]+|[^\S\r\n]+$"
    for before, after in zip(re.split(r"[\r\n]+", text), re.split(r"[\r\n]+", found), strict=True):
        assert re.findall(edges, after) == re.findall(edges, before)


def test_missing_space_has_its_rate_and_takes_whole_runs():
    text = LONG.replace(" ", " \t ").strip()
    found = noised(text, "missing_space", 0)
    assert_rate(text.count(" \t ") - found.count(" \t "), text.count(" \t "), MISSING_SPACE_RATE)
    assert not re.search(r"\s", found.replace(" \t ", ""))
    assert noised(" Paris", "missing_space", 0) == " Paris"


@given(text=texts)
def test_look_alikes_can_be_read_back(text):
    found = noised(text, "look_alikes", 0)
    assert len(found) == len(text)
    assert all(old == new or new == LOOK_ALIKES[old] for old, new in zip(text, found, strict=True))


def test_look_alikes_have_their_rate():
    found = noised(LONG, "look_alikes", 0)
    changed = sum(old != new for old, new in zip(LONG, found, strict=True))
    assert_rate(changed, sum(c in LOOK_ALIKES for c in LONG), LOOK_ALIKE_RATE)


def test_look_alikes_are_of_other_scripts_and_of_one_case():
    assert len(set(LOOK_ALIKES.values())) == len(LOOK_ALIKES)
    for letter, other in LOOK_ALIKES.items():
        assert letter.isascii() and letter.isalpha() and letter.isupper() == other.isupper()
        assert unicodedata.name(other).split()[0] in ("CYRILLIC", "GREEK")
    assert (sum(map(str.islower, LOOK_ALIKES)), sum(map(str.isupper, LOOK_ALIKES))) == (15, 17)


def test_the_page_shows_what_noise_makes():
    page = (Path(__file__).parents[2] / "docs" / "robustness.md").read_text(encoding="utf-8")
    text = re.search(r'Of "(.+)" seed 0 makes', page)[1]
    assert re.findall(r"^\| `(\w+)` \| [^|`]+ \| `([^`]+)` \|$", page, re.MULTILINE) == [
        (name, noised(text, name, 0)) for name in NOISES
    ]
