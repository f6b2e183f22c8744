"""Weight gradients of a linear module in Triton, from one pass over what they are made of.

A program adds up a tile of the gradient sample by sample. When a sample ends, its sum is added to the plain gradient,
and times its weight to the weighted one: the second gradient costs no matrix product, and no operand is rounded. (Sums
over all samples so far, times the differences between weights, would save an accumulator; but weights may differ by
many orders of magnitude, and small sums with large weights would drown.)

Meaning and checks are in ssiuu_fast/ops/weighted_weight_gradient.py, both_weight_gradients.py and
penalized_weight_gradient.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ssiuu_fast.kernels.penalty import penalty_terms
from ssiuu_fast.ops.penalty import Options

# inputs of a tile that are computed and written one after the other: 32 bytes of 16-bit numbers
_PART = 16
# rows of tiles whose programs follow each other, so that they share in the cache what they read
_GROUP = 8


class Tile(NamedTuple):
    """The part of the gradient that a program computes, tokens it reads at a time, and its warps."""

    outputs: int
    inputs: int
    tokens: int
    warps: int
    stages: int = 3


def tile_of(dtype: torch.dtype, aligned: bool, capability: tuple[int, int]) -> Tile:
    """What fits into the registers: three accumulators, and addresses one by one where memory isn't aligned."""
    if dtype == torch.float32:
        return Tile(64, 64, 16, 4 if aligned else 8)
    if not aligned:
        return Tile(64, 64, 32, 8)
    # there accumulators of two warpgroups are read and written by one instruction
    return Tile(128, 128, 64, 8) if capability[0] == 9 else Tile(128, 64, 32, 8, 4)


