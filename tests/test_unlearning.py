"""The unlearning loop: early stop, what it keeps, and what it says."""

import json

import pytest
import torch
from taught import small_task

from ssiuu_fast import SSIUURegularizer
from ssiuu_fast.evaluation.scores import score
from ssiuu_fast.unlearning import unlearn


def run(taught, *, objective="gd", threshold=0.33, **options):
    model, encoder = taught
    task = small_task()
    settings = {"learning_rate": 1e-3, "max_epochs": 20} | options
    return unlearn(
        model,
        [encoder.encode(row) for row in task.split.forget],
        [encoder.encode(row) for row in task.split.retain] if objective != "ga" else None,
        objective=objective,
        threshold=threshold,
        forget_score=settings.pop("forget_score", lambda: score(model, encoder, task.split.forget).mean),
        **settings,
    )


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("objective", ["ga", "gd"])
def test_stops_at_the_threshold(taught, objective):
    rows = []
    progress = run(taught, objective=objective, threshold=0.4, log=rows.append)
    assert progress.scores[0] >= 0.9
    assert progress.scores[-1] <= 0.4 < min(progress.scores[:-1])
    assert progress.stopped_by == "threshold" and progress.reached
    # 30 forget rows, 16 a step: two steps an epoch
    assert progress.steps == 2 * progress.epochs
    assert progress.kept_epoch == progress.epochs
    assert [row["step"] for row in rows if "forget_nll" in row] == list(range(1, progress.steps + 1))
    assert ("retain_nll" in rows[1]) == (objective == "gd")
    assert progress.penalty_share == 0
    assert progress.notes == []


def test_gradient_difference_keeps_more_than_ascent(taught_folder):
    from taught import load_taught

    kept = {}
    for objective in ("ga", "gd"):
        model, encoder = load_taught(taught_folder)
        run((model, encoder), objective=objective)
        kept[objective] = score(model, encoder, small_task().split.retain).mean
    assert kept["gd"] > kept["ga"]


def test_threshold_already_met(taught):
    model, _ = taught
    before = weights(model)
    progress = run(taught, threshold=1.0)
    assert progress.stopped_by == "already_met" and progress.reached
    assert progress.steps == progress.epochs == 0
    assert "already at or under the threshold 1.000" in progress.notes[0]
    assert equal(model.state_dict(), before)


def test_threshold_never_reached_keeps_the_best(taught):
    model, _ = taught
    scores = iter([0.9, 0.7, 0.5, 0.6, 0.8])
    seen = []

    def forget_score():
        seen.append(weights(model))
        return next(scores)

    progress = run(taught, threshold=0.1, max_epochs=4, forget_score=forget_score)
    assert progress.stopped_by == "max_epochs" and not progress.reached
    assert progress.kept_epoch == 2
    assert equal(model.state_dict(), seen[2])
    assert "was not reached in 4 epochs; kept is epoch 2 with the lowest forget score, 0.500" in progress.notes[0]


def test_a_run_that_diverges_keeps_the_best(taught):
    model, _ = taught
    before = weights(model)
    progress = run(taught, learning_rate=float("inf"), max_epochs=3)
    assert progress.stopped_by == "divergence"
    assert any("the run diverged; kept is epoch 0" in note for note in progress.notes)
    assert equal(model.state_dict(), before)


def test_a_broken_model_is_not_an_unlearned_one(taught):
    """One step an epoch: only the score itself can tell."""
    model, encoder = taught
    before = weights(model)
    forget = small_task().split.forget[:10]
    progress = unlearn(
        model,
        [encoder.encode(row) for row in forget],
        None,
        objective="ga",
        learning_rate=float("inf"),
        threshold=0.33,
        forget_score=lambda: score(model, encoder, forget).mean,
        max_epochs=3,
    )
    assert progress.stopped_by == "divergence" and not progress.reached
    assert any("are not numbers" in note for note in progress.notes)
    assert equal(model.state_dict(), before)


def test_steps_left_out_have_no_share(taught):
    model, _ = taught
    rows = []
    regularizer = SSIUURegularizer(model, weight=1e3, every=2)
    progress = run(taught, regularizer=regularizer, log=rows.append, threshold=0.0, max_epochs=3)
    shares = [row["penalty_share"] for row in rows if "penalty_share" in row]
    # the first step stores, then every second one is left out
    assert [share > 0 for share in shares] == [False, False, True, False, True, False]
    assert progress.penalty_share == pytest.approx(sum(shares) / 6)


def test_micro_batches_change_nothing(taught_folder):
    from taught import load_taught

    ends = []
    for size in (None, 5):
        model, encoder = load_taught(taught_folder)
        model.double()
        regularizer = SSIUURegularizer(model, relative_weight=10)
        progress = run((model, encoder), regularizer=regularizer, max_epochs=4, threshold=0.0, micro_batch_size=size)
        ends.append((model, progress))
    (one, whole), (other, parts) = ends
    assert whole.weight == pytest.approx(parts.weight, rel=1e-6)
    assert whole.penalty_shares == pytest.approx(parts.penalty_shares, rel=1e-4)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_same_seed_gives_the_same_weights(taught_folder):
    from taught import load_taught

    ends = []
    for seed in (0, 0, 1):
        model, encoder = load_taught(taught_folder)
        run((model, encoder), max_epochs=2, threshold=0.0, seed=seed)
        ends.append(weights(model))
    assert equal(ends[0], ends[1])
    assert not equal(ends[0], ends[2])


