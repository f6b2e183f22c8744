"""The penalty in Triton: one launch for all tensors of a kind, which it finds through a table of addresses.

A kind is the dtypes, and whether every thread may read and write 16 bytes at once: a list that mixes tensors that allow
it with others takes two launches for the same dtypes. Results don't depend on it.

Meaning and checks are in ssiuu_fast/ops/penalty.py; the formulas are those of csrc/include/ssiuu/elementwise.h and
blockwise8.h.
"""

from collections.abc import Callable
from functools import partial
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
# A thread's elements of a block are 8 or 4: one 16-byte load of 16-bit or of 32-bit numbers, where they are aligned.
WARPS = (4, 8)
# bytes of an address, and elements of a tensor, that aligned ones are multiples of
_ALIGNMENT = 16
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
def penalty_terms(gradient, parameter, reference, LIMIT: tl.constexpr, ONE_SIDED: tl.constexpr, FIRST: tl.constexpr):
    """penalty_terms of elementwise.h: what is stored, d, g (0 where nothing is punished), whether A < 0, and finite."""
    attribution = parameter * gradient
    gap = attribution - reference
    below = attribution < 0.0
    decisive = tl.where(below, gap, attribution)
    finite = (tl.abs(decisive) <= LIMIT) & (attribution >= -LIMIT)
    negative = finite & below
    punished = negative
    if ONE_SIDED:
        punished = negative & (gap < 0.0)
    if FIRST:
        difference = tl.zeros_like(attribution)
    else:
        difference = tl.where(punished, gap, 0.0)
    stored = tl.where(finite, attribution, reference)
    return stored, difference, tl.where(punished, gradient, 0.0), negative, finite


