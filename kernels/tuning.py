"""The choice among a few block sizes by timing, once for each kind of input."""

from typing import NamedTuple

import torch

# below this the launch takes longer than the kernel
_WORTH_TUNING = 1 << 22
_RUNS = 10

_chosen = {}


class Block(NamedTuple):
    """Neurons that one program works on, and its warps."""

    neurons: int
    warps: int


def best_block(launch, blocks: tuple[Block, ...], kind: tuple, hidden: torch.Tensor) -> Block:
    """Return the block with which `launch(block)` is fastest on inputs of this kind, dtype and size.

    launch is run with each block the first time, so it must come to the same when it runs again. The first block is
    taken untimed for small inputs, in the interpreter, and in a CUDA graph's capture, where waiting isn't allowed.
    Triton's own autotune knows none of the three, and would tune anew for each number of tokens.
    """
    if hidden.device.type != "cuda" or hidden.numel() < _WORTH_TUNING:
        return blocks[0]
    batch, tokens, neurons = hidden.shape
    key = (*kind, hidden.device, neurons, batch.bit_length(), tokens.bit_length())
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return blocks[0]
        _chosen[key] = min(blocks, key=lambda block: _milliseconds(launch, block))
    return _chosen[key]


def _milliseconds(launch, block):
    # compiled and warm
    launch(block)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(_RUNS):
        launch(block)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
