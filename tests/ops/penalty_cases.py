"""Random calls of penalty_, and what they should give: the fp64 truth and the transcription in plain torch."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ssiuu_fast.ops import Blockwise8
from ssiuu_fast.ops.blockwise8 import tensors_of

SINGLE = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 64, 127, 255, 256, 257, 1009, 4099)
LARGE = (65_537, 262_147, 1_000_003)


@dataclass
class Case:
    gradients: list
    parameters: list
    references: list
    outs: list
    options: dict = field(default_factory=dict)

    def copy(self):
        lists = (self.gradients, self.parameters, self.references, self.outs)
        return Case(*([None if t is None else copied(t) for t in tensors] for tensors in lists), self.options)

    def run(self, penalty_, backend, **more):
        return penalty_(
            self.gradients, self.parameters, self.references, out=self.outs, backend=backend, **self.options, **more
        )

    @property
    def written(self):
        """Everything that a call may change, as plain tensors."""
        targets = [gradient if out is None else out for gradient, out in zip(self.gradients, self.outs, strict=True)]
        return targets + [tensor for reference in self.references for tensor in tensors_of(reference)]


class Expected(NamedTuple):
    value: torch.Tensor
    reference: torch.Tensor
    penalty: torch.Tensor
    negative: torch.Tensor
    gradient_square: torch.Tensor
    cancelled: torch.Tensor
    largest_gradient: torch.Tensor


def at_odd_offset(tensor):
    """A copy that starts one element into its memory."""
    view = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return view.copy_(tensor)


def copied(tensor):
    if isinstance(tensor, Blockwise8):
        return Blockwise8(at_odd_offset(tensor.codes), at_odd_offset(tensor.absmax))
    return at_odd_offset(tensor)


def decoded(reference):
    return reference.decode() if isinstance(reference, Blockwise8) else reference


def random_case(generator, *, double=False, poison=False):
    """A call on one to four tensors, a quarter of the references in 8 bits.

    With poison, some elements of gradients and of references that can hold it are inf or NaN.
    """

    def number(high):
        return int(torch.randint(high, (), generator=generator))

    def coin():
        return number(2) == 1

    def dtype():
        return torch.float64 if double else SINGLE[number(3)]

    def normal(size, dtype, scale):
        return at_odd_offset((torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype))

    case = Case([], [], [], [])
    first = number(4) == 0
    for _ in range(1 + number(4)):
        size = LARGE[number(3)] if number(500) == 0 else SIZES[number(len(SIZES))]
        case.gradients.append(normal(size, dtype(), 0.5))
        case.parameters.append(normal(size, dtype(), 2))
        reference = normal(size, dtype(), 1)
        eight_bits = not double and number(4) == 0
        case.references.append(copied(Blockwise8.encode(reference)) if eight_bits else reference)
        out = None
        if coin():
            out = normal(size, case.gradients[-1].dtype if double or coin() else torch.float32, 1)
        case.outs.append(out)
        if first and eight_bits:
            case.references[-1].codes.random_(256, generator=generator)
            case.references[-1].absmax.fill_(torch.nan)
        elif first:
            reference.fill_(torch.nan)
        elif poison and size and not eight_bits:
            reference[number(size)] = torch.nan
        if poison and size:
            case.gradients[-1][number(size)] = (torch.inf, -torch.inf, torch.nan)[number(3)]
    case.options = {
        "weight": (1.0, 0.37, 1e-3)[number(3)],
        "gradient_scale": (1.0, 0.73, 2.0)[number(3)],
        "one_sided": coin(),
        "update_references": first or coin(),
        "first": first,
    }
    return case


def every_magnitude():
    """A first step whose A takes every magnitude of fp32, many in one block of an 8-bit reference."""
    generator = torch.Generator().manual_seed(0)
    size = 20_000
    signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
    parameters = signs * 10 ** (45 * torch.rand(size, generator=generator).sort().values - 38)
    parameters[5000:10_000] = signs[5000:10_000] * 10 ** (8 * torch.rand(5000, generator=generator) - 8)
    references = Blockwise8.empty_like(parameters)
    references.codes.zero_()
    options = {"weight": 0.5, "first": True}
    return Case([torch.ones(size)], [parameters], [references], [None], options)


def expected(case, arithmetic=None):
    """An Expected an index by the formula's plain transcription.

    arithmetic=torch.float64 is the truth for finite input; None leaves every step in the dtypes of storage, as a
    user's own few lines of torch would.
    """
    options = case.options
    for gradient, parameter, reference, out in zip(
        case.gradients, case.parameters, case.references, case.outs, strict=True
    ):
        written_dtype = gradient.dtype if out is None else out.dtype
        reference = decoded(reference)
        reference_dtype = reference.dtype
        if arithmetic is not None:
            gradient, parameter, reference = (t.to(arithmetic) for t in (gradient, parameter, reference))
            written_dtype = reference_dtype = arithmetic
        g = gradient * options["gradient_scale"]
        attribution = parameter * g
        difference = torch.where(attribution < 0, attribution - reference, 0)
        if options["one_sided"]:
            difference = difference.clamp(max=0)
        if options["first"]:
            difference = torch.zeros_like(attribution)
        previous = reference
        value = options["weight"] * 2 * difference * g
        if out is not None:
            value = out + value
        if options["update_references"]:
            reference = attribution
        yield Expected(
            value.to(written_dtype),
            reference.to(reference_dtype),
            difference.double().square().sum(),
            (attribution < 0).sum(),
            (2 * difference.double() * g.double()).square().sum(),
            # what A and A^ref cancelled from, for the error of their difference in fp32
            (difference != 0).double().mul(attribution.abs() + previous.abs()).square().sum(),
            (2 * g.double()).abs().amax() if g.numel() else g.sum(),
        )
