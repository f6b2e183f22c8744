"""Resuming: bit by bit the run that was never interrupted; checkpoints that are whole or not there."""

import json
import shutil

import pytest
import torch
from tiny import tiny_llama
from transformers import TrainerCallback
from unlearners import dropped_out, equal, history, rows, trainer, weights

from ssiuu_fast.adapters import add_lora
from ssiuu_fast.loop import checkpoints
from ssiuu_fast.ranks import Ranks


class Interrupt(TrainerCallback):
    def __init__(self, before_step):
        self.before_step = before_step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.before_step:
            raise KeyboardInterrupt


def run_of(folder, interrupt=None, **options):
    settings = {
        "num_train_epochs": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "relative_weight": 3.0,
    }
    return trainer(
        folder,
        model=dropped_out(tiny_llama(torch.float32), 0.2),
        callbacks=None if interrupt is None else [Interrupt(interrupt)],
        **(settings | options),
    )


WAYS = {
    "penalty, calibrated": {},
    "8 bits": {"state_dtype": "8bit"},
    "initial": {"reference": "initial"},
    "neurons, initial": {"granularity": "neuron", "reference": "initial"},
    "ga alone": {"regularize": False, "relative_weight": None, "objective": "ga"},
    "npo": {"objective": "npo"},
    "klue": {"objective": "klue", "objective_options": {"share": 0.5, "others": 2}},
    "rmu": {"objective": "rmu", "objective_options": {"layer": 1}},
    "an epoch that ends between two checkpoints": {"save_steps": 5},
    "evaluations between checkpoints": {"eval_strategy": "steps", "eval_steps": 3},
    "a checkpoint an epoch": {"save_strategy": "epoch"},
    "a schedule": {"lr_scheduler_type": "linear", "optim": "adafactor"},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, options):
    whole_folder = tmp_path / "whole"
    whole = run_of(whole_folder, **options)
    whole.train()
    steps = sorted(int(path.name.split("-")[1]) for path in whole_folder.glob("checkpoint-*"))
    # in the middle of an epoch or between two, before and after λ is fixed
    for step in (steps[1], steps[-2]):
        # another process would start with other random numbers
        torch.manual_seed(step)
        resumed = run_of(tmp_path / f"{step}", **options)
        resumed.train(resume_from_checkpoint=str(whole_folder / f"checkpoint-{step}"))
        assert resumed.state.global_step == 12
        assert equal(weights(resumed.model), weights(whole.model))
        assert history(resumed) == history(whole)
        assert resumed.progress() == whole.progress()
        for one, other in zip(states(resumed), states(whole), strict=True):
            assert torch.equal(one, other)


def states(run):
    state = run.optimizer.state_dict()["state"]
    tensors = [state[key][name] for key in sorted(state) for name in sorted(state[key])]
    if run.regularizer is not None:
        references = run.regularizer.state_dict()["references"]
        tensors += [references[name] for name in sorted(references)]
    return [tensor for tensor in tensors if torch.is_tensor(tensor)]


def test_the_best_weights_survive(tmp_path):
    """The best evaluation is older than the checkpoint that the run is resumed from."""
    values = [0.9, 0.5, 0.7, 0.6, 0.8]

    def scored(run, taken):
        left = iter(values[taken:])
        run._forget_score = lambda model: next(left)
        return run

    options = {"save_steps": 4, "threshold": 0.1}
    whole = scored(run_of(tmp_path / "whole", **options), 0)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        scored(run_of(tmp_path / "b", 10, **options), 0).train()
    assert (tmp_path / "b" / "checkpoint-8" / checkpoints.BEST).exists()
    # two epochs of three steps are behind checkpoint 8, and the score before them
    resumed = scored(run_of(tmp_path / "b", **options), 3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.progress().kept_epoch == whole.progress().kept_epoch == 1
    assert equal(weights(resumed.model), weights(whole.model))


def test_a_finished_run_takes_no_step_more(tmp_path):
    options = {"threshold": 0.255, "save_steps": 1}
    run = run_of(tmp_path, **options)
    run.train()
    assert run.progress().stopped_by == "threshold"
    again = run_of(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.progress() == run.progress()
    assert equal(weights(again.model), weights(run.model))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "ga"}, "objective='gd', this one has objective='ga'"),
        ({"seed": 1}, "with seed=0, this one has seed=1"),
        ({"gradient_accumulation_steps": 1}, "rows_per_step=4, this one has rows_per_step=2"),
        ({"relative_weight": 30.0}, "with penalty="),
        ({"regularize": False, "relative_weight": None}, "with penalty="),
        ({"threshold": 0.1}, "threshold=0.0, this one has threshold=0.1"),
    ],
)
def test_another_configuration_is_refused_before_anything_changes(tmp_path, options, message):
    run_of(tmp_path, max_steps=2).train()
    run = run_of(tmp_path, **options)
    before = weights(run.model)
    with pytest.raises(ValueError, match=message):
        run.train(resume_from_checkpoint=True)
    assert equal(weights(run.model), before)


