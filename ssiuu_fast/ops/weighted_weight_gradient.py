"""The weight gradient of a linear module in which every sample counts with a weight of its own."""

import torch
from torch import Tensor

from ssiuu_fast.ops import backends
from ssiuu_fast.ops.weight_gradient_input import (
    by_token,
    check_operands,
    check_target,
    mark_written,
    of_samples,
    selected,
)


def weighted_weight_gradient(
    gradient: Tensor,
    input: Tensor,
    weights: Tensor,
    *,
    rows: slice | Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum the weight gradients of the samples of a linear module y = x Wᵀ, each times its weight.

    With dY = gradient, X = input, samples b and tokens t:

        result[n,k] = Σ_b weights[b] Σ_t dY[b,t,n] · X[b,t,k]

    Where one backward of Σ_s w_s·log P_s gave dY, weights r_s = P_s / w_s make this the gradient of Σ P, the target of
    Algorithm 1 of arXiv 2509.22263, without a second backward.

    Args:
        gradient: [batch, ..., N], the gradient at the module's output; any number of token dimensions, none included.
        input: [batch, ..., K], of the same dtype and the same leading dimensions. float32, bfloat16, float16 or
            float64, any strides. For GPT-2's Conv1D, whose weight is [K, N], pass the two the other way round.
        weights: [batch], float32 (float64 for float64), on the device of gradient.
        rows: None, or the samples whose weight isn't 0, where the host knows them: a slice, or distinct indices as
            int64, on the CPU or the device of gradient. The others are not read. Where no rows are given they must
            be finite, as 0 · inf is NaN.
        out: None, or [N, K] of the dtype of gradient or float32, to which the result is added in place; any strides,
            overlapping nothing.
        backend: "auto", "library", "triton" or "reference". "library" is one matrix product of torch's, of the wider
            operand and the other one times the weights, computed in float32 and rounded once to its dtype (in float16
            what falls below 6e-8 is lost, and what exceeds 65504 infinite: scale the weights). "triton" rounds no
            operand; with fewer than 16 tokens a sample most of its work is on none. "auto" takes the library's product
            until the kernel is measured faster.

    Returns:
        [N, K] in the dtype of gradient, accumulated in float32 (float64 for float64), without gradient history; or
        `out`. No samples, or no tokens: zeros; `out` stays. "library" rounds to the dtype of gradient before it adds to
        a float32 `out`.

    Raises:
        TypeError, ValueError: before anything is changed, with what is wrong and what to do. Indices on an accelerator
            are not looked at, which would wait.
        RuntimeError: the backend asked for can't run here, with the reason.
    """
    if torch.compiler.is_compiling():
        from ssiuu_fast.ops import library

        return library.traced_weighted_weight_gradient(gradient, input, weights, rows, out, backend)
    return run_weighted_weight_gradient(gradient, input, weights, rows, out, backend)


def run_weighted_weight_gradient(gradient, input, weights, rows, out, backend) -> Tensor:
    """weighted_weight_gradient outside of a traced graph."""
    check_operands(gradient, input, weights, rows)
    if out is not None:
        shape = (gradient.shape[-1], input.shape[-1])
        read = [("gradient", gradient), ("input", input), ("weights", weights)]
        check_target(out, "out", shape, (gradient.dtype, torch.float32), read)
    double = gradient.dtype == torch.float64
    name = backends.choose(backend, "weighted_weight_gradient", gradient.device, double=double)
    run = {"library": library_product, "triton": _triton, "reference": reference_product}[name]
    with torch.no_grad():
        return run(gradient, input, weights, rows, out)


def library_product(gradient, input, weights, rows, out):
    """weighted_weight_gradient in one product of torch's, checked."""
    gradient, input, weights = selected(rows, gradient, input, weights)
    if gradient.shape[-1] <= input.shape[-1]:
        gradient = _scaled(gradient, weights)
    else:
        input = _scaled(input, weights)
    return plain_product(gradient, input, out)


def plain_product(gradient, input, out):
    """Σ_b Σ_t gradient[b,t,:]ᵀ input[b,t,:], added to `out` if there is one."""
    left, right = by_token(gradient).T, by_token(input)
    if out is None:
        return torch.mm(left, right)
    if out.dtype == gradient.dtype:
        return out.addmm_(left, right)
    return out.add_(torch.mm(left, right))


def _scaled(tensor, weights):
    """tensor · weights, a weight a sample, computed in the dtype of the weights and rounded once."""
    scaled = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return torch.mul(tensor, weights.view(-1, *[1] * (tensor.dim() - 1)), out=scaled)


def _triton(gradient, input, weights, rows, out):
    from ssiuu_fast.kernels.weight_gradient import weight_gradients

    gradient, input, weights = selected(rows, gradient, input, weights)
    result = gradient.new_empty(gradient.shape[-1], input.shape[-1]) if out is None else out
    weight_gradients(
        of_samples(gradient),
        of_samples(input),
        weights.contiguous(),
        weighted=result,
        add=(False, out is not None),
    )
    mark_written(result)
    return result


def reference_product(gradient, input, weights, rows, out):
    """The formula in plain torch, one sample after the other: what everything else is tested against."""
    gradient, input, weights = selected(rows, gradient, input, weights)
    total = torch.zeros(gradient.shape[-1], input.shape[-1], dtype=weights.dtype, device=gradient.device)
    for sample, weight in enumerate(weights):
        left, right = (by_token(tensor[sample : sample + 1]).to(weights.dtype) for tensor in (gradient, input))
        total += weight * (left.T @ right)
    if out is None:
        return total.to(gradient.dtype)
    return out.copy_(out.to(torch.promote_types(out.dtype, total.dtype)) + total)
