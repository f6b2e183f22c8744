"""Methods compared on a small model: lines, files, failures, and going on after a stop."""

import json
import pickle
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from taught import RECIPE, small_task

from ssiuu_fast import compare, compare_setting
from ssiuu_fast.cli import main
from ssiuu_fast.compare import columns_of, finished, run_sweep
from ssiuu_fast.comparison_options import CompareOptions
from ssiuu_fast.objectives import OBJECTIVES, log_probs
from ssiuu_fast.runs import RunFolder
from ssiuu_fast.sweep import BEFORE_JOB, Sweep


@dataclass
class Lazy(log_probs.GradientAscent):
    """Never gets anywhere."""

    name: ClassVar[str] = "Lazy"

    def forget_loss(self, model, batch, totals):
        loss, scores = super().forget_loss(model, batch, totals)
        return 0 * loss, scores


@dataclass
class Wild(log_probs.GradientAscent):
    """Diverges in its first step."""

    name: ClassVar[str] = "Wild"

    def forget_loss(self, model, batch, totals):
        loss, scores = super().forget_loss(model, batch, totals)
        return loss * float("inf"), scores


@dataclass
class Broken(log_probs.GradientAscent):
    """Raises."""

    name: ClassVar[str] = "Broken"

    def forget_loss(self, model, batch, totals):
        raise RuntimeError("the model has no layer 7")


def one_after_another(work, ready, context, *, description, done=None, device=None, died=None):
    """What `run_jobs` does, in this process; what would go to another one must survive the way."""
    done = dict(done or {})
    while left := [job for job in ready(done) if job not in done]:
        job, told = pickle.loads(pickle.dumps((left[0], context)))
        done[job] = work(job, *told, lambda text: None)
    return done


@pytest.fixture
def here(monkeypatch):
    """Runs in this process, where the objectives of these tests are known."""
    monkeypatch.setattr(compare, "run_jobs", one_after_another)
    for name, kind in (("lazy", Lazy), ("wild", Wild), ("broken", Broken)):
        monkeypatch.setitem(OBJECTIVES, name, kind)


def quick(**changes) -> Sweep:
    return replace(Sweep(("gd",), 1, (2e-3,), max_epochs=20), **changes)


def new_run(path) -> RunFolder:
    return RunFolder.create(path, "compare", {})


def test_methods_that_fail_are_lines_beside_the_others(here, taught_folder, tmp_path):
    run = new_run(tmp_path / "run")
    task = small_task()
    task = replace(task, instructions=task.instructions[:16], utility=task.split.retain[:10])
    # too low to get anywhere in an epoch, then as high as it was taught
    sweep = quick(methods=("gd", "lazy", "wild", "broken"), rates=(1e-7, 2e-3), seeds=2)
    lines = run_sweep(sweep, task, RECIPE, taught_folder, run)
    outcomes = {line["label"]: line["outcome"].removesuffix(", collapsed") for line in lines}
    failed = {"lazy": "never reached", "wild": "diverged", "broken": "error"}
    assert outcomes == {"before": "", "gd": "reached 2/2"} | failed
    assert run.read_json("results.json") == json.loads(json.dumps(lines))

    before, gd, lazy, *_ = lines
    assert gd["learning_rate"] == 2e-3
    assert [(found["learning_rate"], found["reached"]) for found in gd["searched"]] == [(1e-7, False), (2e-3, True)]
    assert all(value <= task.threshold for value in gd["scores"]["FS"])
    for column in columns_of(task):
        assert len(before["scores"][column]) == 1 and len(gd["scores"][column]) == 2
        assert all(0 <= value <= 1 for value in gd["scores"][column])
    assert lazy["learning_rate"] is None and lazy["scores"] == {}

    text = run.file("table.md").read_text()
    assert text.splitlines()[0].split() == (
        "| | FS | RS | US | harmful 0.1 | harmful 0.3 | benign | lr | epochs | penalty share | outcome |".split()
    )
    assert "- broken: at learning rate 1e-07: RuntimeError: the model has no layer 7" in text
    assert run.file("comparison.png").exists() and run.file("comparison.csv").exists()
    names = {path.name for path in run.file("runs").iterdir()}
    assert {"gd-0.002-0", "gd-0.002-0.json", "gd-0.002-0.attacks.json", "gd-0.002-0.steps.jsonl"} <= names
    # one model a line stays, and none of a run that came to nothing
    assert {path.name for path in run.file("runs").iterdir() if path.is_dir()} == {"gd-0.002-0"}
    assert "no layer 7" in run.file("runs/broken-1e-07-0.error.txt").read_text()

    # the run that raised is tried again, and nothing else is
    tried = []
    OBJECTIVES["broken"] = Lazy
    sound = compare.work

    def work(job, *context):
        tried.append((job.label, job.learning_rate))
        return sound(job, *context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "work", work)
        again = run_sweep(sweep, task, RECIPE, taught_folder, run)
    assert tried == [("broken", 1e-7), ("broken", 2e-3)]
    assert again[:4] == lines[:4]
    assert again[4]["outcome"] == "never reached"
    assert not run.file("runs/broken-1e-07-0.error.txt").exists()


