"""The Ssiuu penalty: one pass over gradient, parameter and reference attribution of a whole model."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssiuu_fast.ops import backends, cuda
from ssiuu_fast.ops.addresses import penalty_table
from ssiuu_fast.ops.blockwise8 import LIMIT, Blockwise8, tensors_of
from ssiuu_fast.ops.checks import check_weight
from ssiuu_fast.ops.penalty_input import check_counts, check_tensors

_RESULT_DTYPES = (torch.float64, torch.int64, torch.float64, torch.int64)


class PenaltyResult(NamedTuple):
    """Sums over all elements of one `penalty_` call, 0-dim tensors on the device of the inputs."""

    penalty: Tensor
    negative: Tensor
    gradient_square: Tensor
    nonfinite: Tensor


class Options(NamedTuple):
    """What a backend needs to know beside the buffers."""

    weight: float | Tensor
    gradient_scale: float
    one_sided: bool
    update_references: bool
    first: bool


def penalty_(
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    references: Sequence[Tensor | Blockwise8],
    *,
    weight: float | Tensor,
    out: Sequence[Tensor | None] | None = None,
    one_sided: bool = False,
    update_references: bool = True,
    first: bool = False,
    gradient_scale: float = 1.0,
    nonfinite_counts: Tensor | None = None,
    backend: str = "auto",
) -> PenaltyResult:
    """Turn the gradient of the target into the gradient of the Ssiuu penalty, and renew the reference.

    Element by element, with φ a parameter, g the gradient of the target (Σ P over the forget batch)
    and A^ref the stored attribution (Algorithm 1 of arXiv 2509.22263):

        g = gradient_scale · gradients[i]        A = φ · g
        d = A − A^ref   where A < 0 (one_sided: and d < 0),   else 0
        gradients[i] ← weight · 2 · d · g        A^ref ← A

    Args:
        gradients, parameters, references: lists of equal length, one entry a parameter tensor. Within an
            index shape and device agree and every tensor is contiguous; everything else may differ from
            index to index. float32, bfloat16 or float16, each its own, computed in float32; or all float64
            within an index, computed in float64. A float16 reference flushes |A| < 6e-8 to zero. A reference may
            be a Blockwise8, except beside float64: it is decoded, used and encoded again in the same pass.
        weight: λ, a finite number or a one-element float32 tensor on the device of each index.
        out: None, or a list with a tensor or None an index. Where a tensor, weight · 2 · d · g is added to it
            instead, and gradients[i] stays; float32 or the dtype of gradients[i], overlapping nothing.
        one_sided: punish only attributions below their reference.
        update_references: store A. False leaves references as they are.
        first: there is no reference yet. d = 0, A is stored whatever `update_references` says; references
            may be uninitialised memory.
        gradient_scale: factor on every gradient before use, for gradients that come averaged or scaled.
        nonfinite_counts: None, or int64 [len(gradients)] on the device of the inputs (of index 0, if they have
            several), which receives the non-finite elements of each index.
        backend: "auto", "cpp", "cuda", "triton" or "reference".

    Returns:
        PenaltyResult of 0-dim tensors on the device of index 0 (on the CPU for empty lists):
        penalty float64 = Σ d²; negative int64 = number of elements with A < 0;
        gradient_square float64 = Σ (2·d·g)², the squared norm of ∂R/∂φ before weight;
        nonfinite int64 = number of elements left out, as follows. Squares neither vanish nor overflow, whatever
        the size of d; "cpp" and "cuda" sum a few of them in float32 where that loses no more than 1e-7.

        An element is left out where A, or A − A^ref if A < 0, is NaN, infinite or beyond the range of its
        reference's dtype (2^126 for Blockwise8): it adds nothing to any sum but this count, gets 0 written (nothing
        added to `out`) and keeps its reference (0 with `first`); in a Blockwise8 the kept value is encoded again
        with its block's new absmax.

    Raises:
        TypeError, ValueError: before anything is changed, with the index, what is wrong and what to do.
        RuntimeError: the backend asked for can't run here, with the reason.
    """
    outs = [None] * len(gradients) if out is None else out
    options = Options(weight, gradient_scale, bool(one_sided), bool(update_references or first), bool(first))
    run = run_penalty_
    if torch.compiler.is_compiling():
        from ssiuu_fast.ops.library import traced_penalty_ as run
    return run(gradients, parameters, references, outs, options, nonfinite_counts, backend)


def run_penalty_(gradients, parameters, references, outs, options, nonfinite_counts, backend) -> PenaltyResult:
    """penalty_ outside of a traced graph."""
    check_tensors(gradients, parameters, references, outs, options.update_references)
    if not math.isfinite(options.gradient_scale):
        raise ValueError(f"gradient_scale must be finite, not {options.gradient_scale}")
    if nonfinite_counts is not None:
        check_counts(nonfinite_counts, gradients)
    groups = _by_device(gradients)
    weight = check_weight(options.weight, [(device, f"gradients[{rows[0]}]") for device, rows in groups.items()])
    options = options._replace(weight=weight, gradient_scale=float(options.gradient_scale))
    if not gradients:
        return PenaltyResult(*(torch.zeros((), dtype=dtype) for dtype in _RESULT_DTYPES))

    runs = {device: _runner(backend, device, [gradients[i] for i in rows]) for device, rows in groups.items()}
    sums = []
    with torch.no_grad():
        for device, rows in groups.items():
            lists = ([tensors[i] for i in rows] for tensors in (gradients, parameters, references, outs))
            *partial, counts = runs[device](*lists, options)
            if nonfinite_counts is not None:
                # a slice where there is one device: an index made of a list is sent there, and waited for
                where = slice(None) if len(groups) == 1 else rows
                nonfinite_counts[where] = counts.to(nonfinite_counts.device)
            sums.append(PenaltyResult(*partial, counts.sum()))
    _mark_written(gradients, references, outs, options.update_references)
    if len(sums) == 1:
        return sums[0]
    return PenaltyResult(*(sum(x.to(gradients[0].device) for x in field) for field in zip(*sums, strict=True)))


def _by_device(gradients):
    groups = {}
    for i, gradient in enumerate(gradients):
        groups.setdefault(gradient.device, []).append(i)
    return groups


def _mark_written(gradients, references, outs, references_written):
    """Tell autograd, as an in-place torch operator would: kernels write through bare pointers."""
    written = [g if o is None else o for g, o in zip(gradients, outs, strict=True)]
    if references_written:
        written += [tensor for reference in references for tensor in tensors_of(reference)]
    torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])


def _runner(backend, device, gradients):
    double = any(g.dtype == torch.float64 for g in gradients)
    name = backends.choose(backend, "penalty_", device, double=double)
    if name == "triton":
        from ssiuu_fast.kernels.penalty import penalty as triton_penalty

        return triton_penalty
    return {"cuda": cuda.penalty, "cpp": _cpp, "reference": _reference}[name]


def _cpp(gradients, parameters, references, outs, options):
    counts = torch.empty(len(gradients), dtype=torch.int64)
    penalty, negative, gradient_square = backends._C.penalty(
        penalty_table(gradients, parameters, references, outs),
        float(options.weight),
        options.gradient_scale,
        options.one_sided,
        options.update_references,
        options.first,
        counts.data_ptr(),
        torch.get_num_threads(),
    )
    return (
        torch.tensor(penalty, dtype=torch.float64),
        torch.tensor(negative),
        torch.tensor(gradient_square, dtype=torch.float64),
        counts,
    )


def _reference(gradients, parameters, references, outs, options):
    """The formula in plain torch, one tensor after the other: what every kernel is tested against."""
    device = gradients[0].device
    # MPS has no float64
    total_dtype = torch.float32 if device.type == "mps" else torch.float64
    penalty, gradient_square = torch.zeros(2, dtype=total_dtype, device=device)
    negative = torch.zeros((), dtype=torch.int64, device=device)
    counts = torch.zeros(len(gradients), dtype=torch.int64, device=device)
    for i, (gradient, parameter, reference, out) in enumerate(
        zip(gradients, parameters, references, outs, strict=True)
    ):
        dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        g = gradient.to(dtype) * options.gradient_scale
        attribution = parameter.detach().to(dtype) * g
        previous = torch.zeros_like(attribution) if options.first else _decoded(reference).to(dtype)
        difference = attribution - previous
        limit = LIMIT if isinstance(reference, Blockwise8) else torch.finfo(reference.dtype).max
        # NaN compares as false; where A >= 0 the reference doesn't matter
        finite = (attribution.abs() <= limit) & ((difference.abs() <= limit) | (attribution >= 0))
        active = finite & (attribution < 0)
        punished = active & (difference < 0) if options.one_sided else active
        zero = torch.zeros((), dtype=dtype, device=device)
        d = zero.expand_as(g) if options.first else torch.where(punished, difference, zero)

        penalty += d.to(total_dtype).square().sum()
        gradient_square += (2 * d.to(total_dtype) * torch.where(finite, g, zero)).square().sum()
        negative += active.sum()
        counts[i] = g.numel() - finite.sum()
        if options.update_references:
            stored = torch.where(finite, attribution, previous)
            reference.store(stored) if isinstance(reference, Blockwise8) else reference.copy_(stored)
        value = torch.where(punished, 2 * options.weight * d * g, zero)
        if out is None:
            gradient.copy_(value)
        else:
            out.copy_(out.to(dtype) + value)
    return penalty, negative, gradient_square, counts


def _decoded(reference):
    return reference.decode() if isinstance(reference, Blockwise8) else reference