def test_other_rows_are_refused(tmp_path):
    run_of(tmp_path, max_steps=2).train()
    with pytest.raises(ValueError, match="with forget_rows="):
        trainer(
            tmp_path, forget=rows(9), relative_weight=3.0, per_device_train_batch_size=2, gradient_accumulation_steps=2
        ).train(resume_from_checkpoint=True)


def test_adapters_go_on_with_the_base_they_began_with_alone(tmp_path):
    pytest.importorskip("peft")

    def adapted(dtype=torch.float32, base=0):
        model = tiny_llama(dtype, seed=base)
        # fresh adapters are the same in every process
        torch.manual_seed(0)
        return trainer(
            tmp_path, model=add_lora(model, rank=2), weight=1.0, save_strategy="steps", save_steps=2, max_steps=4
        )

    whole = adapted()
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    for other in (adapted(base=1), adapted(torch.bfloat16)):
        before = weights(other.model)
        with pytest.raises(ValueError, match="on other frozen weights.*resume on the base model that it began with"):
            other.train(resume_from_checkpoint=True)
        assert equal(weights(other.model), before)
    resumed = adapted()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and equal(weights(resumed.model), weights(whole.model))


def test_a_trainer_may_train_again_after_its_objective_froze_weights(tmp_path):
    run = run_of(tmp_path, 3, objective="rmu", objective_options={"layer": 1})
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.remove_callback(Interrupt)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 12


def test_the_layout_of_a_step_may_change(tmp_path):
    options = {"max_steps": 4, "save_steps": 2}
    run_of(tmp_path, **options).train()
    other = run_of(tmp_path, **options, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.state.global_step == 4


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint: start without it"):
        run_of(tmp_path).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="has no unlearning.json: it is not a checkpoint of UnlearningTrainer"):
        run_of(tmp_path).train(resume_from_checkpoint=True)


def test_leftovers_are_removed_and_never_taken(tmp_path):
    run_of(tmp_path, max_steps=2).train()
    left = tmp_path / f"{checkpoints.STAGING}checkpoint-4" / "checkpoint-4"
    shutil.copytree(tmp_path / "checkpoint-2", left)
    (left / "trainer_state.json").write_text("{")
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / f"{checkpoints.REMOVED}checkpoint-1")
    run = run_of(tmp_path, max_steps=3)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_old_checkpoints_are_removed(tmp_path):
    run_of(tmp_path, save_total_limit=2, max_steps=7).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-7"]


def test_a_checkpoint_appears_as_a_whole(tmp_path):
    with (
        pytest.raises(OSError, match="disk full"),
        checkpoints.staged(tmp_path, "checkpoint-1", Ranks(), True) as staging,
    ):
        (staging / "checkpoint-1" / "half").write_text("x")
        raise OSError("disk full")
    assert not (tmp_path / "checkpoint-1").exists()
    with checkpoints.staged(tmp_path, "checkpoint-1", Ranks(), True) as staging:
        (staging / "checkpoint-1" / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    # an older one of the same name makes way
    with checkpoints.staged(tmp_path, "checkpoint-1", Ranks(), True) as staging:
        (staging / "checkpoint-1" / "new").write_text("y")
    assert [path.name for path in (tmp_path / "checkpoint-1").iterdir()] == ["new"]


def test_no_pickle_of_ours(tmp_path):
    run_of(tmp_path, max_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    pickled = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    ours = {path.name for path in folder.rglob("*") if path.is_file()} - pickled
    assert {"unlearning.json", "regularizer.json", "model.safetensors"} <= ours
    assert all(name.endswith((".json", ".safetensors")) for name in ours)
    assert any(name.startswith("regularizer-") for name in ours)
    assert json.loads((folder / "unlearning.json").read_text())["settings"]["objective"] == "gd"
