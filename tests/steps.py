"""Steps of a plain loop around the regulariser, shared by its tests."""

import torch
from tiny import batch, log_probs_of, part

from ssiuu_fast import answer_token_counts

# λ at which the penalty of tiny_llama matters
WEIGHT = 1e6


def step(model, regularizer, rows, micro_batches=1, scale=1.0, ids=None):
    """One step's backward passes; gradients are added to what `.grad` holds. Returns R."""
    size = -(-len(rows["labels"]) // micro_batches)
    tokens = answer_token_counts(rows["labels"]).sum()
    for index in range(micro_batches):
        some = part(rows, index * size, (index + 1) * size)
        log_probs = log_probs_of(model, some)
        counts = answer_token_counts(some["labels"])
        penalty = regularizer.backward(
            log_probs,
            last=index == micro_batches - 1,
            scale=scale,
            token_counts=counts,
            sample_ids=None if ids is None else ids[index * size : (index + 1) * size],
        )
        (scale * log_probs.sum() / tokens).backward()
    return penalty.item()


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def two_steps(model, regularizer, **how):
    """The gradient of the second step, after a small move, and its R."""
    step(model, regularizer, batch(seed=0), **how)
    model.zero_grad()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    penalty = step(model, regularizer, batch(seed=1), **how)
    return gradients(model), penalty


def assert_close(a, b, bound=1e-9):
    assert a.keys() == b.keys()
    for name in b:
        assert (a[name] - b[name]).abs().max() <= bound * b[name].abs().max(), name