@triton.jit
def _halves(tile):
    """Left and right half of a tile; the values stay in the registers they are in."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _parts(tile, PARTS: tl.constexpr):
    """4 or 8 parts of a tile, from left to right."""
    left, right = _halves(tile)
    quarters = _halves(left) + _halves(right)
    if PARTS == 4:
        return quarters
    else:
        return _halves(quarters[0]) + _halves(quarters[1]) + _halves(quarters[2]) + _halves(quarters[3])


@triton.jit
def _write(out, row, column, row_stride, column_stride, inside, value, ADD: tl.constexpr):
    at = out + row[:, None] * row_stride + column[None, :] * column_stride
    if ADD:
        value += tl.load(at, inside, 0.0).to(tl.float32)
    tl.store(at, value.to(out.dtype.element_ty), inside)


@triton.jit
def _count(flags):
    return tl.sum(tl.sum(flags.to(tl.int32), 1), 0).to(tl.int64)


# numbers that differ from batch to batch are no reason to compile anew
@triton.jit(do_not_specialize=["tiles", "tokens"])
def weight_gradient_kernel(
    gradient,
    input,
    weights,
    plain_out,
    weighted_out,
    parameter,
    reference,
    penalty_weight,
    gradient_scale,
    partial_sums,
    partial_counts,
    tiles,
    tokens,
    outputs,
    inputs,
    gradient_sample_stride,
    gradient_token_stride,
    gradient_output_stride,
    input_sample_stride,
    input_token_stride,
    input_input_stride,
    plain_output_stride,
    plain_input_stride,
    weighted_output_stride,
    weighted_input_stride,
    ADD_PLAIN: tl.constexpr,
    ADD_WEIGHTED: tl.constexpr,
    LIMIT: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    UPDATE: tl.constexpr,
    FIRST: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile of plain_out, weighted_out or both; or, with a parameter, of the plain gradient and that of the penalty.

    tiles: TOKENS tokens of a sample each, those of all samples.
    WIDEN: operands to float32 first, for the interpreter: it multiplies the bits of bfloat16 (triton issue 11584).
    """
    program = tl.program_id(0).to(tl.int64)
    rows, columns = tl.cdiv(outputs, OUTPUTS), tl.cdiv(inputs, INPUTS)
    first_row = program // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first_row, GROUP)
    within_group = program % (GROUP * columns)
    row = (first_row + within_group % height) * OUTPUTS + tl.arange(0, OUTPUTS)
    first_column = within_group // height * INPUTS
    column = first_column + tl.arange(0, INPUTS)
    row_inside, column_inside = row < outputs, column < inputs

    offset = tl.arange(0, TOKENS).to(tl.int64)
    gradients = gradient + row[:, None] * gradient_output_stride + offset[None, :] * gradient_token_stride
    given = input + offset[:, None] * input_token_stride + column[None, :] * input_input_stride
    of_sample = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    weighted = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    if plain_out is not None:
        plain = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    sample = tl.full([], 0, tl.int64)
    first_token = tl.full([], 0, tl.int64)
    # one loop over the tokens of all samples: loads of the next sample are under way while one ends
    for _ in range(tiles):
        counted = first_token + offset < tokens
        dy = tl.load(
            gradients + sample * gradient_sample_stride + first_token * gradient_token_stride,
            row_inside[:, None] & counted[None, :],
            0.0,
        )
        x = tl.load(
            given + sample * input_sample_stride + first_token * input_token_stride,
            counted[:, None] & column_inside[None, :],
            0.0,
        )
        if WIDEN:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        of_sample = tl.dot(dy, x, of_sample, input_precision="ieee")
        ends = first_token + TOKENS >= tokens
        if ends:
            if plain_out is not None:
                plain += of_sample
            weight = tl.load(weights + sample)
            # whatever a sample without weight holds
            weighted += tl.where(weight != 0.0, weight * of_sample, 0.0)
            of_sample = tl.zeros([OUTPUTS, INPUTS], tl.float32)
        sample += ends.to(tl.int64)
        first_token = tl.where(ends, 0, first_token + TOKENS)

    weighted_parts = _parts(weighted, PARTS)
    if plain_out is not None:
        plain_parts = _parts(plain, PARTS)
    if parameter is not None:
        # an eager launch passes a Python float as fp32, a compiled graph as fp64
        scale = tl.full([], gradient_scale, tl.float32)
        twice_weight = 2.0 * tl.load(penalty_weight).to(tl.float32)
    # a part after the other: what a whole tile takes is more than there are registers
    for part in tl.static_range(PARTS):
        column = first_column + part * (INPUTS // PARTS) + tl.arange(0, INPUTS // PARTS)
        inside = row_inside[:, None] & (column < inputs)[None, :]
        if parameter is None:
            value = weighted_parts[part]
            _write(
                weighted_out, row, column, weighted_output_stride, weighted_input_stride, inside, value, ADD_WEIGHTED
            )
        if plain_out is not None:
            value = plain_parts[part]
            if parameter is not None:
                at = row[:, None] * inputs + column[None, :]
                phi = tl.load(parameter + at, inside, 0.0).to(tl.float32)
                if FIRST:
                    previous = tl.zeros_like(phi)
                else:
                    previous = tl.load(reference + at, inside, 0.0).to(tl.float32)
                stored, difference, g, negative, finite = penalty_terms(
                    weighted_parts[part] * scale, phi, previous, LIMIT, ONE_SIDED, FIRST
                )
                if UPDATE:
                    tl.store(reference + at, stored.to(reference.dtype.element_ty), inside)
                value += difference * twice_weight * g
                # in fp64: d is of the size of a probability, and its square would vanish in fp32
                square = difference.to(tl.float64) * difference.to(tl.float64)
                product = difference.to(tl.float64) * g.to(tl.float64)
                sums = 2 * (PARTS * program + part)
                tl.store(partial_sums + sums, tl.sum(tl.sum(square, 1), 0))
                tl.store(partial_sums + sums + 1, 4.0 * tl.sum(tl.sum(product * product, 1), 0))
                tl.store(partial_counts + sums, _count(negative))
                tl.store(partial_counts + sums + 1, _count(inside & (finite == 0)))
            _write(plain_out, row, column, plain_output_stride, plain_input_stride, inside, value, ADD_PLAIN)


class Penalty(NamedTuple):
    """What the form with the penalty takes besides; options as penalty_ has them."""

    parameter: torch.Tensor
    reference: torch.Tensor
    options: Options


def weight_gradients(gradient, input, weights, *, plain=None, weighted, add):
    """Fill `weighted` with Σ_b weights[b] · gradient[b]ᵀ input[b], and `plain`, if given, with that without weights.

    gradient [batch, tokens, outputs], input [batch, tokens, inputs]; add: whether to what is there, in plain and in
    weighted.
    """
    _launch(gradient, input, weights, plain, weighted, add, None)


def penalized_weight_gradient(gradient, input, weights, parameter, reference, out, options, *, add):
    """Fill `out` with the sum of plain gradient and that of the penalty; return the sums of penalty_."""
    penalty = Penalty(parameter, reference, options)
    sums, counts = _launch(gradient, input, weights, out, None, (add, False), penalty)
    return sums[:, 0].sum(), counts[:, 0].sum(), sums[:, 1].sum(), counts[:, 1].sum()


def _launch(gradient, input, weights, plain, weighted, add, penalty):
    device = gradient.device
    batch, tokens, outputs = gradient.shape
    inputs = input.shape[2]
    written = [tensor for tensor in (plain, weighted) if tensor is not None]
    tensors = [gradient, input, *written, *(penalty[:2] if penalty else ())]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    tile = tile_of(gradient.dtype, all(map(_is_aligned, tensors)), capability)
    programs = triton.cdiv(outputs, tile.outputs) * triton.cdiv(inputs, tile.inputs)
    parts = tile.inputs // _PART
    sums = counts = weight = None
    if penalty:
        sums = torch.empty(programs * parts, 2, dtype=torch.float64, device=device)
        counts = torch.empty(programs * parts, 2, dtype=torch.int64, device=device)
        weight = penalty.options.weight
        if not isinstance(weight, torch.Tensor):
            # no copy from the host, which a CUDA graph couldn't capture
            weight = torch.full((), weight, dtype=torch.float32, device=device)
    if programs == 0:
        return sums, counts
    with torch.cuda.device_of(gradient):
        weight_gradient_kernel[(programs,)](
            gradient,
            input,
            weights,
            plain,
            weighted,
            penalty.parameter if penalty else None,
            penalty.reference if penalty else None,
            weight,
            penalty.options.gradient_scale if penalty else 1.0,
            sums,
            counts,
            batch * triton.cdiv(tokens, tile.tokens),
            tokens,
            outputs,
            inputs,
            *gradient.stride(),
            *input.stride(),
            *(plain.stride() if plain is not None else (0, 0)),
            *(weighted.stride() if weighted is not None else (0, 0)),
            ADD_PLAIN=add[0],
            ADD_WEIGHTED=add[1],
            LIMIT=torch.finfo(penalty.reference.dtype).max if penalty else 0.0,
            ONE_SIDED=bool(penalty) and penalty.options.one_sided,
            UPDATE=bool(penalty) and penalty.options.update_references,
            FIRST=bool(penalty) and penalty.options.first,
            OUTPUTS=tile.outputs,
            INPUTS=tile.inputs,
            TOKENS=tile.tokens,
            GROUP=_GROUP,
            PARTS=parts,
            WIDEN=device.type == "cpu",
            num_warps=tile.warps,
            num_stages=tile.stages,
            # a fused multiply-add could give A − A^ref another sign than the reference has
            enable_fp_fusion=False,
        )
    return sums, counts


def _is_aligned(tensor):
    """Whether a thread may read 16 bytes at once anywhere in it."""
    *strides, last = tensor.stride()
    return last == 1 and all(number % 16 == 0 for number in (tensor.data_ptr(), tensor.shape[-1], *strides))
