"""The word and its reasons, case by case."""

import pytest
from studies import made_up

from ssiuu_fast.influence import Amount, Cell
from ssiuu_fast.report import verdict as words
from ssiuu_fast.report.verdict import best_recovery, half_of, read_target, verdict

ERASING, HIDING = {"after": (0.1, 1.0)}, {"after": (1.0, 3.0)}


def word(**study):
    return verdict(made_up(**study)).word


def test_each_word_has_its_case():
    assert word(**ERASING) == words.ERASED
    assert word(**HIDING) == words.HIDDEN
    assert word(after=(1.0, 1.0), accuracy=(0.9, 0.9)) == words.UNCHANGED
    assert word(**HIDING, accuracy=(0.9, 0.85)) == words.NOT_UNLEARNED
    # support lost and suppression gained in equal parts
    assert word(after=(0.5, 1.5)) == words.UNKNOWN
    assert word(**ERASING, accuracy=(0.3, 0.1)) == words.UNKNOWN


def test_what_a_target_says_whatever_happened_is_set_aside():
    found = verdict(made_up(**ERASING, probability=(0.4, 0.001)))
    # the other two say the same
    assert found.word == words.ERASED
    assert any("fell from 0.4 to 0.001" in reason for reason in found.reasons)
    found = verdict(made_up(**HIDING, probability=(0.9, 0.001)))
    assert found.word == words.HIDDEN
    assert any("0.9 before, where log P is nearly flat" in reason for reason in found.reasons)


def test_what_silencing_brings_back_outweighs_the_sums():
    hidden_too = {"after": (0.1, 1.2)}
    assert word(**hidden_too) == words.ERASED
    assert word(**hidden_too, recovered=0.8) == words.PARTLY_HIDDEN
    # 0.15 more, which 20 rows are too few for
    assert word(**hidden_too, recovered=0.46) == words.PARTLY_HIDDEN
    assert word(**hidden_too, recovered=0.46, rows=20) == words.ERASED
    # random neurons reach 0.31
    assert word(**hidden_too, recovered=0.405) == words.ERASED


def test_an_attack_that_brings_much_back_speaks_against_erased():
    study = {"attacked": (0.5, 1.0)} | ERASING
    assert word(**study, accuracy=(0.9, 0.3, 0.4)) == words.ERASED
    found = verdict(made_up(**study, accuracy=(0.9, 0.3, 0.6)))
    assert found.word == words.UNKNOWN
    assert "0.30 to 0.60, 50% of what was lost" in found.reasons[0]


def total(lost, gained):
    amounts = (Amount(1.0, 1.0, 1.0, interval) for interval in (lost, gained))
    return Cell(None, None, 10, *amounts)


@pytest.mark.parametrize(
    ("lost", "gained", "said"),
    [
        ((2, 3), (0.5, 1), words.ERASED),
        ((2, 3), (-9, -8), words.ERASED),
        ((0.5, 1), (2, 3), words.HIDDEN),
        ((1, 3), (2, 4), words.UNKNOWN),
        ((-1, 3), (-4, -2), words.UNKNOWN),
        ((-3, -2), (-5, -4), words.UNKNOWN),
        ((-0.01, 0.02), (0, 0.03), words.UNCHANGED),
        (None, (2, 3), words.UNKNOWN),
    ],
)
def test_intervals_that_overlap_say_nothing(lost, gained, said):
    assert read_target(total(lost, gained), support_before=10.0) == said


def test_the_best_recovery():
    study = made_up(**HIDING, recovered=0.7)
    found = best_recovery(study.ablation, study.rows)
    assert (found.intact, found.best, found.m, found.random) == (0.3, 0.7, 1, 0.31)
    nothing = made_up(**ERASING)
    assert best_recovery(nothing.ablation, 200) is None
    assert verdict(nothing).reasons[0].startswith("By target")


def test_half_of_a_curve():
    import torch

    assert half_of(torch.tensor([3.0, 5.0, 6.0])) == 1
    assert half_of(torch.tensor([1.0, 2.0, 3.0, 4.0])) == 2
    assert half_of(torch.tensor([0.0, 0.0])) == 0
    assert half_of(torch.tensor([])) == 0
