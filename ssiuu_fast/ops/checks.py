"""Checks that operators make before they touch a buffer."""

import torch
from torch import Tensor

# dtype codes of the C++ kernels, csrc/cpu/kernels.h
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
BLOCKWISE8_CODE = 4


def check_dense(tensor, label: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless `tensor` is a dense tensor of one of `dtypes`; label names it in the message."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{label} must be a tensor, not {type(tensor).__name__}")
    if hasattr(tensor, "to_local"):
        raise TypeError(f"{label} is a {type(tensor).__name__}: pass its local shard, .to_local()")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{label} is {tensor.dtype}: convert it to one of {', '.join(map(str, dtypes))}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{label} has layout {tensor.layout}: pass a dense tensor, .to_dense()")


def check_contiguous(tensor, label: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """check_dense, and contiguous."""
    check_dense(tensor, label, dtypes)
    if not tensor.is_contiguous():
        raise ValueError(f"{label} of shape {tuple(tensor.shape)} has strides {tensor.stride()}: pass it .contiguous()")


def check_written(tensor: Tensor, label: str) -> None:
    """Raise if overwriting `tensor` would break a graph."""
    if tensor.requires_grad:
        raise ValueError(f"{label} requires grad and would be overwritten: pass it .detach()")


def check_no_overlap(written: list[tuple[str, int, Tensor]], read: list[tuple[str, int, Tensor]]) -> None:
    """Raise if memory that is written is also part of another tensor of either list; sorting makes it n log n."""
    spans = []
    for is_written, tensors in ((True, written), (False, read)):
        for name, index, tensor in tensors:
            if tensor.numel():
                start = tensor.data_ptr()
                spans.append((str(tensor.device), start, start + tensor.nbytes, is_written, name, index))
    spans.sort()
    furthest = furthest_written = None
    for span in spans:
        device, start, end, is_written, name, index = span
        before = furthest if is_written else furthest_written
        if before is not None and before[0] == device and start < before[2]:
            raise ValueError(
                f"{name}[{index}] and {before[4]}[{before[5]}] share memory and one is written: pass a .clone()"
            )
        furthest = _further(furthest, span)
        if is_written:
            furthest_written = _further(furthest_written, span)


def _further(best, span):
    if best is None or best[0] != span[0] or span[2] > best[2]:
        return span
    return best
