"""What one backward pass can't do takes two, with the same numbers, and says why."""

import pytest
import torch
from one_pass import MODELS, close
from steps import WEIGHT, assert_close, gradients
from tiny import batch, log_probs_of, tiny_llama, tiny_mixtral
from torch import nn

from ssiuu_fast import SSIUURegularizer, sequence_log_probs


def hidden_loss(model, rows):
    output = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], output_hidden_states=True)
    log_probs = sequence_log_probs(output.logits, rows["labels"])
    return log_probs, output.hidden_states[1].square().mean()


def own_log_probs(model, rows):
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1]
    steps = logits.log_softmax(-1).gather(-1, rows["labels"][:, 1:, None].clamp(min=0)).squeeze(-1)
    log_probs = steps.masked_fill(rows["labels"][:, 1:] == -100, 0.0).sum(1)
    return log_probs, log_probs.sum()


def part_of_the_loss(model, rows):
    log_probs = log_probs_of(model, rows)
    return log_probs, log_probs[1:].sum()


def also_elsewhere(model, rows):
    log_probs = log_probs_of(model, rows)
    return log_probs, log_probs.sum() + log_probs_of(model, batch(seed=9)).sum()


def weight_decay(model, rows):
    log_probs = log_probs_of(model, rows)
    return log_probs, log_probs.sum() + model.model.layers[0].mlp.down_proj.weight.square().sum()


def masked_gradient(model, rows):
    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: gradient.tril())
    log_probs = log_probs_of(model, rows)
    return log_probs, (log_probs * torch.arange(1, 6)).sum()


def watched_grad(model, rows):
    weight = model.model.layers[0].mlp.up_proj.weight
    if not weight._post_accumulate_grad_hooks:
        weight.register_post_accumulate_grad_hook(lambda parameter: None)
    log_probs = log_probs_of(model, rows)
    return log_probs, (log_probs * torch.arange(1, 6)).sum()


def hooked_output(model, rows):
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, inputs, output: output * 2, prepend=True
    )
    log_probs = log_probs_of(model, rows)
    handle.remove()
    return log_probs, (log_probs * torch.arange(1, 6)).sum()


def another_weight(model, rows):
    """The weight reaches its module by another way than its own."""
    name = "model.layers.0.mlp.up_proj.weight"
    halved = {name: model.get_parameter(name) * 0.5}
    output = torch.func.functional_call(model, halved, (), {k: rows[k] for k in ("input_ids", "attention_mask")})
    log_probs = sequence_log_probs(output.logits, rows["labels"])
    return log_probs, (log_probs * torch.arange(1, 6)).sum()


def sorted_rows(model, rows):
    order = torch.tensor([3, 1, 4, 0, 2])
    logits = model(input_ids=rows["input_ids"][order], attention_mask=rows["attention_mask"][order]).logits
    log_probs = sequence_log_probs(logits[order.argsort()], rows["labels"])
    return log_probs, (log_probs * torch.arange(1, 6)).sum()


def faint(model, rows):
    log_probs = log_probs_of(model, rows)
    return log_probs, 1e-33 * (log_probs * torch.arange(1, 6)).sum()


# a loop, and what it is told
REASONS = [
    (hidden_loss, "the loss depends on the model by other ways than log_probs"),
    (own_log_probs, "come from 0 calls of sequence_log_probs"),
    (part_of_the_loss, "row 0 has a part in the target and none in the loss"),
    (also_elsewhere, "the loss depends on the model by other ways than log_probs"),
    (weight_decay, "the loss depends on the model by other ways than log_probs"),
    (masked_gradient, "a hook on model.layers.0.mlp.up_proj.weight may change its gradient"),
    (watched_grad, "a hook on model.layers.0.mlp.up_proj.weight may change its gradient"),
    (hooked_output, "up_proj.weight is not, or not only"),
    (another_weight, "up_proj.weight is not, or not only"),
    (sorted_rows, "the model's output was put in another order (IndexBackward0)"),
    (faint, "row 0 has a part in the target and none in the loss"),
]


