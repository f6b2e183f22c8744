"""SSIUURegularizer with references in few bits: what it saves, and when it warns that they can't tell."""

import copy
import json
import warnings

import pytest
import torch
from steps import WEIGHT, assert_close, gradients, step
from tiny import batch, log_probs_of, part, tiny_llama
from torch import nn

from ssiuu_fast import SSIUURegularizer
from ssiuu_fast.change import STEPS_TOO_LITTLE
from ssiuu_fast.ops import Blockwise8

WARNING = "compares rounding errors"


@pytest.mark.parametrize("reference", ["previous", "initial"])
@pytest.mark.filterwarnings("ignore:reference='initial'")
def test_state_round_trip(reference, tmp_path):
    model = tiny_llama(torch.float32)
    options = {"weight": WEIGHT, "reference": reference, "state_dtype": "8bit"}
    whole = SSIUURegularizer(model, **options)
    for seed in range(2):
        step(model, whole, batch(seed=seed))
    state = whole.state_dict()
    # flat tensors, and what JSON can hold
    assert set(state["references"]) == {f"{n}.{part}" for n in whole.parameter_names for part in ("codes", "absmax")}
    json.dumps({name: value for name, value in state.items() if name != "references"})
    torch.save(state, tmp_path / "state.pt")
    other_model = copy.deepcopy(model)
    other_model.zero_grad()
    model.zero_grad()
    resumed = SSIUURegularizer(other_model, **options)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in range(2, 4):
        assert step(model, whole, batch(seed=seed)) == step(other_model, resumed, batch(seed=seed))
    assert_close(gradients(other_model), gradients(model), bound=0)


def test_a_state_of_another_dtype_is_refused_by_name_and_changes_nothing():
    model = tiny_llama(torch.float32)
    saved = SSIUURegularizer(model, state_dtype="8bit")
    step(model, saved, batch())
    for state_dtype, name in ((torch.bfloat16, "'bfloat16'"), (torch.float32, "'float32'"), (None, "None")):
        other = SSIUURegularizer(model, state_dtype=state_dtype)
        with pytest.raises(ValueError, match=f"state_dtype='8bit', this regulariser state_dtype={name}"):
            other.load_state_dict(saved.state_dict())
        assert other.state_dict()["references"] is None


def test_the_initial_reference_is_summed_in_fp32_and_scaled_by_its_absmax():
    model = tiny_llama(torch.float32)
    rows = batch(samples=8)
    options = {"weight": WEIGHT, "reference": "initial"}
    stored = {}
    for state_dtype in (torch.float32, "8bit"):
        regularizer = SSIUURegularizer(model, state_dtype=state_dtype, **options)
        regularizer.set_reference(log_probs_of(model, part(rows, i, i + 2)) for i in range(0, 8, 2))
        # the mean until the size of a step is known, then its sum
        before = regularizer.state_dict()["references"]
        step(model, regularizer, part(rows, 0, 4))
        stored[state_dtype] = (before, regularizer.state_dict()["references"])
    for name in regularizer.parameter_names:
        for exact, flat in zip(stored[torch.float32], stored["8bit"], strict=True):
            encoded = Blockwise8.encode(exact[name])
            assert torch.equal(encoded.codes, flat[f"{name}.codes"])
            assert torch.equal(encoded.absmax, flat[f"{name}.absmax"])


def test_a_parameter_outside_the_graph_has_an_attribution_of_zero():
    used, unused = nn.Parameter(torch.full((3,), -1.0)), nn.Parameter(torch.full((300,), -1.0))
    regularizer = SSIUURegularizer([("used", used), ("unused", unused)], state_dtype="8bit")
    regularizer.backward((used.sum() + unused.sum() / 300).reshape(1))
    assert regularizer.state_dict()["references"]["unused.absmax"].all()
    regularizer.backward(used.sum().reshape(1))
    assert not regularizer.state_dict()["references"]["unused.absmax"].any()
    assert not regularizer.state_dict()["references"]["unused.codes"].any()


def test_the_relative_change_by_hand():
    weights = nn.Parameter(torch.tensor([1.0, -2.0, 4.0, 0.0]))
    regularizer = SSIUURegularizer([("w", weights)], state_dtype=torch.bfloat16)
    assert regularizer.backward((weights.sum() - 3).reshape(1)).item() == 0
    # nothing to compare with yet
    assert regularizer.last_step.relative_change is None
    # g = P = 1 again; A = (2, −2, 3, 0) after (1, −2, 4, 0): changes 1/2, 0, 1/3, and 0/0, which doesn't count
    weights.data = torch.tensor([2.0, -2.0, 3.0, 0.0])
    regularizer.backward((weights.sum() - 3).reshape(1))
    assert regularizer.last_step.relative_change == pytest.approx(1 / 3)
    # P = 0: there is no attribution at all
    regularizer.backward((weights.sum() - 1000).reshape(1))
    assert regularizer.last_step.relative_change is None


@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_the_change_is_not_measured_where_there_are_bits_enough(state_dtype):
    model = tiny_llama(torch.float32)
    regularizer = SSIUURegularizer(model, state_dtype=state_dtype)
    for seed in range(2):
        step(model, regularizer, batch(seed=seed))
    assert regularizer.last_step.relative_change is None


def test_the_change_does_not_depend_on_scale_or_micro_batches():
    changes = []
    for how in ({}, {"scale": 1024.0}, {"micro_batches": 2}):
        model = tiny_llama(torch.float32)
        regularizer = SSIUURegularizer(model, state_dtype="8bit")
        for seed in range(2):
            step(model, regularizer, batch(seed=seed), **how)
        changes.append(regularizer.last_step.relative_change)
    assert changes == pytest.approx([changes[0]] * 3, rel=1e-3)


def warnings_of(state_dtype, batches, rate, steps=12):
    """What a run of plain gradient descent on the forget loss says, and the changes that it logged."""
    model = tiny_llama(torch.float32)
    regularizer = SSIUURegularizer(model, weight=0.0, state_dtype=state_dtype)
    changes = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number in range(steps):
            model.zero_grad()
            step(model, regularizer, batch(seed=number % batches))
            changes.append(regularizer.last_step.relative_change)
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=rate)
    return [str(w.message) for w in said if WARNING in str(w.message)], changes[1:]


def test_warns_once_where_the_forget_set_is_one_batch_and_the_learning_rate_small():
    said, changes = warnings_of("8bit", batches=1, rate=1e-3)
    assert max(changes) < 0.13
    assert len(said) == 1
    assert "state_dtype=torch.float32" in said[0] and "off by 1.3%" in said[0]


def test_sixteen_bits_can_tell_changes_that_eight_cannot():
    said, changes = warnings_of(torch.bfloat16, batches=1, rate=1e-3)
    assert 0.02 < min(changes) < max(changes) < 0.13
    assert said == []
    said, changes = warnings_of(torch.bfloat16, batches=1, rate=1e-4)
    assert max(changes) < 0.02
    assert len(said) == 1 and "off by 0.2%" in said[0]


def test_is_silent_where_every_step_has_a_new_batch():
    for state_dtype in ("8bit", torch.bfloat16):
        said, changes = warnings_of(state_dtype, batches=100, rate=1e-3)
        assert min(changes) > 0.13
        assert said == []


def test_is_silent_where_only_a_step_or_two_change_little():
    said, changes = warnings_of("8bit", batches=1, rate=1e-3, steps=STEPS_TOO_LITTLE)
    assert len([change for change in changes if change < 0.13]) == STEPS_TOO_LITTLE - 1
    assert said == []
