"""What a model is asked: a question is one or more (context, continuation) pairs, of which one is right."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace


@dataclass(frozen=True)
class Writing:
    """How a text is to be written after a question's context.

    Attributes:
        stop: strings that end the text.
        max_tokens: its longest length, as the task's data counts it.
    """

    stop: tuple[str, ...]
    max_tokens: int


@dataclass(frozen=True)
class Question:
    """One question of a task.

    With several pairs it is a choice, and the model's answer is its likeliest continuation. With one pair it is a
    cloze, and right where greedy decoding writes the continuation, and no more letters after a word's last.

    Attributes:
        task: the name of its task.
        number: its place in the task, from 0; limits and seeds don't change it.
        pairs: (context, continuation) of each choice.
        gold: which of them is right.
        writing: how a text is to be written after the first context; None where none is.
        answer: the number that this text must come to.
        is_text: there is no context, and the one continuation is a text of any length, scored in windows.
    """

    task: str
    number: int
    pairs: tuple[tuple[str, str], ...]
    gold: int = 0
    writing: Writing | None = None
    answer: str = ""
    is_text: bool = False

    @property
    def is_choice(self) -> bool:
        return len(self.pairs) > 1

    def with_contexts(self, change: Callable[[str], str]) -> "Question":
        """The same question with its contexts changed."""
        return replace(self, pairs=tuple((change(context), continuation) for context, continuation in self.pairs))

    def with_texts(self, change: Callable[[str], str]) -> "Question":
        """The same question with contexts and continuations changed."""
        return replace(self, pairs=tuple((change(context), change(choice)) for context, choice in self.pairs))

    @property
    def digest(self) -> str:
        """Of all that an answer depends on: the texts that are scored, and how one is written."""
        asked = json.dumps([self.pairs, self.is_text, astuple(self.writing) if self.writing else None])
        return hashlib.blake2b(asked.encode(), digest_size=8).hexdigest()
