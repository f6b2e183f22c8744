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
        fields = ({"question": row.prompt, "answer": row.answer, "options": row.false_options} for row in rows)
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, fields)))
    return ["--model", taught_folder, "--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl"]


def test_plain_loop(run, tmp_path):
    printed = run("plain_loop.py", "--steps", 8, "--output", tmp_path)
    log_probs, shares = numbers(r"log P (\S+),", printed), numbers(r"share (\d+)%", printed)
    assert len(log_probs) == 8 and log_probs[-1] < log_probs[0] - 1
    assert shares[:5] == [0] * 5 and min(shares[5:]) > 0
    assert "before: score of the forget set 1.00, of the retain set 1.00" in printed and "after: " in printed
    assert (tmp_path / "model.safetensors").exists()


def test_torchrun_on_two_ranks_is_the_plain_loop(run, people, taught_folder, tmp_path):
    plain = run("plain_loop.py", *people, "--steps", 7, "--output", tmp_path / "one")
    sharded = torchrun("torchrun_fsdp2.py", *people, "--steps", 7, "--output", tmp_path / "two")
    norms = numbers(r"norm (\S+),", plain)
    assert len(norms) == 7 and numbers(r"norm (\S+),", sharded) == pytest.approx(norms, rel=1e-2)
    start, one, two = (weights(folder) for folder in (taught_folder, tmp_path / "one", tmp_path / "two"))
    for name in start:
        assert (one[name] - two[name]).norm() < 1e-2 * (one[name] - start[name]).norm(), name
    assert any((tmp_path / "two" / "regularizer").iterdir())


def test_trainer(run, people, taught_folder, tmp_path):
    printed = run("trainer.py", *people, *trainer_flags(tmp_path), "--learning_rate", "1e-3", "--num_train_epochs", 4)
    shares = numbers(r"'penalty_share': '([^']+)'", printed)
    assert len(shares) == 8 and min(shares[5:]) > 0
    losses = numbers(r"'forget_nll': '([^']+)'", printed)
    assert losses[-1] > losses[0]
    assert "stopped by max_epochs" in printed or "stopped by threshold" in printed
    start, end = weights(taught_folder), weights(tmp_path)
    assert all(not end[name].equal(start[name]) for name in start)


def test_lora(run, people, tmp_path):
    printed = run("lora.py", *people, *trainer_flags(tmp_path), "--learning_rate", "4e-3", "--num_train_epochs", 4)
    assert max(numbers(r"'penalty_share': '([^']+)'", printed)) > 0
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    # B starts at 0
    moved = [tensor.any().item() for name, tensor in adapter.items() if "lora_B" in name]
    assert len(moved) == 14 and all(moved)
    assert not (tmp_path / "model.safetensors").exists()


def trainer_flags(folder):
    return f"--output_dir {folder} --report_to none --disable_tqdm true --save_strategy no --use_cpu true".split()


def numbers(pattern, text):
    return [float(number) for number in re.findall(pattern, text)]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def torchrun(name, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / name), *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
