"""Which rows a step sees: a function of (seed, step) alone, so that every layout and every resumed run agrees."""

from collections.abc import Mapping, Sized
from functools import lru_cache

import torch


def wrapping_batch(rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Row indices of step 0, 1, …: shuffled passes over the rows, one after the other, cut into batches of one size.

    Every batch has min(batch_size, rows) rows; a pass that doesn't divide wraps into the next. Attributions are sums
    over a batch, so its size must not change (METHOD, open point 0).
    """
    if rows < 1 or batch_size < 1:
        raise ValueError(f"can't draw batches of {batch_size} from {rows} rows")
    batch_size = min(batch_size, rows)
    start = step * batch_size
    return [_order(rows, seed, position // rows)[position % rows] for position in range(start, start + batch_size)]


def epoch_batches(rows: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row indices of one epoch, each row once; the last batch may be smaller."""
    order = _order(rows, seed, epoch)
    return [order[start : start + batch_size] for start in range(0, rows, batch_size)]


def rank_batches(rows: int, batch_size: int, seed: int, ranks: int, rank: int) -> list[list[int]]:
    """One rank's batches of a pass in which each row comes to one rank, once; all ranks have as many batches.

    Their sizes differ by one row at most. Where there are fewer rows than would fill them all with one, some hold more
    than batch_size; with fewer rows than ranks, some ranks have no batch.
    """
    order = _order(rows, seed, 0)
    batches = max(1, min(-(-rows // (batch_size * ranks)), rows // ranks)) * ranks
    bounds = [rows * number // batches for number in range(batches + 1)]
    cut = [order[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    return [batch for batch in cut[rank::ranks] if batch]


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Batches of `wrapping_batch` after which every row was seen once."""
    return -(-rows // min(batch_size, rows))


def number_of_micro_batches(batch_size: int, micro_batch_size: int | None) -> int:
    """The smallest number of equal micro-batches of at most micro_batch_size rows."""
    least = 1 if micro_batch_size is None else -(-batch_size // micro_batch_size)
    return next(number for number in range(least, batch_size + 1) if batch_size % number == 0)


def refuse_empty_micro_batches(
    batch_size: int, micro_batch_size: int | None, sets: Mapping[str, Sized], processes: int = 1
) -> None:
    """Raises ValueError where micro_batch_size cuts a step into more micro-batches than a set has rows.

    sets: the rows that steps are drawn from, by the name of each set. processes: how many share the batch.
    """
    each = number_of_micro_batches(batch_size // processes, micro_batch_size)
    for name, rows in sets.items():
        if each > 1 and len(rows) < processes * each:
            among = "" if processes == 1 else f" in each of {processes} processes"
            raise ValueError(
                f"micro_batch_size={micro_batch_size} cuts a batch of {batch_size} into {each} micro-batches{among}, "
                f"and each needs a {name} row, of which there are {len(rows)}: raise micro_batch_size or leave it out, "
                "or lower batch_size"
            )


@lru_cache(maxsize=8)
def _order(rows: int, seed: int, number: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.randperm(rows, generator=generator).tolist()