def test_a_run_whose_process_was_killed_is_a_line_beside_the_others(here, taught_folder, tmp_path, monkeypatch):
    said = []

    def with_a_death(work, ready, context, *, died, **options):
        def work_or_die(job, *told):
            return died(job, "its process was killed", said.append) if job.label == "lazy" else work(job, *told)

        return one_after_another(work_or_die, ready, context, **options)

    monkeypatch.setattr(compare, "run_jobs", with_a_death)
    run = new_run(tmp_path / "run")
    lines = run_sweep(quick(methods=("lazy", "gd")), small_task(), RECIPE, taught_folder, run)
    assert [line["outcome"].partition(",")[0] for line in lines] == ["", "error", "reached 1/1"]
    assert lines[1]["explanation"] == "at learning rate 0.002: its process was killed"
    assert said == ["lazy-0.002-0: its process was killed"]
    assert run.file("runs/lazy-0.002-0.error.txt").read_text() == "its process was killed\n"
    # none of its results is taken for one when the sweep goes on
    assert not run.file("runs/lazy-0.002-0.json").exists()


def test_a_penalised_method_has_two_lines(here, taught_folder, tmp_path, monkeypatch):
    asked = []

    def unlearned(model, encoder, method, seed, task, recipe, run, name, say):
        asked.append((name, method, recipe.unlearning_rate, recipe.max_epochs, recipe.objective_options))
        reached = method == "gd" or recipe.max_epochs > 20
        details = {"reached": reached, "epochs": 3, "score": 0.3, "stopped_by": "threshold", "notes": []}
        return details | {"penalty_share": 0.5, "weight": 2.0}

    monkeypatch.setattr(compare, "unlearn_logged", unlearned)
    monkeypatch.setattr(compare, "attack_task", lambda *_, **__: [])
    recipe = replace(RECIPE, objective_options={"gd": {}})
    sweep = Sweep(("ssiuu",), 1, (1e-4, 2e-4), 20, 100)
    lines = run_sweep(sweep, small_task(), recipe, taught_folder, new_run(tmp_path / "run"))
    assert [(line["label"], line["outcome"]) for line in lines[1:]] == [
        ("ssiuu", "never reached"),
        ("ssiuu@gd", "reached 1/1"),
    ]
    assert asked == [
        ("ssiuu-0.0001-0", "ssiuu", 1e-4, 20, {"gd": {}}),
        ("ssiuu-0.0002-0", "ssiuu", 2e-4, 20, {"gd": {}}),
        ("gd-0.0001-0", "gd", 1e-4, 20, {"gd": {}}),
        ("ssiuu@gd-0.0001-0", "ssiuu", 1e-4, 100, {"gd": {}}),
    ]


