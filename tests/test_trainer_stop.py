"""When an unlearning run stops, which weights it keeps, and what it says."""

import pytest
import torch
from taught import RECIPE, load_taught, small_task
from transformers import TrainerCallback
from unlearners import config, equal, history, probability, rows, trainer, weights

from ssiuu_fast import SSIUURegularizer
from ssiuu_fast.data.collate import Encoded
from ssiuu_fast.evaluation.scores import score
from ssiuu_fast.trainer import UnlearningTrainer


def scored(run, values):
    """The trainer with scores that are given; the weights that each belongs to."""
    values, seen = iter(values), []

    def forget_score(model):
        seen.append(weights(model))
        return next(values)

    run._forget_score = forget_score
    return seen


def on_people(taught, folder, **options):
    model, encoder = taught
    task = small_task()
    settings = {"learning_rate": 1e-3, "num_train_epochs": 20, "per_device_train_batch_size": 16, "threshold": 0.4}
    return UnlearningTrainer(
        model,
        config(folder, max_length=RECIPE.max_positions, **(settings | {"regularize": False} | options)),
        forget=task.split.forget,
        retain=task.split.retain,
        test=task.split.test,
        processing_class=encoder.tokenizer,
    )


def test_stops_at_the_threshold(taught, tmp_path):
    run = on_people(taught, tmp_path)
    run.train()
    progress = run.progress()
    assert progress.scores[0] >= 0.9
    assert progress.scores[-1] <= 0.4 < min(progress.scores[:-1])
    assert progress.stopped_by == "threshold" and progress.reached
    # 30 forget rows, 16 a step: two steps an epoch
    assert progress.steps == 2 * progress.epochs == 2 * (len(progress.scores) - 1)
    assert progress.kept_epoch == progress.epochs and progress.score == progress.scores[-1]
    assert progress.penalty_share == 0 and progress.notes == []
    model, encoder = run.model, run.encoder
    assert score(model, encoder, small_task().split.forget).mean == progress.score
    tested = [row["eval_test_score"] for row in history(run) if "eval_test_score" in row]
    assert tested[-1] == score(model, encoder, small_task().split.test).mean


def test_the_default_threshold_is_that_of_the_rows(taught, tmp_path):
    assert on_people(taught, tmp_path, threshold=None).threshold == pytest.approx(0.33)


def test_a_score_of_ones_own_without_a_threshold_is_no_early_stop_and_that_is_said(tmp_path):
    run = trainer(tmp_path, threshold=None, regularize=False)
    seen = scored(run, [0.9, 0.1, 0.0, 0.5])
    run.train()
    progress = run.progress()
    assert (run.threshold, progress.stopped_by, progress.steps, progress.score) == (None, "max_epochs", 9, 0.5)
    assert equal(weights(run.model), seen[3])
    said = "the run had no early stop, and keeps its last weights: give threshold to stop at a forget score"
    assert progress.notes == [said]


def test_gradient_difference_keeps_more_than_ascent(taught_folder, tmp_path):
    kept = {}
    for objective in ("ga", "gd"):
        run = on_people(load_taught(taught_folder), tmp_path, objective=objective)
        run.train()
        assert run.progress().reached
        kept[objective] = score(run.model, run.encoder, small_task().split.retain).mean
    assert kept["gd"] > kept["ga"]


def test_threshold_already_met(tmp_path, caplog):
    run = trainer(tmp_path, threshold=1.0, save_strategy="epoch")
    before = weights(run.model)
    run.train()
    progress = run.progress()
    assert progress.stopped_by == "already_met" and progress.reached
    assert progress.steps == progress.epochs == progress.kept_epoch == 0 and len(progress.scores) == 1
    assert "already at or under the threshold 1.000" in progress.notes[0] and len(progress.notes) == 1
    assert equal(weights(run.model), before)
    assert not list(tmp_path.glob("checkpoint-*"))
    assert "single sample" not in caplog.text


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_threshold_never_reached_keeps_the_best(tmp_path, optim):
    run = trainer(tmp_path, threshold=0.1, num_train_epochs=4, weight=1.0, optim=optim)
    seen = scored(run, [0.9, 0.7, 0.5, 0.5, 0.8])
    run.train()
    progress = run.progress()
    assert progress.stopped_by == "max_epochs" and not progress.reached
    assert (progress.kept_epoch, progress.epochs, progress.score) == (2, 4, 0.5)
    assert equal(weights(run.model), seen[2]) and not equal(seen[2], seen[3])
    assert "was not reached in 4 epochs; kept is epoch 2 with the lowest forget score, 0.500" in progress.notes[0]


