"""The scripts of examples/ run, and do what they say."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example in this process; returns what it printed."""

    def run_example(name, *arguments):
        monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    yield run_example
    sys.modules.pop("common", None)


@pytest.fixture(scope="module")
def people(taught_folder, tmp_path_factory):
    """Arguments that name a model and its rows to forget and to retain."""
    from taught import small_task

    folder, split = tmp_path_factory.mktemp("rows"), small_task().split
    for name, rows in (("forget", split.forget), ("retain", split.retain)):
        lines = [json.dumps({"question": row.prompt, "answer": row.answer}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return ["--model", taught_folder, "--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl"]


def test_plain_loop(run, tmp_path):
    printed = run("plain_loop.py", "--steps", 8, "--output", tmp_path)
    log_probs = [float(number) for number in re.findall(r"log P of an answer (\S+),", printed)]
    shares = [int(number) for number in re.findall(r"share of the penalty (\d+)%", printed)]
    assert len(log_probs) == 8 and log_probs[-1] < log_probs[0] - 1
    assert shares[:5] == [0] * 5 and min(shares[5:]) > 0
    assert "before: score of the forget set 1.00, of the retain set 1.00" in printed and "after: " in printed
    assert (tmp_path / "model.safetensors").exists()


def test_torchrun_on_two_ranks_is_the_plain_loop(run, people, taught_folder, tmp_path):
    run("plain_loop.py", *people, "--steps", 7, "--output", tmp_path / "one")
    printed = torchrun("torchrun_fsdp2.py", *people, "--steps", 7, "--output", tmp_path / "two")
    assert printed.count("step ") == 7
    start, one, two = (
        load_file(Path(folder) / "model.safetensors") for folder in (taught_folder, tmp_path / "one", tmp_path / "two")
    )
    moved = max((one[name] - start[name]).abs().max() for name in one)
    assert moved > 1e-3
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-4


def torchrun(name, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / name), *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
