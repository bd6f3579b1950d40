"""What a model is asked: a question is one or more (context, continuation) pairs, of which one is right."""

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Question:
    """One question of a task.

    With several pairs it is a choice, and the model's answer is its likeliest continuation. With one pair it is a cloze,
    and right where greedy decoding writes the continuation.

    Attributes:
        task: the name of its task.
        number: its place in the task, from 0; limits and seeds don't change it.
        pairs: (context, continuation) of each choice.
        gold: which of them is right.
        written: the answer that a text written after the first context must come to; None where nothing is written.
    """

    task: str
    number: int
    pairs: tuple[tuple[str, str], ...]
    gold: int = 0
    written: str | None = None

    @property
    def is_choice(self) -> bool:
        return len(self.pairs) > 1

    def with_contexts(self, change: Callable[[str], str]) -> "Question":
        """The same question with its contexts changed."""
        return replace(self, pairs=tuple((change(context), continuation) for context, continuation in self.pairs))

    def with_texts(self, change: Callable[[str], str]) -> "Question":
        """The same question with contexts and continuations changed."""
        return replace(
            self, pairs=tuple((change(context), change(continuation)) for context, continuation in self.pairs)
        )
