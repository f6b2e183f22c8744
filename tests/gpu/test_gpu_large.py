"""Tensors of more than 2^31 elements, everywhere in them, and thousands of tensors in one call."""

import pytest
import torch
from neuron_grid import whole_numbers
from penalty_cases import SINGLE
from penalty_grid import MIXED, OPTIONS, assert_equal, case_of, check, covering

from ssiuu_fast import ops
from ssiuu_fast.ops import neuron_attribution, neuron_penalty, penalized_weight_gradient, penalty_

pytestmark = pytest.mark.gpu
BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"])
GIGABYTE = 10**9
# past 2^31 elements and 2^32 bytes of bf16; 2^31 bytes lie at half of it
ELEMENTS = 2**31 + 4099
# compared slice by slice; a multiple of the 256 elements of a block of 8 bits
SLICE = 2**27
# 3 · 87,382 · 8192 > 2^31
SHAPE = (3, 87_382, 8192)
# 65,537 · 32,784 > 2^31; rows compared at a time
MATRIX, ROWS = (65_537, 32_784), 8192


@pytest.fixture(autouse=True)
def free_memory():
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def skip_unless_free(gigabytes):
    free = torch.cuda.mem_get_info()[0] / GIGABYTE
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free:.0f} GB are free")


def fill(tensor, role, begin):
    """Random numbers that depend on the role of the tensor and the place of the slice alone."""
    generator = torch.Generator(tensor.device).manual_seed(10 * begin + role)
    return tensor.normal_(generator=generator)


def slices():
    return [slice(begin, min(begin + SLICE, ELEMENTS)) for begin in range(0, ELEMENTS, SLICE)]


