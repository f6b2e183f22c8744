"""METHOD's table of objectives once more, sample by sample without padding and with live reference models."""

import copy

import torch
from plain_attribution import unpadded
from tiny import part

from ssiuu_fast.data.collate import Encoded, collate
from ssiuu_fast.objectives.objective import ForgetBatch, Totals
from ssiuu_fast.ops import answer_token_counts


def nll_seq(model, row):
    """(NLL of the answer, its tokens) of one sample: row holds [T] tensors."""
    logits = model(input_ids=row["input_ids"][None]).logits[0]
    steps = torch.log_softmax(logits[:-1], dim=-1)
    places = [place for place in range(1, len(row["labels"])) if row["labels"][place] != -100]
    return -sum(steps[place - 1, row["labels"][place]] for place in places), len(places)


def nll_tok(model, rows):
    found = [nll_seq(model, row) for row in unpadded(rows)]
    return sum(nll for nll, _ in found) / sum(count for _, count in found)


def log_sigma(x):
    return torch.log(1 / (1 + torch.exp(-x)))


def ga(model, start, forget, refusals, retain):
    return -nll_tok(model, forget)


def gd(model, start, forget, refusals, retain, gamma=1.0, alpha=1.0):
    return -gamma * nll_tok(model, forget) + alpha * nll_tok(model, retain)


def npo(model, start, forget, refusals, retain, gamma=1.0, alpha=1.0, beta=0.1):
    losses = []
    for row in unpadded(forget):
        z = nll_seq(model, row)[0] - nll_seq(start, row)[0].detach()
        losses.append(-(2 / beta) * log_sigma(beta * z))
    return gamma * torch.stack(losses).mean() + alpha * nll_tok(model, retain)


def dpo(model, start, forget, refusals, retain, gamma=1.0, alpha=1.0, beta=0.1):
    losses = []
    for row, refusal in zip(unpadded(forget), unpadded(refusals), strict=True):
        gained = [nll_seq(start, some)[0].detach() - nll_seq(model, some)[0] for some in (refusal, row)]
        losses.append(-(2 / beta) * log_sigma(beta * (gained[0] - gained[1])))
    return gamma * torch.stack(losses).mean() + alpha * nll_tok(model, retain)


def simnpo(model, start, forget, refusals, retain, gamma=0.125, alpha=1.0, beta=4.5, delta=0.0):
    losses = []
    for row in unpadded(forget):
        nll, tokens = nll_seq(model, row)
        losses.append(-(2 / beta) * log_sigma(beta * (nll / tokens - delta)))
    return gamma * torch.stack(losses).mean() + alpha * nll_tok(model, retain)


PLAIN = {"ga": ga, "gd": gd, "npo": npo, "dpo": dpo, "simnpo": simnpo}


def encoded(rows):
    """A padded batch as rows of token ids."""
    return [Encoded(row["input_ids"].tolist(), row["labels"].tolist()) for row in unpadded(rows)]


def moved(model, by=1.05):
    """(the model a little way from its start, a copy of the start)."""
    start = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(by)
    return model, start


def totals(rows):
    return Totals(
        samples=len(rows["labels"]),
        tokens=int(answer_token_counts(rows["labels"]).sum()),
        attended=int(rows["attention_mask"].sum()),
    )


def backward(objective, model, forget, retain, *, refusals=None, reference=None, micro=(5,), regularizer=None):
    """One step of a training loop: gradients are added to `.grad`. Returns the loss."""
    value, start = 0.0, 0
    for size in micro:
        chosen = list(range(start, start + size))
        start += size
        rows = part(forget, chosen[0], start)
        if objective.needs_refusals:
            rows = collate(encoded(rows) + encoded(part(refusals, chosen[0], start)))
            chosen += [index + len(forget["labels"]) for index in chosen]
        batch = ForgetBatch(rows, size, None if reference is None else reference[chosen])
        loss, log_probs = objective.forget_loss(model, batch, totals(forget))
        assert log_probs.shape == (size,)
        if regularizer is not None:
            regularizer.backward(log_probs, last=start == len(forget["labels"]))
        loss.backward()
        value += loss.item()
    start = 0
    for size in micro if objective.needs_retain else ():
        loss = objective.retain_loss(model, part(retain, start, start + size), totals(retain))
        start += size
        loss.backward()
        value += loss.item()
    objective.finish_gradients(model)
    return value
