"""How many warps a kernel gets: measured once a process and key, on buffers of its own.

triton.autotune is no way here: it runs a kernel again and again on the caller's tensors, which this one overwrites, and
restores only those that it is handed by name; ours lie behind a table of addresses.

Only what changes no result may be chosen: two processes that choose differently must give the same bits.
"""

from collections.abc import Callable, Hashable

import torch

# A thread's elements of a block of 1024 are 8 or 4: one 16-byte load of 16-bit or of 32-bit numbers.
WARPS = (4, 8)
DEFAULT = 4
_LAUNCHES = 10

_chosen: dict[Hashable, int] = {}


def fastest(key: Hashable, device: torch.device, prepare: Callable[[], Callable[[int], None]]) -> int:
    """The number of warps for this key. `prepare` makes the buffers and returns launch(warps).

    The default where there is nothing to measure: in the interpreter, while a CUDA graph is being captured, and where
    there is no memory for the buffers.
    """
    if device.type != "cuda" or (key not in _chosen and torch.cuda.is_current_stream_capturing()):
        return DEFAULT
    if key not in _chosen:
        try:
            launch = prepare()
            _chosen[key] = min(WARPS, key=lambda warps: _milliseconds(launch, warps))
        except torch.OutOfMemoryError:
            return DEFAULT
    return _chosen[key]


def _milliseconds(launch, warps):
    # the first one compiles
    launch(warps)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # the device is kept busy for about a millisecond until all launches are enqueued: it is timed, not the host
    torch.cuda._sleep(2_000_000)
    start.record()
    for _ in range(_LAUNCHES):
        launch(warps)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
