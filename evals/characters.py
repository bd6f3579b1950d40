"""Character-level tasks with exact answers, made from a list of words: what a model knows of the letters of a word.

Each prompt holds four worked examples of its task, about other words, and ends in "Answer:". Every task comes in two
forms that ask the same: as a choice of four and, with ``_exact`` after its name, as a cloze.

The choices of a question are of one length, so that neither a liking for short texts nor a normalisation by length
tells them apart, and the right one stands at each place with equal probability. Of every letter that ``count`` asks
for, 0, 1, 2 and 3 are right equally often. So chance is 25 %, for any answer that does not depend on the question. A
cloze is right where greedy decoding writes the whole answer and the line's end; chance is about 0.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from evals.draws import generator
from evals.questions import Question
from training.errors import UserError

CHOICES = 4
EXAMPLES = 4
EXACT = "_exact"

# Five to ten letters, none the same backwards.
_WORD_LIST = """
    address animal answer apple artificial assistance attempt attention attitude available balloon banana barrier
    beautiful beginning between bicycle blanket bottle bread breakfast bridge business butter button cannon caravan
    carpet carrier center cheese chicken children civilian cocoon coffee committee connection copper database daughter
    degree dinner discuss division dollar eleven evening evidence example excellent experience father feather finger
    glass glasses grammar green hammer happiness harbor holiday horoscope horror horse hundred illegal initial innocent
    institute invisible journey kettle kitchen ladder legally lemon lesson letter lettuce library literally little
    locally lullaby mammal maximum meadow member memory message middle minimum minute mirror momentum monopoly mother
    mountain mummy needle nineteen opinion outdoor pajamas panorama paper paragraph parallel pepper peppermint pineapple
    planning possible potato process protocol puppet puppy purple rainbow recorder remember river rocket school science
    session sister spring statistics street substitute success summer sweater tattoo teacher terror thunder tomato
    tomorrow umbrella village warrior weather wonder yellow
"""
WORDS = tuple(_WORD_LIST.split())
LETTERS = "".join(WORDS)  # as frequent as they are there
COUNTED = "aeilmnoprst"  # each occurs 0, 1, 2 and 3 times in more words than there are examples


class Problem(NamedTuple):
    """What is asked of one word.

    Attributes:
        word: the word that it is about.
        question: in words.
        answer: the right one.
        wrong: three others of the answer's length.
    """

    word: str
    question: str
    answer: str
    wrong: list[str]


def _others(answer: str, candidates: Iterable[str]) -> list[str]:
    """The first three candidates that differ from the answer and from each other."""
    found = {answer: None}
    for candidate in candidates:
        found[candidate] = None
        if len(found) == CHOICES:
            break
    return list(found)[1:]


def _slips(text: str, rng: random.Random) -> Iterable[str]:
    """The text with two neighbouring letters swapped or, as often, with one letter replaced; without end."""
    while True:
        if rng.random() < 0.5:
            i = rng.randrange(len(text) - 1)
            yield text[:i] + text[i + 1] + text[i] + text[i + 2 :]
        else:
            i = rng.randrange(len(text))
            yield text[:i] + rng.choice(LETTERS) + text[i + 1 :]


def spelling(words: Sequence[str], rng: random.Random) -> Problem:
    """A word's letters, with spaces between them; wrong are those of the word with a slip."""
    word = rng.choice(words)
    answer, *wrong = (" ".join(one) for one in (word, *_others(word, _slips(word, rng))))
    return Problem(word, f'Spell "{word}" with a space between the letters.', answer, wrong)


def unspelling(words: Sequence[str], rng: random.Random) -> Problem:
    """The word that is spelled with spaces between its letters; wrong is the word with a slip."""
    word = rng.choice(words)
    return Problem(word, f'Which word is spelled "{" ".join(word)}"?', word, _others(word, _slips(word, rng)))


def counting(words: Sequence[str], rng: random.Random) -> Problem:
    """How many times a letter occurs in a word: 0, 1, 2 or 3, which are the choices.

    Letter and answer are drawn first and by themselves, so that the letter says nothing about the answer.
    """
    letter, times = rng.choice(COUNTED), rng.randrange(CHOICES)
    word = rng.choice([word for word in words if word.count(letter) == times])
    wrong = [str(other) for other in range(CHOICES) if other != times]
    return Problem(word, f'How many times does the letter "{letter}" occur in "{word}"?', str(times), wrong)


def reversing(words: Sequence[str], rng: random.Random) -> Problem:
    """A word's letters from the last to the first; wrong are the word as it is, and two slips in the answer."""
    word = rng.choice(words)
    answer = word[::-1]
    wrong = _others(answer, itertools.chain([word], _slips(answer, rng)))
    return Problem(word, f'Write "{word}" backwards.', answer, wrong)


def inserting(words: Sequence[str], rng: random.Random) -> Problem:
    """A word with a letter that it lacks after each occurrence of a letter that it has.

    Wrong are the word with the letter before each occurrence, and two with one of the letters in another place.
    """
    word = rng.choice(words)
    after, new = rng.choice(word), rng.choice([letter for letter in LETTERS if letter not in word])
    places = [i + 1 for i, letter in enumerate(word) if letter == after]

    def with_new(places: Iterable[int]) -> str:
        ends = [0, *sorted(places), len(word)]
        return new.join(word[start:end] for start, end in itertools.pairwise(ends))

    def misplaced() -> Iterable[str]:
        yield with_new([place - 1 for place in places])
        while True:
            free = [place for place in range(len(word) + 1) if place not in places]
            moved = rng.randrange(len(places))
            yield with_new([*places[:moved], rng.choice(free), *places[moved + 1 :]])

    answer = with_new(places)
    return Problem(word, f'Write "{word}" with "{new}" after every "{after}".', answer, _others(answer, misplaced()))


PROBLEMS: dict[str, Callable[[Sequence[str], random.Random], Problem]] = {
    "spell": spelling,
    "unspell": unspelling,
    "count": counting,
    "reverse": reversing,
    "insert": inserting,
}
TASKS = (*PROBLEMS, *(name + EXACT for name in PROBLEMS))


def questions(task: str, count: int, seed: int) -> list[Question]:
    """The first questions of a task; each depends on the task, the seed and its number alone.

    A number's words and examples are the same in both forms of a task. Words may come up again in later questions.

    Args:
        task: one of ``TASKS``.
        count: how many.
        seed: another seed asks other questions.

    Raises:
        UserError: there is no such task.
        ValueError: ``count`` is negative.
    """
    if task not in TASKS:
        raise UserError(f"task {task!r} is not known; there are {', '.join(TASKS)}")
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    return [_question(task, number, generator(task.removesuffix(EXACT), seed, number)) for number in range(count)]


def _question(task: str, number: int, rng: random.Random) -> Question:
    problems: list[Problem] = []
    while len(problems) <= EXAMPLES:
        taken = [problem.word for problem in problems]
        problems.append(PROBLEMS[task.removesuffix(EXACT)]([word for word in WORDS if word not in taken], rng))
    *examples, asked = problems
    context = "".join(f"Question: {one.question}\nAnswer: {one.answer}\n\n" for one in examples)
    context += f"Question: {asked.question}\nAnswer:"
    if task.endswith(EXACT):
        return Question(task, number, ((context, f" {asked.answer}\n"),))
    choices = [asked.answer, *asked.wrong]
    rng.shuffle(choices)
    return Question(task, number, tuple((context, f" {one}") for one in choices), choices.index(asked.answer))