def test_a_sweep_that_was_stopped_anywhere_goes_on_with_the_next_run(tmp_path, monkeypatch):
    calls = []

    def work(job, sweep, task, recipe, start, folder, say):
        calls.append(job)
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        if job.what == "attack":
            result = {"attacks": [{"name": "benign", "recovered": 0.1 * job.seed}]}
        elif job == BEFORE_JOB:
            result = {"unlearning": {}, "FS": 0.9, "RS": 0.9}
        else:
            details = {"reached": job.learning_rate > 1e-5, "epochs": 3, "score": 0.2, "stopped_by": "threshold"}
            details |= {"penalty_share": 0.0, "weight": None, "notes": []}
            result = {"unlearning": details, "FS": 0.2, "RS": 0.8}
        RunFolder(folder).write_json(f"{job.file}.json", result)
        return result

    monkeypatch.setattr(compare, "run_jobs", one_after_another)
    monkeypatch.setattr(compare, "work", work)
    sweep, task = Sweep(("gd", "ssiuu"), 2, (1e-5, 2e-5)), small_task()
    stop_after = None
    whole = run_sweep(sweep, task, RECIPE, "model", new_run(tmp_path / "whole"))
    jobs = list(calls)
    for stop_after in range(1, len(jobs) + 1):
        run = new_run(tmp_path / str(stop_after))
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            run_sweep(sweep, task, RECIPE, "model", run)
        assert len(finished(sweep, RunFolder(run.file("runs")))) == stop_after - 1
        calls.append(None)
        assert run_sweep(sweep, task, RECIPE, "model", run) == whole
        # the one that was broken off is done again, every other once
        assert [job for job in calls if job is not None] == [*jobs[:stop_after], *jobs[stop_after - 1 :]]


def test_a_model_that_knows_nothing_is_refused(here, taught_folder, tmp_path):
    task = replace(small_task(), threshold=1.0)
    with pytest.raises(ValueError, match="doesn't know these rows, and there is nothing to compare"):
        run_sweep(quick(), task, RECIPE, taught_folder, new_run(tmp_path / "run"))
    with pytest.raises(ValueError, match="can't be scored before unlearning: FileNotFoundError: .*no such model"):
        run_sweep(quick(), task, RECIPE, "./nowhere", new_run(tmp_path / "other"))


def test_the_command_and_going_on_with_it(here, taught_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_setting, "PEOPLE", RECIPE)
    monkeypatch.setattr(compare_setting, "people_task", lambda instructions: small_task())
    folder = tmp_path / "run"
    flags = ["--methods", "gd", "--data", "people", "--model", str(taught_folder), "--seeds", "1"]
    flags += ["--learning_rates", "[2e-3]", "--objective_options", "{gd: {}}"]
    assert main(["compare", *flags, "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    table = (folder / "table.md").read_text()
    assert table in printed
    assert "of 0.005, the rate that taught the model" in table
    assert "reached 1/1" in table
    monkeypatch.setattr(compare, "work", None)
    (folder / "table.md").unlink()
    assert main(["compare", "--resume", str(folder)]) == 0
    assert (folder / "table.md").read_text() == table
    # runs on other rows are not averaged with these
    other = replace(small_task(), instructions=small_task().instructions[:-1])
    monkeypatch.setattr(compare_setting, "people_task", lambda instructions: other)
    assert main(["compare", "--resume", str(folder)]) == 1
    assert "was started with have changed" in capsys.readouterr().err


@pytest.fixture
def files(tmp_path):
    task = small_task()

    def write(name, examples):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"question": e.prompt, "answer": e.answer}) + "\n" for e in examples))
        return str(path)

    return {name: write(name, getattr(task.split, name)) for name in ("forget", "retain", "test")}


def own(files, model, **options) -> CompareOptions:
    return CompareOptions(methods="ga,gd", model=str(model), forget=files["forget"], retain=files["retain"], **options)


