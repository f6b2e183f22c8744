"""UnlearningTrainer: a step against a plain transcription, layouts that don't matter, and what it works with."""

import json
from dataclasses import asdict

import pytest
import torch
from tiny import exactly, log_probs_of, tiny_llama
from transformers import HfArgumentParser
from unlearners import config, equal, history, probability, rows, trainer, weights

from ssiuu_fast import SSIUURegularizer
from ssiuu_fast.data.collate import collate
from ssiuu_fast.sampling import wrapping_batch
from ssiuu_fast.trainer_config import UnlearningConfig


def plain_gradient_difference(model, steps, *, seed, lr=1e-2, batch_size=4, **penalty):
    """−NLL(forget) + NLL(retain) and the penalty, clipped to 1, AdamW: METHOD without a line of the trainer."""
    forget, retain = rows(10), rows(7, seed=1)
    regularizer = SSIUURegularizer(model, **penalty) if penalty else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        some = collate([forget[index] for index in wrapping_batch(10, batch_size, seed, step)])
        others = collate([retain[index] for index in wrapping_batch(7, batch_size, seed + 500_000, step)])
        log_probs = log_probs_of(model, some)
        if regularizer:
            regularizer.backward(log_probs)
        (log_probs.sum() / (some["labels"][:, 1:] != -100).sum()).backward()
        (-log_probs_of(model, others).sum() / (others["labels"][:, 1:] != -100).sum()).backward()
        if regularizer and regularizer.relative_weight is not None:
            regularizer.after_backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def close(a, b, atol=1e-12):
    for name, tensor in weights(a).items():
        torch.testing.assert_close(tensor, weights(b)[name], rtol=0, atol=atol)


@pytest.mark.parametrize("penalty", [{}, {"weight": 3.0}, {"relative_weight": 3.0}])
@pytest.mark.parametrize("seed", [0, 7])
def test_a_run_is_the_plain_loop(tmp_path, penalty, seed):
    run = trainer(tmp_path, seed=seed, regularize=bool(penalty), **penalty)
    run.train()
    plain = plain_gradient_difference(exactly(tiny_llama()), 9, seed=seed, **penalty)
    assert run.state.global_step == 9
    close(run.model, plain)
    assert not equal(weights(plain), weights(tiny_llama()))


@pytest.mark.parametrize("size, micro_batches", [(2, 2), (1, 4)])
def test_micro_batches_change_nothing(tmp_path, size, micro_batches):
    whole = trainer(tmp_path / "a", relative_weight=3.0)
    parts = trainer(
        tmp_path / "b",
        relative_weight=3.0,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=micro_batches,
    )
    whole.train(), parts.train()
    close(whole.model, parts.model, atol=1e-10)
    for one, other in zip(history(whole), history(parts), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-7)


def test_fewer_rows_than_a_batch_are_cut_unevenly(tmp_path):
    forget = rows(5)
    whole = trainer(tmp_path / "a", forget=forget, per_device_train_batch_size=8, weight=3.0)
    parts = trainer(
        tmp_path / "b", forget=forget, per_device_train_batch_size=2, gradient_accumulation_steps=4, weight=3.0
    )
    assert [len(parts.steps.part(0, 0, number).sample_ids) for number in range(4)] == [1, 1, 1, 2]
    whole.train(), parts.train()
    close(whole.model, parts.model, atol=1e-10)


def test_gradient_checkpointing_is_exact_and_never_reentrant(tmp_path):
    plain = trainer(tmp_path / "a", weight=3.0)
    saving = trainer(tmp_path / "b", weight=3.0, gradient_checkpointing=True)
    assert saving.args.checkpointing_options["use_reentrant"] is False
    plain.train(), saving.train()
    close(plain.model, saving.model, atol=1e-11)


