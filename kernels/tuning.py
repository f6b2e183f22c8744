"""The choice among a few launch configurations: measured once a process and kind of input.

triton.autotune is no way here. It runs a kernel again and again on the caller's tensors, some of which ours overwrite,
and restores only those that it is handed by name, not those behind a table of addresses; it would also tune anew for
each number of tokens, and while a CUDA graph is captured.

Only what changes no result may be chosen: two processes that choose differently must give the same bits.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

Choice = TypeVar("Choice")
_LAUNCHES = 10

_chosen: dict[Hashable, object] = {}


def fastest(
    key: Hashable,
    choices: Sequence[Choice],
    device: torch.device,
    prepare: Callable[[], Callable[[Choice], None]],
) -> Choice:
    """The fastest choice for this key. `prepare` returns launch(choice), which must do no harm when run again.

    The first choice where there is nothing to measure: in the interpreter, while a CUDA graph is being captured, and
    where there is no memory for what prepare allocates.
    """
    if device.type != "cuda" or (key not in _chosen and torch.cuda.is_current_stream_capturing()):
        return choices[0]
    if key not in _chosen:
        try:
            launch = prepare()
            _chosen[key] = min(choices, key=lambda choice: _milliseconds(launch, choice))
        except torch.OutOfMemoryError:
            return choices[0]
    return _chosen[key]


def _milliseconds(launch, choice):
    # the first one compiles
    launch(choice)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # the device is kept busy for about a millisecond until all launches are enqueued: it is timed, not the host
    torch.cuda._sleep(2_000_000)
    start.record()
    for _ in range(_LAUNCHES):
        launch(choice)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
