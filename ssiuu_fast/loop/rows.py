"""Rows to unlearn or to retain, in whatever form a person has them."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ssiuu_fast.data.collate import IGNORE, Encoded, Encoder
from ssiuu_fast.data.example import Example, refuse_overlap
from ssiuu_fast.data.jsonl import EXPECTED, example_from


@dataclass(frozen=True)
class Rows:
    """Token ids of every row, and the texts they come from where all rows are texts."""

    encoded: list[Encoded]
    examples: list[Example] | None

    def __len__(self) -> int:
        return len(self.encoded)

    @cached_property
    def answer_tokens(self) -> list[int]:
        """Labelled tokens of each row, after the shift of a causal model."""
        return [_answer_tokens(row) for row in self.encoded]

    @cached_property
    def digest(self) -> str:
        """sha256 of the token ids and labels, in order."""
        content = json.dumps([[row.input_ids, row.labels] for row in self.encoded])
        return hashlib.sha256(content.encode()).hexdigest()


def read_rows(rows: Iterable, encoder: Encoder | None, name: str) -> Rows:
    """Rows from `Example`s, mappings as in our JSON Lines, `Encoded`, or mappings with input_ids and labels.

    A list, a datasets.Dataset or any iterable of these; an attention_mask marks the padding of a tokenised row, which
    is left out. `name` says in errors which set it is. encoder: None where there is no tokenizer.

    Raises ValueError for an empty set, for text without a tokenizer, for a row that isn't one, and for one without an
    answer token.
    """
    encoded, examples = [], []
    for number, row in enumerate(rows):
        try:
            if isinstance(row, Encoded):
                tokens = row
            elif isinstance(row, Mapping) and "input_ids" in row:
                tokens = _tokenised(row)
            else:
                if encoder is None:
                    raise ValueError("is a text: give processing_class, the model's tokenizer")
                examples.append(_example(row))
                tokens = encoder.encode(examples[-1])
            if not _answer_tokens(tokens):
                raise ValueError("has no answer token: label at least one token after the first")
        except ValueError as error:
            raise ValueError(f"row {number} of the {name} set: {error}") from None
        encoded.append(tokens)
    if not encoded:
        raise ValueError(f"the {name} set is empty: it needs at least one question with its answer")
    return Rows(encoded, examples if len(examples) == len(encoded) else None)


def refuse_common_rows(forget: Rows, others: Rows, name: str) -> None:
    """Raises ValueError where a row to forget is in the other set too: a model can't lose and keep the same fact."""
    if forget.examples is not None and others.examples is not None:
        refuse_overlap(forget.examples, others.examples, retain_name=f"{name} set")
    common = _keys(forget.encoded) & _keys(others.encoded)
    if common:
        raise ValueError(
            f"forget set and {name} set share {len(common)} tokenised row(s), e.g. {list(min(common))[:12]}: remove "
            "them from one of the two"
        )


def _keys(rows: Sequence[Encoded]) -> set[tuple[int, ...]]:
    return {tuple(row.input_ids) for row in rows}


def _answer_tokens(row: Encoded) -> int:
    return sum(label != IGNORE for label in row.labels[1:])


def _tokenised(row: Mapping) -> Encoded:
    if "labels" not in row:
        raise ValueError(f"has input_ids and no labels, {IGNORE} outside the answer (found: {', '.join(row)})")
    ids, labels = list(map(int, row["input_ids"])), list(map(int, row["labels"]))
    if len(ids) != len(labels):
        raise ValueError(f"has {len(ids)} input_ids and {len(labels)} labels")
    mask = row.get("attention_mask")
    if mask is not None:
        kept = [place for place, real in enumerate(mask) if int(real)]
        ids, labels = [ids[place] for place in kept], [labels[place] for place in kept]
    return Encoded(ids, labels)


def _example(row) -> Example:
    if isinstance(row, Example):
        return row
    if not isinstance(row, Mapping):
        raise ValueError(f"is a {type(row).__name__}; expected an Example, {EXPECTED}, or input_ids and labels")
    # datasets.Dataset fills in None where a row lacks another's column
    return example_from({name: value for name, value in row.items() if value is not None})
