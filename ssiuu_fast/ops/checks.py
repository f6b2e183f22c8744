"""Checks that operators make before they touch a buffer."""

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# dtype codes of the C++ kernels, csrc/include/ssiuu/types.h
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


def check_weight(weight: float | Tensor, places: list[tuple[torch.device, str]]) -> float | Tensor:
    """The weight as a number or a 0-dim tensor; raise unless it is finite, or one float32 element on every device.

    places: devices, and what is there. On an accelerator the value isn't looked at: that would wait.
    """
    if not isinstance(weight, Tensor):
        if not math.isfinite(weight):
            raise ValueError(f"weight must be finite, not {weight}")
        return float(weight)
    if weight.numel() != 1 or weight.dtype != torch.float32:
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}: pass a number or one float32 element"
        )
    for device, label in places:
        if weight.device != device:
            raise ValueError(f"weight is on {weight.device} and {label} on {device}: move it there")
    weight = weight.detach().reshape(())
    if weight.device.type == "cpu" and not weight.isfinite():
        raise ValueError(f"weight must be finite, not {weight.item()}")
    return weight


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


def check_own_memory(tensor: Tensor, label: str) -> None:
    """Raise unless every element of `tensor`, which is written, surely has memory of its own."""
    extent = 1
    # from the innermost dimension out, each must step over all that lies within
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if tensor.numel() and stride < extent:
                raise ValueError(
                    f"{label} of shape {tuple(tensor.shape)} has strides {tensor.stride()}: elements may share memory"
                    " and would be overwritten, pass it .contiguous()"
                )
            extent += stride * (size - 1)


def check_apart(written: Tensor, label: str, other: Tensor, other_label: str) -> None:
    """Raise if memory between the first and the last element of `written` is also part of `other`."""
    if isinstance(written, FakeTensor):
        # it lies nowhere
        return
    (start, end), (other_start, other_end) = _range(written), _range(other)
    if written.device == other.device and start < other_end and other_start < end:
        raise ValueError(f"{label} and {other_label} share memory and {label} is overwritten: pass a .clone()")


def _range(tensor):
    """Addresses from the first to past the last element, whatever lies between; empty for no elements."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return start, start + (last + 1) * tensor.element_size()
