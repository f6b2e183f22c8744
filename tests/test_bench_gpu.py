"""benchmarks/gpu.py runs, on the CPU with tiny sizes: what it prints, and its rows."""

import json
import os
import subprocess
import sys
import time
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
    titles = ("Limits", "neuron_attribution", "neuron_penalty", "penalty_, Llama", "penalty_, small")
    for title in (*titles, "penalized_weight_gradient", "weighted_weight_gradient"):
        assert f"### {title}" in run.stdout
    assert "goal at least 0.9" in run.stdout
    rows = json.loads(file.read_text())
    contestants = {row["contestant"] for row in rows if row["benchmark"] == "penalty_"}
    assert contestants == {"cpp", "reference", "cuda", "eager", "foreach", "compiled"}
    contestants = {row["contestant"] for row in rows if row["benchmark"] == "penalized_weight_gradient"}
    assert contestants == {"library", "reference", "reference, then penalty_", "plain product"}
    assert "reference: " in run.stdout and "× library, goal at least 1.1" in run.stdout
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


class FakeDevice:
    """Events of a device that sleeps until the host has enqueued `hidden` launches."""

    def __init__(self, hidden):
        self.hidden, self.launches = hidden, 0

    def __call__(self, enable_timing):
        return self

    def record(self):
        pass

    def query(self):
        return self.launches > self.hidden

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 7.0


@pytest.fixture
def stopwatch_module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import stopwatch

    return stopwatch


def test_a_time_in_which_the_device_waited_for_the_host_is_none(stopwatch_module, monkeypatch):
    watch = stopwatch_module.Stopwatch(torch.device("cpu"))
    watch.on_gpu, watch._cycles_per_second, watch._flushing = True, 1e9, torch.zeros(1)
    slept, device = [], FakeDevice(hidden=1024)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch.cuda, "Event", device)

    def launch(count):
        def call():
            device.launches = count

        return call

    assert watch.device_time(launch(1024), 0.01) == 7e-3
    assert slept == [pytest.approx(15.5e6, rel=1e-3)]
    # the queue was full, or the host was late
    assert watch.device_time(launch(1025), 0.01) is None
    # no sleep is as long, so there is no call
    assert watch.device_time(None, 2 * stopwatch_module.LONGEST_LEAD) is None
    # an idle device is not expected to sleep
    device.launches = 2000
    assert watch._events(lambda: None) == 7e-3


def test_quantiles_are_of_the_times_that_are_known(stopwatch_module):
    measured = stopwatch_module.Measured(call_times=[1.0] * 4)
    measured.device_times = [2.0, None, 2.0, 2.0]
    assert measured.seconds == (2.0, 2.0, 2.0) and measured.rounds == 4
    measured.device_times = [2.0, None, 2.0, None]
    assert measured.seconds is None and measured.call_seconds == (1.0, 1.0, 1.0)


def test_a_slow_contestant_has_fewer_rounds(stopwatch_module):
    watch = stopwatch_module.Stopwatch(torch.device("cpu"))
    contestants = {"slow": lambda: time.sleep(0.02), "fast": lambda: None}
    measured = stopwatch_module.race(watch, contestants, lambda: None, 8, most_seconds=0.06)
    assert measured["slow"].rounds == 2 and measured["fast"].rounds == 8
    # one round it always has, and quantiles of it
    measured = stopwatch_module.race(watch, contestants, lambda: None, 8, most_seconds=1e-9)
    assert measured["slow"].rounds == 1 and len(measured["slow"].seconds) == 3


def test_no_ratio_is_made_of_a_time_that_is_not_known(stopwatch_module, capsys):
    import case
    import gpu
    from rows import DeviceRow

    def row(name, seconds, call, rounds=20):
        made = DeviceRow("b", "c", name, seconds, rounds, 50.0 if seconds else None, 0, clocks="")
        made.call_seconds = (call,) * 3
        return made

    rows = {"cuda": row("cuda", (1.0,) * 3, 2.0), "eager": row("eager", None, 9.0, 4)}
    rows["compiled"] = row("compiled", (3.0,) * 3, 30.0)
    assert str(gpu.times_as_fast(rows["cuda"], rows, "compiled", by_call=False)) == "3.00"
    assert str(gpu.times_as_fast(rows["cuda"], rows, "eager", by_call=False)) == "4.50 (call)"
    assert str(gpu.times_as_fast(rows["cuda"], rows, "eager", by_call=True)) == "4.50"
    of = {"benchmark": "b", "name": "c", "contestants": {}, "restore": None, "outcome": None, "truth": "eager"}
    goals = {"limit": 0.4, "eager": 8.0}
    made = case.Case(**of, traffic=1, limit="copy", baselines=("eager",), goals=goals, goals_of=("cuda",))
    gpu.print_case(made, list(rows.values()), {"copy": 100.0}, 20)
    said = capsys.readouterr().out
    assert "| eager, 4 rounds | – | 9e+03 (9e+03–9e+03) | – | – |" in said
    assert "cuda: 0.50 of copy, goal at least 0.4: met" in said
    assert "cuda: 4.50 × eager (call), goal at least 8: MISSED" in said


def test_the_goal_of_neuron_attribution_is_for_the_shape_it_is_stated_for(stopwatch_module):
    import gpu_neurons

    cases = [gpu_neurons._attribution_case(shape, torch.device("meta"), ("cuda",)) for shape in gpu_neurons.SHAPES]
    assert [made.goals for made in cases] == [{"limit": 0.9}, {}, {}]


def test_shards_are_unaligned_and_apart(stopwatch_module):
    import gpu_penalty

    buffers = gpu_penalty.shard_buffers([(5,), (8,), (3, 2)], "bf16", torch.device("cpu"))
    for tensors in (buffers.gradients, buffers.parameters, buffers.references):
        starts = [tensor.storage_offset() for tensor in tensors]
        assert all(start % 2 for start in starts) and [tensor.numel() for tensor in tensors] == [5, 8, 6]
        assert starts[1] >= starts[0] + 5 and starts[2] >= starts[1] + 8
        assert tensors[0].untyped_storage().nbytes() >= 2 * (starts[2] + 6)


def test_clocks_are_read_while_the_device_works(stopwatch_module):
    watch = stopwatch_module.Stopwatch(torch.device("cpu"))
    reads = []
    watch.on_gpu, watch.wait, watch._flush = True, lambda: None, lambda: reads.append(time.sleep(1e-3))
    assert watch.under_load(lambda: time.sleep(0.05) or "1980 MHz") == "1980 MHz"
    assert len(reads) > 3