def test_compiled(tmp_path):
    plain = trainer(tmp_path / "a", weight=3.0, max_steps=2)
    # accelerate's settings are those of the trainer that was made last
    plain.train()
    compiled = trainer(tmp_path / "b", weight=3.0, max_steps=2, torch_compile=True, torch_compile_backend="aot_eager")
    before = torch._functorch.config.donated_buffer
    compiled.train()
    assert torch._functorch.config.donated_buffer == before
    close(plain.model, compiled.model, atol=1e-11)


def test_bfloat16_autocast(tmp_path):
    full = trainer(tmp_path / "a", model=tiny_llama(torch.float32), weight=3.0, max_steps=3)
    full.train()
    half = trainer(tmp_path / "b", model=tiny_llama(torch.float32), weight=3.0, max_steps=3, bf16=True)
    half.train()
    assert next(half.model.parameters()).dtype == torch.float32
    norms = [[row["grad_norm"] for row in history(run) if "loss" in row] for run in (full, half)]
    assert norms[0] != norms[1]
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "adagrad", "rmsprop"])
def test_optimizers_of_transformers(tmp_path, optim):
    model = tiny_llama(torch.float32)
    before = weights(model)
    run = trainer(tmp_path, model=model, weight=3.0, optim=optim, max_steps=2)
    run.train()
    assert run.progress().steps == 2
    assert not equal(weights(model), before)


@pytest.mark.parametrize("objective, options", [("ga", {}), ("simnpo", {"beta": 2.0}), ("gd", {"alpha": 0.0})])
def test_objectives_by_name(tmp_path, objective, options):
    run = trainer(tmp_path, objective=objective, objective_options=options, weight=1.0)
    run.train()
    assert history(run)[-1]["eval_forget_score"] < history(run)[0]["eval_forget_score"]
    assert ("retain_loss" in history(run)[1]) == (objective != "ga")


