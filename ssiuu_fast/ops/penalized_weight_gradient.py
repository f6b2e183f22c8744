"""The weight gradient of a linear module and that of the Ssiuu penalty on its weight, as one sum."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ssiuu_fast.ops import backends
from ssiuu_fast.ops.blockwise8 import Blockwise8, check_blockwise8, tensors_of
from ssiuu_fast.ops.checks import check_apart, check_contiguous, check_weight, check_written
from ssiuu_fast.ops.penalty import Options, penalty_
from ssiuu_fast.ops.weight_gradient_input import check_operands, check_target, mark_written, of_samples
from ssiuu_fast.ops.weighted_weight_gradient import library_product, plain_product, reference_product


class PenalizedWeightGradient(NamedTuple):
    """`gradient` [N, K], and the sums of `PenaltyResult`: 0-dim tensors on the device."""

    gradient: Tensor
    penalty: Tensor
    negative: Tensor
    gradient_square: Tensor
    nonfinite: Tensor


def penalized_weight_gradient(
    gradient: Tensor,
    input: Tensor,
    weights: Tensor,
    parameter: Tensor,
    reference: Tensor | Blockwise8,
    *,
    weight: float | Tensor,
    rows: slice | Tensor | None = None,
    out: Tensor | None = None,
    one_sided: bool = False,
    update_reference: bool = True,
    first: bool = False,
    gradient_scale: float = 1.0,
    backend: str = "auto",
) -> PenalizedWeightGradient:
    """Return the weight gradient of a linear module plus that of the Ssiuu penalty on its weight; renew its reference.

    `both_weight_gradients` and `penalty_` in one, for a step of one micro-batch: the gradient of the target is needed
    nowhere else. With dY = gradient, X = input, samples b and tokens t (Algorithm 1 of arXiv 2509.22263):

        g = gradient_scale · Σ_b weights[b] Σ_t dY[b,t,:]ᵀ X[b,t,:]        A = φ · g
        d = A − A^ref   where A < 0 (one_sided: and d < 0),   else 0
        gradient = Σ_b Σ_t dY[b,t,:]ᵀ X[b,t,:] + weight · 2 · d · g        A^ref ← A

    Args:
        gradient, input, weights, rows: as in `both_weight_gradients`.
        parameter: φ, [N, K], contiguous, on the device of gradient; float32, bfloat16 or float16 (float64 for float64).
        reference: A^ref, like parameter, of a dtype of its own; or a Blockwise8, which "triton" can't take.
        weight: λ, a finite number or a one-element float32 tensor on the device.
        out: None, or [N, K] of the dtype of gradient or float32, contiguous, overlapping nothing: the result is added.
        one_sided, first, gradient_scale: as in `penalty_`, and so are the elements that aren't finite.
        update_reference: store A. False leaves the reference as it is, but for `first`.
        backend: "auto", "library", "triton" or "reference". "library" is two matrix products of torch's and `penalty_`:
            g is rounded to the dtype of gradient, and so is the plain gradient before the penalty's is added. In
            "triton" g is never written to memory, and the sum is rounded once. "auto" takes two library products until
            the fused kernel is measured faster.

    Returns:
        PenalizedWeightGradient: `out`, or [N, K] in the dtype of gradient; and the sums of `penalty_`.

    Raises:
        TypeError, ValueError: before anything is changed, with what is wrong and what to do.
        RuntimeError: the backend asked for can't run here, with the reason; in a graph of torch.compile that may not
            break: call it in a function under torch.compiler.disable.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "penalized_weight_gradient can't be traced: call it in a function under torch.compiler.disable,"
            " or both_weight_gradients and penalty_"
        )
    check_operands(gradient, input, weights, rows)
    _check_state(gradient, input, weights, parameter, reference, out, bool(update_reference or first))
    if not math.isfinite(gradient_scale):
        raise ValueError(f"gradient_scale must be finite, not {gradient_scale}")
    options = Options(
        check_weight(weight, [(gradient.device, "gradient")]),
        float(gradient_scale),
        bool(one_sided),
        bool(update_reference or first),
        bool(first),
    )
    double = gradient.dtype == torch.float64
    name = backends.choose(backend, "penalized_weight_gradient", gradient.device, double=double)
    if name == "triton" and isinstance(reference, Blockwise8):
        raise RuntimeError(
            'penalized_weight_gradient: backend="triton" can\'t run: it has no form for references of 8 bits.'
            ' backend="auto" takes one that can.'
        )
    run = {"library": _library, "triton": _triton, "reference": _reference}[name]
    with torch.no_grad():
        return PenalizedWeightGradient(*run(gradient, input, weights, rows, parameter, reference, out, options))


def _check_state(gradient, input, weights, parameter, reference, out, reference_written):
    double = gradient.dtype == torch.float64
    dtypes = (torch.float64,) if double else (torch.float32, torch.bfloat16, torch.float16)
    shape = (gradient.shape[-1], input.shape[-1])
    check_contiguous(parameter, "parameter", dtypes)
    if not isinstance(reference, Blockwise8):
        check_contiguous(reference, "reference", dtypes)
    elif double:
        raise TypeError("reference is a Blockwise8 beside float64 gradients: pass a float64 reference")
    else:
        check_blockwise8(reference, "reference")
    for name, tensor in (("parameter", parameter), ("reference", reference)):
        if tensor.shape != shape or tensor.device != gradient.device:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} on {tensor.device}: it must be {shape} on {gradient.device}"
            )
    read = [("gradient", gradient), ("input", input), ("weights", weights), ("parameter", parameter)]
    stored = tensors_of(reference)
    if reference_written:
        for tensor in stored:
            check_written(tensor, "reference")
            for name, other in read:
                check_apart(tensor, "reference", other, name)
    if out is not None:
        check_contiguous(out, "out", tuple(dict.fromkeys((gradient.dtype, torch.float32))))
        check_target(out, "out", shape, (out.dtype,), read + [("reference", tensor) for tensor in stored])


def _library(gradient, input, weights, rows, parameter, reference, out, options):
    g = library_product(gradient, input, weights, rows, None)
    result = plain_product(gradient, input, out)
    return result, *_add_penalty(g, parameter, reference, result, options, "auto")


def _reference(gradient, input, weights, rows, parameter, reference, out, options):
    """Everything in the dtype of the weights, and rounded once."""
    dtype = weights.dtype
    total = out.to(torch.promote_types(out.dtype, dtype)) if out is not None else gradient.new_zeros((), dtype=dtype)
    total = total + reference_product(gradient.to(dtype), input.to(dtype), torch.ones_like(weights), None, None)
    g = reference_product(gradient.to(dtype), input.to(dtype), weights, rows, None)
    sums = _add_penalty(g, parameter, reference, total, options, "reference")
    return total.to(gradient.dtype) if out is None else out.copy_(total), *sums


def _add_penalty(g, parameter, reference, result, options, backend):
    return penalty_(
        [g],
        [parameter],
        [reference],
        out=[result],
        weight=options.weight,
        one_sided=options.one_sided,
        update_references=options.update_references,
        first=options.first,
        gradient_scale=options.gradient_scale,
        backend=backend,
    )


def _triton(gradient, input, weights, rows, parameter, reference, out, options):
    from ssiuu_fast.kernels.weight_gradient import penalized_weight_gradient as triton_form

    result = gradient.new_empty(parameter.shape) if out is None else out
    sums = triton_form(
        of_samples(gradient),
        of_samples(input),
        weights.contiguous(),
        parameter.detach(),
        reference,
        result,
        options,
        add=out is not None,
    )
    mark_written(result, *([reference] if options.update_references else []))
    return result, *sums
