"""benchmarks/attribution.py runs, with a tiny model: what it prints, and its rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).parents[1] / "benchmarks" / "attribution.py"


def test_it_runs_with_and_without_captum(tmp_path):
    rows = tmp_path / "rows.json"
    # captum isn't a dependency: one that can't be imported stands in for none
    (tmp_path / "captum").mkdir()
    (tmp_path / "captum" / "__init__.py").write_text("raise ImportError('no captum here')")
    sizes = "--size tiny --samples 2 --tokens 32 --rounds 2 --threads 1".split()
    run = subprocess.run(
        [sys.executable, str(FILE), *sizes, "--json", str(rows)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "outputs autograd doesn't keep (K, O, Q, down)" in run.stdout
    assert "not importable: no captum here" in run.stdout
    assert run.stdout.count("plain by the clock, goal 1.10") == 2
    found = {(row["contestant"], row["case"]): row for row in json.loads(rows.read_text())}
    assert len(found) == 6
    captum = found["captum", "tiny 2x32"]
    assert captum["seconds"] is None and captum["failure"]
    mine = found["attribute", "tiny 2x32"]
    # 2 layers of Q, K, O and down: 32 neurons each, of 2 x 32 tokens in fp32
    assert mine["allowed_extra_bytes"] == int(1.02 * 2 * 4 * 32 * 2 * 32 * 4)
    assert 0 < mine["extra_bytes"] < 3 * mine["allowed_extra_bytes"]
    assert mine["hardware"] and mine["versions"]["torch"]
