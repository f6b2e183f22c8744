"""Unlearning with one backward pass for loss and target, and with two: what the tests of the first share."""

import copy

import pytest
import torch
from plain_objectives import encoded, moved, totals
from steps import WEIGHT, assert_close, gradients
from tiny import batch, exactly, part, tiny_gpt2, tiny_llama, tiny_model

from ssiuu_fast import SSIUURegularizer, answer_token_counts
from ssiuu_fast.data.collate import collate
from ssiuu_fast.objectives import make_objective
from ssiuu_fast.objectives.objective import ForgetBatch
from ssiuu_fast.objectives.reference import reference_log_probs

ONE = "one backward"
ROWS = 8
MODELS = {
    "llama": lambda dtype=torch.float64: exactly(tiny_llama(dtype)),
    "qwen2": lambda dtype=torch.float64: exactly(tiny_model("qwen2", dtype)),
    "gpt2": tiny_gpt2,
}


class Unlearning:
    """Two steps of an objective, with two passes for each micro-batch or with one."""

    def __init__(self, model, one, objective="gd", micro_batches=1, retain=True, **options):
        self.model, self.one, self.micro_batches = model, one, micro_batches
        self.objective = make_objective(objective)
        self.retain = retain and self.objective.needs_retain
        self.regularizer = SSIUURegularizer(model, **({"weight": WEIGHT} | options))
        self.penalties, self.roads = [], []
        self.reference = None
        if self.objective.needs_reference:
            _, start = moved(copy.deepcopy(model), 1.0)
            rows = encoded(batch(ROWS, seed=1)) + encoded(batch(ROWS, seed=2))
            self.reference = reference_log_probs(start, rows, None)

    def step(self, autocast=False):
        forget, refusals = batch(ROWS, seed=1), batch(ROWS, seed=2)
        size = ROWS // self.micro_batches
        for index in range(self.micro_batches):
            chosen = list(range(index * size, (index + 1) * size if index < self.micro_batches - 1 else ROWS))
            rows = part(forget, chosen[0], chosen[-1] + 1)
            counts, count = answer_token_counts(rows["labels"]), len(chosen)
            if self.objective.needs_refusals:
                rows = collate(encoded(rows) + encoded(part(refusals, chosen[0], chosen[-1] + 1)))
                chosen += [place + ROWS for place in chosen]
            reference = None if self.reference is None else self.reference[chosen]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss, log_probs = self.objective.forget_loss(
                    self.model, ForgetBatch(rows, count, reference), totals(forget)
                )
            how = {"last": index == self.micro_batches - 1, "token_counts": counts}
            if self.one:
                penalty = self.regularizer.backward(log_probs, loss=loss, **how)
                self.roads.append(self.regularizer.road)
            else:
                penalty = self.regularizer.backward(log_probs, **how)
                loss.backward()
        if self.retain:
            retain = batch(ROWS, seed=3)
            self.objective.retain_loss(self.model, retain, totals(retain)).backward()
        if self.regularizer.relative_weight is not None:
            self.regularizer.after_backward()
        self.penalties.append(penalty.item())

    def steps(self, count=2, **how):
        """The gradient of the last one; between two the weights move a little."""
        for number in range(count):
            if number:
                self.model.zero_grad()
                with torch.no_grad():
                    for parameter in self.model.parameters():
                        if parameter.requires_grad:
                            parameter.mul_(1.01)
            self.step(**how)
        return gradients(self.model)


def both(make, bound=1e-9, count=2, roads=(ONE,), **options):
    """Asserts that one pass gives what two give; the run with one."""
    two, one = Unlearning(make(), False, **options), Unlearning(make(), True, **options)
    expected, found = two.steps(count), one.steps(count)
    assert set(one.roads) == set(roads)
    assert one.penalties[-1] > 0
    assert one.penalties == pytest.approx(two.penalties, rel=10 * bound)
    close(found, expected, bound)
    for name, reference in two.regularizer.state_dict()["references"].items():
        ours = one.regularizer.state_dict()["references"][name]
        if reference.dtype == torch.float64:
            assert (ours - reference).abs().max() <= bound * reference.abs().max(), name
    for figure in ("negative_share", "underflows", "nonfinite", "absent"):
        assert getattr(one.regularizer.last_step, figure) == getattr(two.regularizer.last_step, figure)
    return one


def close(found, expected, bound):
    assert [name for name in found if found[name] is None] == [name for name in expected if expected[name] is None]
    kept = {name: gradient for name, gradient in expected.items() if gradient is not None}
    assert_close({name: found[name] for name in kept}, kept, bound)
