"""Experts of a mixture, which transformers stacks into 3-D parameters: not left out without a word."""

import pytest
from neurons import neurons
from steps import WEIGHT, step
from tiny import batch, tiny_llama, tiny_mixtral
from torch import nn

from ssiuu_fast import SSIUURegularizer

EXPERTS = r"model\.layers\.\*\.mlp\.experts\.down_proj, model\.layers\.\*\.mlp\.experts\.gate_up_proj: these 4 param"


def test_left_out_with_a_warning_and_taken_in_by_its_remedy():
    model = tiny_mixtral()
    with pytest.warns(UserWarning, match=EXPERTS + r".*parameters=\['\*_proj\.weight', '\*experts\*'\]"):
        few = SSIUURegularizer(model)
    assert not any("experts" in name for name in few.parameter_names)
    regularizer = SSIUURegularizer(model, WEIGHT, parameters=["*_proj.weight", "*experts*"])
    assert set(few.parameter_names) < set(regularizer.parameter_names)
    assert "model.layers.1.mlp.experts.gate_up_proj" in regularizer.parameter_names
    for seed in range(2):
        step(model, regularizer, batch(seed=seed))
    assert regularizer.last_step.penalty > 0
    assert regularizer.last_step.absent == 0


def test_neurons_of_experts_are_not_possible():
    with pytest.warns(UserWarning, match=EXPERTS + r".*not possible, use granularity='parameter'.*'\*experts\*'"):
        neurons(tiny_mixtral())


@pytest.mark.parametrize("make", [SSIUURegularizer, neurons])
def test_not_said_where_there_is_no_need(make, recwarn):
    make(tiny_llama())
    make(tiny_mixtral(), parameters=["*_proj.weight"])
    # a convolution outside the blocks
    model = tiny_llama()
    model.patches = nn.Conv1d(2, 2, 2)
    make(model)
    assert not [warning for warning in recwarn if warning.category is UserWarning]


def test_frozen_experts_are_no_parameters_to_regularise(recwarn):
    model = tiny_mixtral()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    SSIUURegularizer(model)
    assert not [warning for warning in recwarn if warning.category is UserWarning]
