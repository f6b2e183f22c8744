"""SSIUURegularizer(granularity="neuron") in two processes against plain autograd in one."""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from neurons import neurons
from plain_neurons import PlainNeurons
from tiny import batch, exactly, log_probs_of, part, tiny_llama
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ssiuu_fast import answer_token_counts

WORLD = 2
# λ at which the penalty is at least a tenth of the gradient
WEIGHTS = {"probability": 1e6, "log_probability": 1e-2, "mean_token_probability": 1e3}
WEIGHT = WEIGHTS["log_probability"]
# rows of rank 0, of 5
CUT = 3


def plain(model):
    return model


def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS = {"ddp": DistributedDataParallel, "fsdp2": sharded}


def tiny_exact():
    return exactly(tiny_llama())


def mine(rows, rank, cut=CUT):
    return part(rows, 0, cut) if rank == 0 else part(rows, cut, len(rows["labels"]))


def distributed_step(model, regularizer, rows, rank, ids=None, cut=CUT, micro_batches=1, scale=1.0):
    """One step of this rank's rows; the mean of the ranks' losses is that of one process. Returns R."""
    tokens = answer_token_counts(rows["labels"]).sum()
    rows, ids = mine(rows, rank, cut), None if ids is None else (ids[:cut] if rank == 0 else ids[cut:])
    size = -(-len(rows["labels"]) // micro_batches)
    for index in range(micro_batches):
        some = part(rows, index * size, (index + 1) * size)
        log_probs = log_probs_of(model, some)
        penalty = regularizer.backward(
            log_probs,
            last=index == micro_batches - 1,
            scale=scale,
            token_counts=answer_token_counts(some["labels"]),
            sample_ids=None if ids is None else ids[index * size : (index + 1) * size],
        )
        # DDP averages what is added up over micro-batches at the last of them only if it is told so
        sync = index == micro_batches - 1 or not isinstance(model, DistributedDataParallel)
        loss = scale * WORLD * log_probs.sum() / tokens
        if sync:
            loss.backward()
        else:
            with model.no_sync():
                loss.backward()
    return penalty.item()


def whole_gradients(model):
    """Of the wrapped model, under the names of the bare one."""
    return {
        name.removeprefix("module."): p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in model.named_parameters()
    }


def assert_same(ours, truth, bound=1e-9, scale=1.0):
    assert ours.keys() == truth.keys()
    for name in truth:
        error = (ours[name] / scale - truth[name]).abs().max() / truth[name].abs().max()
        assert error <= bound, f"{name}: {error:.2e}"


def move(*models):
    for model in models:
        model.zero_grad()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)


def assert_equal_everywhere(value):
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    assert values[0] == values[1]


def as_plain_autograd(rank, wrap, target="log_probability", scale=1.0, cut=CUT, **options):
    model = tiny_exact()
    truth = PlainNeurons(tiny_exact(), WEIGHTS[target], target=target, **options)
    model = WRAPPERS[wrap](model)
    regularizer = neurons(model, WEIGHTS[target], target=target, **options)
    penalties = []
    for number in range(4):
        rows = batch(seed=number)
        expected, expected_penalty = truth.step(rows)
        penalty = distributed_step(model, regularizer, rows, rank, cut=cut, scale=scale)
        assert_same(whole_gradients(model), expected, scale=scale)
        assert penalty == pytest.approx(expected_penalty, rel=1e-9)
        attributions = torch.cat(list(truth.attributions.values()))
        if number % options.get("every", 1) == 0:
            assert regularizer.last_step.negative_share == (attributions < 0).double().mean().item()
            penalties.append(penalty)
        move(model, truth.model)
    assert min(penalties[1:]) > 0
    assert_equal_everywhere({n: t.tolist() for n, t in regularizer.state_dict()["references"].items()})


def initial(rank, wrap, given, micro_batches=1, one_sided=False):
    """Each sample is on one rank, then on the other."""
    model = tiny_exact()
    truth = PlainNeurons(tiny_exact(), WEIGHT, target="log_probability", reference="initial", one_sided=one_sided)
    model = WRAPPERS[wrap](model)
    regularizer = neurons(model, WEIGHT, reference="initial", one_sided=one_sided)
    rows, ids = batch(seed=0), torch.tensor([7, 3, 11, 0, 5])
    if given:
        truth.set_reference(rows, ids)
        some, names = mine(rows, rank), ids[:CUT] if rank == 0 else ids[CUT:]
        # sharded, every rank's pass waits for the other's
        items = [(log_probs_of(model, some), None, names)]
        regularizer.set_reference(items)
        move(model, truth.model)
    for number in range(4):
        order = torch.arange(5).roll(2 * number)
        turned = {name: tensor[order] for name, tensor in rows.items()}
        expected, expected_penalty = truth.step(turned, ids[order])
        penalty = distributed_step(model, regularizer, turned, rank, ids[order], micro_batches=micro_batches)
        assert_same(whole_gradients(model), expected)
        assert penalty == pytest.approx(expected_penalty, rel=1e-9)
        move(model, truth.model)
    assert penalty > 0
    negative = torch.cat([a.flatten() for a in truth.attributions.values()]) < 0
    assert regularizer.last_step.negative_share == negative.double().mean().item()
    state = regularizer.state_dict()
    assert sorted(state["reference_ids"]) == sorted(ids.tolist())
    assert_equal_everywhere((state["reference_ids"], {n: t.tolist() for n, t in state["references"].items()}))


CASES = {}
for wrap in WRAPPERS:
    for target, one_sided in itertools.product(WEIGHTS, (False, True)):
        CASES[f"previous-{wrap}-{target}-{one_sided}"] = partial(
            as_plain_autograd, wrap=wrap, target=target, one_sided=one_sided
        )
    CASES[f"previous-{wrap}-every-2"] = partial(as_plain_autograd, wrap=wrap, every=2)
    CASES[f"previous-{wrap}-scaled"] = partial(as_plain_autograd, wrap=wrap, scale=1024.0)
    CASES[f"previous-{wrap}-short"] = partial(as_plain_autograd, wrap=wrap, cut=4)
    for given, micro_batches, one_sided in ((True, 1, False), (True, 2, True), (False, 1, True), (False, 2, False)):
        CASES[f"initial-{wrap}-{given}-{micro_batches}-{one_sided}"] = partial(
            initial, wrap=wrap, given=given, micro_batches=micro_batches, one_sided=one_sided
        )
