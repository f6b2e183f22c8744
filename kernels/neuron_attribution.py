"""neuron_attribution in Triton, and the sums over tokens that the penalty on neurons also begins with.

Meaning and checks are in ssiuu_fast/ops/neuron_attribution.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ssiuu_fast.kernels import tuning


class Block(NamedTuple):
    """Neurons that one program works on, and its warps."""

    neurons: int
    warps: int


# Tokens read at once. Token t adds to lane t % LANES of its column, and the lanes are added pairwise at the end: sums
# don't depend on the block that is tuned.
LANES = 8
# A row of 64 bfloat16 is one line of memory; each thread reads 16 bytes of both inputs, twice with the last block. All
# programs of 16 × 8192 columns then fit on an H100 at once (64 registers a thread), so that none is left for a second
# wave; smaller programs end more evenly, larger ones take fewer instructions.
BLOCKS = (Block(128, 4), Block(64, 2), Block(256, 4))
# elements below which the launch takes longer than the kernel
_WORTH_TUNING = 1 << 22
# columns that fill a large GPU; with fewer of them long sums are cut
_ENOUGH_COLUMNS = 1 << 18
# The partial results of so many tokens, 16 bytes a column, are under 1 % of what is read.
_SHORTEST_PART = 512
_COMBINE_BLOCK = 256


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add_lanes(lanes, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """Sum over the first dimension by halves: two terms commute, so no layout of threads changes the result."""
    if LANES > 1:
        return add_lanes(tl.sum(tl.reshape(lanes, [LANES // 2, 2, BLOCK]), 1), LANES // 2, BLOCK)
    else:
        return tl.reshape(lanes, [BLOCK])


# these bound loops only: compiled once, whatever the number of tokens, which changes from batch to batch
@triton.jit(do_not_specialize=["groups", "rows", "tokens", "part_length"])
def attribution_kernel(
    hidden,
    gradient,
    mask,
    largest_out,
    smallest_out,
    sums_out,
    groups,
    rows,
    tokens,
    neurons,
    part_length,
    hidden_batch_stride,
    hidden_token_stride,
    gradient_batch_stride,
    gradient_token_stride,
    EXTREMES: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum, max and min of hidden · gradient over one part of one group's rows, for one block of neurons.

    A group is a sample (rows = tokens), or the whole batch (one group, rows = samples × tokens). Results are
    [parts, groups, neurons]; without EXTREMES sums only.
    """
    blocks = tl.cdiv(neurons, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < neurons
    group = program // blocks % groups
    part = program // blocks // groups
    begin = part * part_length
    end = tl.minimum(begin + part_length, rows)

    sums = tl.zeros([LANES, BLOCK], tl.float64)
    largest = tl.full([LANES, BLOCK], float("-inf"), tl.float32)
    smallest = tl.full([LANES, BLOCK], float("inf"), tl.float32)
    for step in range(begin // tokens, tl.cdiv(end, tokens)):
        sample = group + step
        last = tl.minimum(end - step * tokens, tokens)
        # two steps are on their way to shared memory while one is worked on: with few warps a multiprocessor nothing
        # else would keep the memory busy
        for start in tl.range(tl.maximum(begin - step * tokens, 0), last, LANES, num_stages=3):
            token = start + tl.arange(0, LANES)
            counted = token < last
            if mask is not None:
                counted &= tl.load(mask + sample * tokens + token, counted, 0) != 0
            # what doesn't count isn't read: it costs nothing, and a NaN there can't get out
            read = counted[:, None] & inside[None, :]
            hidden_at = sample * hidden_batch_stride + token[:, None] * hidden_token_stride + columns[None, :]
            gradient_at = sample * gradient_batch_stride + token[:, None] * gradient_token_stride + columns[None, :]
            product = tl.load(hidden + hidden_at, read, 0.0).to(tl.float32)
            product *= tl.load(gradient + gradient_at, read, 0.0).to(tl.float32)
            sums += product.to(tl.float64)
            if EXTREMES:
                largest = maximum(largest, tl.where(read, product, float("-inf")))
                smallest = minimum(smallest, tl.where(read, product, float("inf")))

    at = (part * groups + group) * neurons + columns
    tl.store(sums_out + at, add_lanes(sums, LANES, BLOCK).to(sums_out.dtype.element_ty), inside)
    if EXTREMES:
        # reductions of Triton pass over NaN
        nan = tl.max((largest != largest).to(tl.int32), 0) != 0
        tl.store(largest_out + at, tl.where(nan, float("nan"), tl.max(largest, 0)), inside)
        tl.store(smallest_out + at, tl.where(nan, float("nan"), tl.min(smallest, 0)), inside)


@triton.jit(do_not_specialize=["parts"])
def combine_kernel(
    largest_parts,
    smallest_parts,
    sum_parts,
    largest_out,
    smallest_out,
    sums_out,
    parts,
    columns,
    BLOCK: tl.constexpr,
):
    """Results of all parts, one after the other, for one block of columns (samples × neurons)."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    sums = tl.zeros([BLOCK], tl.float64)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    smallest = tl.full([BLOCK], float("inf"), tl.float32)
    at = column
    for _ in range(parts):
        sums += tl.load(sum_parts + at, inside, 0.0)
        largest = maximum(largest, tl.load(largest_parts + at, inside, 0.0))
        smallest = minimum(smallest, tl.load(smallest_parts + at, inside, 0.0))
        at += columns
    tl.store(sums_out + column, sums.to(tl.float32), inside)
    tl.store(largest_out + column, largest, inside)
    tl.store(smallest_out + column, smallest, inside)


def neuron_attribution(hidden, gradient, mask, result):
    """Fill `result` (max, min, sum) with the attributions; all on one device, mask uint8 or None."""
    batch, tokens, neurons = hidden.shape
    columns = batch * neurons
    if tokens == 0:
        for tensor, value in zip(result, (-torch.inf, torch.inf, 0.0), strict=True):
            tensor.fill_(value)
        return
    if columns == 0:
        return
    parts, _ = cut(columns, tokens)
    with torch.cuda.device_of(hidden):
        if parts == 1:
            add_tokens(hidden, gradient, mask, result.sum, extremes=(result.max, result.min), per_sample=True)
            return
        extremes = torch.empty(2, parts, batch, neurons, dtype=torch.float32, device=hidden.device)
        sums = torch.empty(parts, batch, neurons, dtype=torch.float64, device=hidden.device)
        add_tokens(hidden, gradient, mask, sums, extremes=extremes, per_sample=True)
        combine_kernel[(triton.cdiv(columns, _COMBINE_BLOCK),)](
            *extremes, sums, *result, parts, columns, BLOCK=_COMBINE_BLOCK, enable_fp_fusion=False
        )


def cut(columns, rows):
    """Number of parts that `rows` rows of so many columns are cut into, and their length: from the sizes alone."""
    parts = max(1, min(triton.cdiv(_ENOUGH_COLUMNS, columns), rows // _SHORTEST_PART))
    length = triton.cdiv(triton.cdiv(rows, parts), LANES) * LANES
    return triton.cdiv(rows, length), length


def add_tokens(hidden, gradient, mask, sums, *, extremes=None, per_sample):
    """Fill `sums` and `extremes` (max and min), [parts, groups, neurons], with those of hidden · gradient."""
    batch, tokens, neurons = hidden.shape
    groups, rows = (batch, tokens) if per_sample else (1, batch * tokens)
    parts, length = cut(groups * neurons, rows)
    largest, smallest = (None, None) if extremes is None else extremes

    def launch(block):
        attribution_kernel[(triton.cdiv(neurons, block.neurons) * groups * parts,)](
            hidden,
            gradient,
            mask,
            largest,
            smallest,
            sums,
            groups,
            rows,
            tokens,
            neurons,
            length,
            *hidden.stride()[:2],
            *gradient.stride()[:2],
            EXTREMES=extremes is not None,
            LANES=LANES,
            BLOCK=block.neurons,
            num_warps=block.warps,
            # a fused multiply-add rounds once where the formula rounds twice, and a sign decides
            enable_fp_fusion=False,
        )

    launch(_best_block(launch, hidden, mask, extremes))


def _best_block(launch, hidden, mask, extremes):
    if hidden.numel() < _WORTH_TUNING:
        return BLOCKS[0]
    batch, tokens, neurons = hidden.shape
    kind = ("attribution", hidden.device, hidden.dtype, extremes is None, mask is None)
    # runs of the kernel write the same into buffers of their own, so it may be tuned on them
    key = (*kind, neurons, batch.bit_length(), tokens.bit_length())
    return tuning.fastest(key, BLOCKS, hidden.device, lambda: launch)