def test_what_is_logged(tmp_path):
    run = trainer(tmp_path, relative_weight=3.0, num_train_epochs=4)
    run.train()
    steps = [row for row in run.state.log_history if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    known = {
        "forget_nll", "retain_loss", "penalty", "penalty_norm", "penalty_share", "penalty_weight", "negative_share",
        "underflows", "nonfinite", "grad_norm", "tokens_per_second", "peak_memory_gb", "learning_rate",
    }  # fmt: skip
    assert all(known <= row.keys() for row in steps)
    assert all(row["loss"] == pytest.approx(row["retain_loss"] - row["forget_nll"]) for row in steps)
    # nothing is added in the step without a reference and the four that calibrate
    assert [row["penalty_share"] > 0 for row in steps] == [False] * 5 + [True] * 7
    assert [row.get("objective_norm") == row["grad_norm"] for row in steps] == [True] * 5 + [False] * 7
    assert all(row["penalty_norm"] / row["grad_norm"] == pytest.approx(row["penalty_share"]) for row in steps)
    progress = run.progress()
    # of the steps that had one
    assert progress.penalty_share == pytest.approx(sum(row["penalty_share"] for row in steps) / 7)
    assert progress.penalty_shares == [row["penalty_share"] for row in steps[5:]]
    assert progress.weight == run.regularizer.weight == steps[-1]["penalty_weight"]
    json.dumps(progress.as_dict())


def test_the_weight_is_logged_as_it_is_and_not_as_a_mean(tmp_path):
    run = trainer(tmp_path, relative_weight=3.0, num_train_epochs=4, logging_steps=6)
    run.train()
    first, second = (row["penalty_weight"] for row in run.state.log_history if "loss" in row)
    # five steps without λ and one with it
    assert first == second == run.regularizer.weight > 0


def test_the_share_of_the_penalty_is_a_mean_over_the_steps_that_had_one(tmp_path):
    options = {"relative_weight": 3.0, "num_train_epochs": 4, "every": 2}
    single, several = trainer(tmp_path / "a", **options), trainer(tmp_path / "b", logging_steps=12, **options)
    single.train(), several.train()
    # every second step is left out; of the others the first stores and four calibrate
    shares = [row["penalty_share"] for row in history(single) if "loss" in row]
    assert [share > 0 for share in shares] == [False] * 10 + [True, False]
    (row,) = [row for row in history(several) if "loss" in row]
    assert row["penalty_share"] == pytest.approx(shares[10])
    for run in (single, several):
        assert run.progress().penalty_share == pytest.approx(shares[10])


def test_logs_of_several_steps_are_means(tmp_path):
    single, several = trainer(tmp_path / "a", weight=3.0), trainer(tmp_path / "b", weight=3.0, logging_steps=3)
    single.train(), several.train()
    each = [row for row in history(single) if "loss" in row]
    means = [row for row in history(several) if "loss" in row]
    assert [row["step"] for row in means] == [3, 6, 9]
    for name in ("loss", "forget_nll", "retain_loss", "penalty", "penalty_share"):
        assert means[1][name] == pytest.approx(sum(row[name] for row in each[3:6]) / 3)


def test_the_initial_reference_is_taken_before_the_first_step(tmp_path, recwarn):
    run = trainer(tmp_path, weight=3.0, reference="initial")
    run.train()
    assert next(row for row in history(run) if "loss" in row)["penalty"] > 0
    assert not [warning for warning in recwarn if "set_reference" in str(warning.message)]


def test_options_from_flags(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--objective", "npo", "--objective_options", '{"beta": 0.2}', "--use_cpu"]
    (parsed,) = HfArgumentParser(UnlearningConfig).parse_args_into_dataclasses(
        [
            *flags,
            "--regularized_parameters",
            "*down_proj*",
            "*up_proj*",
            "--state_dtype",
            "8bit",
            "--weight",
            "2",
            "--offload",
        ]
    )
    assert parsed.new_objective().beta == 0.2
    options = parsed.regularizer_options()
    assert (options["weight"], options["relative_weight"], options["state_dtype"]) == (2.0, None, "8bit")
    assert options["offload"] is True
    assert options["parameters"] == ["*down_proj*", "*up_proj*"]


def test_defaults_are_those_of_the_method(tmp_path):
    args = UnlearningConfig(output_dir=str(tmp_path), use_cpu=True)
    assert args.regularizer_options()["relative_weight"] == 30
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.999, 0.0, 1.0)
    assert (args.per_device_train_batch_size, args.num_train_epochs, args.lr_scheduler_type) == (16, 20, "constant")
    assert args.eval_on_start and args.eval_strategy == "epoch"


def test_the_model_is_left_as_a_user_expects(tmp_path):
    model = tiny_llama()
    cached = model.config.use_cache
    trainer(tmp_path, model=model, max_steps=1).train()
    assert model.config.use_cache == cached
    assert not model.training


def test_rows_in_every_form(tmp_path):
    from datasets import Dataset

    encoded = rows(10)
    as_dataset = Dataset.from_list([asdict(row) for row in encoded])
    padded = [
        {
            "input_ids": [*row.input_ids, 0, 0],
            "labels": [*row.labels, -100, -100],
            "attention_mask": [1] * len(row.input_ids) + [0, 0],
        }
        for row in encoded
    ]
    for form in (as_dataset, padded, iter(encoded)):
        assert trainer(tmp_path, forget=form).forget.encoded == encoded


def test_a_score_every_few_steps(tmp_path):
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=2, num_train_epochs=2)
    run.train()
    # before the first step, every second step, and at the end, which is no second one here: 6 steps
    assert [row["step"] for row in history(run) if "eval_forget_score" in row] == [0, 2, 4, 6]
    assert run.evaluate()["eval_forget_score"] == pytest.approx(min(run.progress().scores), rel=1e-12)
    assert probability(run.model) == run.progress().score


def test_no_text_and_no_threshold_means_no_early_stop(tmp_path):
    run = trainer(tmp_path, scored=False, threshold=None)
    run.train()
    progress = run.progress()
    assert (progress.steps, progress.scores, progress.score, progress.stopped_by) == (9, [], None, "max_epochs")
    assert not any("threshold" in note for note in progress.notes)
    assert config(tmp_path).threshold == 0.0
