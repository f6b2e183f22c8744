"""Cases of the operators on weight gradients: shapes, layouts and choices of samples, and what they should give."""

from typing import NamedTuple

import torch

SINGLE = (torch.float32, torch.bfloat16, torch.float16)
# leading dimensions, N, K: no sample, no token, single elements, primes, no feature, several token dimensions or none
SHAPES = (
    ((1, 1), 1, 1),
    ((3, 17), 5, 13),
    ((0, 3), 4, 7),
    ((3, 0), 4, 7),
    ((2, 5), 0, 3),
    ((2, 5), 3, 0),
    ((7,), 11, 2),
    ((5, 2, 3), 31, 37),
    ((2, 3, 1, 5), 2, 67),
    ((4, 33), 67, 41),
)
ROWS = ("all", "slice", "stepping slice", "indices", "none")
LAYOUTS = ("contiguous", "features first", "in a row with others", "expanded over samples")


class Case(NamedTuple):
    """Arguments of a call, and the weights whose samples outside of `rows` are 0."""

    gradient: torch.Tensor
    input: torch.Tensor
    weights: torch.Tensor
    rows: slice | torch.Tensor | None

    @property
    def shape(self):
        return self.gradient.shape[-1], self.input.shape[-1]

    def double(self):
        return self._replace(
            gradient=self.gradient.double(), input=self.input.double(), weights=self.weights.double(), rows=None
        )


def rows_of(kind, batch):
    return {
        "all": None,
        "slice": slice(batch // 3, batch - batch // 4),
        "stepping slice": slice(1, None, 2),
        "indices": torch.arange(batch - 1, -1, -2),
        "none": slice(0, 0),
    }[kind]


def laid_out(tensor, layout):
    """The same numbers, but for the expanded one, in another layout and a memory of NaN."""
    if layout == "features first":
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "in a row with others":
        memory = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan)
        return memory[..., 1 : 1 + tensor.shape[-1]].copy_(tensor)
    if layout == "expanded over samples":
        return tensor[:1].expand(tensor.shape)
    return tensor


def make_case(shape, dtype, number, generator, *, whole=False):
    """Whole numbers have sums that are exact in float32 in any order."""
    leading, outputs, inputs = shape

    def values(*size):
        if whole:
            return torch.randint(-4, 5, size, generator=generator).to(dtype)
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    gradient = laid_out(values(*leading, outputs), LAYOUTS[number % 4])
    input = laid_out(values(*leading, inputs), LAYOUTS[number // 4 % 4])
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.randn(leading[0], generator=generator, dtype=torch.float64)
    # r_s = P_s / w_s spans decades
    weights = weights.mul(4).round() if whole else weights * 10 ** torch.randn(leading[0], generator=generator)
    rows = rows_of(ROWS[number % 5], leading[0])
    if rows is not None:
        kept = torch.zeros_like(weights)
        kept[rows] = 1
        weights = weights * kept
    return Case(gradient, input, weights.to(weight_dtype), rows)


def cases(dtype, shapes=SHAPES, seeds=3, **options):
    """Each shape with each seed, layouts and rows in turn."""
    for seed in range(seeds):
        for place, shape in enumerate(shapes):
            number = 7 * seed + place
            generator = torch.Generator().manual_seed(number)
            yield f"{shape} {dtype}, case {number}", make_case(shape, dtype, number, generator, **options)


def truth_of(case, weights=None):
    """The sum over everything at once, in float64."""
    double = case.double()
    gradient, input = (t.reshape(t.shape[0], t.shape[1:-1].numel(), t.shape[-1]) for t in double[:2])
    return torch.einsum("b,btn,btk->nk", double.weights if weights is None else weights.double(), gradient, input)


def rounding_of(case, scaled_operand=False, out=None):
    """By how much a sum in float32 with `out`, in an order of its own, may be off.

    scaled_operand: the products are of operands of which one was rounded, and are rounded before they are added to out.
    """
    if not all(case.shape):
        return 0.0
    absolute = case._replace(gradient=case.gradient.abs(), input=case.input.abs(), weights=case.weights.abs())
    roundings = 4 * torch.finfo(torch.float32).eps
    if scaled_operand:
        roundings += torch.finfo(case.gradient.dtype).eps
    largest = truth_of(absolute).max()
    return roundings * (largest if out is None else largest + out.abs().max())


def transcribed(case):
    """As a user's own few lines of torch would: every step in the dtype of storage."""
    total = case.gradient.new_zeros(case.shape)
    for gradient, input, weight in zip(*case[:3], strict=True):
        gradient, input = (tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1]) for tensor in (gradient, input))
        total += weight.to(total.dtype) * (gradient.T @ input)
    return total
