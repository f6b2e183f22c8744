"""benchmarks/gpu.py runs, on the CPU with tiny sizes: what it prints, and its rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_it_runs_and_a_contestant_that_fails_is_a_row(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--rounds", "2", "--json", str(file)]
    # threads that wait for each other are slow where the cores are shared
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    for title in ("Limits", "neuron_attribution", "neuron_penalty", "penalty_, Llama", "penalty_, small"):
        assert f"### {title}" in run.stdout
    assert "goal at least 0.9" in run.stdout
    rows = json.loads(file.read_text())
    contestants = {row["contestant"] for row in rows if row["benchmark"] == "penalty_"}
    assert contestants == {"cpp", "reference", "cuda", "eager", "foreach", "compiled"}
    for row in rows:
        # no CUDA kernel runs on the CPU
        if row["contestant"] == "cuda":
            assert "can't run" in row["failure"] and row["seconds"] is None
        elif not row["failure"]:
            low, median, high = row["seconds"]
            assert 0 < low <= median <= high and row["gigabytes_per_second"] > 0 and row["hardware"]
    assert not [row for row in rows if "wrong" in row["failure"]]


@pytest.fixture
def case_module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import case

    return case


def test_what_disagrees_is_found(case_module):
    part, disagreement = case_module.Part, case_module.disagreement
    truth = [part(torch.tensor([1.0, 2.0, 3.0]), 1e-3), part(torch.zeros(()), 1e-3), part(torch.ones(0), 1e-3)]
    assert disagreement(truth, truth) == ""
    for value in (2.1, float("nan"), float("inf")):
        other = [part(torch.tensor([1.0, value, 3.0]), 1e-3), *truth[1:]]
        assert "33.33% of the elements of output 0 of 3" in disagreement(other, truth)


def test_a_wrong_contestant_is_not_timed(case_module):
    import stopwatch

    values = torch.ones(4)
    case = case_module.Case(
        benchmark="doubling",
        name="4",
        contestants={"eager": lambda: values.mul_(2), "wrong": lambda: values.mul_(3), "other": None},
        restore=lambda: values.fill_(1),
        outcome=lambda result: [case_module.Part(values, 1e-6)],
        truth="eager",
        traffic=32,
        limit="copy",
        baselines=("eager",),
        goals={},
        goals_of=(),
    )
    rows = {row.contestant: row for row in case_module.run(case, stopwatch.Stopwatch(torch.device("cpu")), 3)}
    assert rows["eager"].seconds and not rows["eager"].failure
    assert rows["wrong"].failure == "wrong: 100.00% of the elements of output 0 of 1 are wrong"
    assert rows["wrong"].seconds is None and rows["other"].failure == "has no form for this case"
