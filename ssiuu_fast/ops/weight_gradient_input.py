"""What the operators on weight gradients refuse, before anything is changed, and how they choose samples and tokens."""

import torch
from torch import Tensor

from ssiuu_fast.ops.checks import check_apart, check_dense, check_own_memory, check_written

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_operands(gradient, input, weights, rows) -> None:
    """Raise unless gradient is [batch, ..., N] and input [batch, ..., K], and weights and rows are of their batch."""
    check_dense(gradient, "gradient", _DTYPES)
    check_dense(input, "input", _DTYPES)
    for name, tensor in (("gradient", gradient), ("input", input)):
        if tensor.dim() < 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be [batch, ..., features]")
    if gradient.dtype != input.dtype:
        raise TypeError(f"gradient is {gradient.dtype} and input {input.dtype}: convert one to the dtype of the other")
    if gradient.shape[:-1] != input.shape[:-1] or gradient.device != input.device:
        raise ValueError(
            f"gradient is {tuple(gradient.shape)} on {gradient.device} and input {tuple(input.shape)} on"
            f" {input.device}: device and all dimensions but the last must agree"
        )
    batch = gradient.shape[0]
    check_dense(weights, "weights", (_arithmetic_of(gradient),))
    if weights.shape != (batch,) or weights.device != gradient.device:
        raise ValueError(
            f"weights is {tuple(weights.shape)} on {weights.device}: pass one a sample, ({batch},) on {gradient.device}"
        )
    if rows is not None:
        _check_rows(rows, batch, gradient.device)


def _arithmetic_of(tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _check_rows(rows, batch, device):
    if isinstance(rows, slice):
        if rows.step is not None and rows.step < 1:
            raise ValueError(f"rows is {rows}: its step must be positive")
        return
    if not isinstance(rows, Tensor):
        raise TypeError(f"rows must be None, a slice or an int64 tensor, not {type(rows).__name__}")
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise TypeError(
            f"rows is {rows.dtype} of shape {tuple(rows.shape)}: pass int64 indices of samples in one dimension"
        )
    if rows.device.type != "cpu":
        # what it holds is not looked at, that would wait
        if rows.device != device:
            raise ValueError(f"rows is on {rows.device} and gradient on {device}: move it there, or to the CPU")
        return
    if rows.numel():
        least, most = int(rows.min()), int(rows.max())
        if least < 0 or most >= batch:
            raise ValueError(f"rows holds {least if least < 0 else most}: samples are 0 to {batch - 1}")


def check_target(out: Tensor, label: str, shape: tuple, dtypes, read: list[tuple[str, Tensor]]) -> None:
    """Raise unless `out`, which is added to, has this shape, one of these dtypes, and no memory of what is read."""
    check_dense(out, label, tuple(dict.fromkeys(dtypes)))
    check_written(out, label)
    like = read[0][1]
    if out.shape != shape or out.device != like.device:
        raise ValueError(f"{label} is {tuple(out.shape)} on {out.device}: it must be {tuple(shape)} on {like.device}")
    check_own_memory(out, label)
    for name, tensor in read:
        check_apart(out, label, tensor, name)


def selected(rows, *tensors: Tensor) -> tuple[Tensor, ...]:
    """These samples of each tensor: views for a slice, copies for indices."""
    if rows is None:
        return tensors
    if isinstance(rows, slice):
        return tuple(tensor[rows] for tensor in tensors)
    rows = _indices_on(rows, tensors[0].device)
    return tuple(tensor.index_select(0, rows) for tensor in tensors)


def _indices_on(rows: Tensor, device: torch.device) -> Tensor:
    """The indices on this device; sent there without waiting, which a copy from ordinary memory would."""
    if rows.device == device or device.type != "cuda":
        return rows.to(device)
    return rows.pin_memory().to(device, non_blocking=True)


def by_token(tensor: Tensor) -> Tensor:
    """[batch, ..., features] → [batch · ..., features], a view where strides allow it."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def of_samples(tensor: Tensor) -> Tensor:
    """[batch, ..., features] → [batch, tokens, features], a view where strides allow it."""
    return tensor.reshape(tensor.shape[0], tensor.shape[1:-1].numel(), tensor.shape[-1])


def mark_written(*tensors: Tensor) -> None:
    """Tell autograd, as an in-place torch operator would: kernels write through bare pointers."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])
