"""The penalty in Triton: one launch for all tensors of the same dtypes, which it finds through a table of addresses.

Meaning and checks are in ssiuu_fast/ops/penalty.py; the formulas are those of csrc/include/ssiuu/elementwise.h and
blockwise8.h.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ssiuu_fast.kernels import tuning
from ssiuu_fast.ops import blockwise8
from ssiuu_fast.ops.blockwise8 import Blockwise8
from ssiuu_fast.ops.penalty import Options

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, Blockwise8: tl.uint8}
# Lanes of the sums, so it is not for tuning: another number would add in another order. A multiple of the 8-bit block.
_BLOCK = 1024
# A thread's elements of a block are 8 or 4: one 16-byte load of 16-bit or of 32-bit numbers.
WARPS = (4, 8)
_SHORTEST_CHUNK = 16 * _BLOCK
# bounds the memory for partial sums
_MOST_CHUNKS = 1 << 16
# of the buffers that warps are chosen on: more than the second-level cache of a GPU holds
_SCRATCH_BYTES = 1 << 27


@triton.jit
def sum_in_pairs(values, LENGTH: tl.constexpr):
    """Neighbours, then neighbours of these sums, …: the same bits however the elements lie on the warps."""
    for _ in tl.static_range(LENGTH.bit_length() - 1):
        values = tl.sum(tl.reshape(values, [values.shape[0] // 2, 2]), 1)
    return tl.sum(values, 0)


@triton.jit
def blockwise8_codes(values, inverse):
    """blockwise8_code of blockwise8.h, step by step."""
    scaled = tl.abs(values) * inverse
    size = tl.where(scaled >= 2.75e-7, 1.0, 0.5)
    factor = tl.where(scaled >= 2.75e-7, 1e7 / 9, 0.0)
    size = tl.where(scaled >= 1.9e-6, 2.0, size)
    factor = tl.where(scaled >= 1.9e-6, 1e7 / 45, factor)
    size = tl.where(scaled >= 1.45e-5, 4.0, size)
    factor = tl.where(scaled >= 1.45e-5, 1e7 / 225, factor)
    size = tl.where(scaled >= 1.225e-4, 8.0, size)
    factor = tl.where(scaled >= 1.225e-4, 1e7 / 1125, factor)
    size = tl.where(scaled >= 1.1125e-3, 16.0, size)
    factor = tl.where(scaled >= 1.1125e-3, 1e7 / 5625, factor)
    size = tl.where(scaled >= 1.05625e-2, 32.0, size)
    factor = tl.where(scaled >= 1.05625e-2, 1e7 / 28125, factor)
    size = tl.where(scaled >= 0.1028125, 64.0, size)
    factor = tl.where(scaled >= 0.1028125, 1e7 / 140625, factor)
    place = scaled * factor + size * (8.0 / 9)
    magnitude = tl.minimum(place, size + size - 1.0).to(tl.int32)
    positive = tl.where(scaled > 0.996484375, 128, magnitude)
    negative = tl.where(magnitude > 0, magnitude + 128, 0)
    return tl.where(values < 0.0, negative, positive)


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
    code_values,
    GRADIENT: tl.constexpr,
    PARAMETER: tl.constexpr,
    REFERENCE: tl.constexpr,
    BLOCKWISE: tl.constexpr,
    OUT: tl.constexpr,
    LIMIT: tl.constexpr,
    ADD: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    UPDATE: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one tensor a program; its sums go to a place of their own, no atomics.

    BLOCKWISE: elements of an 8-bit block, 0 where references are numbers of their own.
    """
    chunk = tl.program_id(0).to(tl.int64)
    row = table + tl.load(chunk_tensor + chunk) * 6
    gradients = tl.load(row).to(tl.pointer_type(GRADIENT))
    parameters = tl.load(row + 1).to(tl.pointer_type(PARAMETER))
    references = tl.load(row + 2).to(tl.pointer_type(REFERENCE))
    outs = tl.load(row + 3).to(tl.pointer_type(OUT))
    size = tl.load(row + 4)
    scales = tl.load(row + 5).to(tl.pointer_type(tl.float32))
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
        elif BLOCKWISE:
            codes = tl.load(references + at, inside, 0).to(tl.int32)
            reference = tl.load(code_values + codes) * tl.load(scales + at // BLOCKWISE, inside, 0.0)
        else:
            reference = tl.load(references + at, inside, 0.0).to(tl.float32)
        gap = attribution - reference
        below = attribution < 0.0
        decisive = tl.where(below, gap, attribution)
        finite = (tl.abs(decisive) <= LIMIT) & (attribution >= -LIMIT)
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
            stored = tl.where(finite, attribution, reference)
            if BLOCKWISE:
                blocks = tl.reshape(stored, [BLOCK // BLOCKWISE, BLOCKWISE])
                absmax = tl.max(tl.abs(blocks), 1)
                # the smallest normal number, as 1 / absmax must be one
                absmax = tl.where(absmax < 1.1754943508222875e-38, 0.0, absmax)
                ones = tl.full([BLOCK // BLOCKWISE], 1.0, tl.float32)
                inverse = tl.math.div_rn(ones, tl.where(absmax > 0.0, absmax, ones))
                inverse = tl.where(absmax > 0.0, inverse, 0.0)
                codes = tl.reshape(blockwise8_codes(blocks, inverse[:, None]), [BLOCK])
                tl.store(references + at, codes.to(REFERENCE), inside)
                first = begin + start + tl.arange(0, BLOCK // BLOCKWISE).to(tl.int64) * BLOCKWISE
                tl.store(scales + first // BLOCKWISE, absmax, first < size)
            else:
                tl.store(references + at, stored.to(REFERENCE), inside)
        if ADD:
            value += tl.load(outs + at, inside, 0.0).to(tl.float32)
        tl.store(outs + at, value.to(OUT), inside)

    tl.store(partial_sums + 2 * chunk, sum_in_pairs(penalty, BLOCK))
    tl.store(partial_sums + 2 * chunk + 1, 4.0 * sum_in_pairs(gradient_square, BLOCK))
    tl.store(partial_counts + 2 * chunk, tl.sum(negatives, 0))
    tl.store(partial_counts + 2 * chunk + 1, tl.sum(nonfinites, 0))


def penalty(gradients, parameters, references, outs, options):
    """Return penalty, negative, gradient_square and the non-finite count of each tensor; all on one device."""
    device = gradients[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # a replay would copy the table again, from memory that is no longer its own
        raise RuntimeError('penalty_ in Triton can\'t be captured in a CUDA graph: capture it with backend="cuda"')
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    negative = torch.zeros((), dtype=torch.int64, device=device)
    counts = torch.zeros(len(gradients), dtype=torch.int64, device=device)
    weight = options.weight
    if not isinstance(weight, torch.Tensor):
        weight = torch.full((), weight, dtype=torch.float32, device=device)
    with torch.cuda.device_of(gradients[0]):
        for dtypes, indices in _by_dtypes(gradients, parameters, references, outs).items():
            lists = [[tensors[i] for i in indices] for tensors in (gradients, parameters, references, outs)]
            partial = _launch(*lists, dtypes, weight, options)
            sums += partial.sums.sum(0)
            negative += partial.counts[:, 0].sum()
            positions = _upload(torch.tensor(indices), device)
            # integers: the order in which they are added doesn't matter
            counts.index_add_(0, positions[partial.tensor_of_chunk], partial.counts[:, 1])
    return sums[0], negative, sums[1], counts


def _by_dtypes(gradients, parameters, references, outs):
    groups = {}
    for i, (gradient, parameter, reference, out) in enumerate(
        zip(gradients, parameters, references, outs, strict=True)
    ):
        reference_type = Blockwise8 if isinstance(reference, Blockwise8) else reference.dtype
        dtypes = (gradient.dtype, parameter.dtype, reference_type, out.dtype if out is not None else None)
        groups.setdefault(dtypes, []).append(i)
    return groups


class _Partial(NamedTuple):
    """What the chunks of one launch add to the sums."""

    sums: torch.Tensor
    counts: torch.Tensor
    tensor_of_chunk: torch.Tensor


def _launch(gradients, parameters, references, outs, dtypes, weight, options):
    launch, partial = _prepared(gradients, parameters, references, outs, dtypes, weight, options)
    if len(partial.sums):
        device = gradients[0].device
        key = ("penalty", device, dtypes)
        launch(tuning.fastest(key, WARPS, device, lambda: _launch_on_scratch(dtypes, device)))
    return partial


def _launch_on_scratch(dtypes, device):
    elements = _SCRATCH_BYTES // sum(1 if dtype is Blockwise8 else dtype.itemsize for dtype in dtypes if dtype)

    def buffer(dtype):
        if dtype is None:
            return None
        if dtype is not Blockwise8:
            return torch.zeros(elements, dtype=dtype, device=device)
        reference = Blockwise8.empty_like(torch.empty(elements, device="meta"))
        return Blockwise8(*(torch.zeros_like(tensor, device=device) for tensor in blockwise8.tensors_of(reference)))

    options = Options(1.0, 1.0, one_sided=False, update_references=True, first=False)
    return _prepared(*([buffer(dtype)] for dtype in dtypes), dtypes, torch.ones((), device=device), options)[0]


def _prepared(gradients, parameters, references, outs, dtypes, weight, options):
    """launch(warps), and where it will leave its sums."""
    device = gradients[0].device
    rows = list(zip(gradients, parameters, references, outs, strict=True))
    table = _upload(torch.tensor([_row(*row) for row in rows]), device)
    tensor_of_chunk, begin, length = _chunks([gradient.numel() for gradient in gradients], device)
    partial_sums = torch.empty(len(begin), 2, dtype=torch.float64, device=device)
    partial_counts = torch.empty(len(begin), 2, dtype=torch.int64, device=device)
    gradient_type, parameter_type, reference_type, out_type = dtypes
    eight_bits = reference_type is Blockwise8

    def launch(warps):
        penalty_kernel[(len(begin),)](
            table,
            tensor_of_chunk,
            begin,
            length,
            weight,
            options.gradient_scale,
            partial_sums,
            partial_counts,
            blockwise8.values_on(device),
            GRADIENT=_TYPES[gradient_type],
            PARAMETER=_TYPES[parameter_type],
            REFERENCE=_TYPES[reference_type],
            BLOCKWISE=blockwise8.BLOCK if eight_bits else 0,
            OUT=_TYPES[out_type or gradient_type],
            LIMIT=blockwise8.LIMIT if eight_bits else torch.finfo(reference_type).max,
            ADD=out_type is not None,
            ONE_SIDED=options.one_sided,
            UPDATE=options.update_references,
            FIRST=options.first,
            BLOCK=_BLOCK,
            num_warps=warps,
            # a fused multiply-add could give A − A^ref another sign than the reference has
            enable_fp_fusion=False,
        )

    # a table of addresses keeps no buffer alive
    launch.buffers = rows
    return launch, _Partial(partial_sums, partial_counts, tensor_of_chunk)


def _row(gradient, parameter, reference, out):
    target = gradient if out is None else out
    memory = [tensor.data_ptr() for tensor in blockwise8.tensors_of(reference)]
    stored, absmax = memory if len(memory) == 2 else (*memory, 0)
    return [gradient.data_ptr(), parameter.data_ptr(), stored, target.data_ptr(), gradient.numel(), absmax]


def _chunks(sizes, device):
    """Tensor and first element of each chunk, and their common length: from the sizes alone."""
    length = max(_SHORTEST_CHUNK, triton.cdiv(triton.cdiv(sum(sizes), _MOST_CHUNKS), _BLOCK) * _BLOCK)
    counts = torch.tensor([triton.cdiv(size, length) for size in sizes])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    before = counts.cumsum(0) - counts
    begin = (torch.arange(len(tensor)) - before[tensor]) * length
    return _upload(tensor, device), _upload(begin, device), length


def _upload(tensor, device):
    """To the device; not waiting for what is enqueued there, as a copy from ordinary memory would."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
