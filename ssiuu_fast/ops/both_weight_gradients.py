"""The weight gradient of a linear module and the weighted one, from one pass over what both are made of."""

from typing import NamedTuple

import torch
from torch import Tensor

from ssiuu_fast.ops import backends
from ssiuu_fast.ops.checks import check_apart
from ssiuu_fast.ops.weight_gradient_input import check_operands, check_target, mark_written, of_samples
from ssiuu_fast.ops.weighted_weight_gradient import library_product, plain_product, reference_product


class WeightGradients(NamedTuple):
    """The plain gradient of the loss and the one in which samples are weighted, [N, K] each."""

    plain: Tensor
    weighted: Tensor


def both_weight_gradients(
    gradient: Tensor,
    input: Tensor,
    weights: Tensor,
    *,
    rows: slice | Tensor | None = None,
    out: tuple[Tensor | None, Tensor | None] | None = None,
    backend: str = "auto",
) -> WeightGradients:
    """Return the weight gradient of a linear module y = x Wᵀ, and beside it `weighted_weight_gradient`.

    With dY = gradient, X = input, samples b and tokens t:

        plain[n,k] = Σ_b Σ_t dY[b,t,n] · X[b,t,k]      weighted[n,k] = Σ_b weights[b] Σ_t dY[b,t,n] · X[b,t,k]

    Args:
        gradient, input, weights: as in `weighted_weight_gradient`.
        rows: None, or the samples whose weight isn't 0, as there: the library's second product reads no other.
        out: None, or what plain and weighted are added to in place: two [N, K] of the dtype of gradient or float32, or
            None for either; any strides, overlapping nothing.
        backend: "auto", "library", "triton" or "reference". "triton" reads gradient and input once and takes one matrix
            product for both. "auto" takes two library products until the fused kernel is measured faster.

    Returns:
        WeightGradients, accumulated and rounded as in `weighted_weight_gradient`, without gradient history.

    Raises:
        TypeError, ValueError: before anything is changed, with what is wrong and what to do.
        RuntimeError: the backend asked for can't run here, with the reason.
    """
    if torch.compiler.is_compiling():
        from ssiuu_fast.ops import library

        return library.traced_both_weight_gradients(gradient, input, weights, rows, out, backend)
    return run_both_weight_gradients(gradient, input, weights, rows, out, backend)


def run_both_weight_gradients(gradient, input, weights, rows, out, backend) -> WeightGradients:
    """both_weight_gradients outside of a traced graph."""
    check_operands(gradient, input, weights, rows)
    outs = two_of(out)
    shape = (gradient.shape[-1], input.shape[-1])
    read = [("gradient", gradient), ("input", input), ("weights", weights)]
    for place, target in enumerate(outs):
        if target is not None:
            check_target(target, f"out[{place}]", shape, (gradient.dtype, torch.float32), read)
    if None not in outs:
        check_apart(outs[0], "out[0]", outs[1], "out[1]")
    double = gradient.dtype == torch.float64
    name = backends.choose(backend, "both_weight_gradients", gradient.device, double=double)
    run = {"library": _library, "triton": _triton, "reference": _reference}[name]
    with torch.no_grad():
        return WeightGradients(*run(gradient, input, weights, rows, *outs))


def two_of(out) -> tuple[Tensor | None, Tensor | None]:
    """`out` as two tensors or None."""
    if out is None:
        return None, None
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError(f"out must be None or two tensors (or None for either), not {type(out).__name__}")
    return tuple(out)


def _library(gradient, input, weights, rows, plain, weighted):
    return plain_product(gradient, input, plain), library_product(gradient, input, weights, rows, weighted)


def _triton(gradient, input, weights, rows, plain, weighted):
    from ssiuu_fast.kernels.weight_gradient import weight_gradients

    shape = (gradient.shape[-1], input.shape[-1])
    results = [gradient.new_empty(shape) if out is None else out for out in (plain, weighted)]
    weight_gradients(
        of_samples(gradient),
        of_samples(input),
        weights.contiguous(),
        plain=results[0],
        weighted=results[1],
        add=(plain is not None, weighted is not None),
    )
    mark_written(*results)
    return results


def _reference(gradient, input, weights, rows, plain, weighted):
    return (
        reference_product(gradient, input, torch.ones_like(weights), None, plain),
        reference_product(gradient, input, weights, rows, weighted),
    )
