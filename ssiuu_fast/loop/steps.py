"""What a step works on: a function of (seed, step) alone, cut into one micro-batch after the other for each rank."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssiuu_fast.data.collate import Encoded, collate
from ssiuu_fast.loop.rows import Rows
from ssiuu_fast.objectives.objective import ForgetBatch, Totals
from ssiuu_fast.sampling import steps_per_epoch, wrapping_batch

# the retain rows are another stream of draws than the forget rows
RETAIN_SEED = 500_000


@dataclass(frozen=True)
class Part:
    """One micro-batch of a step, on one rank.

    forget: the rows to forget. token_counts: [samples] tokens of their answers. sample_ids: [samples] their numbers in
    the forget set, always on the CPU. retain: rows to retain, None where the objective needs none. forget_totals,
    retain_totals: of the whole step, over all micro-batches and ranks. last: whether the step is complete with it.
    """

    forget: ForgetBatch
    token_counts: Tensor
    sample_ids: Tensor
    forget_totals: Totals
    retain: dict[str, Tensor] | None
    retain_totals: Totals | None
    last: bool

    @property
    def tokens_of_step(self) -> int:
        """Tokens of prompts and answers in the whole step, without padding."""
        return self.forget_totals.attended + (self.retain_totals.attended if self.retain_totals else 0)

    def to(self, device: torch.device) -> "Part":
        reference = self.forget.reference_log_probs
        forget = replace(
            self.forget,
            inputs=_moved(self.forget.inputs, device),
            reference_log_probs=None if reference is None else reference.to(device),
        )
        retain = None if self.retain is None else _moved(self.retain, device)
        return replace(self, forget=forget, retain=retain, token_counts=self.token_counts.to(device))


class Steps:
    """The micro-batches of every step.

    A step takes batch_size forget rows (`wrapping_batch`), all of them where there are fewer, and as many retain rows,
    cut into contiguous slices for each (rank, micro-batch). Every rank can tell what the others have, so the totals of
    a step need no communication.

    refusals: data.refusals.RefusalRows, for objectives that need them. reference_log_probs: of the forget rows and then
    of refusals.encoded, for objectives that need them; may be set later.

    Raises ValueError where a set has fewer rows than there are slices.
    """

    def __init__(
        self,
        forget: Rows,
        retain: Rows | None,
        *,
        batch_size: int,
        ranks: int,
        micro_batches: int,
        seed: int,
        pad_id: int = 0,
    ):
        self.forget = forget
        self.retain = retain
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.refusals = None
        self.reference_log_probs: Tensor | None = None
        self._slices = ranks * micro_batches
        self.seed = seed
        self._pad_id = pad_id
        for name, rows in (("forget", forget), ("retain", retain)):
            if rows is not None and min(batch_size, len(rows)) < self._slices:
                raise ValueError(
                    f"a step has {min(batch_size, len(rows))} {name} rows for {self._slices} micro-batches ({ranks} "
                    f"rank(s), {micro_batches} each), and each needs a row: lower gradient_accumulation_steps or the "
                    f"number of ranks, or raise the batch size or the rows of the {name} set"
                )

    @property
    def per_epoch(self) -> int:
        """Steps after which every forget row was seen once."""
        return steps_per_epoch(len(self.forget), self.batch_size)

    @property
    def rows_per_step(self) -> int:
        """Forget rows of every step."""
        return min(self.batch_size, len(self.forget))

    def passes(self, steps: int) -> int:
        """Passes over the forget rows, the last one begun or whole, in so many steps."""
        return -(-steps * self.rows_per_step // len(self.forget))

    def part(self, step: int, rank: int, micro_batch: int) -> Part:
        """Micro-batch 0, 1, … of a rank in step 0, 1, …"""
        number = rank * self.micro_batches + micro_batch
        drawn = wrapping_batch(len(self.forget), self.batch_size, self.seed, step)
        first, stop = contiguous_slice(len(drawn), self._slices, number)
        mine = drawn[first:stop]
        passes = [(step * self.rows_per_step + place) // len(self.forget) for place in range(first, stop)]
        rows = [self.forget.encoded[index] for index in mine]
        retain, retain_totals = self._retain(step, number)
        return Part(
            forget=self._forget_batch(rows, mine, passes),
            token_counts=torch.tensor([self.forget.answer_tokens[index] for index in mine]),
            sample_ids=torch.tensor(mine),
            forget_totals=_totals(self.forget, drawn),
            retain=retain,
            retain_totals=retain_totals,
            last=micro_batch == self.micro_batches - 1,
        )

    def _forget_batch(self, rows: list[Encoded], indices: list[int], passes: list[int]) -> ForgetBatch:
        places = list(indices)
        if self.refusals is not None:
            drawn = [self.refusals.place(index, number) for index, number in zip(indices, passes, strict=True)]
            rows = [*rows, *(self.refusals.encoded[place] for place in drawn)]
            places += [len(self.forget) + place for place in drawn]
        reference = None if self.reference_log_probs is None else self.reference_log_probs[places]
        return ForgetBatch(self.collated(rows), samples=len(indices), reference_log_probs=reference)

    def _retain(self, step: int, number: int) -> tuple[dict[str, Tensor] | None, Totals | None]:
        if self.retain is None:
            return None, None
        drawn = wrapping_batch(len(self.retain), self.batch_size, self.seed + RETAIN_SEED, step)
        first, stop = contiguous_slice(len(drawn), self._slices, number)
        rows = [self.retain.encoded[index] for index in drawn[first:stop]]
        return self.collated(rows), _totals(self.retain, drawn)

    def collated(self, rows: list[Encoded]) -> dict[str, Tensor]:
        """A padded batch of rows."""
        return collate(rows, self._pad_id)


def contiguous_slice(rows: int, slices: int, number: int) -> tuple[int, int]:
    """Bounds of one of contiguous slices whose lengths differ by at most one."""
    return rows * number // slices, rows * (number + 1) // slices


def _totals(rows: Rows, indices: list[int]) -> Totals:
    return Totals(
        samples=len(indices),
        tokens=sum(rows.answer_tokens[index] for index in indices),
        attended=sum(len(rows.encoded[index].input_ids) for index in indices),
    )


def _moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}
