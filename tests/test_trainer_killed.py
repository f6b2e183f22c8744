"""SIGKILL at any moment, in the middle of a checkpoint too, and the run still ends bit by bit where it would have."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ssiuu_fast.loop.checkpoints import REMOVED, STAGING

STEPS = 48
SCRIPT = Path(__file__).with_name("killed.py")


def start(folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen([sys.executable, SCRIPT, folder], stdout=output, stderr=output, env=environment)


def checkpoints_of(folder):
    # one may be renamed away between the listing and the look
    steps = [int(path.name.removeprefix("checkpoint-")) for path in (folder / "run").glob("checkpoint-*")]
    return sorted(steps)


def saving_after(folder, step):
    half = [int(path.name.rpartition("-")[2]) for path in (folder / "run").glob(f"{STAGING}*")]
    return any(number > step for number in half)


def kill_when(process, condition, patience=120):
    """SIGKILL as soon as condition() holds; False if the run was over first."""
    end = time.monotonic() + patience
    while not condition():
        if process.poll() is not None:
            assert process.returncode == 0
            return False
        assert time.monotonic() < end
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return True


def assert_readable(folder):
    """Every checkpoint is whole: each file of it can be read."""
    for step in checkpoints_of(folder):
        checkpoint = folder / "run" / f"checkpoint-{step}"
        assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step
        for path in checkpoint.rglob("*.json"):
            json.loads(path.read_text())
        tensors = list(checkpoint.rglob("*.safetensors"))
        assert {"model.safetensors", "references.safetensors"} <= {path.name for path in tensors}
        for path in tensors:
            with safe_open(path, framework="pt") as file:
                assert all(file.get_tensor(name).numel() >= 0 for name in file.keys())
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, weights_only=True)
        assert (checkpoint / "rng_state.pth").stat().st_size > 0


def finish(folder):
    process = start(folder)
    assert process.wait(300) == 0, (folder / "output.txt").read_text()[-2000:]
    return load_file(folder / "final.safetensors")


def survive(folder, kills, seed):
    """Kills the run again and again; how many of the kills fell into a checkpoint that was being written or removed."""
    draws, inside = random.Random(seed), 0
    for number in range(kills):
        process, before = start(folder), (checkpoints_of(folder) or [0])[-1]
        goal = min(before + draws.randint(1, 2), STEPS - 1)
        if number % 2:
            # somewhere between two checkpoints, or in the next one
            until = []

            def some_time_later(until=until, goal=goal):
                if not until and (checkpoints_of(folder) or [0])[-1] >= goal:
                    until.append(time.monotonic() + draws.random() * 0.03)
                return bool(until) and time.monotonic() >= until[0]

            killed = kill_when(process, some_time_later)
        else:
            # while one is being written
            killed = kill_when(process, lambda goal=goal: saving_after(folder, goal))
        assert killed, "the run was over before it could be killed"
        inside += any(path.name.startswith((STAGING, REMOVED)) for path in (folder / "run").iterdir())
        assert_readable(folder)
    return inside


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed(tmp_path, uninterrupted, kills):
    inside = survive(tmp_path, kills, seed=kills)
    # half of the kills wait for a half-written checkpoint
    assert inside >= 1
    final = finish(tmp_path)
    assert final.keys() == uninterrupted.keys()
    assert all(torch.equal(final[name], tensor) for name, tensor in uninterrupted.items())
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
