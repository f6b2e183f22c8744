"""`ssiuu-fast unlearn`: methods, stopping and resuming, and what is said before the model is loaded."""

import json

import pytest
from safetensors.torch import load_file
from taught import small_task
from unlearners import TIMES, equal

from ssiuu_fast import unlearn_command
from ssiuu_fast.cli import main
from ssiuu_fast.methods import PENALTY
from ssiuu_fast.objectives import OBJECTIVES
from ssiuu_fast.trainer import UnlearningTrainer
from ssiuu_fast.unlearn_options import UnlearnOptions


@pytest.fixture
def rows(tmp_path):
    """Flags that name rows to forget and to retain."""
    split = small_task().split
    flags = []
    for name, examples in (("forget", split.forget), ("retain", split.retain)):
        fields = ({"question": row.prompt, "answer": row.answer, "options": row.false_options} for row in examples)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, fields)))
        flags += [f"--{name}", str(tmp_path / f"{name}.jsonl")]
    return flags


def unlearn(model, rows, output, *options):
    flags = ["--model", str(model), *rows, "--output", str(output), "--learning_rate", "1e-3", "--max_epochs", "3"]
    return main(["unlearn", *flags, "--threshold", "0", *map(str, options)])


def read(folder, name):
    return json.loads((folder / name).read_text())


