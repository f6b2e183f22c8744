"""What the operators allocate beside their tensors and results."""

import pytest
import torch

from ssiuu_fast import ops
from ssiuu_fast.ops import neuron_attribution, neuron_penalty, penalized_weight_gradient, penalty_

pytestmark = pytest.mark.gpu
BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"])
# bytes: table and partial sums, whatever the size of the model; Triton's has its chunks beside
WORKSPACE = {"cuda": 1_000_000, "triton": 8_000_000}
WORKSPACE_A_TENSOR = {"cuda": 128, "triton": 1024}
SHAPES = pytest.mark.parametrize("shape", [(16, 512, 8192), (1, 32_768, 1024)], ids=str)


def rise_of_peak(call):
    """Bytes by which allocated memory rose during the call over what was allocated before; results count."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    rise = torch.cuda.max_memory_allocated() - before
    del result
    return rise


def random_tensors(device, sizes):
    return [torch.randn(size, device=device).to(torch.bfloat16) for size in sizes]


@BACKENDS
@pytest.mark.parametrize("kind", ["bf16", "8bit"])
@pytest.mark.parametrize("sizes", [[20_000_003] * 15, [257] * 3000], ids=["large", "small"])
def test_penalty(device, backend, kind, sizes):
    gradients, parameters, references = (random_tensors(device, sizes) for _ in range(3))
    if kind == "8bit":
        references = [ops.Blockwise8.encode(reference) for reference in references]

    def call():
        return penalty_(gradients, parameters, references, weight=0.5, backend=backend)

    # what is compiled and loaded stays
    call()
    rise = rise_of_peak(call)
    allowed = WORKSPACE[backend] + WORKSPACE_A_TENSOR[backend] * len(sizes)
    assert rise <= allowed, f"{rise:,} bytes, allowed are {allowed:,}"


def neuron_inputs(device, shape):
    return torch.randn(2, *shape, device=device, dtype=torch.bfloat16)


@BACKENDS
@SHAPES
def test_neuron_attribution(device, backend, shape):
    hidden, gradient = neuron_inputs(device, shape)
    neuron_attribution(hidden, gradient, backend=backend)
    rise = rise_of_peak(lambda: neuron_attribution(hidden, gradient, backend=backend))
    results = 3 * 4 * shape[0] * shape[2]
    allowed = results + 0.01 * (hidden.nbytes + gradient.nbytes)
    assert rise <= allowed, f"{rise:,} bytes, allowed are {allowed:,.0f}"


@BACKENDS
@SHAPES
@pytest.mark.parametrize("per_sample", [False, True])
def test_neuron_penalty(device, backend, shape, per_sample):
    hidden, gradient = neuron_inputs(device, shape)
    reference = torch.randn((shape[0], shape[2]) if per_sample else shape[2:], device=device)

    def call():
        return neuron_penalty(hidden, gradient, reference, weight=0.5, per_sample=per_sample, backend=backend)

    call()
    rise = rise_of_peak(call)
    # not even a byte for each element of [batch, tokens, neurons]
    allowed = 0.1 * hidden.numel()
    assert rise <= allowed, f"{rise:,} bytes, allowed are {allowed:,.0f}"


def test_the_fused_kernel_keeps_no_second_gradient(device):
    gradient, input = (torch.randn(8, 128, size, device=device, dtype=torch.bfloat16) for size in (4096, 2048))
    parameter, reference = torch.randn(2, 4096, 2048, device=device, dtype=torch.bfloat16)
    weights = torch.rand(8, device=device)

    def call():
        return penalized_weight_gradient(gradient, input, weights, parameter, reference, weight=0.5, backend="triton")

    call()
    rise = rise_of_peak(call)
    # the result, and partial sums
    allowed = parameter.nbytes + 1_000_000
    assert rise <= allowed, f"{rise:,} bytes, allowed are {allowed:,}"
