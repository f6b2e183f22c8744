"""Refusals: what a model is to answer instead, and which of them each row gets."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from ssiuu_fast.data.collate import Encoded

# the paper's
DEFAULT_REFUSAL = "I can't answer the question."


def load_refusals(path) -> list[str]:
    """The lines of a UTF-8 text file, each a refusal (TOFU's idontknow.jsonl is one); blank lines are skipped.

    Raises FileNotFoundError, or ValueError for a file that is empty or no text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected refusals, a plain line each")
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    refusals = [line for line in lines if line]
    if not refusals:
        raise ValueError(f"{path} is empty: expected refusals, a plain line each")
    return refusals


class RefusalRows:
    """Forget rows with the refusal that each gets in each pass, drawn from (seed, epoch, row): no state, so the same
    in every rank and after a resume.

    encode(row, refusal): the question of that row answered by a refusal. encoded: every (row, refusal) that comes up in
    `epochs` passes over `rows` rows, once, ordered by row; known before the first step, so that what the starting model
    thinks of them can be computed and cached beforehand, epochs × rows numbers at most.
    """

    def __init__(
        self, encode: Callable[[int, str], Encoded], refusals: Sequence[str], rows: int, *, seed: int, epochs: int
    ):
        if isinstance(refusals, str):
            raise ValueError(f"refusals must be a list of texts, got the string {refusals!r}: write [{refusals!r}]")
        if not refusals:
            raise ValueError("there are no refusals: leave them out for the default, or give at least one")
        self._seed = seed
        self._refusals = list(dict.fromkeys(refusals))
        drawn = sorted({(row, self._drawn(row, epoch)) for row in range(rows) for epoch in range(epochs)})
        self._places = {pair: place for place, pair in enumerate(drawn)}
        self._epochs = epochs
        self.encoded = [encode(row, self._refusals[refusal]) for row, refusal in drawn]

    def place(self, row: int, epoch: int) -> int:
        """Index into `encoded` of what this row is paired with in this pass, counted from 0."""
        if not 0 <= epoch < self._epochs:
            raise ValueError(f"epoch={epoch}: refusals were drawn for epochs 0 to {self._epochs - 1}")
        return self._places[row, self._drawn(row, epoch)]

    def _drawn(self, row: int, epoch: int) -> int:
        return random.Random(f"{self._seed} {epoch} {row}").randrange(len(self._refusals))
