"""Tensors as the compiled kernels take them: addresses, sizes, strides and dtype codes (csrc/README.md)."""

import torch
from torch import Tensor

from ssiuu_fast.ops.blockwise8 import Blockwise8
from ssiuu_fast.ops.checks import BLOCKWISE8_CODE, DTYPE_CODES


def penalty_table(gradients, parameters, references, outs) -> list[int]:
    """Ten numbers a tensor: four addresses, size, four dtype codes, address of absmax."""
    table = []
    for g, p, r, o in zip(gradients, parameters, references, outs, strict=True):
        out, out_code = (0, 0) if o is None else (o.data_ptr(), DTYPE_CODES[o.dtype])
        if isinstance(r, Blockwise8):
            reference, reference_code, absmax = r.codes.data_ptr(), BLOCKWISE8_CODE, r.absmax.data_ptr()
        else:
            reference, reference_code, absmax = r.data_ptr(), DTYPE_CODES[r.dtype], 0
        table += (g.data_ptr(), p.data_ptr(), reference, out, g.numel())
        table += (DTYPE_CODES[g.dtype], DTYPE_CODES[p.dtype], reference_code, out_code, absmax)
    return table


def address(tensor: Tensor | None) -> int:
    """0 stands for None."""
    return 0 if tensor is None else tensor.data_ptr()


def neuron_numbers(hidden: Tensor, gradient: Tensor, mask: Tensor | None) -> list[int]:
    """Eleven numbers: three addresses, shape, strides of batch and token of both, dtype code."""
    strides = (*hidden.stride()[:2], *gradient.stride()[:2])
    return [
        hidden.data_ptr(), gradient.data_ptr(), address(mask), *hidden.shape, *strides, DTYPE_CODES[hidden.dtype]
    ]  # fmt: skip


def launch_place(device: torch.device) -> tuple[int, int]:
    """Index of a CUDA device, and the stream that is current there."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream
