"""Jobs in processes of their own: one process of one thread a core, or one process a GPU."""

import multiprocessing
import os
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ProcessPoolExecutor
from queue import Empty

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from ssiuu_fast import models

Ready = Callable[[dict], Iterable[Hashable]]


def run_jobs(
    work: Callable,
    ready: Ready,
    context: tuple,
    *,
    description: str,
    done: dict | None = None,
    device: str | None = None,
) -> dict:
    """job → work(job, *context, say), of every job that ready(done) names; say(text) prints above the bar.

    ready(done): the jobs that may run, given the results so far, those to start first in front; finished and running
    ones may be among them. done: results of an earlier run, to go on from. An error in a job ends all of them. Small
    models gain nothing from more threads, so that each process has one. Where device is None or "cuda" and there are
    several GPUs, each has its own process; any other device but the CPU has one. A process sees no other GPU than its
    own, which is "cuda" there.
    """
    done = dict(done or {})
    if all(job in done for job in ready(done)):
        return done
    context_of_processes = multiprocessing.get_context("spawn")
    seats = _seats(device)
    with context_of_processes.Manager() as manager:
        messages, free = manager.Queue(), manager.Queue()
        for seat in seats:
            free.put(seat)
        with (
            ProcessPoolExecutor(
                len(seats), mp_context=context_of_processes, initializer=_settle, initargs=(free,)
            ) as pool,
            tqdm(desc=description) as bar,
        ):
            running: dict = {}
            try:
                while True:
                    waiting = [job for job in ready(done) if job not in done and job not in running.values()]
                    for job in waiting[: len(seats) - len(running)]:
                        running[pool.submit(_work, work, job, context, messages)] = job
                    bar.total = bar.n + max(len(waiting), len(running))
                    if not running:
                        return done
                    _print_messages(messages, bar)
                    for future in [future for future in running if future.done()]:
                        done[running.pop(future)] = future.result()
                        bar.update()
                        _print_messages(messages, bar)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


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


def _settle(free) -> None:
    # several processes share the terminal: the parent's bar is the only one
    disable_progress_bar()
    seat = free.get()
    if seat is not None:
        # before this process first asks for a GPU; a Trainer would otherwise spread over all of them
        os.environ["CUDA_VISIBLE_DEVICES"] = seat
    torch.set_num_threads(1)


def _print_messages(messages, bar) -> None:
    try:
        while True:
            bar.write(messages.get(timeout=0.2))
    except Empty:
        return
