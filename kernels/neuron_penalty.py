"""neuron_penalty in Triton: the sums over tokens, then A and d of each neuron, then the injection over the gradient.

Meaning and checks are in ssiuu_fast/ops/neuron_penalty.py.
"""

import torch
import triton
import triton.language as tl

from ssiuu_fast.kernels.neuron_attribution import add_tokens, cut

# One block for the terms: their sums depend on it. One for the injection as well: it writes over what it reads, so that
# tuning would take a second buffer of its size, and a pass without arithmetic leaves little to tune: four 16-byte loads
# of bfloat16 under way in each thread, and factors that are 3 % of what is read and written.
_TERMS_BLOCK = 512
_TOKENS, _NEURONS, _WARPS = 32, 256, 8


@triton.jit(do_not_specialize=["parts"])
def terms_kernel(
    sums,
    reference,
    weight,
    attribution_out,
    factor_out,
    partial_penalty,
    partial_negative,
    parts,
    columns,
    LIMIT: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A, 2 · weight · d, Σ d² and #{A < 0} of one block of columns (groups × neurons) from the sums of all parts."""
    program = tl.program_id(0).to(tl.int64)
    column = program * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros([BLOCK], tl.float64)
    at = column
    for _ in range(parts):
        total += tl.load(sums + at, inside, 0.0)
        at += columns
    attribution = total.to(tl.float32)
    if reference is not None:
        gap = attribution - tl.load(reference + column, inside, 0.0)
    else:
        gap = tl.zeros([BLOCK], tl.float32)
    # NaN compares as false
    negative = (attribution < 0.0) & (attribution >= -LIMIT) & (tl.abs(gap) <= LIMIT)
    punished = negative
    if ONE_SIDED:
        punished = negative & (gap < 0.0)
    difference = tl.where(punished, gap, 0.0)
    tl.store(attribution_out + column, attribution, inside)
    tl.store(factor_out + column, 2.0 * tl.load(weight) * difference, inside)
    square = difference.to(tl.float64) * difference.to(tl.float64)
    tl.store(partial_penalty + program, tl.sum(square, 0))
    tl.store(partial_negative + program, tl.sum(negative.to(tl.int64), 0))


@triton.jit(do_not_specialize=["tokens"])
def inject_kernel(
    gradient,
    factors,
    mask,
    tokens,
    neurons,
    gradient_batch_stride,
    gradient_token_stride,
    factor_batch_stride,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
):
    """gradient ← factor · gradient for a tile of tokens and neurons of one sample, 0 where the factor is 0."""
    blocks = tl.cdiv(neurons, NEURONS)
    spans = tl.cdiv(tokens, TOKENS)
    program = tl.program_id(0).to(tl.int64)
    column = program % blocks * NEURONS + tl.arange(0, NEURONS)
    token = program // blocks % spans * TOKENS + tl.arange(0, TOKENS)
    sample = program // blocks // spans
    inside = column < neurons
    within = token < tokens
    counted = within
    if mask is not None:
        counted = tl.load(mask + sample * tokens + token, within, 0) != 0
    factor = tl.load(factors + sample * factor_batch_stride + column, inside, 0.0)[None, :]
    at = gradient + sample * gradient_batch_stride + token[:, None] * gradient_token_stride + column[None, :]
    value = tl.load(at, counted[:, None] & inside[None, :], 0.0).to(tl.float32)
    # whatever the gradient holds; where a token doesn't count 0 was put in place of it, but the factor may be infinite
    value = tl.where((factor == 0.0) | (counted == 0)[:, None], 0.0, factor * value)
    tl.store(at, value.to(gradient.dtype.element_ty), within[:, None] & inside[None, :])


def neuron_penalty(hidden, gradient, reference, mask, attribution, *, weight, per_sample, one_sided):
    """Fill `attribution`, write the injection over `gradient`, return penalty and negative; mask uint8 or None."""
    batch, tokens, neurons = hidden.shape
    columns = attribution.numel()
    device = hidden.device
    penalty = torch.zeros((), dtype=torch.float64, device=device)
    negative = torch.zeros((), dtype=torch.int64, device=device)
    if hidden.numel() == 0:
        attribution.zero_()
        return penalty, negative
    # no copy from the host, which a CUDA graph couldn't capture
    weight = weight if isinstance(weight, torch.Tensor) else torch.full((), weight, dtype=torch.float32, device=device)
    parts, _ = cut(columns, tokens if per_sample else batch * tokens)
    sums = torch.empty(parts, columns, dtype=torch.float64, device=device)
    factors = torch.empty_like(attribution)
    programs = triton.cdiv(columns, _TERMS_BLOCK)
    partial_penalty = torch.empty(programs, dtype=torch.float64, device=device)
    partial_negative = torch.empty(programs, dtype=torch.int64, device=device)
    with torch.cuda.device_of(hidden):
        add_tokens(hidden, gradient, mask, sums, per_sample=per_sample)
        terms_kernel[(programs,)](
            sums,
            reference,
            weight,
            attribution,
            factors,
            partial_penalty,
            partial_negative,
            parts,
            columns,
            LIMIT=torch.finfo(torch.float32).max,
            ONE_SIDED=one_sided,
            BLOCK=_TERMS_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
        inject_kernel[(triton.cdiv(neurons, _NEURONS) * triton.cdiv(tokens, _TOKENS) * batch,)](
            gradient,
            factors,
            mask,
            tokens,
            neurons,
            *gradient.stride()[:2],
            neurons if per_sample else 0,
            TOKENS=_TOKENS,
            NEURONS=_NEURONS,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return partial_penalty.sum(), partial_negative.sum()
