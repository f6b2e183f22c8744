"""SSIUURegularizer on a GPU: the CPU's numbers, what it raises when, and no waiting for the device."""

import pytest
import torch
from steps import WEIGHT, gradients, step
from tiny import batch, log_probs_of, tiny_llama
from torch import nn

from ssiuu_fast import SSIUURegularizer

pytestmark = pytest.mark.gpu
STEPS = 3


def to_device(rows, device):
    return {name: tensor.to(device) for name, tensor in rows.items()}


def run(device, **options):
    """Gradients and R of a few steps on weights that don't depend on the device."""
    model = tiny_llama(torch.float32).to(device)
    regularizer = SSIUURegularizer(model, WEIGHT, **options)
    outcomes = []
    for seed in range(STEPS):
        model.zero_grad()
        penalty = step(model, regularizer, to_device(batch(seed=seed), device))
        outcomes.append((penalty, {name: g.cpu() for name, g in gradients(model).items()}))
        last = regularizer.last_step
        assert last.nonfinite == 0 and 0 < last.negative_share < 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    return outcomes


def assert_close_norms(ours, theirs, bound):
    for number, ((penalty, one), (cpu_penalty, other)) in enumerate(zip(ours, theirs, strict=True)):
        assert penalty == pytest.approx(cpu_penalty, rel=bound), f"R of step {number}"
        for name in other:
            error = (one[name] - other[name]).norm() / other[name].norm()
            assert error <= bound, f"step {number}, {name}: {error.item():.2e}"
    assert ours[-1][0] > 0


# a number on the edge between two stored ones may fall to either side, by another order of sums
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-3, "8bit": 5e-2}


@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
@pytest.mark.parametrize("state_dtype", BOUNDS, ids=str)
def test_parameters_as_on_the_cpu(device, state_dtype, backend):
    ours = run(device, state_dtype=state_dtype, backend=backend)
    assert_close_norms(ours, run("cpu", state_dtype=state_dtype), BOUNDS[state_dtype])


@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
def test_neurons_as_on_the_cpu(device, backend):
    ours = run(device, granularity="neuron", backend=backend)
    assert_close_norms(ours, run("cpu", granularity="neuron"), 1e-3)


def broken(weight, value):
    """log-probs whose gradient is `value` at the first element of weight."""

    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return (w * 0).sum().reshape(1) - 1

        @staticmethod
        def backward(ctx, gradient):
            out = torch.full_like(weight, 0.5)
            out[0] = value
            return out

    return Break.apply(weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_attributions_raise_when_they_are_next_looked_at(device, value):
    sound, weight = (nn.Parameter(torch.full((3,), -1.0, device=device)) for _ in range(2))

    def after_a_broken_step():
        regularizer = SSIUURegularizer([("sound", sound), ("broken", weight)], weight=1.0)
        regularizer.backward(broken(weight, 1.0) + 0 * sound.sum())
        # returns: nobody waited for the count
        regularizer.backward(broken(weight, value) + 0 * sound.sum())
        return regularizer

    with pytest.raises(FloatingPointError, match=r"non-finite attributions in broken \(1\)"):
        after_a_broken_step().backward(broken(weight, 1.0) + 0 * sound.sum())
    with pytest.raises(FloatingPointError, match=r"non-finite attributions in broken \(1\)"):
        _ = after_a_broken_step().last_step


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "8bit"], ids=str)
@pytest.mark.parametrize("nonfinite", ["count", "raise"])
def test_backward_does_not_wait_for_the_device(device, backend, state_dtype, nonfinite):
    model = tiny_llama(torch.float32).to(device)
    regularizer = SSIUURegularizer(model, WEIGHT, state_dtype=state_dtype, nonfinite=nonfinite, backend=backend)
    take_steps_without_waiting(model, regularizer, device)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("reference", ["previous", "initial"])
@pytest.mark.parametrize("nonfinite", ["count", "raise"])
def test_backward_of_neurons_does_not_wait_for_the_device(device, backend, reference, nonfinite):
    model = tiny_llama(torch.float32).to(device)
    regularizer = SSIUURegularizer(
        model, WEIGHT, granularity="neuron", reference=reference, nonfinite=nonfinite, backend=backend
    )
    if reference == "initial":
        # this pass may wait
        regularizer.set_reference(
            (log_probs_of(model, to_device(batch(seed=seed), device)), None, ids_of(seed)) for seed in range(5)
        )
    take_steps_without_waiting(model, regularizer, device)


@pytest.mark.filterwarnings("ignore:reference='initial'")
def test_samples_that_are_new_are_not_waited_for(device):
    model = tiny_llama(torch.float32).to(device)
    regularizer = SSIUURegularizer(model, WEIGHT, granularity="neuron", reference="initial", nonfinite="count")
    take_steps_without_waiting(model, regularizer, device, of=lambda number: number % 4)


def ids_of(seed):
    # on the CPU: the host has to know them
    return torch.arange(5) + 5 * seed


def take_steps_without_waiting(model, regularizer, device, of=lambda number: number):
    """of: number of a step → seed of its batch."""
    try:
        # the first two steps compile: without and with a reference
        for number in range(5):
            log_probs = log_probs_of(model, to_device(batch(seed=of(number)), device))
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
            regularizer.backward(log_probs, sample_ids=ids_of(of(number)))
            torch.cuda.set_sync_debug_mode("default")
            log_probs.sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert regularizer.last_step.penalty > 0
