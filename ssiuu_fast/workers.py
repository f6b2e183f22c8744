"""Jobs in processes of their own: one process of one thread a core, or one process a GPU."""

import multiprocessing
import os
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from queue import Empty

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from ssiuu_fast import models

Ready = Callable[[dict], Iterable[Hashable]]
# of (job, how, say): the result of a job whose process was killed
Died = Callable[[Hashable, str, Callable[[str], None]], object]

# an error that a process can't tell of itself
PROCESS_DIED = (
    "its process was killed, as the system does where memory runs out: give each process more memory, or lower what a "
    "job needs"
)


def run_jobs(
    work: Callable,
    ready: Ready,
    context: tuple,
    *,
    description: str,
    done: dict | None = None,
    device: str | None = None,
    died: Died | None = None,
) -> dict:
    """job → work(job, *context, say), of every job that ready(done) names; say(text) prints above the bar.

    ready(done): the jobs that may run, given the results so far, those to start first in front; finished and running
    ones may be among them. done: results of an earlier run, to go on from. An error in a job ends all of them. Small
    models gain nothing from more threads, so that each process has one. Where device is None or "cuda" and there are
    several GPUs, each has its own process; any other device but the CPU has one. A process sees no other GPU than its
    own, which is "cuda" there.

    died(job, how, say): the result of a job whose process was killed, in a few words how; the others go on, and a new
    process takes its place. Left open, RuntimeError ends all of them.
    """
    done = dict(done or {})
    if all(job in done for job in ready(done)):
        return done
    processes = multiprocessing.get_context("spawn")
    with processes.Manager() as manager, ExitStack() as seats, tqdm(desc=description) as bar:
        messages = manager.Queue()
        free = [_Seat(gpu, processes, seats) for gpu in _seats(device)]
        running: dict[Future, tuple[Hashable, _Seat]] = {}
        try:
            while True:
                started = {job for job, _ in running.values()}
                waiting = [job for job in ready(done) if job not in done and job not in started]
                for job in waiting[: len(free)]:
                    seat = free.pop()
                    running[seat.submit(_work, work, job, context, messages)] = job, seat
                bar.total = bar.n + max(len(waiting), len(running))
                if not running:
                    return done
                _print_messages(messages, bar)
                for future in [future for future in running if future.done()]:
                    job, seat = running.pop(future)
                    done[job] = _result(future, job, died, messages.put)
                    free.append(seat)
                    bar.update()
                    _print_messages(messages, bar)
        except BaseException:
            for _, seat in running.values():
                seat.leave()
            raise


class _Seat:
    """Where one process at a time works: a pool of its own, so that one that dies takes no other job along.

    gpu: what CUDA_VISIBLE_DEVICES is to be there, or None. seats: closes the pools in the end.
    """

    def __init__(self, gpu: str | None, processes, seats: ExitStack):
        self._gpu = gpu
        self._processes = processes
        self._seats = seats
        self._pool = self._new_pool()

    def submit(self, *work) -> Future:
        try:
            return self._pool.submit(*work)
        except BrokenProcessPool:
            # the process died in the job before, or since
            self._pool = self._new_pool()
            return self._pool.submit(*work)

    def leave(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _new_pool(self) -> ProcessPoolExecutor:
        return self._seats.enter_context(
            ProcessPoolExecutor(1, mp_context=self._processes, initializer=_settle, initargs=(self._gpu,))
        )


def _result(future: Future, job: Hashable, died: Died | None, say: Callable[[str], None]):
    try:
        return future.result()
    except BrokenProcessPool as error:
        if died is None:
            raise RuntimeError(f"{job}: {PROCESS_DIED}") from error
        return died(job, PROCESS_DIED, say)


def _work(work: Callable, job, context: tuple, messages):
    return work(job, *context, messages.put)


def _seats(device: str | None) -> list[str | None]:
    """One entry a process: the GPU that it is to see, as CUDA_VISIBLE_DEVICES names it; None for any other device."""
    place = models.default_device(device)
    if place.type == "cpu":
        # the cores that this process may use, where the system tells
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return [None] * cores
    if place.type != "cuda":
        return [None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(max(1, torch.cuda.device_count()))]
    if place.index is None:
        return gpus
    if place.index >= len(gpus):
        raise ValueError(f"device {device}: there are {len(gpus)} GPUs, counted from 0")
    return [gpus[place.index]]


def _settle(gpu: str | None) -> None:
    # several processes share the terminal: the parent's bar is the only one
    disable_progress_bar()
    if gpu is not None:
        # before this process first asks for a GPU; a Trainer would otherwise spread over all of them
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(1)


def _print_messages(messages, bar) -> None:
    try:
        while True:
            bar.write(messages.get(timeout=0.2))
    except Empty:
        return
