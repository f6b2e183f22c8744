"""SSIUURegularizer(granularity="neuron") against the penalty on neurons written out with plain autograd."""

import copy
import itertools
import warnings

import pytest
import torch
from plain_neurons import PlainNeurons
from steps import gradients, step
from tiny import batch, tiny_gpt2, tiny_llama

from ssiuu_fast import SSIUURegularizer

# with every=2 the second regularised step is the third
STEPS = 3
# λ at which the penalty is at least a tenth of the gradient
WEIGHTS = {"probability": 1e6, "log_probability": 1e-2, "mean_token_probability": 1e3}
OPTIONS = [
    {"target": target, "reference": reference, "one_sided": one_sided, "every": every}
    for target, reference, one_sided, every in itertools.product(
        WEIGHTS, ("previous", "initial"), (False, True), (1, 2)
    )
]


def descend(model, gradient, rate=0.5):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if gradient.get(name) is not None:
                p -= rate * gradient[name]


def assert_same(ours, truth, bound, what):
    assert ours.keys() == truth.keys()
    for name in truth:
        error = (ours[name] - truth[name]).abs().max() / truth[name].abs().max()
        assert error <= bound, f"{what}, {name}: {error:.2e}"


def ids_of(number, samples=5):
    """Ids of the rows of batch(seed=number): two batches take turns, so that samples come again."""
    return torch.arange(samples) + samples * (number % 2)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_gradient_is_that_of_the_transcription(options, dtype, bound, make):
    weight = WEIGHTS[options["target"]]
    model = make(dtype)
    truth = PlainNeurons(copy.deepcopy(model), weight, **options)
    regularizer = SSIUURegularizer(model, weight, granularity="neuron", **options)
    penalties = []
    for number in range(2 * STEPS if options["reference"] == "initial" else STEPS):
        rows, ids = batch(seed=number % 2), ids_of(number)
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            penalty = step(model, regularizer, rows, ids=ids)
        expected, expected_penalty = truth.step(rows, ids)
        assert_same(gradients(model), expected, bound, f"step {number}")
        assert penalty == pytest.approx(expected_penalty, rel=1e3 * bound)
        penalties.append(penalty)
        # the truth's step for both: what is compared is one step, not how errors grow
        descend(model, expected)
        descend(truth.model, expected)
    assert sum(penalties) > 0
