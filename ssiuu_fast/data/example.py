"""One question with its answer: the row every data set is read into."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A question-answer pair, with what is known about it.

    prompt: the question; of a chat, the last user turn.
    answer: the text a model that knows the fact gives.
    false_options: wrong answers of a multiple-choice question, without the right one; empty if it has none.
    paraphrase: the same question in other words.
    subject: who or what the fact is about (a person's name, an author's index); rows of one subject belong together.
    turns: earlier (role, text) turns of a chat, a system turn first if there is one.
    verbatim: prompt and answer are joined as they stand, without any template.
    paraphrased_answer: the right answer in other words.
    perturbed_answers: wrong answers worded like `paraphrased_answer`, for the truth ratio; unlike false_options they
        don't make a row multiple choice.
    """

    prompt: str
    answer: str
    false_options: tuple[str, ...] = ()
    paraphrase: str | None = None
    subject: str | None = None
    turns: tuple[tuple[str, str], ...] = ()
    verbatim: bool = False
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """Rows to forget, to show while unlearning so that they are retained, and to test retention on."""

    forget: list[Example]
    retain: list[Example]
    test: list[Example]

    @property
    def memorised(self) -> list[Example]:
        """All of them: what a model knows before it unlearns."""
        return [*self.forget, *self.retain, *self.test]


def require_rows(examples: Sequence[Example], name: str) -> None:
    """Raise ValueError when a set has no rows; `name` says which, e.g. "forget set a.jsonl"."""
    if not examples:
        raise ValueError(f"{name} is empty: it needs at least one question with its answer")


def refuse_overlap(
    forget: Sequence[Example],
    retain: Sequence[Example],
    forget_name: str = "forget set",
    retain_name: str = "retain set",
) -> None:
    """Raise ValueError when a question with its answer is in both sets.

    A model can't lose and keep the same fact. Surrounding space and system turns don't count; earlier turns of a
    chat do.
    """
    common = {_identity(example) for example in forget} & {_identity(example) for example in retain}
    if common:
        _, prompt, answer = min(common)
        raise ValueError(
            f"{forget_name} and {retain_name} share {len(common)} row(s), e.g. {prompt!r} -> {answer!r}: "
            "remove them from one of the two"
        )


def _identity(example: Example):
    turns = tuple(turn for turn in example.turns if turn[0] != "system")
    return turns, example.prompt.strip(), example.answer.strip()
