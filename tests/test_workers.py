"""Jobs that wait for each other, in a process of their own."""

import os
import signal
import time

import pytest
import torch

from ssiuu_fast import workers
from ssiuu_fast.workers import run_jobs


def square(job, offset, say):
    if job == 13:
        raise ValueError("thirteen is not to be had")
    say(f"squaring {job} with {torch.get_num_threads()} thread")
    return job * job + offset, os.getpid()


def killed_by_13(job, say):
    say(f"began {job}")
    if job == 13:
        # what the system does to the largest process where memory runs out
        os.kill(os.getpid(), signal.SIGKILL)
    if job == 1:
        # under way when the other is killed
        time.sleep(3)
    return os.getpid()


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr(workers, "_seats", lambda device: [None])


def test_a_job_starts_when_those_before_it_are_done_and_an_error_ends_all(one_process, capfd):
    asked = []

    def ready(done):
        asked.append(dict(done))
        # 3 becomes possible by the result of 2; 1 was done before
        return [1, 2, *([3] if 2 in done else [])]

    done = run_jobs(square, ready, (10,), description="squares", done={1: "kept"})
    assert {job: result if job == 1 else result[0] for job, result in done.items()} == {1: "kept", 2: 14, 3: 19}
    assert done[2][1] == done[3][1] != os.getpid()
    assert "squaring 3 with 1 thread" in "".join(capfd.readouterr())
    with pytest.raises(ValueError, match="thirteen is not to be had"):
        run_jobs(square, lambda done: [13, 14], (0,), description="squares")


def test_a_process_that_is_killed_costs_its_own_job_alone(monkeypatch, capfd):
    monkeypatch.setattr(workers, "_seats", lambda device: [None, None])
    jobs, told = [1, 13, 14, 15], []

    def died(job, how, say):
        told.append((job, how))
        say(f"lost {job}")
        return "lost"

    done = run_jobs(killed_by_13, lambda done: jobs, (), description="jobs", died=died)
    assert told == [(13, workers.PROCESS_DIED)] and done.pop(13) == "lost"
    # two processes at first, and one in place of the one that died
    assert done.keys() == {1, 14, 15} and len(set(done.values())) == 2
    said = "".join(capfd.readouterr())
    assert said.count("began 1\n") == 1 and "lost 13" in said


def test_a_process_that_is_killed_ends_jobs_that_need_all(one_process):
    with pytest.raises(RuntimeError, match="13: its process was killed, as the system does where memory runs out"):
        run_jobs(killed_by_13, lambda done: [13, 14], (), description="jobs")


def test_nothing_is_started_for_nothing(monkeypatch):
    monkeypatch.setattr(workers, "multiprocessing", None)
    assert run_jobs(square, lambda done: [1], (0,), description="squares", done={1: 5}) == {1: 5}


@pytest.mark.parametrize(
    ("device", "visible", "seats"),
    [
        (None, None, ["0", "1", "2"]),
        ("cuda", None, ["0", "1", "2"]),
        ("cuda:1", None, ["1"]),
        ("cuda", "5,7", ["5", "7"]),
        ("cuda:1", "5,7", ["7"]),
        ("mps", None, [None]),
    ],
)
def test_a_process_a_gpu(monkeypatch, device, visible, seats):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert workers._seats(device) == seats


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    with pytest.raises(ValueError, match="cuda:2: there are 2 GPUs"):
        workers._seats("cuda:2")


def test_a_process_a_core():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert workers._seats("cpu") == [None] * cores