def test_the_penalty_is_in_the_log(taught):
    model, _ = taught
    rows = []
    progress = run(
        taught, regularizer=SSIUURegularizer(model, relative_weight=30), log=rows.append, threshold=0.0, max_epochs=6
    )
    steps = [row for row in rows if "penalty" in row]
    assert len(steps) == progress.steps
    # the first step has nothing stored, the next four calibrate
    assert [row["penalty_share"] for row in steps[:5]] == [0] * 5
    assert all(row["penalty_share"] > 0 for row in steps[5:])
    assert progress.weight > 0
    assert progress.penalty_share == pytest.approx(sum(row["penalty_share"] for row in steps) / len(steps))
    assert {"negative_share", "underflows", "nonfinite", "weight", "gradient_norm"} <= steps[-1].keys()


def test_a_penalty_too_small_to_act_is_said(taught):
    model, _ = taught
    progress = run(taught, regularizer=SSIUURegularizer(model, weight=1e-9), max_epochs=2, threshold=0.0)
    assert any("too little to matter" in note for note in progress.notes)


def test_a_run_that_ends_before_calibration_says_so(taught):
    model, _ = taught
    progress = run(taught, regularizer=SSIUURegularizer(model, relative_weight=30), max_epochs=1, threshold=0.0)
    assert any("no penalty was ever applied" in note for note in progress.notes)


def test_the_initial_reference_is_taken_before_the_first_step(taught, recwarn):
    model, _ = taught
    rows = []
    regularizer = SSIUURegularizer(model, weight=1e3, reference="initial")
    run(taught, regularizer=regularizer, log=rows.append, max_epochs=1, threshold=0.0)
    assert rows[1]["penalty"] > 0
    assert not [warning for warning in recwarn if "set_reference" in str(warning.message)]


@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_neurons(taught, reference, recwarn):
    model, _ = taught
    rows = []
    regularizer = SSIUURegularizer(model, relative_weight=3, granularity="neuron", reference=reference)
    # 30 rows, 16 a step: batches wrap around, and a row may be in one twice
    micro = 5 if reference == "initial" else None
    progress = run(
        taught, regularizer=regularizer, log=rows.append, threshold=0.0, max_epochs=4, micro_batch_size=micro
    )
    steps = [row for row in rows if "penalty" in row]
    assert len(steps) == progress.steps == 8
    calibrated = [row["weight"] > 0 for row in steps]
    # in the first step nothing has changed yet, then four calibrate
    assert calibrated == [False] * 5 + [True] * 3
    assert all(row["penalty"] > 0 for row in steps[1:])
    # while λ is being calibrated nothing is added; then the penalty's part isn't known, and nothing is said of it
    assert [row["penalty_share"] for row in steps] == [0.0] * 5 + [None] * 3
    assert '"penalty_norm": null' in json.dumps(steps[-1])
    assert progress.as_dict()["penalty_share"] is None
    assert not any("too little to matter" in note for note in progress.notes)
    assert not [warning for warning in recwarn if "penalty" in str(warning.message)]


def test_neurons_hold_back_what_gradient_difference_changes(taught_folder):
    """With a weight that dwarfs the loss the suppressing neurons stay near where they were."""
    from taught import load_taught

    penalties = {}
    for weight in (0.0, 1e3):
        model, encoder = load_taught(taught_folder)
        rows = []
        regularizer = SSIUURegularizer(
            model, weight, granularity="neuron", reference="initial", target="mean_token_probability"
        )
        run((model, encoder), regularizer=regularizer, log=rows.append, threshold=0.0, max_epochs=4)
        penalties[weight] = rows[-2]["penalty"]
    assert penalties[1e3] < penalties[0.0]


def test_bad_input(taught):
    model, encoder = taught
    forget = [encoder.encode(row) for row in small_task().split.forget]
    common = {"learning_rate": 1e-3, "threshold": 0.3, "forget_score": lambda: 1.0}
    with pytest.raises(ValueError, match="unknown objective 'gdd'; known: ga, gd"):
        unlearn(model, forget, forget, objective="gdd", **common)
    with pytest.raises(ValueError, match="the forget set is empty"):
        unlearn(model, [], forget, objective="gd", **common)
    with pytest.raises(ValueError, match="GD needs retain rows and there are none"):
        unlearn(model, forget, [], objective="gd", **common)


def test_micro_batches_of_neurons_are_refused_before_anything_is_scored(taught):
    model, _ = taught
    regularizer = SSIUURegularizer(model, granularity="neuron")

    def never():
        raise AssertionError("scored")

    with pytest.raises(ValueError, match="micro_batch_size=5 is smaller than batch_size=16"):
        run(taught, regularizer=regularizer, micro_batch_size=5, forget_score=never)
    with pytest.raises(AssertionError, match="scored"):
        run(taught, regularizer=regularizer, micro_batch_size=16, forget_score=never)


def test_modules_outside_the_graph_are_logged(taught):
    model, _ = taught
    rows = []
    regularizer = SSIUURegularizer(model, granularity="neuron", nonfinite="count")
    block, used = model.model.layers[-1].mlp.down_proj, []
    # from the second step on the output of this module goes nowhere, nor do those that it is made of
    block.register_forward_hook(lambda module, inputs, output: output * 0 if len(used) < 2 else output.detach())
    model.register_forward_pre_hook(lambda module, inputs: used.append(1) if module.training else None)
    with pytest.warns(UserWarning, match="is not in this step's graph.*the same of 2 others"):
        run(taught, regularizer=regularizer, log=rows.append, threshold=0.0, max_epochs=2)
    steps = [row for row in rows if "penalty" in row]
    assert [row.get("absent") for row in steps] == [None, 3, 3, 3]
