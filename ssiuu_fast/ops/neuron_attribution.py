"""Attribution of neurons over the tokens of each sample: max, min and sum of hidden · gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from ssiuu_fast.ops import backends, cuda
from ssiuu_fast.ops.addresses import neuron_numbers
from ssiuu_fast.ops.checks import check_dense

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class NeuronAttribution(NamedTuple):
    """Largest, smallest and summed attribution over the tokens of each sample, [batch, neurons] each."""

    max: Tensor
    min: Tensor
    sum: Tensor


def neuron_attribution(
    hidden: Tensor, gradient: Tensor, mask: Tensor | None = None, *, backend: str = "auto"
) -> NeuronAttribution:
    """Reduce the attribution A[b,k,i] = hidden[b,k,i] · gradient[b,k,i] over the tokens k of each sample b.

    Equation 1 of arXiv 2509.22263, with gradient = ∂P(y|x)/∂hidden; influence variation (eq. 4, 5) needs the max
    and the min of each neuron i, the correlation of attributions the sum.

    Args:
        hidden, gradient: [batch, tokens, neurons] of one dtype: float32, bfloat16, float16 (computed in float32) or
            float64 (in float64). Batch and token may have any strides, neurons must lie next to each other.
        mask: None, or bool or integer [batch, tokens]: tokens with 0 don't count, whatever they hold, NaN included.
        backend: "auto", "cpp", "cuda", "triton" or "reference".

    Returns:
        NeuronAttribution of [batch, neurons] in float32 (float64 for float64), without gradient history. A sample
        without a counted token has max −inf, min +inf and sum 0. A NaN among the counted tokens of a neuron makes
        its max, min and sum NaN. The sum is accumulated in float64, in a fixed order ("cuda" adds up to four
        neighbouring tokens in float32 before: where those overflow, it is infinite or NaN).

    Raises:
        TypeError, ValueError: what is wrong and what to do.
        RuntimeError: the backend asked for can't run here, with the reason.
    """
    if torch.compiler.is_compiling():
        from ssiuu_fast.ops import library

        return library.traced_neuron_attribution(hidden, gradient, mask, backend)
    return run_neuron_attribution(hidden, gradient, mask, backend)


def run_neuron_attribution(hidden, gradient, mask, backend) -> NeuronAttribution:
    """neuron_attribution outside of a traced graph."""
    check_pair(hidden, gradient, mask)
    double = hidden.dtype == torch.float64
    name = backends.choose(backend, "neuron_attribution", hidden.device, double=double)
    run = {"cuda": _cuda, "cpp": _cpp, "triton": _triton, "reference": _reference}[name]
    with torch.no_grad():
        return run(hidden, gradient, mask)


def check_pair(hidden: Tensor, gradient: Tensor, mask: Tensor | None) -> None:
    """Raise unless hidden and gradient are [batch, tokens, neurons] alike, and the mask fits them."""
    for name, tensor in (("hidden", hidden), ("gradient", gradient)):
        check_dense(tensor, name, _DTYPES)
        if tensor.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be [batch, tokens, neurons]")
        if tensor.stride(2) != 1 and tensor.shape[2] > 1:
            raise ValueError(f"{name} has strides {tensor.stride()}, the last must be 1: pass it .contiguous()")
        if (tensor.shape, tensor.dtype, tensor.device) != (hidden.shape, hidden.dtype, hidden.device):
            raise ValueError(
                f"gradient is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device} and hidden {hidden.dtype}"
                f" {tuple(hidden.shape)} on {hidden.device}: they must agree"
            )
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor or None, not {type(mask).__name__}")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask is {mask.dtype}: pass bool or integers, nonzero for a token that counts")
    if mask.shape != hidden.shape[:2] or mask.device != hidden.device:
        raise ValueError(
            f"mask is {tuple(mask.shape)} on {mask.device}: it must be {tuple(hidden.shape[:2])} on {hidden.device}"
        )


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """The mask as kernels take it: contiguous bytes, 0 or 1."""
    return None if mask is None else (mask != 0).contiguous().view(torch.uint8)


def _empty_result(hidden):
    batch, _, neurons = hidden.shape
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return NeuronAttribution(*(torch.empty(batch, neurons, dtype=dtype, device=hidden.device) for _ in range(3)))


def _cuda(hidden, gradient, mask):
    return NeuronAttribution(*cuda.neuron_attribution(hidden, gradient, mask_bytes(mask)))


def _cpp(hidden, gradient, mask):
    result = _empty_result(hidden)
    mask = mask_bytes(mask)
    written = (tensor.data_ptr() for tensor in result)
    backends._C.neuron_attribution(neuron_numbers(hidden, gradient, mask), *written, torch.get_num_threads())
    return result


def _triton(hidden, gradient, mask):
    from ssiuu_fast.kernels.neuron_attribution import neuron_attribution as triton_attribution

    result = _empty_result(hidden)
    triton_attribution(hidden, gradient, mask_bytes(mask), result)
    return result


def _reference(hidden, gradient, mask):
    result = _empty_result(hidden)
    if hidden.shape[1] == 0:
        result.max.fill_(-torch.inf)
        result.min.fill_(torch.inf)
        result.sum.zero_()
        return result
    product = hidden.to(result.sum.dtype) * gradient.to(result.sum.dtype)
    left_out = torch.zeros((), dtype=torch.bool, device=hidden.device) if mask is None else (mask == 0).unsqueeze(-1)
    # MPS has no float64
    total_dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
    return NeuronAttribution(
        product.masked_fill(left_out, -torch.inf).amax(1),
        product.masked_fill(left_out, torch.inf).amin(1),
        product.masked_fill(left_out, 0).sum(1, dtype=total_dtype).to(product.dtype),
    )
