"""What penalty_ refuses, before anything is changed."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from ssiuu_fast.ops.blockwise8 import Blockwise8, check_blockwise8, tensors_of
from ssiuu_fast.ops.checks import check_contiguous, check_no_overlap, check_written

_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
_DOUBLE = (torch.float64,)
_DTYPES = _SINGLE + _DOUBLE


def check_tensors(gradients, parameters, references, outs, references_written):
    """Refuse bad input; nothing has been written when this raises."""
    lengths = {"parameters": len(parameters), "references": len(references), "out": len(outs)}
    for name, length in lengths.items():
        if length != len(gradients):
            raise ValueError(f"{name} has {length} entries and gradients {len(gradients)}: pass one an index")
    if all(map(_is_plain, gradients, parameters, references, outs)) and _lie_apart(
        [gradients, parameters, references, [out for out in outs if out is not None]]
    ):
        return
    written, read = [], []
    for i, (gradient, parameter, reference, out) in enumerate(
        zip(gradients, parameters, references, outs, strict=True)
    ):
        check_contiguous(gradient, f"gradients[{i}]", _DTYPES)
        tensors = [("parameters", parameter), ("references", reference)]
        dtypes = _DOUBLE if gradient.dtype == torch.float64 else _SINGLE
        check_contiguous(parameter, f"parameters[{i}]", dtypes)
        _check_reference(reference, f"references[{i}]", dtypes)
        if out is not None:
            tensors.append(("out", out))
            check_contiguous(out, f"out[{i}]", (gradient.dtype, torch.float32))
        for name, tensor in tensors:
            if tensor.shape != gradient.shape or tensor.device != gradient.device:
                raise ValueError(
                    f"{name}[{i}] is {tuple(tensor.shape)} on {tensor.device} and gradients[{i}]"
                    f" {tuple(gradient.shape)} on {gradient.device}: shape and device must agree within an index"
                )
        target, name = (gradient, "gradients") if out is None else (out, "out")
        check_written(target, f"{name}[{i}]")
        written.append((name, i, target))
        if out is not None:
            read.append(("gradients", i, gradient))
        read.append(("parameters", i, parameter))
        for tensor in tensors_of(reference):
            if references_written:
                check_written(tensor, f"references[{i}]")
            (written if references_written else read).append(("references", i, tensor))
    check_no_overlap(written, read)


def _is_plain(gradient, parameter, reference, out):
    """Whether one index has nothing to be refused, quickly: lists may have thousands of them."""
    if type(parameter) is not Tensor and type(parameter) is not nn.Parameter:
        return False
    for tensor in (gradient, reference) if out is None else (gradient, reference, out):
        if type(tensor) is not Tensor or tensor.requires_grad:
            return False
    shape, device = gradient.shape, gradient.device
    for tensor in (gradient, parameter, reference) if out is None else (gradient, parameter, reference, out):
        if tensor.dtype not in _SINGLE or tensor.layout is not torch.strided or not tensor.is_contiguous():
            return False
        if tensor.shape != shape or tensor.device != device:
            return False
    return out is None or out.dtype == gradient.dtype or out.dtype == torch.float32


def _lie_apart(lists):
    """Whether all of these tensors are on one device and no two share memory."""
    tensors = [tensor for some in lists for tensor in some if tensor.numel()]
    if len({tensor.device for tensor in tensors}) > 1:
        return False
    spans = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors)
    return all(start + size <= following for (start, size), (following, _) in pairwise(spans))


def _check_reference(reference, label, dtypes):
    if not isinstance(reference, Blockwise8):
        check_contiguous(reference, label, dtypes)
    elif dtypes == _DOUBLE:
        raise TypeError(f"{label} is a Blockwise8 beside float64 gradients: pass a float64 reference")
    else:
        check_blockwise8(reference, label)


def check_counts(counts, gradients):
    device = gradients[0].device if gradients else torch.device("cpu")
    if counts.dtype != torch.int64 or counts.shape != (len(gradients),) or counts.device != device:
        raise ValueError(
            f"nonfinite_counts is {counts.dtype} {tuple(counts.shape)} on {counts.device}:"
            f" pass int64 ({len(gradients)},) on {device}"
        )
