"""Cases of neuron_attribution and neuron_penalty that every backend is held to, and how results are compared.

Where Triton is interpreted (test_neuron_triton.py starts such a process) its kernels are what is tested, else those of
the CPU.
"""

import os
from itertools import product
from typing import NamedTuple

import torch

from ssiuu_fast.ops import NeuronAttribution, neuron_attribution, neuron_penalty

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL = "triton" if INTERPRETED else "cpp"
BACKENDS = [KERNEL] if INTERPRETED else [KERNEL, "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16] + ([] if INTERPRETED else [torch.float64])
# [batch, tokens, neurons]: nothing at all, single elements, primes, more than a tile, no token
SHAPES = [(1, 1, 1), (3, 17, 1), (2, 5, 513), (3, 0, 4), (0, 3, 4), (2, 3, 0), (4, 33, 67), (5, 2, 259), (1, 90, 1031)]


class Case(NamedTuple):
    """Arguments of a neuron_penalty call; the first two and the mask are also those of neuron_attribution."""

    hidden: torch.Tensor
    gradient: torch.Tensor
    reference: torch.Tensor | None
    mask: torch.Tensor | None
    options: dict

    def run(self, backend, double=False):
        """Its result on copies that keep the strides; double: the same numbers in float64."""
        hidden, gradient, reference = self.hidden, copy_strided(self.gradient), self.reference
        if double:
            hidden, gradient = hidden.double(), gradient.double()
            reference = reference if reference is None else reference.double()
        return neuron_penalty(hidden, gradient, reference, self.mask, backend=backend, **self.options)

    def attribution(self, backend) -> NeuronAttribution:
        return neuron_attribution(self.hidden, self.gradient, self.mask, backend=backend)


def copy_strided(tensor):
    """A copy with the same strides, in a memory of NaN."""
    extent = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size)
    memory = torch.full((extent,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def strided(shape, dtype, generator):
    """Token-major, one element into a memory with room between its rows."""
    batch, tokens, neurons = shape
    memory = torch.randn(tokens, batch, neurons + 3, generator=generator).to(dtype)
    return memory.transpose(0, 1)[..., 1 : neurons + 1]


def expanded(shape, dtype, generator):
    """One row that serves every sample and token."""
    return torch.randn(shape[2], generator=generator).to(dtype).expand(shape)


def contiguous(shape, dtype, generator):
    return torch.randn(shape, generator=generator).to(dtype)


# The interpreter is slow: each seventeenth case still meets nearly every two settings together.
EVERY = 17 if INTERPRETED else 1


def cases(dtypes=DTYPES, shapes=SHAPES, every=EVERY):
    """(name, Case): dtype × shape × seed × grain × mask × option, the memory layouts in turn; each `every`-th."""
    return list(_cases(dtypes, shapes))[::every]


def _cases(dtypes, shapes):
    layouts = [(contiguous, contiguous), (strided, contiguous), (contiguous, strided), (expanded, strided)]
    grid = product(dtypes, shapes, (0, 1), (True, False), (True, False), ("two-sided", "one-sided", "no reference"))
    for number, (dtype, shape, seed, per_sample, masked, option) in enumerate(grid):
        generator = torch.Generator().manual_seed(seed)
        of_hidden, of_gradient = layouts[number % len(layouts)]
        hidden, gradient = of_hidden(shape, dtype, generator), of_gradient(shape, dtype, generator)
        mask = None
        if masked:
            mask = torch.rand(shape[:2], generator=generator) < 0.7
            # no token at all of the first sample
            mask[:1] = False
        reference = None
        if option != "no reference":
            sums_shape = (shape[0], shape[2]) if per_sample else shape[2:]
            of_sums = torch.float64 if dtype == torch.float64 else torch.float32
            reference = torch.randn(sums_shape, generator=generator, dtype=of_sums) * max(1, shape[1]) ** 0.5
        options = {"weight": 0.3, "per_sample": per_sample, "one_sided": option == "one-sided"}
        names = (dtype, shape, seed, "sample" if per_sample else "batch", "masked" if masked else "all", option)
        layout = f"{of_hidden.__name__}/{of_gradient.__name__}"
        yield f"{', '.join(map(str, names))}, {layout}", Case(hidden, gradient, reference, mask, options)


def filled(case, hidden, gradient):
    """The case with these numbers wherever a token doesn't count; it must have a mask."""
    left_out = (case.mask == 0).unsqueeze(-1)
    return case._replace(
        hidden=case.hidden.masked_fill(left_out, hidden), gradient=case.gradient.masked_fill(left_out, gradient)
    )


def assert_within(kernel, plain, truth, additions, name):
    """Kernel and plain torch against the truth in float64: no further off than torch and one rounding."""
    for field in ("injection", "attribution", "penalty"):
        mine, transcribed, exact = (getattr(result, field).double() for result in (kernel, plain, truth))
        if exact.numel() == 0:
            continue
        error = (mine - exact).abs()
        # where the truth is fp64 itself, sums of it differ by their order; d² doubles an error, d itself keeps it
        roundings = 4 * additions if getattr(plain, field).dtype == torch.float64 else 1
        rounding = roundings * torch.finfo(getattr(plain, field).dtype).eps * exact.abs().max()
        bound = (transcribed - exact).abs().max() + rounding
        worst = error.argmax()
        assert error.max() <= bound, f"{name}: {field}, worst at {worst.item()}: {mine.flatten()[worst]}"


def assert_alike(kernel, plain, name):
    """A within one unit of the last place; where it is the same, the injection is the same to the last bit."""
    # the interpreter truncates to bfloat16 instead of rounding
    units = 1 if INTERPRETED and plain.injection.dtype == torch.bfloat16 else 0
    torch.testing.assert_close(kernel.attribution, plain.attribution, rtol=2e-7, atol=1e-35, equal_nan=True, msg=name)
    assert kernel.injection.shape == plain.injection.shape and kernel.injection.dtype == plain.injection.dtype
    same = (kernel.attribution == plain.attribution) | plain.attribution.isnan()
    # sums in float64 hardly ever round to different float32 numbers
    assert same.numel() < 100 or same.double().mean() > 0.99 or plain.attribution.dtype == torch.float64, name
    rows = same.unsqueeze(1) if same.dim() == 2 else same
    mine, expected = (result.injection.masked_fill(~rows, 0) for result in (kernel, plain))
    torch.testing.assert_close(
        mine, expected, rtol=units * torch.finfo(mine.dtype).eps, atol=0, equal_nan=True, msg=name
    )
    torch.testing.assert_close(kernel.penalty, plain.penalty, rtol=1e-6, atol=0, msg=name)
    assert kernel.negative == plain.negative, name
