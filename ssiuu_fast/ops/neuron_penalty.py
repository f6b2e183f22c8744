"""The penalty at the grain of neurons: what is added to the gradient of a linear module's output."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ssiuu_fast.ops import backends
from ssiuu_fast.ops.neuron_attribution import check_pair


class NeuronPenalty(NamedTuple):
    """What a call gives: `injection` like the gradient, `attribution` like the reference, two 0-dim sums."""

    injection: Tensor
    attribution: Tensor
    penalty: Tensor
    negative: Tensor


def neuron_penalty(
    hidden: Tensor,
    gradient: Tensor,
    reference: Tensor | None,
    mask: Tensor | None = None,
    *,
    weight: float | Tensor,
    per_sample: bool,
    one_sided: bool = False,
    backend: str = "auto",
) -> NeuronPenalty:
    """Turn the gradient at a module's output into the gradient of the Ssiuu penalty on its neurons.

    With h = hidden[b,k,i], g = gradient[b,k,i] = ∂T/∂h, tokens k and neurons i (eq. 1 and 14 of arXiv 2509.22263, at
    the grain of neurons; g is taken as constant):

        A[b,i] = Σ_k h·g   (per_sample)      A[i] = Σ_b Σ_k h·g   (else)
        d = A − reference   where A < 0 (one_sided: and d < 0),   else 0
        injection[b,k,i] = weight · 2 · d · g[b,k,i]      penalty = Σ d²      negative = #{A < 0}

    Args:
        hidden, gradient: [batch, tokens, neurons] of one dtype: float32, bfloat16, float16 (computed in float32) or
            float64 (in float64). Batch and token may have any strides, neurons must lie next to each other.
            **gradient is overwritten** and returned as the injection.
        reference: [batch, neurons] if per_sample, else [neurons]; float32 (float64 for float64), contiguous. None:
            there is none yet, and d = 0.
        mask: None, or bool or integer [batch, tokens]: tokens with 0 add nothing to A and get 0 injected.
        weight: λ, a finite number or a one-element float32 tensor on the device of hidden.
        per_sample: whether A and its reference belong to a sample or to the whole batch.
        one_sided: punish only attributions below their reference.
        backend: "auto", "cpp", "cuda", "triton" or "reference".

    Returns:
        NeuronPenalty: injection is `gradient`; attribution has the shape and dtype of the reference; penalty float64
        and negative int64, 0-dim on the device. A neuron whose A, or A − reference if A < 0, isn't finite adds
        nothing and gets 0 injected; its attribution is returned as it is. Sums over tokens are accumulated in
        float64 or blockwise, in a fixed order.

    Raises:
        TypeError, ValueError: before anything is changed, with what is wrong and what to do.
        RuntimeError: the backend asked for can't run here, with the reason.
    """
    check_pair(hidden, gradient, mask)
    _check(hidden, gradient, reference, weight, per_sample)
    double = hidden.dtype == torch.float64
    name = backends.choose(backend, "neuron_penalty", hidden.device, double=double)
    run = {"reference": _reference}[name]
    with torch.no_grad():
        return run(hidden, gradient, reference, mask, weight, per_sample, one_sided)


def _check(hidden, gradient, reference, weight, per_sample):
    if gradient.requires_grad:
        raise ValueError("gradient requires grad and would be overwritten: pass it .detach()")
    if isinstance(weight, Tensor):
        if weight.numel() != 1 or weight.dtype != torch.float32 or weight.device != hidden.device:
            raise ValueError(
                f"weight is {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}: pass a number or one"
                f" float32 element on {hidden.device}"
            )
    elif not math.isfinite(weight):
        raise ValueError(f"weight must be finite, not {weight}")
    if reference is None:
        return
    batch, _, neurons = hidden.shape
    shape = (batch, neurons) if per_sample else (neurons,)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if (reference.shape, reference.dtype, reference.device) != (shape, dtype, hidden.device):
        raise ValueError(
            f"reference is {reference.dtype} {tuple(reference.shape)} on {reference.device}: with"
            f" per_sample={per_sample} it must be {dtype} {shape} on {hidden.device}"
        )
    if not reference.is_contiguous():
        raise ValueError(f"reference has strides {reference.stride()}: pass it .contiguous()")


def _reference(hidden, gradient, reference, mask, weight, per_sample, one_sided):
    """The formula in plain torch: what every kernel is tested against."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # MPS has no float64
    total_dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
    product = hidden.to(dtype) * gradient.to(dtype)
    if mask is not None:
        product.masked_fill_((mask == 0).unsqueeze(-1), 0)
    attribution = product.sum(1 if per_sample else (0, 1), dtype=total_dtype).to(dtype)
    difference = torch.zeros_like(attribution) if reference is None else attribution - reference
    limit = torch.finfo(dtype).max
    # NaN compares as false
    active = (attribution < 0) & (attribution >= -limit) & (difference.abs() <= limit)
    punished = active & (difference < 0) if one_sided else active
    d = torch.where(punished, difference, torch.zeros_like(difference))
    factor = 2 * weight * d
    if per_sample:
        factor = factor.unsqueeze(1)
    # where nothing is punished 0 is written, whatever the gradient holds
    value = torch.where(factor == 0, torch.zeros((), dtype=dtype, device=hidden.device), factor * gradient.to(dtype))
    if mask is not None:
        value = value.masked_fill((mask == 0).unsqueeze(-1), 0)
    gradient.copy_(value)
    return NeuronPenalty(gradient, attribution, d.to(total_dtype).square().sum(), active.sum())
