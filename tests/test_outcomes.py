"""What a line of the table says, for runs that are made up."""

import pytest

from ssiuu_fast.experiment import UnlearningRecipe
from ssiuu_fast.outcomes import sweep_lines
from ssiuu_fast.report.method_table import method_table, notes_on_sweep
from ssiuu_fast.sweep import BEFORE_JOB, Job, Sweep

COLUMNS = ("FS", "RS", "harmful_0.1", "harmful_0.3", "benign")
RATES = (1e-5, 2e-5)


class TASK:
    threshold, chance, utility = 0.33, 0.33, None


def run(score, epochs=20, stopped_by="max_epochs", **scores):
    reached = stopped_by == "threshold"
    details = {"reached": reached, "epochs": epochs, "score": score, "stopped_by": stopped_by}
    details |= {"penalty_share": 0.0, "weight": None, "notes": []}
    return {"unlearning": details} | scores


def attacks(*recovered):
    return {"attacks": [{"name": n, "recovered": r} for n, r in zip(COLUMNS[2:], recovered, strict=True)]}


BEFORE = {
    BEFORE_JOB: {"unlearning": {}, "FS": 0.99, "RS": 0.93},
    BEFORE_JOB.attack: attacks(0.97, 0.98, 0.96),
}


def lines_of(sweep, results):
    done = dict(BEFORE)
    for (what, label, rate, seed), result in results.items():
        done[Job(what, label, rate, seed)] = result
    return sweep_lines(sweep, done, TASK)


def table_of(lines):
    rows = method_table(lines, COLUMNS, TASK.chance).splitlines()[2:]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)}


def test_a_line_is_the_mean_over_seeds():
    reached = {("unlearn", "gd", 1e-5, 0): run(0.5)}
    for seed, (epochs, retained) in enumerate([(12, 0.8), (14, 0.6)]):
        reached["unlearn", "gd", 2e-5, seed] = run(0.3, epochs, "threshold", FS=0.3, RS=retained)
        reached["attack", "gd", 2e-5, seed] = attacks(0.4, 0.5 + 0.1 * seed, 0.3)
    lines = lines_of(Sweep(("gd",), 2, RATES), reached)
    table = table_of(lines)
    expected = ["0.30 ± 0.00", "0.70 ± 0.14", "0.40 ± 0.00", "0.55 ± 0.07", "0.30 ± 0.00", "2e-05", "12–14"]
    assert table["gd"] == [*expected, "0.00 ± 0.00", "reached 2/2"]
    assert table["before"] == ["0.99", "0.93", "0.97", "0.98", "0.96", "–", "–", "–", ""]
    assert table["chance"][:5] == ["0.33"] * 5
    assert [seed["seed"] for seed in lines[1]["seeds"]] == [0, 1]
    assert [(run["learning_rate"], run["reached"]) for run in lines[1]["searched"]] == [(1e-5, False), (2e-5, True)]
    assert lines[1]["explanation"] is None


def test_seeds_that_did_not_reach_are_left_out_of_the_mean_and_named():
    results = {
        ("unlearn", "gd", 1e-5, 0): run(0.3, 12, "threshold", FS=0.3, RS=0.8),
        ("attack", "gd", 1e-5, 0): attacks(0.4, 0.5, 0.3),
        ("unlearn", "gd", 1e-5, 1): run(0.41),
        ("unlearn", "gd", 1e-5, 2): run(0.9, 2, "divergence"),
    }
    line = lines_of(Sweep(("gd",), 3, RATES), results)[1]
    assert line["scores"]["RS"] == [0.8]
    assert line["outcome"] == "reached 1/3"
    assert line["explanation"] == (
        "seed 1: not reached in 20 epochs, lowest forget score 0.410; seed 2: diverged, lowest forget score 0.900"
    )