def test_your_own_rows_and_model(files, taught_folder, tmp_path):
    elsewhere = shutil.copytree(taught_folder, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("teaching.json"))
    found = compare_setting.setting(own(files, elsewhere, utility=files["test"], max_length=100, seeds=2))
    assert (len(found.task.split.forget), len(found.task.utility)) == (30, len(small_task().split.test))
    assert found.task.split.test == found.task.split.retain
    assert "RS is on the retain rows" in found.notes[0]
    assert (found.start, found.recipe.teaching_rate, found.recipe.max_positions) == (str(elsewhere), 1e-5, 100)
    assert (found.sweep.rates[0], found.sweep.rates[-1]) == (1e-8, 1e-4)
    # a model that says at what rate it was taught is attacked at that
    assert compare_setting.setting(own(files, taught_folder)).recipe.teaching_rate == 5e-3
    noted = compare_setting.setting(own(files, taught_folder, taught_at=2e-3, test=files["test"], threshold=0.25))
    assert (noted.sweep.rates[-1], noted.task.threshold, noted.notes) == (2e-2, 0.25, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "gd,dino"}, "unknown method 'dino'"),
        ({"methods": "gd, gd"}, "methods names one twice: gd, gd"),
        ({"methods": ""}, "methods is empty"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"learning_rates": [1e-5, 0.0]}, "learning_rates must be numbers above 0, got 0.0"),
        ({"learning_rates": []}, "learning_rates is empty"),
        ({"objective_options": {"ga": {}}}, "objective_options has 'ga', which none of the methods (gd) is made of"),
        ({"objective_options": {"gd": {"beta": 1}}}, "objective 'gd' has no option 'beta'"),
        ({"forget": "f.jsonl", "data": "people"}, "give data=people or your own rows (forget), not both"),
        ({"forget": "f.jsonl"}, "need the model that knows them"),
        ({"forget": "f.jsonl", "model": "m"}, "give retain"),
        ({"test": "t.jsonl"}, "retain and test are of use with forget"),
    ],
)
def test_what_cannot_be_compared_is_said_first(options, message):
    with pytest.raises(ValueError) as raised:
        compare_setting.setting(CompareOptions(**{"methods": "gd"} | options))
    assert message in str(raised.value)


def test_more_micro_batches_than_rows_are_refused_before_a_run(files, taught_folder):
    asked = own(files, taught_folder, batch_size=128, micro_batch_size=2)
    # 64 micro-batches of 30 rows to forget; of retain rows only where a method has use for them
    with pytest.raises(ValueError, match="micro_batch_size=2 cuts a batch of 128.*needs a forget row.*there are 30"):
        compare_setting.setting(asked)
    few = small_task().split.retain[:3]
    path = Path(files["retain"])
    path.write_text("".join(json.dumps({"question": e.prompt, "answer": e.answer}) + "\n" for e in few))
    with pytest.raises(ValueError, match="cuts a batch of 16 into 4 .*needs a retain row, of which there are 3"):
        compare_setting.setting(own(files, taught_folder, micro_batch_size=4))
    alone = replace(own(files, taught_folder, micro_batch_size=4), methods=["ga"])
    assert compare_setting.setting(alone).recipe.micro_batch_size == 4


def test_rows_that_do_not_fit_are_refused_before_a_run(files, taught_folder):
    with pytest.raises(ValueError, match="max_length"):
        compare_setting.setting(own(files, taught_folder, max_length=5))


def test_every_reaches_the_penalty_and_nothing_else(monkeypatch):
    from ssiuu_fast import experiment

    given = []
    monkeypatch.setattr(experiment, "unlearn", lambda *args, penalty, **how: given.append(penalty) or Nothing())
    recipe = compare_setting.setting(CompareOptions(methods="gd,ssiuu", every=4)).recipe
    for method in ("gd", "ssiuu"):
        experiment.unlearn_task(None, None, method, 0, small_task(), replace(recipe, unlearning_rate=1e-3))
    assert given == [None, {"relative_weight": 30.0, "every": 4}]


class Nothing:
    def as_dict(self):
        return {}
