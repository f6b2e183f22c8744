"""`ssiuu-fast unlearn` under torchrun: one folder, one voice, and the run of a single process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from taught import small_task

from ssiuu_fast.cli import main
from ssiuu_fast.ranks import Ranks

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ssiuu_fast"]


@pytest.fixture
def flags(taught_folder, tmp_path):
    split = small_task().split
    for name, examples in (("forget", split.forget), ("retain", split.retain)):
        fields = ({"question": row.prompt, "answer": row.answer, "options": row.false_options} for row in examples)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, fields)))
    config = {
        "model": str(taught_folder),
        "forget": str(tmp_path / "forget.jsonl"),
        "retain": str(tmp_path / "retain.jsonl"),
        "learning_rate": 1e-3,
        "threshold": 0.35,
        "max_epochs": 2,
        "weight": 100.0,
        "micro_batch_size": 4,
        "device": "cpu",
    }
    (tmp_path / "unlearn.yaml").write_text(json.dumps(config))
    return ["unlearn", "--config", str(tmp_path / "unlearn.yaml"), "--output"]


def torchrun(*arguments, cwd):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*TORCHRUN, *arguments], env=environment, capture_output=True, text=True, timeout=120, cwd=cwd
    )


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_two_processes_are_one(flags, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    done = torchrun(*flags, str(two), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("FS: forget rows.") == done.stdout.count("model: ") == 1
    assert main([*flags, str(one)]) == 0
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    alone, shared = results_of(one), results_of(two)
    assert shared["before"] == alone["before"] and shared["after"] == alone["after"]
    assert shared["unlearning"]["steps"] == alone["unlearning"]["steps"] == 4
    steps = [
        [row for row in map(json.loads, (folder / "steps.jsonl").read_text().splitlines()) if "loss" in row]
        for folder in (one, two)
    ]
    for name in ("loss", "penalty", "grad_norm"):
        assert [row[name] for row in steps[1]] == pytest.approx([row[name] for row in steps[0]], rel=1e-3)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=2e-4)


def test_an_error_is_said_once_and_nobody_waits(flags, tmp_path):
    (tmp_path / "there").mkdir()
    done = torchrun(*flags, str(tmp_path / "there"), cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("ssiuu-fast: ") == done.stderr.count("a run is never overwritten") == 1
    assert not any((tmp_path / "there").iterdir())


def failing(rank, failing_ranks):
    try:
        with Ranks().failing_together():
            if rank in failing_ranks:
                raise ValueError(f"rank {rank} can't")
    except (ValueError, SystemExit) as error:
        return repr(error)
    return "fine"


@pytest.mark.parametrize(
    "ranks, said",
    [
        ([], ["fine", "fine"]),
        ([0], ['ValueError("rank 0 can\'t")', "SystemExit(1)"]),
        ([1], ["SystemExit(1)", 'ValueError("rank 1 can\'t")']),
        ([0, 1], ['ValueError("rank 0 can\'t")', "SystemExit(1)"]),
    ],
)
def test_failing_together(two_ranks, ranks, said):
    assert two_ranks(failing, ranks) == said
