"""Every warning of SSIUURegularizer points at the line of the person who called it."""

import warnings

import pytest
import torch
from neurons import IDS, neurons
from steps import WEIGHT, step
from tiny import batch, log_probs_of, tiny_llama

from ssiuu_fast import SSIUURegularizer


def call(model, regularizer, rows, ids=None):
    """A step whose line in this file is the one to blame."""
    log_probs = log_probs_of(model, rows)
    regularizer.backward(log_probs, sample_ids=ids)
    log_probs.sum().backward()


def another_size(model, regularizer):
    call(model, regularizer, batch(samples=5))
    call(model, regularizer, batch(samples=3))


def no_set_reference(model, regularizer):
    call(model, regularizer, batch(), IDS)


def rounding_errors(model, regularizer):
    for _ in range(5):
        call(model, regularizer, batch())


def small_share(model, regularizer):
    for _ in range(10):
        call(model, regularizer, batch())
        regularizer.penalty_share(1.0)


def lost_penalty(model, regularizer):
    step(model, regularizer, batch())
    for _ in range(2):
        regularizer.backward(log_probs_of(model, batch(seed=1)))


@pytest.mark.parametrize(
    ("make", "options", "act", "message"),
    [
        (SSIUURegularizer, {"weight": WEIGHT}, another_size, "3 forget samples"),
        (neurons, {}, another_size, "3 forget samples"),
        (SSIUURegularizer, {"reference": "initial"}, no_set_reference, "without set_reference"),
        (neurons, {"reference": "initial"}, no_set_reference, "without set_reference"),
        (SSIUURegularizer, {"state_dtype": "8bit"}, rounding_errors, "compares rounding errors"),
        (SSIUURegularizer, {"weight": 1e-9}, small_share, "too little to matter"),
        (neurons, {}, lost_penalty, "never added"),
    ],
)
def test_warnings_name_the_line_of_the_caller(make, options, act, message):
    model = tiny_llama(torch.float32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        regularizer = make(model, **options)
        act(model, regularizer)
    assert message in "".join(str(warning.message) for warning in said)
    assert {warning.filename for warning in said} == {__file__}
