"""One backward pass where autograd's tensors are shared, written into, saved by hooks, or missing."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from one_pass import MODELS, ONE, Unlearning
from steps import WEIGHT, assert_close, gradients
from tiny import batch, log_probs_of
from torch import nn

from ssiuu_fast import SSIUURegularizer, kept_tensor


def second_gradients(model, one, rows=5, saving=nullcontext, **options):
    """The gradients of the second step, with one pass or with two, and its road. saving: around every forward pass."""
    regularizer = SSIUURegularizer(model, **options)
    for seed in range(2):
        model.zero_grad()
        with saving():
            log_probs = log_probs_of(model, batch(rows, seed=seed))
        loss = (log_probs * torch.arange(1, rows + 1)).sum()
        if one:
            regularizer.backward(log_probs, loss=loss)
        else:
            regularizer.backward(log_probs)
            loss.backward()
    return {name: gradient.to_dense() for name, gradient in gradients(model).items()}, regularizer.road


class Places(nn.Module):
    """Learnt places whose gradients autograd gives as views of one that others still need."""

    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(48, 8, sparse=sparse, dtype=torch.float64)
        self.below, self.above = (nn.Linear(8, 8, dtype=torch.float64) for _ in range(2))
        self.first, self.second = (nn.Parameter(torch.randn(9, 8, dtype=torch.float64)) for _ in range(2))
        self.head = nn.Linear(8, 48, dtype=torch.float64)

    def forward(self, input_ids, attention_mask):
        hidden = self.below(self.embed(input_ids)) + self.first.unsqueeze(0) + self.second.unsqueeze(0)
        return SimpleNamespace(logits=self.head(self.above(hidden).tanh()))


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_that_share_memory_are_parted(sparse):
    options = {"rows": 1, "weight": 1e4, "parameters": ["*.weight", "first", "second"]}
    expected, _ = second_gradients(Places(sparse), False, **options)
    found, road = second_gradients(Places(sparse), True, **options)
    assert road == ONE
    assert_close(found, expected)


class Overwritten(nn.Module):
    """Writes into the input of a module after its call, where autograd has saved a copy of it and doesn't mind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(48, 8, dtype=torch.float64)
        self.project = nn.Linear(8, 8, bias=False, dtype=torch.float64)
        self.head = nn.Linear(8, 48, dtype=torch.float64)

    def forward(self, input_ids, attention_mask):
        by_token = self.embed(input_ids).transpose(0, 1).contiguous()
        projected = self.project(by_token.transpose(0, 1))
        by_token += 1.0
        return SimpleNamespace(logits=self.head(projected.tanh() + by_token.transpose(0, 1)))


def test_an_input_that_is_written_into():
    options = {"weight": 1e4, "parameters": ["project.weight"]}
    expected, _ = second_gradients(Overwritten(), False, **options)
    found, road = second_gradients(Overwritten(), True, **options)
    assert road == "two backwards: the input of project was changed in place after it was used"
    assert_close(found, expected)


@pytest.mark.parametrize("how", ["hooks", "an older torch"])
def test_hooks_on_saved_tensors(how, monkeypatch):
    packed = []

    def hooks():
        return torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(1) or tensor.clone(), lambda x: x)

    saving = hooks if how == "hooks" else nullcontext
    if how == "an older torch":
        monkeypatch.setattr(kept_tensor, "_HOOKS", None)
    expected, _ = second_gradients(MODELS["llama"](), False, saving=saving, weight=WEIGHT)
    found, road = second_gradients(MODELS["llama"](), True, saving=saving, weight=WEIGHT)
    assert road == ONE
    assert_close(found, expected)
    assert bool(packed) is (how == "hooks")


class Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output):
        return output.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_a_module_that_gets_no_gradient():
    found = []
    for one in (False, True):
        model = MODELS["llama"]()
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: Stop.apply(output))
        found.append(Unlearning(model, one, retain=False).steps())
    silent = "model.layers.0.mlp.up_proj.weight"
    assert found[0].pop(silent) is found[1].pop(silent) is None
    assert_close(found[1], found[0])
