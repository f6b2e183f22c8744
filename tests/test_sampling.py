from collections import Counter
from contextlib import nullcontext

import pytest

from ssiuu_fast.sampling import (
    epoch_batches,
    rank_batches,
    refuse_empty_micro_batches,
    steps_per_epoch,
    wrapping_batch,
)


def test_every_batch_has_one_size_and_every_pass_each_row_once():
    drawn = [index for step in range(20) for index in wrapping_batch(7, 3, seed=1, step=step)]
    assert len(drawn) == 60
    for start in range(0, 56, 7):
        assert sorted(drawn[start : start + 7]) == list(range(7))


@pytest.mark.parametrize(
    ("rows", "size", "ranks"), [(10, 4, 1), (10, 4, 2), (5, 1, 2), (7, 2, 3), (4, 8, 4), (9, 2, 4)]
)
def test_ranks_share_a_pass(rows, size, ranks):
    shares = [rank_batches(rows, size, seed=0, ranks=ranks, rank=rank) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    sizes = [len(batch) for share in shares for batch in share]
    assert max(sizes) - min(sizes) <= 1
    # by more than that only where a rank would have nothing
    assert max(sizes) <= size or rows // ranks < -(-rows // (size * ranks))
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(rows))


def test_fewer_rows_than_ranks():
    assert [len(rank_batches(2, 4, 0, ranks=3, rank=rank)) for rank in range(3)].count(0) == 1


def test_fewer_rows_than_a_batch():
    assert sorted(wrapping_batch(3, 16, seed=0, step=5)) == [0, 1, 2]
    assert steps_per_epoch(3, 16) == 1


def test_a_step_depends_on_seed_and_number_alone():
    late = wrapping_batch(100, 16, seed=3, step=1000)
    for step in range(50):
        wrapping_batch(100, 16, seed=3, step=step)
    assert wrapping_batch(100, 16, seed=3, step=1000) == late
    assert wrapping_batch(100, 16, seed=4, step=1000) != late


def test_epochs():
    batches = epoch_batches(10, 4, seed=0, epoch=1)
    assert [len(b) for b in batches] == [4, 4, 2]
    assert Counter(i for b in batches for i in b) == Counter(range(10))
    assert batches != epoch_batches(10, 4, seed=0, epoch=2)
    assert steps_per_epoch(10, 4) == 3


@pytest.mark.parametrize(
    ("batch", "size", "rows", "processes", "refused"),
    [
        (16, 2, 8, 1, False),
        (16, 2, 7, 1, True),
        (16, 2, 8, 2, False),
        (16, 2, 7, 2, True),
        # equal parts of at most 5 are 4 of 4
        (16, 5, 4, 1, False),
        (16, 5, 3, 1, True),
        # nothing that micro_batch_size could do
        (16, None, 1, 2, False),
    ],
)
def test_each_micro_batch_needs_a_row(batch, size, rows, processes, refused):
    with pytest.raises(ValueError, match="micro_batch_size") if refused else nullcontext():
        refuse_empty_micro_batches(batch, size, {"forget": range(100), "retain": range(rows)}, processes)


@pytest.mark.parametrize(("rows", "size"), [(0, 4), (4, 0)])
def test_nothing_to_draw(rows, size):
    with pytest.raises(ValueError, match=f"batches of {size} from {rows} rows"):
        wrapping_batch(rows, size, 0, 0)
