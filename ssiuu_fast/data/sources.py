"""Data sets by the short names that the command line takes."""

from pathlib import Path

from ssiuu_fast.data import alpaca, faithun, people, tofu
from ssiuu_fast.data.example import Example, require_rows
from ssiuu_fast.data.jsonl import load_jsonl

PEOPLE_SPLITS = ("all", "forget", "retain", "test")


def load_examples(source: str) -> list[Example]:
    """Rows of a data set named by `source`.

    people:forget (all, retain, test) is the embedded default; FOLDER:SPLIT or HUB/NAME:SPLIT is TOFU, for example
    locuslab/TOFU:forget01; faithun:PLACE:SPLIT, PLACE a folder or hub name and SPLIT forget, retain or test, is
    FaithUn's base questions, and faithun:PLACE:SPLIT.paraphrase (multi_hop, same_answer) the others of these clusters;
    anything else is a JSONL file of the user's own. Raises ValueError for an unknown split or an empty set,
    FileNotFoundError for a missing file.
    """
    name, colon, split = source.rpartition(":")
    if source == "people" or name == "people":
        examples = _people(split if colon else "all")
    elif source.startswith("faithun:") and not Path(source).exists():
        examples = _faithun(name.removeprefix("faithun:"), split)
    elif colon and not Path(source).exists():
        examples = tofu.load_split(name, split)
    else:
        examples = load_jsonl(source)
    require_rows(examples, source)
    return examples


def load_instructions(source: str) -> list[Example]:
    """Instructions for the benign attack: "exercises" (embedded), or a local file or hub name of Alpaca's form."""
    return people.instructions(1000) if source == "exercises" else alpaca.load_instructions(source)


def _faithun(place: str, split: str) -> list[Example]:
    if not place or place == "faithun":
        raise ValueError("FaithUn needs its place and its split: faithun:FOLDER:forget")
    name, _, questions = split.partition(".")
    return faithun.load_split(place, name, questions or "base")


def _people(split: str) -> list[Example]:
    if split not in PEOPLE_SPLITS:
        raise ValueError(f"unknown split people:{split}; known: {', '.join(PEOPLE_SPLITS)}")
    data = people.generate()
    return data.examples if split == "all" else getattr(data.split(), split)
