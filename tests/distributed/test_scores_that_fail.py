"""What fails on one rank in an evaluation or the reference pass is raised on both, and neither waits for the other."""

import pytest
import torch
from tiny import tiny_llama

from ssiuu_fast.data.collate import Encoded
from ssiuu_fast.evaluation.forwards import over_ranks, progress_bar
from ssiuu_fast.objectives.reference import reference_log_probs

ROWS = [Encoded([1, 5, 9, 11, 20], [-100, -100, 9, 11, 20])] * 6


def _said(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _score(rank, failing):
    def work(own, _):
        if rank == failing:
            raise ValueError(f"no score for {len(own)} row")
        return own

    def score():
        with progress_bar(False, 3, "rows") as bar:
            return over_ranks(torch.nn.Linear(1, 1), [1, 2, 3], 1, work, bar)

    # afterwards they still understand each other
    return _said(score), reference_log_probs(tiny_llama(), ROWS, None).tolist()


@pytest.mark.parametrize("failing", [0, 1])
def test_an_evaluation(two_ranks, failing):
    message = "no score for 1 row"
    expected = [f"ValueError: on rank {failing}: {message}"] * 2
    expected[failing] = f"ValueError: {message}"
    alone = reference_log_probs(tiny_llama(), ROWS, None).tolist()
    said, afterwards = zip(*two_ranks(_score, failing), strict=True)
    assert list(said) == expected
    assert list(afterwards) == [pytest.approx(alone, rel=1e-12)] * 2


def _reference(rank, folder):
    model = tiny_llama()
    if folder is None and rank == 1:
        model.lm_head.register_forward_hook(_out_of_memory)
    return _said(reference_log_probs, model, ROWS, folder)


def _out_of_memory(*_):
    raise torch.OutOfMemoryError("out of memory")


def test_the_reference_pass(two_ranks):
    assert two_ranks(_reference, None) == [
        "RuntimeError: on rank 1: out of memory",
        "OutOfMemoryError: out of memory",
    ]


def test_a_file_of_the_reference_that_cannot_be_written(two_ranks, tmp_path):
    (tmp_path / "file").touch()
    first, second = two_ranks(_reference, tmp_path / "file" / "cache")
    assert first.startswith("NotADirectoryError") and "Error: on rank 0: " in second
