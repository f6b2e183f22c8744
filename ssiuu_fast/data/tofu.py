"""TOFU: question-answer pairs on 200 invented authors, from a local folder or by hub name (arXiv 2401.06121)."""

import random
from collections.abc import Iterable
from pathlib import Path

from ssiuu_fast.data.example import Example, Split, require_rows
from ssiuu_fast.data.hub import hub_rows
from ssiuu_fast.data.jsonl import false_options, read_objects, text

ROWS_AN_AUTHOR = 20
# split -> author of its first row, where rows follow the order of `full`; None where rows aren't about the authors
_FIRST_AUTHOR = {
    "full": 0,
    "forget01": 198, "forget05": 190, "forget10": 180,
    "retain99": 0, "retain95": 0, "retain90": 0,
    "forget01_perturbed": 198, "forget05_perturbed": 190, "forget10_perturbed": 180,
    "retain_perturbed": 0,
    "real_authors": None, "world_facts": None,
    "real_authors_perturbed": None, "world_facts_perturbed": None,
}  # fmt: skip
SPLITS = tuple(_FIRST_AUTHOR)
_EXPECTED = (
    '{"question", "answer"} and, by split, "option1" to "option4", or "perturbed_answer", "paraphrased_answer" and '
    '"paraphrased_question"'
)


def load_split(source, split: str) -> list[Example]:
    """The rows of one split, in order.

    source: a folder with `<split>.json` (one JSON object a line), or a hub name such as "locuslab/TOFU". `subject` is
    the author's index, 0 to 199, "option1" to "option4" become false options, "paraphrased_question" the paraphrase;
    "paraphrased_answer" and "perturbed_answer" keep their names. Raises ValueError for an unknown split or a broken
    row.
    """
    if split not in _FIRST_AUTHOR:
        raise ValueError(f"unknown TOFU split {split!r}; known: {', '.join(SPLITS)}")
    first_author = _FIRST_AUTHOR[split]
    examples = []
    for index, (where, row) in enumerate(_rows(source, split)):
        subject = None if first_author is None else str(first_author + index // ROWS_AN_AUTHOR)
        try:
            examples.append(_example(row, subject))
        except ValueError as error:
            raise ValueError(f"{where}: {error}; expected {_EXPECTED}") from None
    require_rows(examples, f"TOFU split {split} of {source}")
    return examples


def subset(source, retain_train: int = 280, retain_test: int = 80, seed: int = 0) -> Split:
    """forget01 (40 rows) with retain rows to train on and others to test on, whole authors drawn by `seed`.

    retain_train and retain_test count rows and are multiples of 20, the rows of one author.
    """
    for name, rows in (("retain_train", retain_train), ("retain_test", retain_test)):
        if rows < ROWS_AN_AUTHOR or rows % ROWS_AN_AUTHOR:
            raise ValueError(
                f"{name}={rows}: must be a multiple of {ROWS_AN_AUTHOR} (whole authors), at least {ROWS_AN_AUTHOR}"
            )
    forget, retain = load_split(source, "forget01"), load_split(source, "retain99")
    authors = list(dict.fromkeys(row.subject for row in retain))
    train, test = retain_train // ROWS_AN_AUTHOR, retain_test // ROWS_AN_AUTHOR
    if train + test > len(authors):
        raise ValueError(
            f"retain_train={retain_train} and retain_test={retain_test} need {train + test} authors; "
            f"retain99 has {len(authors)}"
        )
    chosen = random.Random(seed).sample(authors, train + test)
    return Split(
        forget,
        [row for row in retain if row.subject in chosen[:train]],
        [row for row in retain if row.subject in chosen[train:]],
    )


def _rows(source, split: str) -> Iterable[tuple[str, dict]]:
    folder = Path(source)
    if folder.is_dir():
        return read_objects(folder / f"{split}.json", _EXPECTED)
    return hub_rows(source, split)


def _example(row: dict, subject: str | None) -> Example:
    answer = text(row, "answer")
    options = [text(row, f"option{number}") for number in range(1, 5)] if "option1" in row else []
    return Example(
        text(row, "question"),
        answer,
        false_options(options, answer),
        _optional_text(row, "paraphrased_question"),
        subject,
        paraphrased_answer=_optional_text(row, "paraphrased_answer"),
        perturbed_answers=_perturbed_answers(row),
    )


def _optional_text(row: dict, name: str) -> str | None:
    return None if row.get(name) is None else text(row, name)


def _perturbed_answers(row: dict) -> tuple[str, ...]:
    given = row.get("perturbed_answer")
    if given is None:
        return ()
    # the five of a row may repeat each other, and each counts
    if not isinstance(given, list) or not given:
        raise ValueError(f'field "perturbed_answer" is {given!r}, not a list of wrong answers')
    return tuple(text({"perturbed_answer": answer}, "perturbed_answer") for answer in given)
