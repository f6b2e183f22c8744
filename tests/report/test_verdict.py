"""The word and its reasons, case by case."""

import pytest
from studies import made_up

from ssiuu_fast.ablation import AblationRow
from ssiuu_fast.influence import Amount, Cell
from ssiuu_fast.report import verdict as words
from ssiuu_fast.report.verdict import best_recovery, half_of, read_target, verdict

ERASING, HIDING = {"after": (0.1, 1.0)}, {"after": (1.0, 3.0), "recovered": 0.8}


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
    found = verdict(made_up(**HIDING, probability=(0.4, 0.2), token_probability=(0.9, 0.7)))
    assert found.word == words.HIDDEN
    assert any("a token of the answer was 0.9 before, where log P is nearly flat" in reason for reason in found.reasons)


def test_attributions_of_p_fade_at_both_ends():
    # P(1 - P) from 0.0099 to 0.24
    found = verdict(made_up(**HIDING, probability=(0.99, 0.4)))
    assert any("grew from 0.0099 to 0.24" in reason for reason in found.reasons)
    found = verdict(made_up(**HIDING, probability=(0.6, 0.4)))
    assert not any("grew" in reason for reason in found.reasons)


def test_hidden_needs_something_to_come_back():
    found = verdict(made_up(**HIDING | {"recovered": 0.32}))
    assert found.word == words.UNKNOWN
    assert found.reasons[0] == "The sums say hidden, but silencing brings nothing back."


def test_up_to_chance_is_no_recovery():
    below = {"after": (0.1, 1.2), "accuracy": (0.9, 0.0)}
    assert word(**below, recovered=0.25) == words.ERASED
    # chance is 0.25
    assert word(**below, recovered=0.34) == words.ERASED
    assert word(**below, recovered=0.35) == words.PARTLY_HIDDEN


def test_what_supporting_neurons_bring_back_too_is_no_recovery():
    assert word(after=(0.1, 1.2), recovered=0.8, control=0.8) == words.ERASED
    assert word(after=(0.1, 1.2), recovered=0.8, control=0.5) == words.PARTLY_HIDDEN


def test_controls_are_those_of_as_many_neurons():
    rows = [
        AblationRow("none", 0, 0, None, 0.3),
        AblationRow("spurious", 1, 1, None, 0.6),
        AblationRow("spurious", 3, 3, None, 0.8),
        AblationRow("erased", 1, 1, None, 0.2),
        AblationRow("erased", 3, 3, None, 0.8),
        AblationRow("random", 1, 1, 0, 0.3),
        AblationRow("random", 3, 3, 0, 0.7),
    ]
    found = best_recovery({"probability": rows}, 0.25, 200)
    assert (found.best, found.m, found.random, found.erased, found.brings_back) == (0.6, 1, 0.3, 0.2, True)


@pytest.mark.parametrize("samples", [1, 9])
def test_few_rows_say_nothing(samples):
    few = {"samples": samples, "rows": samples}
    # the logit difference can have fewer rows than there are
    for study in (ERASING | few, ERASING | {"samples": samples}):
        found = verdict(made_up(**study))
        assert found.word == words.UNKNOWN
        assert any(f"{samples} row" in reason and "fewer than 10 say nothing" in reason for reason in found.reasons)
    assert word(**HIDING | {"recovered": 1.0}, **few) == words.UNKNOWN
    assert word(**few, accuracy=(0.9, 0.9)) == words.UNKNOWN
    assert word(**ERASING, samples=10, rows=10) == words.ERASED


def test_erased_is_said_of_what_was_lost_where_most_is_still_known():
    found = verdict(made_up(**ERASING, accuracy=(0.95, 0.8)))
    assert found.word == words.LITTLE_LOST
    assert found.reasons[0] == "Accuracy 0.80 is still nearer to 0.95 than to chance, 0.25."
    assert word(**ERASING, accuracy=(0.95, 0.55)) == words.ERASED


def test_a_loss_of_a_tenth_counts_whatever_the_rounding():
    assert word(**ERASING, accuracy=(0.9, 0.8)) == words.LITTLE_LOST
    found = verdict(made_up(**ERASING, accuracy=(0.9, 0.85)))
    assert "less than 0.10 was forgotten" in found.reasons[0]


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
    assert read_target(total(lost, gained), support_before=10.0, samples=200) == said


def test_the_best_recovery():
    study = made_up(**HIDING | {"recovered": 0.7})
    found = best_recovery(study.ablation, study.chance, study.rows)
    assert (found.intact, found.best, found.m, found.random) == (0.3, 0.7, 1, 0.31)
    nothing = made_up(**ERASING)
    assert best_recovery(nothing.ablation, 0.25, 200) is None
    assert verdict(nothing).reasons[0].startswith("By target")


def test_half_of_a_curve():
    import torch

    assert half_of(torch.tensor([3.0, 5.0, 6.0])) == 1
    assert half_of(torch.tensor([1.0, 2.0, 3.0, 4.0])) == 2
    assert half_of(torch.tensor([0.0, 0.0])) == 0
    assert half_of(torch.tensor([])) == 0
