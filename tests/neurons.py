"""Steps and models that the tests of the penalty on neurons share."""

from types import SimpleNamespace

import torch
from plain_neurons import PlainNeurons
from steps import gradients, step
from tiny import batch
from torch import nn

from ssiuu_fast import SSIUURegularizer

# λ at which the penalty is most of tiny_llama's gradient
WEIGHT = 1e-2
IDS = torch.arange(5)


def neurons(model, weight=WEIGHT, **options):
    return SSIUURegularizer(model, weight, granularity="neuron", **({"target": "log_probability"} | options))


def two_steps(model, regularizer, batches=None, **how):
    """The gradient of the second step, after a small move, and its R."""
    batches = batches or [batch(seed=0), batch(seed=1)]
    step(model, regularizer, batches[0], ids=IDS, **how)
    move(model)
    penalty = step(model, regularizer, batches[1], ids=IDS, **how)
    return gradients(model), penalty


def move(model):
    model.zero_grad()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)


def transcribed(model, batches=None, **options):
    """two_steps by plain autograd."""
    batches = batches or [batch(seed=0), batch(seed=1)]
    truth = PlainNeurons(model, WEIGHT, **({"target": "log_probability"} | options))
    truth.step(batches[0], IDS)
    move(model)
    return truth.step(batches[1], IDS)


def left_padded(rows):
    lengths = rows["attention_mask"].sum(1)
    width = rows["input_ids"].shape[1]
    return {
        name: torch.stack([row.roll(width - int(n)) for row, n in zip(tensor, lengths, strict=True)])
        for name, tensor in rows.items()
    }


class Residual(nn.Module):
    """Linear layers on a stream that is written in place, or not."""

    def __init__(self, in_place):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(48, 6, dtype=torch.float64)
        self.layers = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))
        self.head = nn.Linear(6, 48, dtype=torch.float64)
        self.in_place = in_place

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        first, second, third = self.layers
        if self.in_place:
            x = torch.tanh(first(x).add_(x))
            y = second(x)
            y += x
            y.view(-1)[:5] *= 2
        else:
            x = torch.tanh(first(x) + x)
            y = second(x) + x
            y = y * torch.ones_like(y).flatten().index_fill(0, torch.arange(5), 2.0).view_as(y)
        return SimpleNamespace(logits=self.head(third(y)))