def random_inputs(device, kind):
    gradient, parameter = (torch.empty(ELEMENTS, dtype=torch.bfloat16, device=device) for _ in range(2))
    reference = torch.empty_like(gradient) if kind == "bf16" else ops.Blockwise8.empty_like(gradient)
    for span in slices():
        values = fill_slice(device, span, kind)
        gradient[span], parameter[span] = values[:2]
        if kind == "bf16":
            reference[span] = values[2]
        else:
            reference.codes[span] = values[2].codes
            reference.absmax[span.start // 256 : -(-span.stop // 256)] = values[2].absmax
    return gradient, parameter, reference


def fill_slice(device, span, kind):
    empty = torch.empty(span.stop - span.start, dtype=torch.bfloat16, device=device)
    gradient, parameter, reference = (fill(empty.clone(), role, span.start) for role in range(3))
    return gradient, parameter, reference if kind == "bf16" else ops.Blockwise8.encode(reference)


@BACKENDS
@pytest.mark.parametrize("kind", ["bf16", "8bit"])
def test_penalty_of_more_than_2_to_the_31_elements(device, backend, kind):
    skip_unless_free(32)
    gradient, parameter, reference = random_inputs(device, kind)
    counts = torch.full((1,), -1, device=device)
    result = penalty_([gradient], [parameter], [reference], weight=0.5, nonfinite_counts=counts, backend=backend)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for span in slices():
        plain_gradient, plain_parameter, plain_reference = fill_slice(device, span, kind)
        plain = penalty_([plain_gradient], [plain_parameter], [plain_reference], weight=0.5, backend="reference")
        sums += torch.stack([x.double() for x in plain])
        what = f"from element {span.start} on"
        assert_equal(gradient[span], plain_gradient, f"value {what}")
        assert_equal(parameter[span], plain_parameter, f"parameter, which is only read, {what}")
        if kind == "bf16":
            assert_equal(reference[span], plain_reference, f"reference {what}")
        else:
            blocks = slice(span.start // 256, -(-span.stop // 256))
            assert_equal(reference.codes[span], plain_reference.codes, f"codes {what}")
            assert_equal(reference.absmax[blocks], plain_reference.absmax, f"absmax {what}")
    torch.testing.assert_close(torch.stack([x.double() for x in result]), sums, rtol=1e-6, atol=0)
    assert counts.item() == 0


def plane(device, sample):
    """[tokens, neurons] of one sample."""
    return whole_numbers(SHAPE[1:], torch.bfloat16, device, torch.Generator(device).manual_seed(sample))


def neuron_inputs(device):
    hidden, gradient = (torch.empty(SHAPE, dtype=torch.bfloat16, device=device) for _ in range(2))
    for sample in range(SHAPE[0]):
        hidden[sample] = plane(device, sample)
        gradient[sample] = plane(device, 100 + sample)
    return hidden, gradient


@BACKENDS
def test_neuron_attribution_of_more_than_2_to_the_31_elements(device, backend):
    skip_unless_free(32)
    hidden, gradient = neuron_inputs(device)
    result = neuron_attribution(hidden, gradient, backend=backend)
    for neurons in torch.arange(SHAPE[2], device=device).split(512):
        span = slice(neurons[0].item(), neurons[-1].item() + 1)
        plain = neuron_attribution(hidden[..., span], gradient[..., span], backend="reference")
        for mine, theirs, name in zip(result, plain, ("max", "min", "sum"), strict=True):
            assert torch.equal(mine[:, span], theirs), f"{name} of neurons {span.start} to {span.stop}"


@BACKENDS
def test_neuron_penalty_of_more_than_2_to_the_31_elements(device, backend):
    skip_unless_free(48)
    hidden, gradient = neuron_inputs(device)
    reference = torch.full((SHAPE[0], SHAPE[2]), 5.0, device=device)
    result = neuron_penalty(hidden, gradient, reference, weight=0.5, per_sample=True, backend=backend)
    penalty = torch.zeros((), dtype=torch.float64, device=device)
    for sample in range(SHAPE[0]):
        plain_gradient = plane(device, 100 + sample)
        for begin in range(0, SHAPE[2], 512):
            span = slice(begin, begin + 512)
            plain = neuron_penalty(
                hidden[sample : sample + 1, :, span],
                plain_gradient[None, :, span],
                reference[sample : sample + 1, span].contiguous(),
                weight=0.5,
                per_sample=True,
                backend="reference",
            )
            what = f"sample {sample}, neurons {begin} to {begin + 512}"
            assert torch.equal(result.attribution[sample, span], plain.attribution[0]), f"attribution of {what}"
            assert torch.equal(gradient[sample, :, span], plain.injection[0]), f"injection of {what}"
            penalty += plain.penalty
    torch.testing.assert_close(result.penalty, penalty, rtol=1e-6, atol=0)


def module_inputs(device, batch, tokens, outputs, inputs):
    """Whole numbers: gradient, input and weights of a linear module."""
    generator = torch.Generator(device).manual_seed(0)
    gradient, input = (
        whole_numbers((batch, tokens, size), torch.bfloat16, device, generator) for size in (outputs, inputs)
    )
    return gradient, input, torch.arange(batch, dtype=torch.float32, device=device) - 1


def compare_rows(result, plain, reference, plain_reference, what):
    assert_equal(result, plain, f"gradient of {what}")
    assert_equal(reference, plain_reference, f"reference of {what}")


@pytest.mark.parametrize("backend", ["triton"])
def test_weight_gradients_of_operands_of_more_than_2_to_the_31_elements(device, backend):
    skip_unless_free(16)
    last = 37
    gradient = torch.zeros(SHAPE, dtype=torch.bfloat16, device=device)
    few, input, weights = module_inputs(device, SHAPE[0], last, SHAPE[2], 16)
    gradient[:, -last:] = few
    whole = torch.full((*SHAPE[:2], 16), 5, dtype=torch.bfloat16, device=device)
    whole[:, -last:] = input
    parameter, reference = torch.randn(2, SHAPE[2], 16, device=device).round()
    stored, plain_stored = reference.clone(), reference.clone()
    mine = penalized_weight_gradient(gradient, whole, weights, parameter, stored, weight=0.5, backend=backend)
    plain = penalized_weight_gradient(few, input, weights, parameter, plain_stored, weight=0.5, backend="reference")
    compare_rows(mine.gradient, plain.gradient, stored, plain_stored, "the last tokens of each sample")
    torch.testing.assert_close(mine.penalty, plain.penalty, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["triton"])
def test_weight_gradients_of_more_than_2_to_the_31_elements(device, backend):
    skip_unless_free(32)
    gradient, input, weights = module_inputs(device, 2, 5, *MATRIX)
    generator = torch.Generator(device).manual_seed(1)
    parameter, reference = (whole_numbers(MATRIX, torch.bfloat16, device, generator) for _ in range(2))
    stored = reference.clone()
    mine = penalized_weight_gradient(gradient, input, weights, parameter, stored, weight=0.5, backend=backend)
    penalty = torch.zeros((), dtype=torch.float64, device=device)
    for begin in range(0, MATRIX[0], ROWS):
        span = slice(begin, min(begin + ROWS, MATRIX[0]))
        plain_stored = reference[span].clone()
        plain = penalized_weight_gradient(
            gradient[..., span], input, weights, parameter[span], plain_stored, weight=0.5, backend="reference"
        )
        compare_rows(mine.gradient[span], plain.gradient, stored[span], plain_stored, f"rows from {begin} on")
        penalty += plain.penalty
    torch.testing.assert_close(mine.penalty, penalty, rtol=1e-12, atol=0)


@BACKENDS
def test_3000_small_tensors_of_mixed_dtypes(device, backend):
    combinations = [(SINGLE[i % 3], SINGLE[i % 2], (*SINGLE, "8bit")[i % 4], None) for i in range(12)]
    combinations = combinations if backend == "cuda" else 2 * covering(2)
    sizes = [int(size) for size in torch.randint(4097, (997,), generator=torch.Generator().manual_seed(0))]
    check(case_of(combinations * 250, OPTIONS[2], 0, sizes=sizes), device, backend, MIXED, "3000 tensors")