@pytest.mark.parametrize(("loop", "reason"), REASONS, ids=[loop.__name__ for loop, _ in REASONS])
def test_what_one_pass_cannot_do_takes_two(loop, reason, caplog):
    found = []
    for one in (False, True):
        model = MODELS["llama"]()
        regularizer = SSIUURegularizer(model, weight=WEIGHT)
        for seed in range(2):
            model.zero_grad()
            log_probs, loss = loop(model, batch(seed=seed))
            if one:
                with caplog.at_level("INFO"):
                    regularizer.backward(log_probs, loss=loss)
            else:
                regularizer.backward(log_probs)
                loss.backward()
        found.append(gradients(model))
    assert regularizer.road.startswith("two backwards: ")
    assert reason in regularizer.road
    # once
    assert sum(reason in message for message in caplog.messages) == 1
    close(found[1], found[0], 0.0)


def stacked(model):
    return SSIUURegularizer(model, weight=1.0, parameters=["*experts*", "*q_proj.weight"])


MODEL_REASONS = {
    "was given parameters": (
        lambda: tiny_llama(torch.float32),
        lambda model: SSIUURegularizer(model.named_parameters(), weight=1.0),
    ),
    "mlp.experts.gate_up_proj is not, or not only": (tiny_mixtral, stacked),
    "of neurons are needed": (
        lambda: tiny_llama(torch.float32),
        lambda model: SSIUURegularizer(model, weight=1.0, granularity="neuron"),
    ),
}


@pytest.mark.parametrize("reason", MODEL_REASONS)
@pytest.mark.filterwarnings("ignore")
def test_models_that_take_two_passes(reason):
    make, regularize = MODEL_REASONS[reason]
    found = []
    for one in (False, True):
        model = make()
        regularizer = regularize(model)
        for seed in range(2):
            model.zero_grad()
            log_probs = log_probs_of(model, batch(seed=seed))
            loss = (log_probs * torch.arange(1, 6)).sum()
            if one:
                regularizer.backward(log_probs, loss=loss)
            else:
                regularizer.backward(log_probs)
                loss.backward()
        found.append(gradients(model))
    assert reason in regularizer.road
    close(found[1], found[0], 0.0)


def test_flattened_inputs_take_two_passes():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6, bias=False)])
            self.embed, self.head = nn.Embedding(48, 6), nn.Linear(6, 48)

        def forward(self, ids):
            hidden = self.embed(ids)
            return self.head(self.layers[0](hidden.flatten(0, 1)).view_as(hidden).tanh())

    model = Flat()
    regularizer = SSIUURegularizer(model, weight=1.0)
    rows = batch()
    log_probs = sequence_log_probs(model(rows["input_ids"]), rows["labels"])
    regularizer.backward(log_probs, loss=log_probs.sum())
    assert "layers.0 was given [45, 6], and the log-probs are of [5, 9]" in regularizer.road


def test_two_regularisers_share_a_loss():
    """What one adds to the gradients on their way is no part of the other's target."""
    found = []
    for one in (False, True):
        model = MODELS["llama"]()
        neurons = SSIUURegularizer(model, weight=WEIGHT, granularity="neuron")
        parameters = SSIUURegularizer(model, weight=WEIGHT)
        for seed in range(2):
            model.zero_grad()
            log_probs = log_probs_of(model, batch(seed=seed))
            loss = log_probs.sum() / 9
            neurons.backward(log_probs)
            if one:
                parameters.backward(log_probs, loss=loss)
                # the first batch of neurons is compared with itself
                assert seed == 0 or "another regulariser" in parameters.road
            else:
                parameters.backward(log_probs)
                loss.backward()
        found.append(gradients(model))
    assert_close(found[1], found[0], 1e-12)
