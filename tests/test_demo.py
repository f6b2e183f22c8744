"""The whole story in small: rows, table, figure, folder, and going on after a stop."""

import json
from dataclasses import replace

import pytest
from taught import RECIPE, small_task

from ssiuu_fast import comparison_commands, demo, experiment
from ssiuu_fast.cli import main
from ssiuu_fast.demo import report, run_demo
from ssiuu_fast.runs import RunFolder

KEYS = {"method", "seed", "FS", "RS", "harmful_0.1", "harmful_0.3", "benign", "penalty_share"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "demo", "demo", {"seeds": 1})
    rows = run_demo(small_task(), replace(RECIPE, max_epochs=8), 1, run)
    return run, rows


def test_results_are_rows_of_one_form(finished):
    run, rows = finished
    assert run.read_json("results.json") == rows
    assert [(row["method"], row["seed"]) for row in rows] == [("before", 0), ("GD", 0), ("Ssiuu", 0), ("chance", None)]
    for row in rows:
        assert row.keys() == KEYS
        assert all(0 <= row[name] <= 1 for name in KEYS - {"method", "seed", "penalty_share"})
    before, gd, ssiuu, _ = rows
    assert before["FS"] >= 0.8
    assert before["FS"] > max(gd["FS"], ssiuu["FS"])
    assert (gd["penalty_share"], ssiuu["penalty_share"] > 0) == (0, True)


def test_the_folder_holds_everything(finished):
    run, _ = finished
    names = {path.name for path in run.path.iterdir()}
    assert {
        "config.json",
        "results.json",
        "table.md",
        "recovery.png",
        "recovery.csv",
        "influence.md",
        "page.html",
        "pictures",
        "memorised",
        "memorised.json",
    } <= names
    assert {"GD-0", "GD-0.json", "GD-0.steps.jsonl", "Ssiuu-0", "Ssiuu-0.json", "Ssiuu-0.steps.jsonl"} <= names
    config = run.read_json("config.json")
    assert config["command"] == "demo"
    assert {"torch", "transformers", "ssiuu-fast"} <= config["versions"].keys()
    steps = [json.loads(line) for line in run.file("Ssiuu-0.steps.jsonl").read_text().splitlines()]
    assert any("penalty_share" in row for row in steps)
    details = run.read_json("Ssiuu-0.json")
    assert [attack["name"] for attack in details["attacks"]] == ["harmful_0.1", "harmful_0.3", "benign"]


def test_the_unlearned_model_is_an_ordinary_folder(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = finished
    AutoModelForCausalLM.from_pretrained(run.file("Ssiuu-0"))
    AutoTokenizer.from_pretrained(run.file("Ssiuu-0"))


def test_the_page_shows_both_methods(finished):
    run, _ = finished
    said = run.file("influence.md").read_text()
    assert "GD: " in said and "Ssiuu: " in said
    page = run.file("page.html").read_text()
    assert said.splitlines()[0].split("|")[2].strip() == "GD"
    # two targets of five pictures and a logit lens, for each
    assert page.count("<svg ") == 22


def test_a_stopped_demo_goes_on_with_what_is_missing(finished, monkeypatch):
    run, rows = finished
    finished_run = run.read_json("GD-0.json")
    run.file("GD-0.json").unlink()
    started = []

    def run_jobs(work, ready, context, *, description, done):
        jobs = [job for job in ready(done) if job not in done]
        started.extend(jobs)
        run.write_json("GD-0.json", finished_run)
        return done | {job: rows[1] for job in jobs}

    monkeypatch.setattr(demo, "run_jobs", run_jobs)
    monkeypatch.setattr(demo, "_influence", lambda *_: ("", run.file("page.html")))
    monkeypatch.setattr(experiment, "memorise", lambda *_: pytest.fail("memorised again"))
    assert run_demo(small_task(), RECIPE, 1, run) == rows
    assert started == [("GD", 0)]


def rows_of(gd, ssiuu):
    names = ("FS", "RS", "harmful_0.1", "harmful_0.3", "benign")
    rows = [{"method": "before", "seed": 0} | dict.fromkeys(names, 1.0) | {"penalty_share": 0.0}]
    for method, values in (("GD", gd), ("Ssiuu", ssiuu)):
        rows += [
            {"method": method, "seed": s} | dict.fromkeys(names, v) | {"penalty_share": 0.5}
            for s, v in enumerate(values)
        ]
    return [*rows, {"method": "chance", "seed": None} | dict.fromkeys(names, 0.33) | {"penalty_share": 0.0}]


def runs(reached=True):
    return {(method, seed): {"reached": reached, "epochs": 7} for method in ("GD", "Ssiuu") for seed in range(3)}


def test_the_table_says_who_recovers_more():
    text = report(rows_of([0.5, 0.6, 0.7], [0.1, 0.2, 0.3]), runs())
    assert "GD reached the threshold in 3 of 3 runs (epochs: 7, 7, 7)" in text
    assert "| GD     | 0.60 ± 0.10 |" in text
    assert "mean over the penalised steps" in text
    assert "harmful 0.1: Ssiuu recovers 0.40 less than GD" in text
    assert "retention (RS): Ssiuu -0.40 against GD" in text
    assert "benign: Ssiuu recovers 0.40 MORE than GD" in report(rows_of([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]), runs())
    assert "do not differ by more than the spread" in report(rows_of([0.1, 0.2, 0.3], [0.12, 0.22, 0.32]), runs())


def test_runs_under_other_rules_get_no_verdict():
    text = report(rows_of([0.5, 0.6, 0.7], [0.1, 0.2, 0.3]), runs() | {("GD", 1): {"reached": False, "epochs": 100}})
    assert "GD reached the threshold in 2 of 3 runs (epochs: 7, 100, 7)" in text
    assert "no verdict" in text
    assert "recovers" not in text


def test_the_command_runs_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparison_commands, "PEOPLE", replace(RECIPE, max_epochs=2))
    monkeypatch.setattr(comparison_commands, "people_task", lambda instructions: small_task())
    monkeypatch.setattr(demo, "_influence", lambda *_: ("the influence table", "page.html"))
    folder = tmp_path / "run"
    assert main(["demo", "--seeds", "1", "--relative_weight", "3", "--output", str(folder)]) == 0
    table = (folder / "table.md").read_text()
    printed = capsys.readouterr().out
    assert table in printed
    assert "the influence table" in printed and "in pictures: page.html" in printed
    assert json.loads((folder / "recipe.json").read_text())["relative_weight"] == 3

    (folder / "GD-0.json").unlink()
    kept = (folder / "Ssiuu-0.json").stat().st_mtime_ns
    monkeypatch.setattr(comparison_commands, "PEOPLE", RECIPE)
    monkeypatch.setattr(experiment, "memorise", lambda *_: pytest.fail("memorised again"))
    assert main(["demo", "--resume", str(folder)]) == 0
    assert (folder / "Ssiuu-0.json").stat().st_mtime_ns == kept
    assert (folder / "table.md").read_text() == table

    assert main(["demo", "--seeds", "0"]) == 1
    assert "seeds must be at least 1, got 0" in capsys.readouterr().err