def test_a_seed_whose_attack_failed_is_in_no_column():
    results = {}
    for seed, retained in enumerate((0.8, 0.5, 0.6)):
        results["unlearn", "gd", 1e-5, seed] = run(0.3, 9 + seed, "threshold", FS=0.1 * seed, RS=retained)
        results["attack", "gd", 1e-5, seed] = attacks(0.4, 0.5, 0.3) if seed else {"error": "OutOfMemoryError: 3 GB"}
    lines = lines_of(Sweep(("gd",), 3, RATES), results)
    assert lines[1]["outcome"] == "error, reached 3/3, attacked 2/3"
    assert lines[1]["explanation"] == "seed 0: attack: OutOfMemoryError: 3 GB"
    scores = lines[1]["scores"]
    assert {len(values) for values in scores.values()} == {2}
    assert (scores["RS"], scores["epochs"]) == ([0.5, 0.6], [10, 11])
    assert table_of(lines)["gd"][:2] == ["0.15 ± 0.07", "0.55 ± 0.07"]
    # what it did is kept all the same
    assert [seed["RS"] for seed in lines[1]["seeds"]] == [0.8, 0.5, 0.6]


@pytest.mark.parametrize(
    ("results", "outcome", "said"),
    [
        (
            {("unlearn", "gd", 1e-5, 0): run(0.6), ("unlearn", "gd", 2e-5, 0): run(0.5, 3, "divergence")},
            "never reached",
            "never reached the threshold within 20 epochs at any of 2 learning rates from 1e-05 to 2e-05; "
            "lowest forget score 0.500, at 2e-05; diverged at 2e-05",
        ),
        (
            {("unlearn", "gd", rate, 0): run(0.9, 1, "divergence") for rate in RATES},
            "diverged",
            "diverged at each of 2 learning rates from 1e-05 to 2e-05",
        ),
        (
            {("unlearn", "gd", 1e-5, 0): run(0.9), ("unlearn", "gd", 2e-5, 0): {"error": "RuntimeError: no layer 7"}},
            "error",
            "at learning rate 2e-05: RuntimeError: no layer 7",
        ),
        (
            {
                ("unlearn", "gd", 1e-5, 0): run(0.3, 9, "threshold", FS=0.3, RS=0.8),
                ("attack", "gd", 1e-5, 0): {"error": "ValueError: none would be left"},
                ("unlearn", "gd", 1e-5, 1): {"error": "OutOfMemoryError: 3 GB"},
            },
            "error, reached 1/2, attacked 0/1",
            "seed 0: attack: ValueError: none would be left; seed 1: OutOfMemoryError: 3 GB",
        ),
    ],
    ids=["never", "diverged", "error in the search", "error at the rate"],
)
def test_a_failure_is_a_line_that_says_so(results, outcome, said):
    sweep = Sweep(("gd",), 2, RATES)
    lines = lines_of(sweep, results)
    assert (lines[1]["outcome"], lines[1]["explanation"]) == (outcome, said)
    assert table_of(lines)["gd"][-1] == outcome.strip()
    notes = notes_on_sweep(sweep, TASK, UnlearningRecipe(teaching_rate=1e-3, max_positions=64), lines)
    assert f"- gd: {said}" in notes


def test_a_penalised_line_without_a_backbone_rate_says_whose():
    results = {("unlearn", label, rate, 0): run(0.6) for label in ("gd", "ssiuu") for rate in RATES}
    line = lines_of(Sweep(("gd", "ssiuu"), 1, RATES), results)[3]
    assert (line["label"], line["outcome"]) == ("ssiuu@gd", "no rate")
    assert line["explanation"] == "it takes the learning rate found for gd, and none was found"


@pytest.mark.parametrize(("retained", "collapsed"), [(0.47, True), (0.49, False), (0.2, True), (0.9, False)])
def test_retention_near_chance_is_a_collapse(retained, collapsed):
    # a quarter of what lay between chance, 0.33, and 0.93
    results = {
        ("unlearn", "gd", 1e-5, 0): run(0.3, 9, "threshold", FS=0.3, RS=retained),
        ("attack", "gd", 1e-5, 0): attacks(0.4, 0.5, 0.3),
    }
    line = lines_of(Sweep(("gd",), 1, RATES), results)[1]
    assert ("collapsed" in line["outcome"]) == collapsed
    assert (line["explanation"] is not None) == collapsed