# a number that differs from launch to launch is no reason to compile anew
@triton.jit(do_not_specialize=["first_chunk"])
def penalty_kernel(
    table,
    chunks,
    first_chunk,
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
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one tensor a program; its sums go to a place of their own, no atomics.

    BLOCKWISE: elements of an 8-bit block, 0 where references are numbers of their own.
    ALIGNED: addresses (but for absmax) and sizes are multiples of 16, so that a thread reads 16 bytes at once.
    """
    chunk = tl.program_id(0).to(tl.int64) + first_chunk
    row = table + tl.load(chunks + 3 * chunk) * 6
    begin = tl.multiple_of(tl.load(chunks + 3 * chunk + 1), BLOCK)
    place = tl.load(chunks + 3 * chunk + 2)
    gradients = tl.load(row).to(tl.pointer_type(GRADIENT))
    parameters = tl.load(row + 1).to(tl.pointer_type(PARAMETER))
    references = tl.load(row + 2).to(tl.pointer_type(REFERENCE))
    outs = tl.load(row + 3).to(tl.pointer_type(OUT))
    size = tl.load(row + 4)
    scales = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        gradients = tl.multiple_of(gradients, 16)
        parameters = tl.multiple_of(parameters, 16)
        references = tl.multiple_of(references, 16)
        outs = tl.multiple_of(outs, 16)
        size = tl.multiple_of(size, 16)
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
        if FIRST:
            reference = tl.zeros([BLOCK], tl.float32)
        elif BLOCKWISE:
            codes = tl.load(references + at, inside, 0).to(tl.int32)
            reference = tl.load(code_values + codes) * tl.load(scales + at // BLOCKWISE, inside, 0.0)
        else:
            reference = tl.load(references + at, inside, 0.0).to(tl.float32)
        stored, difference, gradient, negative, finite = penalty_terms(
            gradient, parameter, reference, LIMIT, ONE_SIDED, FIRST
        )
        value = difference * twice_weight * gradient

        # in fp64: d is of the size of a probability, and its square would vanish in fp32
        product = difference.to(tl.float64) * gradient.to(tl.float64)
        penalty += difference.to(tl.float64) * difference.to(tl.float64)
        gradient_square += product * product
        negatives += negative.to(tl.int64)
        nonfinites += (inside & (finite == 0)).to(tl.int64)
        if UPDATE:
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

    tl.store(partial_sums + 2 * place, sum_in_pairs(penalty, BLOCK))
    tl.store(partial_sums + 2 * place + 1, 4.0 * sum_in_pairs(gradient_square, BLOCK))
    tl.store(partial_counts + 2 * chunk, tl.sum(negatives, 0))
    tl.store(partial_counts + 2 * chunk + 1, tl.sum(nonfinites, 0))


def penalty(gradients, parameters, references, outs, options):
    """Return penalty, negative, gradient_square and the non-finite count of each tensor; all on one device."""
    device = gradients[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # a replay would copy the table again, from memory that is no longer its own
        raise RuntimeError('penalty_ in Triton can\'t be captured in a CUDA graph: capture it with backend="cuda"')
    weight = options.weight
    if not isinstance(weight, torch.Tensor):
        weight = torch.full((), weight, dtype=torch.float32, device=device)
    with torch.cuda.device_of(gradients[0]):
        rows = list(zip(gradients, parameters, references, outs, strict=True))
        work = _prepared(rows, _by_kind(rows), weight, options)
        for kind, launch in work.launches.items():
            launch(tuning.fastest(("penalty", device, kind), WARPS, device, partial(_launch_on_scratch, kind, device)))
        sums = work.partial_sums.sum(0)
        negative = work.partial_counts[:, 0].sum()
        counts = torch.zeros(len(gradients), dtype=torch.int64, device=device)
        # integers: the order in which they are added doesn't matter
        counts.index_add_(0, work.tensor_of_chunk, work.partial_counts[:, 1])
    return sums[0], negative, sums[1], counts


class Kind(NamedTuple):
    """What a launch is compiled for; `reference` may be Blockwise8, `out` None."""

    gradient: torch.dtype
    parameter: torch.dtype
    reference: torch.dtype | type[Blockwise8]
    out: torch.dtype | None
    aligned: bool


def kind_of(gradient, parameter, reference, out) -> Kind:
    memory = [gradient, parameter, blockwise8.tensors_of(reference)[0], *([] if out is None else [out])]
    aligned = gradient.numel() % _ALIGNMENT == 0 and all(t.data_ptr() % _ALIGNMENT == 0 for t in memory)
    reference_type = Blockwise8 if isinstance(reference, Blockwise8) else reference.dtype
    return Kind(gradient.dtype, parameter.dtype, reference_type, None if out is None else out.dtype, aligned)


def _by_kind(rows) -> dict[Kind, list[int]]:
    kinds = {}
    for i, row in enumerate(rows):
        kinds.setdefault(kind_of(*row), []).append(i)
    return kinds


class _Work(NamedTuple):
    """launch(warps) for each kind, and what the launches write: sums in the order of the caller's tensors and of the
    chunks within, which no kind changes, and counts in the order of launches, as tensor_of_chunk is."""

    launches: dict[Kind, Callable[[int], None]]
    partial_sums: torch.Tensor
    partial_counts: torch.Tensor
    tensor_of_chunk: torch.Tensor


def _prepared(rows, kinds, weight, options) -> _Work:
    """Rows of gradient, parameter, reference and out, and which of them are of each kind."""
    device = rows[0][0].device
    chunks, numbers, length = _chunks([gradient.numel() for gradient, *_ in rows], list(kinds.values()))
    table, chunks = _upload([torch.tensor([_row(*row) for row in rows]), chunks], device)
    partial_sums = torch.empty(len(chunks), 2, dtype=torch.float64, device=device)
    partial_counts = torch.empty(len(chunks), 2, dtype=torch.int64, device=device)

    def launch(kind, first_chunk, number, warps):
        eight_bits = kind.reference is Blockwise8
        penalty_kernel[(number,)](
            table,
            chunks,
            first_chunk,
            length,
            weight,
            options.gradient_scale,
            partial_sums,
            partial_counts,
            blockwise8.values_on(device),
            GRADIENT=_TYPES[kind.gradient],
            PARAMETER=_TYPES[kind.parameter],
            REFERENCE=_TYPES[kind.reference],
            BLOCKWISE=blockwise8.BLOCK if eight_bits else 0,
            OUT=_TYPES[kind.out or kind.gradient],
            LIMIT=blockwise8.LIMIT if eight_bits else torch.finfo(kind.reference).max,
            ADD=kind.out is not None,
            ONE_SIDED=options.one_sided,
            UPDATE=options.update_references,
            FIRST=options.first,
            ALIGNED=kind.aligned,
            BLOCK=_BLOCK,
            num_warps=warps,
            # a fused multiply-add could give A − A^ref another sign than the reference has
            enable_fp_fusion=False,
        )

    launches, first_chunk = {}, 0
    for kind, number in zip(kinds, numbers, strict=True):
        if number:
            launches[kind] = partial(launch, kind, first_chunk, number)
        first_chunk += number
    return _Work(launches, partial_sums, partial_counts, chunks[:, 0])


def _launch_on_scratch(kind, device):
    """launch(warps) on buffers of its own, larger than a cache."""
    *dtypes, _ = kind
    elements = _SCRATCH_BYTES // sum(1 if dtype is Blockwise8 else dtype.itemsize for dtype in dtypes if dtype)
    elements -= elements % _ALIGNMENT

    def buffer(dtype):
        if dtype is None:
            return None
        if dtype is not Blockwise8:
            return torch.zeros(elements, dtype=dtype, device=device)
        reference = Blockwise8.empty_like(torch.empty(elements, device="meta"))
        return Blockwise8(*(torch.zeros_like(tensor, device=device) for tensor in blockwise8.tensors_of(reference)))

    row = [buffer(dtype) for dtype in dtypes]
    options = Options(1.0, 1.0, one_sided=False, update_references=True, first=False)
    # what is compiled for any memory is timed on aligned memory
    launch = _prepared([row], {kind: [0]}, torch.ones((), device=device), options).launches[kind]
    # a table of addresses keeps no buffer alive
    launch.buffers = row
    return launch


def _row(gradient, parameter, reference, out):
    target = gradient if out is None else out
    memory = [tensor.data_ptr() for tensor in blockwise8.tensors_of(reference)]
    stored, absmax = memory if len(memory) == 2 else (*memory, 0)
    return [gradient.data_ptr(), parameter.data_ptr(), stored, target.data_ptr(), gradient.numel(), absmax]


def _chunks(sizes, groups):
    """Tensor, first element and place of each chunk, group after group; the number of each group's; their length.

    Length and place come from the sizes alone.
    """
    length = max(_SHORTEST_CHUNK, triton.cdiv(triton.cdiv(sum(sizes), _MOST_CHUNKS), _BLOCK) * _BLOCK)
    counts = torch.tensor([triton.cdiv(size, length) for size in sizes])
    places = counts.cumsum(0) - counts
    order = torch.tensor([i for group in groups for i in group])
    tensor = torch.repeat_interleave(order, counts[order])
    launched = counts[order].cumsum(0) - counts[order]
    number = torch.arange(len(tensor)) - torch.repeat_interleave(launched, counts[order])
    chunks = torch.stack([tensor, number * length, places[tensor] + number], 1)
    return chunks, [int(counts[group].sum()) for group in groups], length


def _upload(tensors, device):
    """int64 tensors to the device in one copy, which doesn't wait for what is enqueued there.

    From ordinary memory it would, and each piece of pinned memory is one that behind a busy stream has to be asked of
    the driver, which may wait as well.
    """
    staged = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if device.type == "cuda":
        staged = staged.pin_memory()
    parts = staged.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
