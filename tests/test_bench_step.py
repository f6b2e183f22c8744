"""benchmarks/step.py runs, with a tiny model: what it prints, its rows, and when it gives no ratio."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STEP = BENCHMARKS / "step.py"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def case():
    from step_case import Case

    return Case("tiny", batch=2, length=12)


def row(case, contestant, **found):
    from step_report import row_of

    return row_of(case, contestant, found, 3, gd_peak=None)


def test_the_whole_path(tmp_path):
    told = "--quick --contestants plain --case noskip --target probability --batch 2 --length 12 --rounds 2 --threads 1"
    run = subprocess.run(
        [sys.executable, str(STEP), *told.split(), "--device", "cpu", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 of 6 forget rows skipped" in run.stdout and "not seen  the goals of time are for" in run.stdout
    gd, plain = json.loads((tmp_path / "step_cpu_tiny_float32.json").read_text())
    assert (gd["contestant"], plain["contestant"]) == ("gd", "plain")
    for found in (gd, plain):
        low, median, high = found["time_ratio"]
        assert 0 < low <= median <= high and found["seconds"][1] > 0 and found["base_seconds"][1] > 0
        # 2 layers of 4 x 32 x 32 and 3 x 32 x 64
        assert found["regularized_parameters"] == 2 * (4 * 32 * 32 + 3 * 32 * 64) and found["tensors"] == 14
        assert found["tokens"] == 2 * 2 * 12 and found["hardware"] and found["versions"]["torch"]
        assert found["peak_allocation_bytes"] > 0 and not found["failure"] and not found["no_ratio"]
        # 2 tokens of a vocabulary of 64, about evenly
        assert 1e-4 < found["smallest_target"] < 1e-3 and found["rows_skipped"] == 0
    assert plain["penalty_checked"] and not gd["penalty_checked"]
    assert gd["peak_above_gd_bytes"] == 0
    written = (tmp_path / "step_cpu_tiny_float32_noskip_probability_12_1.csv").read_text()
    assert [line.partition(",")[0] for line in written.splitlines()] == ["contestant", "gd", "plain"]
    assert (tmp_path / "step_cpu_tiny_float32_noskip_probability_12_1.png").stat().st_size > 5000


def test_no_ratio_where_rows_were_skipped_that_should_not_be(capsys):
    from step_case import Case
    from step_report import goals, table
    from step_worker import run

    said = {}
    # the second pair of cases is what each is about: there the ratio is there
    for regime, answer in (("noskip", 64), ("skip", 2), ("noskip", 2), ("skip", 64)):
        case = Case("tiny", batch=2, length=72, answer_tokens=answer, regime=regime)
        found = run(case, "two backwards", ["time"], 2)
        assert not found.get("failure"), found
        measured = row(case, "two backwards", **found)
        table([measured])
        goals(case, [measured])
        said[regime, answer] = measured, capsys.readouterr().out.splitlines()
    for key, remark in {
        ("noskip", 64): "6 of 6 forget rows are under the tolerance, 0 should be",
        ("skip", 2): "0 of 6 forget rows are under the tolerance, 6 should be",
    }.items():
        measured, lines = said[key]
        assert measured.time_ratio is measured.extra_seconds is measured.processor_time_ratio is None
        line = next(line for line in lines if line.startswith("| two backwards"))
        assert [cell.strip() for cell in line.split("|")][3:5] == ["–", "–"] and remark in line
        assert measured.seconds is not None
    for key, skipped in {("noskip", 2): "0 of 6", ("skip", 64): "all of 6"}.items():
        measured, lines = said[key]
        assert measured.time_ratio[1] > 0 and measured.extra_seconds is not None
        line = next(line for line in lines if line.startswith("| two backwards"))
        assert f"{measured.time_ratio[1]:.3f}" in line.split("|")[3]
        assert any(f"{skipped} forget rows skipped" in line for line in lines)


def test_no_ratio_where_the_road_itself_left_rows_out(case):
    times = {name: [1.0] * 3 for name in ("seconds", "base_seconds", "processor_seconds", "base_processor_seconds")}
    seen = {"rows": 6, "rows_skipped": 0}
    assert row(case, "one backward", **times, **seen, rows_taken=[2, 2]).time_ratio == (1.0,) * 3
    measured = row(case, "one backward", **times, **seen, rows_taken=[1, 2])
    assert measured.time_ratio is None and measured.no_ratio == "the road took 1 of 2 forget rows"


def test_a_contestant_that_is_not_there_or_wrong_is_a_row(case, monkeypatch):
    import step_contestants
    from step_worker import run

    class Absent(step_contestants.Step):
        def __init__(self, setup):
            raise step_contestants.NotHere("not built: no such thing")

    class Off(step_contestants.Plain):
        def regularize(self, gradients):
            super().regularize([1.01 * gradient for gradient in gradients])

    for name, made, failure in (("absent", Absent, "not built"), ("off", Off, "wrong: R = ")):
        monkeypatch.setitem(step_contestants.CONTESTANTS, name, made)
        found = run(case, name, ["time"], 1)
        assert found["failure"].startswith(failure)
        measured = row(case, name, **found)
        assert measured.seconds is measured.time_ratio is None and measured.hardware


def gradients_of(case, contestant, monkeypatch, weight):
    """.grad of every parameter as AdamW gets it in the second step, and R."""
    import step_contestants
    from step_case import Setup

    monkeypatch.setattr(step_contestants, "WEIGHT", weight)
    setup = Setup(case)
    step = step_contestants.CONTESTANTS[contestant](setup)
    step(0)
    seen = []
    monkeypatch.setattr(setup.optimizer, "step", lambda: seen.extend(p.grad.clone() for p in setup.model.parameters()))
    step(1)
    return torch.cat([gradient.flatten() for gradient in seen]), step.penalty


@pytest.mark.parametrize("count", (1, 2))
@pytest.mark.parametrize("target", ("probability", "log_probability", "mean_token_probability"))
def test_contestants_do_the_same_step(target, count, monkeypatch):
    import step_contestants
    from step_case import Case

    case = Case("tiny", batch=2, length=12, target=target, micro_batches=count)
    plain_gradient, penalty = gradients_of(case, "gd", monkeypatch, 0.0)
    assert penalty is None
    peer, _ = gradients_of(case, "peer", monkeypatch, 0.0)
    torch.testing.assert_close(peer, plain_gradient, rtol=1e-4, atol=1e-6)
    # a penalty as large as the objective's gradient, whatever the scale of the target
    large, _ = gradients_of(case, "plain", monkeypatch, 1e9)
    weight = 1e9 * (plain_gradient.norm() / (large - plain_gradient).norm()).item()
    whole, penalty = gradients_of(case, "plain", monkeypatch, weight)
    added = whole - plain_gradient
    assert 0.9 < added.norm() / plain_gradient.norm() < 1.1
    for name in ("two backwards", "one backward", "one backward, shared forward"):
        try:
            found, of_name = gradients_of(case, name, monkeypatch, weight)
        except step_contestants.NotHere:
            continue
        assert (found - whole).norm() < 1e-4 * added.norm(), name
        assert float(of_name) == pytest.approx(float(penalty), rel=1e-4)


def test_the_base_is_not_slowed_by_what_a_contestant_hooks_in(case):
    from step_case import Setup, twin_of
    from step_contestants import CONTESTANTS

    setup = Setup(case)
    twin = twin_of(setup.model, case)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in setup.model.parameters()]
    neurons = CONTESTANTS["neurons"](setup)
    neurons(0)
    hooks = [sum(len(module._forward_hooks) for module in model.modules()) for model in (setup.model, twin)]
    assert hooks[0] > 0 and hooks[1] == 0
    ids = setup.batches[0][0]["input_ids"]
    torch.testing.assert_close(twin(input_ids=ids).logits, setup.model(input_ids=ids).logits)


def test_lines_and_the_deepest_model(case):
    from step_largest import most_layers
    from step_limits import linears_of
    from step_scaling import Line

    line = Line("tokens", "tokens", "", [1.0, 2.0, 4.0], [3.0, 5.0, 9.0], [0.1] * 3)
    assert (line.slope, line.intercept, line.r_squared) == pytest.approx((2.0, 1.0, 1.0))
    bent = Line("tokens", "tokens", "", [1.0, 2.0, 4.0], [3.0, 5.0, 30.0], [0.1] * 3)
    assert bent.r_squared < 0.99
    assert Line("tokens", "tokens", "", [1.0], [3.0], [0.1]).slope is None
    tried = []
    assert most_layers(lambda layers: tried.append(layers) or layers <= 37, 64) == 37 and len(tried) <= 6
    assert most_layers(lambda layers: False, 64) == 0
    inside = sum(linear.parameters for linear in linears_of(case) if linear.name != "head")
    assert inside == 2 * (4 * 32 * 32 + 3 * 32 * 64)
