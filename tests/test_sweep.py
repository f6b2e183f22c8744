"""Which run comes next, from results that are made up."""

from math import inf

import pytest

from ssiuu_fast.sweep import BEFORE_JOB, Job, Sweep, learning_rates

RATES = (1e-5, 2e-5, 5e-5)


def result(reached, stopped_by="max_epochs"):
    return {"unlearning": {"reached": reached, "stopped_by": "threshold" if reached else stopped_by}}


def outcome_of(job, threshold_at):
    """A run reaches the threshold at rates from that of its label on."""
    if job.what == "attack":
        return {"attacks": []}
    return {"unlearning": {}} if job == BEFORE_JOB else result(job.learning_rate >= threshold_at[job.label])


def play(sweep, threshold_at):
    """Every job of a sweep in the order in which one process does them."""
    done = {}
    while left := [job for job in sweep.ready(done) if job not in done]:
        done[left[0]] = outcome_of(left[0], threshold_at)
    return done


def unlearnings(done, label):
    return [(job.learning_rate, job.seed) for job in done if job.what == "unlearn" and job.label == label]


def test_a_search_goes_up_to_the_first_rate_that_reaches_and_its_run_is_the_first_seed():
    done = play(Sweep(("ga", "gd"), 3, RATES), {"ga": 1e-5, "gd": 2e-5})
    assert unlearnings(done, "ga") == [(1e-5, 0), (1e-5, 1), (1e-5, 2)]
    assert unlearnings(done, "gd") == [(1e-5, 0), (2e-5, 0), (2e-5, 1), (2e-5, 2)]
    attacked = {(job.label, job.learning_rate, job.seed) for job in done if job.what == "attack"}
    runs = {("ga", 1e-5, seed) for seed in range(3)} | {("gd", 2e-5, seed) for seed in range(3)}
    assert attacked == runs | {("before", 0.0, 0)}


def test_a_higher_rate_may_fail_where_a_lower_one_reached():
    """The lowest that reaches is taken without any belief about those above it."""
    sweep = Sweep(("gd",), 1, RATES)
    done = {BEFORE_JOB: {"unlearning": {}}, Job("unlearn", "gd", 1e-5, 0): result(False, "divergence")}
    assert sweep.ready(done)[1] == Job("unlearn", "gd", 2e-5, 0)
    done[Job("unlearn", "gd", 2e-5, 0)] = result(True)
    assert sweep.rate(sweep.line("gd"), done) == 2e-5
    assert all(job.learning_rate < 5e-5 for job in sweep.ready(done))


def test_a_method_that_never_reaches_has_neither_seeds_nor_attacks():
    done = play(Sweep(("gd",), 3, RATES), {"gd": inf})
    assert unlearnings(done, "gd") == [(rate, 0) for rate in RATES]
    assert [job.label for job in done if job.what == "attack"] == ["before"]


def test_an_error_ends_a_search_and_costs_no_other_method():
    sweep = Sweep(("ga", "gd"), 1, RATES)
    done = {BEFORE_JOB: {"unlearning": {}}, Job("unlearn", "ga", 1e-5, 0): {"error": "RuntimeError: no"}}
    left = [job for job in sweep.ready(done) if job not in done]
    assert left == [Job("unlearn", "gd", 1e-5, 0), BEFORE_JOB.attack]


def test_the_model_before_is_looked_at_first_and_alone():
    assert Sweep(("ga", "ssiuu"), 3, RATES).ready({}) == [BEFORE_JOB]


def test_a_penalised_method_also_runs_at_the_rate_of_its_backbone():
    sweep = Sweep(("gd", "ssiuu"), 2, RATES, 20, 100)
    assert [(line.label, line.max_epochs) for line in sweep.lines] == [("gd", 20), ("ssiuu", 20), ("ssiuu@gd", 100)]
    done = play(sweep, {"gd": 1e-5, "ssiuu": 5e-5, "ssiuu@gd": 1e-5})
    assert unlearnings(done, "ssiuu") == [(1e-5, 0), (2e-5, 0), (5e-5, 0), (5e-5, 1)]
    assert unlearnings(done, "ssiuu@gd") == [(1e-5, 0), (1e-5, 1)]


def test_a_backbone_that_is_not_compared_is_only_searched():
    sweep = Sweep(("ga+ssiuu",), 2, RATES)
    done = play(sweep, {"ga": 2e-5, "ga+ssiuu": inf, "ga+ssiuu@ga": inf})
    assert [line.label for line in sweep.lines] == ["ga+ssiuu", "ga+ssiuu@ga"]
    assert unlearnings(done, "ga") == [(1e-5, 0), (2e-5, 0)]
    assert not [job for job in done if job.what == "attack" and job.label == "ga"]
    # every seed runs at a rate that is given, reached or not
    assert unlearnings(done, "ga+ssiuu@ga") == [(2e-5, 0), (2e-5, 1)]


def test_without_a_backbone_rate_there_is_nothing_to_run_at_it():
    done = play(Sweep(("gd", "ssiuu"), 2, RATES), {"gd": inf, "ssiuu": 1e-5})
    assert unlearnings(done, "ssiuu@gd") == []


def test_searches_come_first_and_attacks_last():
    sweep = Sweep(("gd", "ssiuu"), 2, RATES)
    done = {BEFORE_JOB: {"unlearning": {}}, Job("unlearn", "gd", 1e-5, 0): result(True)}
    left = [job for job in sweep.ready(done) if job not in done]
    assert left[0] == Job("unlearn", "ssiuu", 1e-5, 0)
    assert [job.what for job in left] == ["unlearn"] * 4 + ["attack"] * 2


@pytest.mark.parametrize(
    ("taught_at", "lowest", "highest", "number"),
    [(1e-3, 1e-6, 1e-2, 13), (1e-5, 1e-8, 1e-4, 13), (3e-4, 5e-7, 2e-3, 12), (5e-3, 5e-6, 5e-2, 13)],
)
def test_the_usual_rates(taught_at, lowest, highest, number):
    rates = learning_rates(taught_at)
    assert (rates[0], rates[-1], len(rates)) == (lowest, highest, number)
    assert list(rates) == sorted(rates)
    assert {f"{rate:.0e}"[0] for rate in rates} == {"1", "2", "5"}
    assert all(f"{rate:g}" == f"{float(f'{rate:.0e}'):g}" for rate in rates)
