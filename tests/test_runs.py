import json

import pytest

from ssiuu_fast.report.text import mean_sd, table
from ssiuu_fast.runs import RunFolder


def test_an_existing_folder_is_refused_not_overwritten(tmp_path):
    run = RunFolder.create(tmp_path / "a" / "run", "unlearn", {"seed": 3})
    run.write_json("results.json", [1])
    with pytest.raises(FileExistsError, match="never overwritten"):
        RunFolder.create(tmp_path / "a" / "run", "unlearn", {})
    assert run.read_json("results.json") == [1]


def test_config_has_all_that_a_rerun_needs(tmp_path):
    config = RunFolder.create(tmp_path / "run", "unlearn", {"seed": 3}).read_json("config.json")
    assert config["command"] == "unlearn"
    assert config["options"] == {"seed": 3}
    assert {"versions", "machine", "started", "argv"} <= config.keys()


def test_a_folder_is_named_by_command_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunFolder.create(None, "attack", {}).path.match("runs/attack-20*")


def test_json_has_no_nan(tmp_path):
    run = RunFolder.create(tmp_path / "run", "influence", {})
    run.write_json("results.json", {"a": [float("nan"), 1.5], "b": (float("inf"), "NaN")})
    assert run.file("results.json").read_text("utf-8").count("null") == 2
    assert run.read_json("results.json") == {"a": [None, 1.5], "b": [None, "NaN"]}


def test_log_lines(tmp_path):
    run = RunFolder.create(tmp_path / "run", "unlearn", {})
    run.log("steps.jsonl", {"step": 1, "name": "ü"})
    run.log("steps.jsonl", {"step": 2})
    assert [json.loads(line) for line in run.file("steps.jsonl").read_text("utf-8").splitlines()] == [
        {"step": 1, "name": "ü"},
        {"step": 2},
    ]


def test_table_and_spread():
    assert table(["", "FS"], [["GD", "0.5"], ["Ssiuu", "0.25"]]).splitlines() == [
        "|       |   FS |",
        "|-------|-----:|",
        "| GD    |  0.5 |",
        "| Ssiuu | 0.25 |",
    ]
    assert mean_sd([0.5, 0.7]) == "0.60 ± 0.14"
    assert mean_sd([0.5]) == "0.50"
