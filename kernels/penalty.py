"""The penalty in Triton: one launch for all tensors of the same dtypes, which it finds through a table of addresses.

Meaning and checks are in ssiuu_fast/ops/penalty.py; the formula is that of csrc/include/ssiuu/elementwise.h.
"""

import torch
import triton
import triton.language as tl

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_BLOCK = 1024
_SHORTEST_CHUNK = 16 * _BLOCK
# bounds the memory for partial sums
_MOST_CHUNKS = 1 << 16


@triton.jit
def penalty_kernel(
    table,
    chunk_tensor,
    chunk_begin,
    chunk_length,
    weight,
    gradient_scale,
    partial_sums,
    partial_counts,
    GRADIENT: tl.constexpr,
    PARAMETER: tl.constexpr,
    REFERENCE: tl.constexpr,
    OUT: tl.constexpr,
    LIMIT: tl.constexpr,
    ADD: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    UPDATE: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one tensor a program; its sums go to a place of their own, no atomics."""
    chunk = tl.program_id(0).to(tl.int64)
    row = table + tl.load(chunk_tensor + chunk) * 5
    gradients = tl.load(row).to(tl.pointer_type(GRADIENT))
    parameters = tl.load(row + 1).to(tl.pointer_type(PARAMETER))
    references = tl.load(row + 2).to(tl.pointer_type(REFERENCE))
    outs = tl.load(row + 3).to(tl.pointer_type(OUT))
    size = tl.load(row + 4)
    begin = tl.load(chunk_begin + chunk)
    # an eager launch passes a Python float as fp32, a compiled graph as fp64
    scale = tl.full([], gradient_scale, tl.float32)
    twice_weight = 2.0 * tl.load(weight).to(tl.float32)

    penalty = tl.zeros([BLOCK], tl.float64)
    gradient_square = tl.zeros([BLOCK], tl.float64)
    negatives = tl.zeros([BLOCK], tl.int64)
    nonfinites = tl.zeros([BLOCK], tl.int64)
    for start in range(0, chunk_length, BLOCK):
        at = begin + start + tl.arange(0, BLOCK).to(tl.int64)
        inside = at < size
        gradient = tl.load(gradients + at, inside, 0.0).to(tl.float32) * scale
        parameter = tl.load(parameters + at, inside, 0.0).to(tl.float32)
        attribution = parameter * gradient
        if FIRST:
            reference = tl.zeros([BLOCK], tl.float32)
        else:
            reference = tl.load(references + at, inside, 0.0).to(tl.float32)
        gap = attribution - reference
        below = attribution < 0.0
        decisive = tl.where(below, gap, attribution)
        finite = tl.abs(decisive) <= LIMIT
        negative = finite & below
        punished = negative
        if ONE_SIDED:
            punished = negative & (gap < 0.0)
        if FIRST:
            difference = tl.zeros([BLOCK], tl.float32)
        else:
            difference = tl.where(punished, gap, 0.0)
        gradient = tl.where(punished, gradient, 0.0)
        value = difference * twice_weight * gradient

        # in fp64: d is of the size of a probability, and its square would vanish in fp32
        product = difference.to(tl.float64) * gradient.to(tl.float64)
        penalty += difference.to(tl.float64) * difference.to(tl.float64)
        gradient_square += product * product
        negatives += negative.to(tl.int64)
        nonfinites += (inside & (finite == 0)).to(tl.int64)
        if UPDATE:
            tl.store(references + at, tl.where(finite, attribution, reference).to(REFERENCE), inside)
        if ADD:
            value += tl.load(outs + at, inside, 0.0).to(tl.float32)
        tl.store(outs + at, value.to(OUT), inside)

    tl.store(partial_sums + 2 * chunk, tl.sum(penalty, 0))
    tl.store(partial_sums + 2 * chunk + 1, 4.0 * tl.sum(gradient_square, 0))
    tl.store(partial_counts + 2 * chunk, tl.sum(negatives, 0))
    tl.store(partial_counts + 2 * chunk + 1, tl.sum(nonfinites, 0))


def penalty(gradients, parameters, references, outs, options):
    """Return penalty, negative, gradient_square and the non-finite count of each tensor; all on one device."""
    device = gradients[0].device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    negative = torch.zeros((), dtype=torch.int64, device=device)
    counts = torch.zeros(len(gradients), dtype=torch.int64, device=device)
    weight = torch.as_tensor(options.weight, dtype=torch.float32, device=device)
    with torch.cuda.device_of(gradients[0]):
        for dtypes, indices in _by_dtypes(gradients, parameters, references, outs).items():
            lists = [[tensors[i] for i in indices] for tensors in (gradients, parameters, references, outs)]
            partial_sums, partial_counts, tensor_of_chunk = _launch(*lists, dtypes, weight, options)
            sums += partial_sums.sum(0)
            negative += partial_counts[:, 0].sum()
            positions = torch.tensor(indices, device=device)
            # integers: the order in which they are added doesn't matter
            counts.index_add_(0, positions[tensor_of_chunk], partial_counts[:, 1])
    return sums[0], negative, sums[1], counts


def _by_dtypes(gradients, parameters, references, outs):
    groups = {}
    for i, (gradient, parameter, reference, out) in enumerate(
        zip(gradients, parameters, references, outs, strict=True)
    ):
        dtypes = (gradient.dtype, parameter.dtype, reference.dtype, out.dtype if out is not None else None)
        groups.setdefault(dtypes, []).append(i)
    return groups


def _launch(gradients, parameters, references, outs, dtypes, weight, options):
    device = gradients[0].device
    targets = [gradient if out is None else out for gradient, out in zip(gradients, outs, strict=True)]
    rows = zip(gradients, parameters, references, targets, strict=True)
    table = torch.tensor([[*(t.data_ptr() for t in row), row[0].numel()] for row in rows], device=device)
    tensor_of_chunk, begin, length = _chunks([gradient.numel() for gradient in gradients], device)
    partial_sums = torch.empty(len(begin), 2, dtype=torch.float64, device=device)
    partial_counts = torch.empty(len(begin), 2, dtype=torch.int64, device=device)
    gradient_type, parameter_type, reference_type, out_type = dtypes
    if len(begin):
        penalty_kernel[(len(begin),)](
            table,
            tensor_of_chunk,
            begin,
            length,
            weight,
            options.gradient_scale,
            partial_sums,
            partial_counts,
            GRADIENT=_TYPES[gradient_type],
            PARAMETER=_TYPES[parameter_type],
            REFERENCE=_TYPES[reference_type],
            OUT=_TYPES[out_type or gradient_type],
            LIMIT=torch.finfo(reference_type).max,
            ADD=out_type is not None,
            ONE_SIDED=options.one_sided,
            UPDATE=options.update_references,
            FIRST=options.first,
            BLOCK=_BLOCK,
            # a fused multiply-add could give A − A^ref another sign than the reference has
            enable_fp_fusion=False,
        )
    return partial_sums, partial_counts, tensor_of_chunk


def _chunks(sizes, device):
    """Tensor and first element of each chunk, and their common length: from the sizes alone."""
    length = max(_SHORTEST_CHUNK, triton.cdiv(triton.cdiv(sum(sizes), _MOST_CHUNKS), _BLOCK) * _BLOCK)
    counts = torch.tensor([triton.cdiv(size, length) for size in sizes], device=device)
    tensor = torch.repeat_interleave(torch.arange(len(sizes), device=device), counts)
    before = counts.cumsum(0) - counts
    begin = (torch.arange(len(tensor), device=device) - before[tensor]) * length
    return tensor, begin, length
