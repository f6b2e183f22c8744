"""Times of contestants on one device, in turns, and the memory they take."""

import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from rows import quantiles

WARM_UP = 3
# the host's work is hidden behind a sleep of the device, as it is in training behind the backward pass, up to this
LONGEST_LEAD = 0.15
# what a contestant may take of the rounds of one case
MOST_SECONDS = 10.0


@dataclass
class Measured:
    """What was seen of one contestant; `failure` says why there is nothing."""

    # None where the device had to wait for the host
    device_times: list[float | None] = field(default_factory=list)
    call_times: list[float] = field(default_factory=list)
    peak: int = 0
    failure: str = ""

    @property
    def rounds(self):
        return len(self.call_times)

    @property
    def seconds(self):
        """Quantiles of the device's times; None where the host's could not be hidden in most rounds."""
        known = [seconds for seconds in self.device_times if seconds is not None]
        return quantiles(known) if 2 * len(known) > len(self.device_times) else None

    @property
    def call_seconds(self):
        return quantiles(self.call_times)


class Stopwatch:
    """CUDA events on a GPU, the host's clock on the CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flushing = torch.zeros(cache, device=device)
            cycles = 20_000_000
            torch.cuda._sleep(cycles)
            self._cycles_per_second = cycles / self._events(lambda: torch.cuda._sleep(cycles))

    def _flush(self):
        # by reading four times its size: what is written would go back to memory during the call that is timed
        self._flushing.amax()

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def call_time(self, call: Callable) -> float:
        """Seconds of a call on an idle device whose cache holds none of its data."""
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        self._flush()
        self.wait()
        return self._events(call)

    def device_time(self, call: Callable, host_time: float) -> float | None:
        """Seconds of the device alone: it sleeps until the host, which takes host_time, has enqueued the call.

        None where it woke up before that, because the host took longer than it may or than it did before, waited for
        the device, or launched more than the device's queue holds: it would be the host that is timed.
        """
        if not self.on_gpu:
            return self.call_time(call)
        if host_time > LONGEST_LEAD:
            return None
        self._flush()
        lead = 1.5 * host_time + 5e-4
        return self._events(call, sleep=int(lead * self._cycles_per_second))

    def _events(self, call, sleep=0):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if sleep:
            torch.cuda._sleep(sleep)
        start.record()
        call()
        awake = bool(sleep) and start.query()
        end.record()
        end.synchronize()
        return None if awake else start.elapsed_time(end) / 1e3

    def under_load(self, ask: Callable):
        """What `ask` returns while the device reads its memory without a pause."""
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask)
            while self.on_gpu and not answer.done():
                self._flush()
                self.wait()
        return answer.result()

    def host_time(self, call: Callable) -> float:
        """Seconds until the call returns."""
        self.wait()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        self.wait()
        return seconds

    def peak(self, call: Callable) -> int:
        """Bytes by which allocated device memory rises during a call; 0 on the CPU, where nobody counts."""
        if not self.on_gpu:
            call()
            return 0
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() - before


def reason(error: Exception) -> str:
    """An error in one line for a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def race(
    stopwatch: Stopwatch,
    contestants: dict[str, Callable],
    restore: Callable,
    rounds: int,
    most_seconds: float = MOST_SECONDS,
) -> dict[str, Measured]:
    """Time every contestant once a round, in turns; `restore` runs before every call, outside the clock.

    One that has taken most_seconds, restoring included, takes part in no further round.
    """
    measured = {name: Measured() for name in contestants}
    host_times = {}
    for name, call in contestants.items():
        try:
            for _ in range(WARM_UP):
                restore()
                host_times[name] = stopwatch.host_time(call)
            restore()
            measured[name].peak = stopwatch.peak(call)
        except Exception as error:
            measured[name].failure = reason(error)
            release_memory()
    taken = dict.fromkeys(contestants, 0.0)
    for _ in range(rounds):
        for name, call in contestants.items():
            if measured[name].failure or taken[name] >= most_seconds:
                continue
            begin = time.perf_counter()
            try:
                restore()
                measured[name].call_times.append(stopwatch.call_time(call))
                restore()
                measured[name].device_times.append(stopwatch.device_time(call, host_times[name]))
            except Exception as error:
                measured[name].failure = reason(error)
                release_memory()
            taken[name] += time.perf_counter() - begin
    return measured
