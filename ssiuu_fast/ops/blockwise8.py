"""Attributions stored in 8 bits: a code an element, and one absmax a block of 256."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ssiuu_fast.ops.checks import check_contiguous

BLOCK = 256
# the largest magnitude that may be stored, so that 1 / absmax is a normal number
LIMIT = 2.0**126
SMALLEST = torch.finfo(torch.float32).tiny

# the share of absmax from which on a group's values are the nearest ones, and +1 is
_THRESHOLDS = (2.75e-7, 1.9e-6, 1.45e-5, 1.225e-4, 1.1125e-3, 1.05625e-2, 0.1028125)
_TOP = 0.996484375
# codes of a group, and codes a unit of share; below the first threshold lies half a code, and none is reached
_SIZES = (0.5, *(2**i for i in range(7)))
_FACTORS = (0.0, *(1e7 / (9 * 5**i) for i in range(7)))


def _values() -> list[float]:
    values = [0.0] * 256
    for i in range(7):
        size = 2**i
        for j in range(size):
            # a quotient of whole numbers is rounded once
            value = (2 * size + 18 * j + 9) / (2 * size * 10 ** (7 - i))
            values[size + j], values[128 + size + j] = value, -value
    values[128] = 1.0
    return values


VALUES = torch.tensor(_values(), dtype=torch.float32)


class _Constants(NamedTuple):
    """What encoding and decoding look up on a device."""

    values: Tensor
    thresholds: Tensor
    sizes: Tensor
    factors: Tensor
    ninths: Tensor
    top: Tensor


@cache
def _constants_on(device: torch.device) -> _Constants:
    """Sent to a device once: sending waits for what is enqueued there, which a graph can't capture."""
    if device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"references in 8 bits are used on {device} for the first time while a CUDA graph is captured, which can't"
            " hold the copy of their constants to the device: call it once before the capture"
        )
    others = (torch.tensor(number, dtype=torch.float32) for number in (_THRESHOLDS, _SIZES, _FACTORS, 8 / 9, _TOP))
    return _Constants(*(tensor.to(device) for tensor in (VALUES, *others)))


def values_on(device: torch.device) -> Tensor:
    """VALUES on a device."""
    return _constants_on(device).values


@dataclass(frozen=True, eq=False)
class Blockwise8:
    """A tensor stored in 1.016 bytes an element: value = table[code] · absmax of the element's block (fp32).

    A block is 256 consecutive elements of the flat tensor, the last one fewer. The table is the dynamic 8-bit map: a
    sign and seven decades, of which the upper ones have finer steps; relative error 1.3 % on products g · φ.

        group i = 0 … 6, j = 0 … 2^i − 1:   code 2^i + j stands for 10^(i−6) · (0.1 + 0.9 · (j + ½) / 2^i),
        128 more for its negative;          code 0 for 0, code 128 for 1

    codes: uint8, of the shape of the tensor that they stand for, contiguous. absmax: float32 [⌈numel / 256⌉], 0 where
    a block's largest magnitude is no normal number (its codes are 0 then).
    """

    codes: Tensor
    absmax: Tensor

    @classmethod
    def empty_like(cls, tensor: Tensor) -> "Blockwise8":
        """Uninitialised, of a tensor's shape and device."""
        blocks = -(-tensor.numel() // BLOCK)
        return cls(
            torch.empty(tensor.shape, dtype=torch.uint8, device=tensor.device),
            torch.empty(blocks, dtype=torch.float32, device=tensor.device),
        )

    @classmethod
    def encode(cls, tensor: Tensor) -> "Blockwise8":
        """The nearest codes of a tensor of any floating dtype, whose elements are finite and at most 2^126."""
        encoded = cls.empty_like(tensor)
        encoded.store(tensor)
        return encoded

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def numel(self) -> int:
        return self.codes.numel()

    def decode(self) -> Tensor:
        """The values, float32."""
        scales = self.absmax[:, None].expand(-1, BLOCK).reshape(-1)[: self.numel()].view(self.shape)
        return values_on(self.device)[self.codes.int()] * scales

    def decode_strided(self, stride: int) -> Tensor:
        """Every stride-th value of the flat tensor, float32."""
        places = torch.arange(0, self.numel(), stride, device=self.device)
        return values_on(self.device)[self.codes.view(-1)[::stride].int()] * self.absmax[places // BLOCK]

    def zero_(self) -> None:
        self.codes.zero_()
        self.absmax.zero_()

    @torch.no_grad()
    def store(self, tensor: Tensor) -> None:
        """Encodes a tensor of the same shape in place: what every kernel is tested against, bit by bit."""
        flat = tensor.detach().reshape(-1).float()
        padded = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        largest = padded.abs().amax(1)
        absmax = torch.where(largest < SMALLEST, 0, largest)
        inverse = torch.where(absmax > 0, 1 / absmax, 0)
        codes = _codes(padded, inverse[:, None])
        self.absmax.copy_(absmax)
        self.codes.copy_(codes.view(-1)[: flat.numel()].view(self.shape))


def _codes(values: Tensor, inverse: Tensor) -> Tensor:
    """The arithmetic of csrc/include/ssiuu/blockwise8.h, each step rounded to fp32."""
    _, thresholds, sizes, factors, ninths, top = _constants_on(values.device)
    scaled = values.abs() * inverse
    group = torch.bucketize(scaled, thresholds, right=True, out_int32=True)
    size = sizes[group]
    place = scaled * factors[group] + size * ninths
    magnitude = torch.minimum(place, size + size - 1).int()
    positive = torch.where(scaled > top, 128, magnitude)
    negative = torch.where(magnitude > 0, magnitude + 128, 0)
    return torch.where(values < 0, negative, positive).to(torch.uint8)


def tensors_of(reference: "Tensor | Blockwise8") -> tuple[Tensor, ...]:
    """The memory that a reference is made of."""
    return (reference.codes, reference.absmax) if isinstance(reference, Blockwise8) else (reference,)


def check_blockwise8(reference: Blockwise8, label: str) -> None:
    """Raise unless codes and absmax are sound and fit each other; label names the reference in the message."""
    check_contiguous(reference.codes, f"{label}.codes", (torch.uint8,))
    check_contiguous(reference.absmax, f"{label}.absmax", (torch.float32,))
    blocks = -(-reference.numel() // BLOCK)
    if reference.absmax.shape != (blocks,) or reference.absmax.device != reference.device:
        raise ValueError(
            f"{label}.absmax is {tuple(reference.absmax.shape)} on {reference.absmax.device}: {reference.numel()} "
            f"codes on {reference.device} need ({blocks},) there, one a block of {BLOCK}. Make both by "
            "Blockwise8.empty_like"
        )