def steps_of(folder):
    lines = map(json.loads, (folder / "steps.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in row.items() if name not in TIMES} for row in lines if "train_runtime" not in row
    ]


@pytest.fixture
def interrupt(monkeypatch):
    """Ctrl-C in the step of this number, counted from 0; None lets runs go on."""
    takes_step = UnlearningTrainer.training_step

    def at(number):
        def training_step(self, *arguments):
            if self.state.global_step == number:
                raise KeyboardInterrupt
            return takes_step(self, *arguments)

        monkeypatch.setattr(UnlearningTrainer, "training_step", training_step)

    return at


WAYS = {
    "penalty": ["--relative_weight", 3, "--micro_batch_size", 8, "--offload", "true"],
    "npo, and a checkpoint every other epoch": ["--method", "npo+ssiuu", "--weight", 1, "--save_every", 2],
    "LoRA": ["--lora_rank", 2, "--lora_dropout", 0.1, "--method", "gd"],
    "no checkpoints": ["--save_every", 0],
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_resumed_run_is_the_uninterrupted_one(taught_folder, rows, tmp_path, capsys, interrupt, options):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert unlearn(taught_folder, rows, whole, *options) == 0
    # an epoch has two steps
    interrupt(5)
    assert unlearn(taught_folder, rows, stopped, *options) == 130
    assert f"stopped; go on with: ssiuu-fast unlearn --resume {stopped}" in capsys.readouterr().err
    checkpoints = sorted(path.name for path in (stopped / "checkpoints").glob("*"))
    assert checkpoints == ([] if options == WAYS["no checkpoints"] else ["checkpoint-4"])
    interrupt(None)
    assert main(["unlearn", "--resume", str(stopped)]) == 0
    assert "going on in" in capsys.readouterr().out
    assert read(stopped, "results.json") == read(whole, "results.json")
    assert steps_of(stopped) == steps_of(whole)
    weights = "adapter_model.safetensors" if "--lora_rank" in options else "model.safetensors"
    assert equal(load_file(stopped / "model" / weights), load_file(whole / "model" / weights))
    # what only a resumed run would want
    assert sorted(path.name for path in stopped.iterdir()) == ["config.json", "model", "results.json", "steps.jsonl"]
    assert main(["unlearn", "--resume", str(stopped)]) == 1
    assert "is of a run that is finished" in capsys.readouterr().err


def test_adapters_start_from_the_seed(taught_folder, rows, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert unlearn(taught_folder, rows, tmp_path / name, "--lora_rank", 2, "--max_epochs", 1, "--seed", seed) == 0
    a, b, c = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in "abc")
    assert equal(a, b) and not equal(a, c)


OPTIONS_OF = {
    "npo": ["--objective_options", "{beta: 0.3}"],
    "rmu": ["--objective_options", "{layer: 1, alpha: 20}"],
    "klue": ["--objective_options", "{share: 0.5, others: 2}"],
}


@pytest.mark.parametrize("method", [*OBJECTIVES, "simnpo+ssiuu"])
def test_methods_by_name(taught_folder, rows, tmp_path, capsys, method):
    output = tmp_path / "run"
    flags = ["--method", method, *OPTIONS_OF.get(method, []), "--max_epochs", 1, "--reference_cache", tmp_path / "kept"]
    assert unlearn(taught_folder, rows, output, *flags) == 0
    steps = [row for row in steps_of(output) if "loss" in row]
    assert len(steps) == 2
    assert all(("penalty" in row) == method.endswith(PENALTY) for row in steps)
    assert f"\n{method} " in capsys.readouterr().out.replace("|", "").replace("\n ", "\n")
    assert read(output, "config.json")["options"]["method"] == method
    assert any(tmp_path.glob("kept/reference-*")) == OBJECTIVES[method.removesuffix("+ssiuu")].needs_reference


def test_refusals_of_ones_own(taught_folder, rows, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        unlearn_command, "UnlearningTrainer", lambda *_, refusals, **__: given.append(refusals) or 1 / 0
    )
    (tmp_path / "no.txt").write_text("I don't know.\n\nNo idea.\n")
    for flags in (["--refusals", tmp_path / "no.txt"], []):
        with pytest.raises(ZeroDivisionError):
            unlearn(taught_folder, rows, tmp_path / "run", "--method", "dpo", *flags)
    assert given == [["I don't know.", "No idea."], ["I can't answer the question."]]
    assert not (tmp_path / "run").exists()


REFUSED = {
    "unknown method": (["--method", "gdd"], "unknown method 'gdd'; known: ssiuu, ga, gd"),
    "unknown option": (["--method", "npo", "--objective_options", "{gama: 1}"], "has no option 'gama'; it has"),
    "option out of range": (["--method", "npo", "--objective_options", "{beta: 0}"], "beta=0: must be"),
    "options without a method": (["--objective_options", "{beta: 1}"], "are of a method: give method too"),
    "refusals for npo": (["--method", "npo", "--refusals", "x"], "method npo has no use for any, only dpo has"),
    "no such refusals": (["--method", "dpo", "--refusals", "/no/such.txt"], "/no/such.txt: no such file"),
    "λ without a penalty": (["--method", "gd", "--weight", "1"], "of the penalty, which gd goes without: use gd+ssiuu"),
    "checkpoints every -1 epochs": (["--save_every", "-1"], "save_every must be at least 0"),
    "neurons in micro-batches": (
        ["--granularity", "neuron", "--micro_batch_size", "4"],
        "micro_batch_size: with granularity=neuron and reference=previous",
    ),
    "neurons in host memory": (
        ["--granularity", "neuron", "--offload", "true"],
        "offload is of no use with granularity=neuron",
    ),
    "host memory on the CPU": (["--offload", "true", "--device", "cpu"], "in host memory anyway, leave it out"),
    "more micro-batches than rows": (
        ["--batch_size", "64", "--micro_batch_size", "1"],
        "micro_batch_size=1 cuts a batch of 64 into 64 micro-batches, and each needs a forget row, of which there are "
        "30: raise micro_batch_size or leave it out, or lower batch_size",
    ),
    "a second GPU": (["--device", "cuda:1"], "set CUDA_VISIBLE_DEVICES=1 and say cuda"),
}


@pytest.mark.parametrize("flags, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_before_the_model_is_loaded(rows, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(unlearn_command.models, "load", lambda *_, **__: pytest.fail("loaded"))
    assert unlearn(tmp_path / "model", rows, tmp_path / "run", *flags) == 1
    error = capsys.readouterr().err
    assert message in error and error.splitlines()[-1].startswith("ssiuu-fast: ")
    assert not (tmp_path / "run").exists()


def test_fewer_retain_rows_than_micro_batches(rows, tmp_path, capsys):
    (tmp_path / "few.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question": "r", "answer": "b"}\n')
    flags = ["--retain", tmp_path / "few.jsonl", "--micro_batch_size", 2]
    assert unlearn(tmp_path / "model", rows, tmp_path / "run", *flags) == 1
    said = (
        "micro_batch_size=2 cuts a batch of 16 into 8 micro-batches, and each needs a retain row, of which there are 2"
    )
    assert said in capsys.readouterr().err


def test_what_the_trainer_refuses_leaves_no_folder(taught_folder, rows, tmp_path, capsys, monkeypatch):
    def refuses(*_, **__):
        raise ValueError("these rows can't be unlearned")

    monkeypatch.setattr(unlearn_command, "UnlearningTrainer", refuses)
    assert unlearn(taught_folder, rows, tmp_path / "run") == 1
    assert "these rows can't be unlearned" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_of_a_model_and_rows():
    with pytest.raises(ValueError, match="give model and forget.*Or resume"):
        UnlearnOptions(model="a")
    UnlearnOptions(resume="runs/unlearn")


def test_a_folder_that_is_none(tmp_path, capsys):
    assert main(["unlearn", "--resume", str(tmp_path / "none")]) == 1
    assert "none/config.json" in capsys.readouterr().err