def test_a_run_that_only_gets_worse_keeps_the_starting_weights(tmp_path):
    run = trainer(tmp_path, threshold=0.1, weight=1.0)
    seen = scored(run, [0.5, 0.6, 0.7, 0.8])
    run.train()
    assert run.progress().kept_epoch == 0
    assert equal(weights(run.model), seen[0])


class StopsAt(TrainerCallback):
    """Ends a run after a step; while it goes on, a run is stopped by nothing."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize(
    "threshold, kept, said",
    [
        (0.1, 1, "kept is epoch 1 with the lowest forget score, 0.700"),
        (None, 1.3333, "the weights are those of the last step"),
    ],
)
def test_a_callback_that_ends_the_run_is_said(tmp_path, threshold, kept, said):
    # three steps an epoch
    run = trainer(tmp_path, threshold=threshold, num_train_epochs=4, weight=1.0, callbacks=[StopsAt(4)])
    scored(run, [0.9, 0.7, 0.8, 0.8])
    run.train()
    progress = run.progress()
    assert (progress.stopped_by, progress.reached, progress.steps) == ("callback", False, 4)
    assert f"a callback stopped the run after 1.3333 epochs (step 4); {said}" in progress.notes
    assert progress.kept_epoch == kept and not any("not reached in" in note for note in progress.notes)


def test_a_callback_at_the_last_step_or_at_the_threshold_is_not_what_ends_a_run(tmp_path):
    run = trainer(tmp_path / "a", threshold=0.1, num_train_epochs=2, weight=1.0, callbacks=[StopsAt(6)])
    scored(run, [0.9, 0.7, 0.8])
    run.train()
    assert run.progress().stopped_by == "max_epochs"
    run = trainer(tmp_path / "b", threshold=0.75, num_train_epochs=2, weight=1.0, callbacks=[StopsAt(3)])
    scored(run, [0.9, 0.7])
    run.train()
    assert run.progress().stopped_by == "threshold"


@pytest.mark.parametrize("regularize", [False, True])
def test_a_run_that_diverges_takes_no_broken_step(tmp_path, regularize):
    """The gradient breaks in step 5; steps of an infinite one would leave no number in the model."""
    run = trainer(
        tmp_path, weight=1.0 if regularize else None, regularize=regularize, save_strategy="steps", save_steps=1
    )
    steps, loss = [], run.objective.retain_loss

    def broken(model, inputs, totals):
        steps.append(1)
        return loss(model, inputs, totals) * (float("inf") if len(steps) == 5 else 1.0)

    run.objective.retain_loss = broken
    run.train()
    progress = run.progress()
    assert progress.stopped_by == "divergence" and not progress.reached
    assert progress.steps == 4 and run.state.global_step == 4
    assert "after step 4: the gradient's norm is" in progress.notes[0]
    assert "the run diverged; kept is epoch 1 with the lowest forget score" in progress.notes[1]
    assert probability(run.model) == progress.score
    assert max(int(folder.name.split("-")[1]) for folder in tmp_path.glob("checkpoint-*")) == 4


def test_log_probs_that_are_no_numbers(tmp_path):
    run = trainer(tmp_path, learning_rate=float("inf"), weight=1.0)
    before = weights(run.model)
    # one step an epoch more than the evaluation sees
    run._forget_score = lambda model: 0.5
    run.train()
    progress = run.progress()
    assert progress.stopped_by == "divergence" and progress.steps == 1
    assert "after step 1: a log-probability of the forget batch is not a number" in progress.notes[0]
    assert equal(weights(run.model), before)


def test_attributions_that_are_no_numbers(tmp_path, monkeypatch):
    run = trainer(tmp_path, weight=1.0)
    backward, calls = SSIUURegularizer.backward, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise FloatingPointError("non-finite attributions in somewhere")
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(SSIUURegularizer, "backward", failing)
    run.train()
    assert run.progress().notes[0] == "after step 2: non-finite attributions in somewhere"
    assert run.progress().stopped_by == "divergence"


def test_a_broken_model_is_not_an_unlearned_one(taught, tmp_path):
    """One step an epoch: only the score itself can tell."""
    run = on_people(taught, tmp_path, learning_rate=float("inf"), per_device_train_batch_size=30, num_train_epochs=3)
    before = weights(run.model)
    run.train()
    progress = run.progress()
    assert progress.stopped_by == "divergence" and not progress.reached
    assert any("are not numbers" in note for note in progress.notes)
    assert equal(weights(run.model), before)


def test_steps_left_out_have_no_share(tmp_path):
    run = trainer(tmp_path, weight=1e3, every=2, num_train_epochs=2)
    run.train()
    # the first step stores, then every second one is left out
    shares = [row["penalty_share"] for row in history(run) if "loss" in row]
    assert [share > 0 for share in shares] == [False, False, True, False, True, False]
    assert run.progress().penalty_shares == shares[::2]


def test_a_penalty_that_switches_itself_off_counts_as_none(tmp_path, monkeypatch):
    """As where every probability underflows: λ is fixed, the step is penalised, and nothing comes of it."""
    run = trainer(tmp_path, weight=1e3, num_train_epochs=2)
    monkeypatch.setattr(run, "new_regularizer", vanishing)
    run.train()
    shares = run.progress().penalty_shares
    assert [share > 0 for share in shares] == [False, True, True, False, False, False]
    assert run.progress().penalty_share == pytest.approx(sum(shares) / 6)


def vanishing(model, **options):
    regularizer = SSIUURegularizer(model, **options)
    share, calls = regularizer.penalty_share, []

    def penalty_share(norm):
        calls.append(norm)
        return share(norm) if len(calls) <= 3 else 0.0

    regularizer.penalty_share = penalty_share
    return regularizer


@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_neurons(tmp_path, reference, recwarn):
    micro = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} if reference == "initial" else {}
    run = trainer(tmp_path, relative_weight=3.0, granularity="neuron", reference=reference, **micro)
    run.train()
    steps = [row for row in history(run) if "penalty" in row]
    # in the first step nothing has changed yet, then four calibrate
    assert [row["penalty_weight"] > 0 for row in steps] == [False] * 5 + [True] * 4
    # then the penalty's part isn't known, and nothing is said of it
    assert run.progress().penalty_shares == [None] * 4
    assert run.progress().as_dict()["penalty_share"] is None
    assert not any("too little to matter" in note for note in run.progress().notes)


def test_a_penalty_too_small_to_act_is_said(tmp_path):
    run = trainer(tmp_path, weight=1e-9)
    run.train()
    assert any("too little to matter" in note for note in run.progress().notes)


def test_a_run_that_ends_before_calibration_says_so(tmp_path):
    run = trainer(tmp_path, relative_weight=30.0, num_train_epochs=1)
    run.train()
    assert any("no penalty was ever applied" in note for note in run.progress().notes)


def test_npo_and_dpo_know_the_starting_model(taught_folder, tmp_path):
    """The objective's first value follows from reference log-probs that are the model's own."""
    for objective in ("npo", "dpo"):
        model, encoder = load_taught(taught_folder)
        task = small_task()
        run = UnlearningTrainer(
            model,
            config(tmp_path, objective=objective, max_length=RECIPE.max_positions, max_steps=1, weight=1.0),
            forget=task.split.forget,
            retain=task.split.retain,
            refusals=["I can't say.", "No idea."] if objective == "dpo" else None,
            processing_class=encoder.tokenizer,
        )
        run.train()
        row = next(row for row in history(run) if "loss" in row)
        # −(2/β) log σ(0), β = 0.1
        assert row["loss"] - row["retain_loss"] == pytest.approx(20 * torch.log(torch.tensor(2.0)).item(), rel=1e-5)


@pytest.mark.parametrize("objective, options", [("rmu", {"layer": 1}), ("klue", {"share": 0.3})])
def test_only_some_parameters_move_and_all_are_free_again(tmp_path, objective, options):
    forget = rows_with_other_answers()
    named = {"objective": objective, "objective_options": options}
    run = trainer(tmp_path, forget=forget, scored=False, threshold=None, weight=1.0, **named)
    before = weights(run.model)
    run.train()
    moved = {name for name, tensor in weights(run.model).items() if not torch.equal(tensor, before[name])}
    assert moved and all("mlp" in name for name in moved)
    assert all(parameter.requires_grad for parameter in run.model.parameters())


def rows_with_other_answers():
    return [Encoded([place, 3, 4, 10 + place], [-100, -100, -100, 10 + place]) for place in range(5, 15)] + rows(2)
