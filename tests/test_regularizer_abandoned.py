"""Steps that are given up, losses that are sent back late or never, and other passes over the same graph."""

import copy

import pytest
import torch
from neurons import IDS, move, neurons, two_steps
from steps import assert_close, gradients, step
from tiny import batch, log_probs_of, part, tiny_llama
from torch import nn

from ssiuu_fast import SSIUURegularizer, answer_token_counts


@pytest.fixture
def no_warning(recwarn):
    yield
    assert [str(warning.message) for warning in recwarn if warning.category is UserWarning] == []


@pytest.mark.parametrize("granularity", ["parameter", "neuron"])
def test_a_step_that_is_given_up_leaves_nothing(granularity, no_warning):
    ends = []
    for abandon in (False, True):
        model = tiny_llama()
        regularizer = SSIUURegularizer(model, 1e6, granularity=granularity, reference="initial")
        item = (log_probs_of(model, batch()), None, IDS) if granularity == "neuron" else log_probs_of(model, batch())
        regularizer.set_reference([item])
        move(model)
        if abandon:
            log_probs = log_probs_of(model, part(batch(), 0, 2))
            regularizer.backward(log_probs, last=False, sample_ids=IDS[:2])
            # the person's own error here, caught further out
            with pytest.raises(RuntimeError, match=r"abandon_step\(\) first if it was given up"):
                regularizer.state_dict()
            regularizer.abandon_step()
            regularizer.state_dict()
            plain = copy.deepcopy(model)
            log_probs.sum().backward()
            log_probs_of(plain, part(batch(), 0, 2)).sum().backward()
            assert_close(gradients(model), gradients(plain), bound=0)
            model.zero_grad()
        penalty = step(model, regularizer, batch(), ids=IDS)
        ends.append((penalty, gradients(model)))
    assert ends[0][0] == ends[1][0] > 0
    assert_close(ends[1][1], ends[0][1], bound=0)


def test_after_backward_is_not_waited_for_in_a_step_that_is_given_up():
    model = tiny_llama()
    for make in (SSIUURegularizer, neurons):
        regularizer = make(model, relative_weight=3.0)
        step(model, regularizer, batch())
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"after_backward\(\) was not called .*abandon_step\(\)"):
                step(model, regularizer, batch())
        regularizer.abandon_step()
        step(model, regularizer, batch())


class Breaks(nn.Module):
    """log P = Σ h of one linear layer; the gradient at h is multiplied by `factor`."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 3, bias=False)])
        nn.init.constant_(self.layers[0].weight, -1.0)
        self.factor = 1.0

    def forward(self):
        h = self.layers[0](torch.ones(1, 1, 1))
        h.register_hook(lambda g: g * self.factor)
        return h.sum().reshape(1)


def test_a_step_skipped_because_its_call_raised_has_lost_nothing(no_warning):
    model = Breaks()
    regularizer = neurons(model)
    for factor in (1.0, float("nan"), 2.0):
        model.factor = factor
        log_probs = model()
        if factor == factor:
            regularizer.backward(log_probs)
            log_probs.sum().backward()
        else:
            with pytest.raises(FloatingPointError):
                regularizer.backward(log_probs)


def test_losses_of_micro_batches_may_be_sent_back_together(no_warning):
    whole, summed = tiny_llama(), tiny_llama()
    ends = []
    for model in (whole, summed):
        regularizer = neurons(model, reference="initial")
        rows = batch()
        regularizer.set_reference([(log_probs_of(model, rows), None, IDS)])
        for _ in range(2):
            move(model)
            if model is whole:
                step(model, regularizer, rows, ids=IDS)
                continue
            loss = 0.0
            for start, stop in ((0, 2), (2, 5)):
                log_probs = log_probs_of(model, part(rows, start, stop))
                regularizer.backward(log_probs, last=stop == 5, sample_ids=IDS[start:stop])
                loss = loss + log_probs.sum()
            (loss / answer_token_counts(rows["labels"]).sum()).backward()
        ends.append(gradients(model))
        regularizer.state_dict()
    assert_close(ends[1], ends[0])


@pytest.mark.filterwarnings("ignore:reference='initial'")
def test_a_lost_penalty_is_found_at_the_end_of_the_step():
    model = tiny_llama()
    regularizer = neurons(model, reference="initial")
    step(model, regularizer, batch(), ids=IDS)
    move(model)
    for number in range(2):
        log_probs = log_probs_of(model, part(batch(), 2 * number, 2 * number + 2))
        regularizer.backward(log_probs, last=number == 1, sample_ids=IDS[2 * number : 2 * number + 2])
        if number:
            log_probs.sum().backward()
    # of the first micro-batch's loss nothing was sent back
    with pytest.warns(UserWarning, match="at 14 modules the penalty of the last backward.* was never added"):
        regularizer.state_dict()


def test_other_regularisers_may_look_at_the_graph_in_between(no_warning):
    expected, _ = two_steps(model := tiny_llama(), neurons(model))
    both = tiny_llama()
    first, second, third = neurons(both), neurons(both, 0.0), SSIUURegularizer(both, 0.0)
    for seed in range(2):
        log_probs = log_probs_of(both, batch(seed=seed))
        for regularizer in (first, second, third):
            regularizer.backward(log_probs)
        (log_probs.sum() / answer_token_counts(batch(seed=seed)["labels"]).sum()).backward()
        if not seed:
            move(both)
    assert second.last_step.penalty > 0
    assert third.last_step.penalty > 0
    assert_close(gradients(both), expected)


def test_a_regulariser_that_calibrates_leaves_anothers_penalty_alone(no_warning):
    alone = tiny_llama()
    both = tiny_llama()
    expected, _ = two_steps(alone, neurons(alone))
    first, second = neurons(both), neurons(both, relative_weight=3.0)
    for seed in range(2):
        log_probs = log_probs_of(both, batch(seed=seed))
        first.backward(log_probs)
        second.backward(log_probs)
        (log_probs.sum() / answer_token_counts(batch(seed=seed)["labels"]).sum()).backward()
        second.after_backward()
        if not seed:
            move(both)
    assert second.last_step.penalty_gradient_norm > 0
    assert_close(gradients(both), expected)
