"""The penalty at the grain of neurons: what is added to the gradient of a linear module's output."""

from typing import NamedTuple

import torch
from torch import Tensor

from ssiuu_fast.ops import backends, cuda
from ssiuu_fast.ops.addresses import address, neuron_numbers
from ssiuu_fast.ops.checks import check_apart, check_contiguous, check_own_memory, check_weight, check_written
from ssiuu_fast.ops.neuron_attribution import check_pair, mask_bytes


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
            **gradient is overwritten** and returned as the injection: it must not require grad, nor share memory with
            anything else or within itself (as an expanded tensor does). hidden may be expanded.
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
        nothing and gets 0 injected; its attribution is returned as it is. Sums are
        accumulated as in `neuron_attribution`.

    Raises:
        TypeError, ValueError: before anything is changed, with what is wrong and what to do.
        RuntimeError: the backend asked for can't run here, with the reason.
    """
    if torch.compiler.is_compiling():
        from ssiuu_fast.ops import library

        return library.traced_neuron_penalty(hidden, gradient, reference, mask, weight, per_sample, one_sided, backend)
    return run_neuron_penalty(hidden, gradient, reference, mask, weight, per_sample, one_sided, backend)


def run_neuron_penalty(hidden, gradient, reference, mask, weight, per_sample, one_sided, backend) -> NeuronPenalty:
    """neuron_penalty outside of a traced graph."""
    check_pair(hidden, gradient, mask)
    weight = _check(hidden, gradient, reference, weight, per_sample)
    double = hidden.dtype == torch.float64
    name = backends.choose(backend, "neuron_penalty", hidden.device, double=double)
    run = {"cuda": _cuda, "cpp": _cpp, "triton": _triton, "reference": _reference}[name]
    with torch.no_grad():
        result = run(hidden, gradient, reference, mask, weight, bool(per_sample), bool(one_sided))
    # tell autograd, as an in-place torch operator would: kernels write through bare pointers
    if not gradient.is_inference():
        torch.autograd.graph.increment_version(gradient)
    return result


def _check(hidden, gradient, reference, weight, per_sample):
    """Refuse bad input, before anything is written; return the weight as a number or a 0-dim tensor."""
    check_written(gradient, "gradient")
    check_own_memory(gradient, "gradient")
    check_apart(gradient, "gradient", hidden, "hidden")
    if reference is not None:
        dtype, shape = attribution_form(hidden, per_sample)
        check_contiguous(reference, "reference", (dtype,))
        if reference.shape != shape or reference.device != hidden.device:
            raise ValueError(
                f"reference is {tuple(reference.shape)} on {reference.device}: with per_sample={per_sample} it must be"
                f" {tuple(shape)} on {hidden.device}"
            )
        check_apart(gradient, "gradient", reference, "reference")
    weight = check_weight(weight, [(hidden.device, "hidden")])
    if isinstance(weight, Tensor):
        check_apart(gradient, "gradient", weight, "weight")
    return weight


def attribution_form(hidden: Tensor, per_sample: bool) -> tuple[torch.dtype, torch.Size]:
    """Dtype and shape of the attribution, and of its reference."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    batch, _, neurons = hidden.shape
    return dtype, torch.Size((batch, neurons) if per_sample else (neurons,))


def punished_difference(attribution: Tensor, reference: Tensor | None, one_sided: bool) -> tuple[Tensor, Tensor]:
    """d, and which neurons have A < 0 and everything finite; both like the attribution."""
    difference = torch.zeros_like(attribution) if reference is None else attribution - reference
    limit = torch.finfo(attribution.dtype).max
    # NaN compares as false
    active = (attribution < 0) & (attribution >= -limit) & (difference.abs() <= limit)
    punished = active & (difference < 0) if one_sided else active
    return torch.where(punished, difference, torch.zeros_like(difference)), active


def _cuda(hidden, gradient, reference, mask, weight, per_sample, one_sided):
    dtype, shape = attribution_form(hidden, per_sample)
    attribution = torch.empty(shape, dtype=dtype, device=hidden.device)
    mask = mask_bytes(mask)
    sums = cuda.neuron_penalty(hidden, gradient, reference, mask, weight, attribution, per_sample, one_sided)
    return NeuronPenalty(gradient, attribution, *sums)


def _cpp(hidden, gradient, reference, mask, weight, per_sample, one_sided):
    dtype, shape = attribution_form(hidden, per_sample)
    attribution = torch.empty(shape, dtype=dtype)
    mask = mask_bytes(mask)
    penalty, negative = backends._C.neuron_penalty(
        neuron_numbers(hidden, gradient, mask),
        address(reference),
        attribution.data_ptr(),
        float(weight),
        per_sample,
        one_sided,
        torch.get_num_threads(),
    )
    return NeuronPenalty(gradient, attribution, torch.tensor(penalty, dtype=torch.float64), torch.tensor(negative))


def _triton(hidden, gradient, reference, mask, weight, per_sample, one_sided):
    from ssiuu_fast.kernels.neuron_penalty import neuron_penalty as triton_penalty

    dtype, shape = attribution_form(hidden, per_sample)
    attribution = torch.empty(shape, dtype=dtype, device=hidden.device)
    sums = triton_penalty(
        hidden,
        gradient,
        reference,
        mask_bytes(mask),
        attribution,
        weight=weight,
        per_sample=per_sample,
        one_sided=one_sided,
    )
    return NeuronPenalty(gradient, attribution, *sums)


def _reference(hidden, gradient, reference, mask, weight, per_sample, one_sided):
    """The formula in plain torch: what every kernel is tested against."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # MPS has no float64
    total_dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
    product = hidden.to(dtype) * gradient.to(dtype)
    if mask is not None:
        product.masked_fill_((mask == 0).unsqueeze(-1), 0)
    attribution = product.sum(1 if per_sample else (0, 1), dtype=total_dtype).to(dtype)
    d, active = punished_difference(attribution, reference, one_sided)
    factor = 2 * weight * d
    if per_sample:
        factor = factor.unsqueeze(1)
    # where nothing is punished 0 is written, whatever the gradient holds
    value = torch.where(factor == 0, torch.zeros((), dtype=dtype, device=hidden.device), factor * gradient.to(dtype))
    if mask is not None:
        value = value.masked_fill((mask == 0).unsqueeze(-1), 0)
    gradient.copy_(value)
    return NeuronPenalty(gradient, attribution, d.to(total_dtype).square().sum(), active.sum())
