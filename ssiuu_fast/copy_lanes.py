"""Copies between host and device that run beside the computation, and what waits for what."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# something that is over at some time: a mark in the computation, or a copy
Event = Any
# target and source
Pairs = Sequence[tuple[Tensor, Tensor]]


class Lanes(Protocol):
    """Three lanes of one device: the computation, copies in and copies out. Each keeps its order."""

    def buffer(self, size: int) -> Tensor:
        """Bytes on the device; `mark` is when they can be written."""

    def mark(self) -> Event:
        """What the computation was given up to now."""

    def copy_in(self, pairs: Pairs, after: Sequence[Event]) -> Event: ...

    def copy_out(self, pairs: Pairs, after: Sequence[Event]) -> Event: ...

    def hold(self, buffer: Tensor, event: Event) -> None:
        """What the computation is given from now on comes after the event, and may use the buffer."""

    def wait(self, event: Event) -> None:
        """The host waits."""


class CudaLanes:
    """Two streams beside the one that is current where it is used. Host tensors are pinned."""

    def __init__(self, device: torch.device):
        self._device = device
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def buffer(self, size: int) -> Tensor:
        buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        # the allocator, when it gets this back, waits for what they have been given by then
        buffer.record_stream(self._in)
        buffer.record_stream(self._out)
        return buffer

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    def copy_in(self, pairs: Pairs, after: Sequence[torch.cuda.Event]) -> torch.cuda.Event:
        return _copy(self._in, pairs, after)

    def copy_out(self, pairs: Pairs, after: Sequence[torch.cuda.Event]) -> torch.cuda.Event:
        return _copy(self._out, pairs, after)

    def hold(self, buffer: Tensor, event: torch.cuda.Event) -> None:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        # it may be another stream than the one that the buffer was made on
        buffer.record_stream(current)

    def wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()


class WaitingLanes:
    """Devices without streams of torch's own kind: every copy is over when it returns."""

    def __init__(self, device: torch.device):
        self._device = device

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def mark(self) -> None:
        return None

    def copy_in(self, pairs: Pairs, after: Sequence[None]) -> None:
        for target, source in pairs:
            target.copy_(source)

    copy_out = copy_in

    def hold(self, buffer: Tensor, event: None) -> None:
        pass

    def wait(self, event: None) -> None:
        pass


def lanes_of(device: torch.device) -> Lanes | None:
    """None for the CPU, whose memory is the host's."""
    if device.type == "cpu":
        return None
    return CudaLanes(device) if device.type == "cuda" else WaitingLanes(device)


def pinned_like(tensor: Tensor, device: torch.device) -> Tensor:
    """Uninitialised host memory of a tensor's shape and dtype, from which copies to the device wait for nothing."""
    return torch.empty_like(tensor, device="cpu", pin_memory=device.type == "cuda")


def _copy(stream: torch.cuda.Stream, pairs: Pairs, after: Sequence[torch.cuda.Event]) -> torch.cuda.Event:
    for event in after:
        stream.wait_event(event)
    with torch.cuda.stream(stream):
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
    return stream.record_event()
