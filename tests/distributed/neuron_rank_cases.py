"""SSIUURegularizer(granularity="neuron") in two processes against plain autograd in one."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist
from neurons import neurons
from plain_neurons import PlainNeurons
from steps import gradients
from steps import step as plain_step
from tiny import batch, exactly, log_probs_of, part, tiny_llama
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ssiuu_fast import answer_token_counts

WORLD = 2
# λ at which the penalty is at least a tenth of the gradient
WEIGHTS = {"probability": 1e6, "log_probability": 1e-2, "mean_token_probability": 1e3}
WEIGHT = WEIGHTS["log_probability"]
# rows of rank 0, of 5
CUT = 3


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
    # as text: NaN is what isn't known, on both
    dist.all_gather_object(values, repr(value))
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


@dataclass
class Output:
    """One that DDP finds the tensor in."""

    logits: torch.Tensor


class Branches(nn.Module):
    """Two layers, and a third that only samples of the second half of the vocabulary go through."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(48, 6, dtype=torch.float64)
        self.layers = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))
        self.head = nn.Linear(6, 48, dtype=torch.float64)

    def forward(self, input_ids, attention_mask):
        first, second, third = self.layers
        hidden = torch.tanh(first(self.embedding(input_ids)))
        late = input_ids[:, :1, None] >= 24
        if late.any():
            hidden = torch.where(late, torch.tanh(third(hidden)), hidden)
        return Output(self.head(second(hidden)))


def one_rank_only(rank, reference):
    """A layer that is in the graph of one rank, of the other, of both, of none."""
    options = {"reference": reference, "target": "log_probability"}
    truth = PlainNeurons(Branches(), WEIGHT, **options)
    model = DistributedDataParallel(Branches(), find_unused_parameters=True)
    regularizer = neurons(model, WEIGHT, **options)
    for number, late in enumerate(([], [0, 1], [3, 4], [2, 3], [], [4])):
        rows = batch(seed=number % 2)
        rows["input_ids"][:, 0] = 1
        rows["input_ids"][late, 0] = 40
        ids = torch.arange(5)
        if reference == "previous" and not late:
            # outside the graph A is 0
            truth.stored["layers.2"] = torch.zeros(6, dtype=torch.float64)
        expected, expected_penalty = truth.step(rows, ids)
        penalty = distributed_step(model, regularizer, rows, rank, ids)
        ours = whole_gradients(model)
        for name, gradient in expected.items():
            if gradient is None:
                assert ours[name] is None or not ours[name].any()
            else:
                assert (ours[name] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), (number, name)
        assert penalty == pytest.approx(expected_penalty, rel=1e-9)
        assert regularizer.last_step.absent == (0 if late else 1)
        # DDP keeps the gradient of a parameter that no rank used
        move(model, truth.model)
    assert_equal_everywhere({n: t.tolist() for n, t in regularizer.state_dict()["references"].items()})


def calibrated(rank, wrap, reference, micro_batches=1):
    """λ is that of one process, and so is what is added when it is fixed."""
    groups = [dist.new_group([r]) for r in range(WORLD)]
    alone = tiny_exact()
    options = {"weight": 1e-3, "relative_weight": 3.0, "reference": reference}
    truth = neurons(alone, process_group=groups[rank], **options)
    model = WRAPPERS[wrap](tiny_exact())
    regularizer = neurons(model, **options)
    ids = torch.arange(5)
    for number in range(7):
        rows = batch(seed=number % 2)
        plain_step(alone, truth, rows, ids=ids + 5 * (number % 2), micro_batches=micro_batches)
        distributed_step(model, regularizer, rows, rank, ids=ids + 5 * (number % 2), micro_batches=micro_batches)
        assert_same(whole_gradients(model), gradients(alone))
        truth.after_backward()
        regularizer.after_backward()
        if truth.last_step.penalty_gradient_norm is not None:
            assert regularizer.last_step.penalty_gradient_norm == pytest.approx(
                truth.last_step.penalty_gradient_norm, rel=1e-9
            )
        move(model, alone)
    assert regularizer.weight == pytest.approx(truth.weight, rel=1e-9)
    assert_equal_everywhere((regularizer.weight, regularizer.state_dict()["ratios"]))


def ten_steps(rank, wrap, dtype, optimizer, bound):
    """The weights after ten steps of an optimizer."""
    alone = exactly(tiny_llama(dtype))
    truth = neurons(alone, WEIGHT, process_group=[dist.new_group([r]) for r in range(WORLD)][rank])
    model = WRAPPERS[wrap](exactly(tiny_llama(dtype)))
    regularizer = neurons(model, WEIGHT)
    optimizers = [optimizer(m.parameters()) for m in (alone, model)]
    for number in range(10):
        rows = batch(seed=number)
        plain_step(alone, truth, rows)
        distributed_step(model, regularizer, rows, rank, cut=2 + number % 3)
        for each in optimizers:
            each.step()
            each.zero_grad()
    ours = {n.removeprefix("module."): p for n, p in model.named_parameters()}
    for name, p in alone.named_parameters():
        weights = ours[name].full_tensor() if wrap == "fsdp2" else ours[name]
        assert (weights - p).abs().max() <= bound * p.abs().max(), name


def resumed(rank, reference):
    """A state of two ranks goes on in one, and the other way round."""
    groups = [dist.new_group([r]) for r in range(WORLD)]
    alone, model = tiny_exact(), DistributedDataParallel(tiny_exact())
    truth = neurons(alone, WEIGHT, reference=reference, process_group=groups[rank])
    regularizer = neurons(model, WEIGHT, reference=reference)
    ids = torch.arange(5)
    for _ in range(2):
        plain_step(alone, truth, batch(seed=0), ids=ids)
        distributed_step(model, regularizer, batch(seed=0), rank, ids=ids)
        move(model, alone)
    for tensor in regularizer.state_dict()["references"].values():
        # nothing more than itself would be saved with it
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    states = truth.state_dict(), regularizer.state_dict()
    truth = neurons(alone, WEIGHT, reference=reference, process_group=groups[rank])
    regularizer = neurons(model, WEIGHT, reference=reference)
    regularizer.load_state_dict(states[0])
    truth.load_state_dict(states[1])
    expected = plain_step(alone, truth, batch(seed=0), ids=ids)
    assert expected > 0
    assert distributed_step(model, regularizer, batch(seed=0), rank, ids=ids) == pytest.approx(expected, rel=1e-9)
    assert_same(whole_gradients(model), gradients(alone))


def errors_of_one_rank(rank):
    """They are raised by all ranks; what comes after goes on as if nothing had been."""
    truth = PlainNeurons(tiny_exact(), WEIGHT, target="log_probability")
    model = DistributedDataParallel(tiny_exact())
    regularizer = neurons(model, WEIGHT)
    rows = batch(seed=0)
    truth.step(rows)
    distributed_step(model, regularizer, rows, rank)
    move(model, truth.model)
    log_probs = log_probs_of(model, mine(rows, rank))
    with pytest.raises(ValueError, match=r"log_probs\[0\] is nan" if rank else "on rank 1: log_probs"):
        regularizer.backward(log_probs * torch.nan if rank else log_probs)
    assert all(p.grad is None for p in model.parameters())
    log_probs = log_probs_of(model, mine(rows, rank))
    if rank == 0:
        torch.autograd.grad(log_probs.sum(), list(model.parameters()))
    with pytest.raises(RuntimeError, match="on rank 0: the graph of log_probs" if rank else "the graph of log_probs"):
        regularizer.backward(log_probs)
    expected, expected_penalty = truth.step(rows)
    assert distributed_step(model, regularizer, rows, rank) == pytest.approx(expected_penalty, rel=1e-9)
    assert_same(whole_gradients(model), expected)


def caught(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def errors_under_fsdp2(rank, reference):
    """A pass gathers shards: what one rank can't go on with is said before the other waits for it in there."""
    truth = PlainNeurons(tiny_exact(), WEIGHT, target="log_probability", reference=reference)
    model = sharded(tiny_exact())
    regularizer = neurons(model, WEIGHT, reference=reference)
    rows, ids = batch(seed=0), torch.arange(5)
    named = {"sample_ids": ids[:CUT] if rank == 0 else ids[CUT:]}
    truth.step(rows, ids)
    distributed_step(model, regularizer, rows, rank, ids)
    move(model, truth.model)

    log_probs = log_probs_of(model, mine(rows, rank))
    said = caught(lambda: regularizer.backward(log_probs * (torch.nan if rank else 1), **named))
    assert said.startswith("ValueError: log_probs[0] is nan" if rank else "ValueError: on rank 1: log_probs[0] is nan")
    log_probs = log_probs_of(model, mine(rows, rank))
    if rank == 0:
        log_probs = log_probs_of(tiny_exact(), mine(rows, rank))
    said = caught(lambda: regularizer.backward(log_probs, **named))
    assert said.startswith("RuntimeError: on rank 0: 0 of 14" if rank else "RuntimeError: 0 of 14")
    assert all(p.grad is None for p in model.parameters())

    expected, expected_penalty = truth.step(rows, ids)
    assert distributed_step(model, regularizer, rows, rank, ids) == pytest.approx(expected_penalty, rel=1e-9)
    assert_same(whole_gradients(model), expected)


def fewer_batches_under_fsdp2(rank):
    model = sharded(tiny_exact())
    regularizer = neurons(model, reference="initial")
    rows = mine(batch(seed=0), rank)
    ids = torch.arange(3) if rank == 0 else torch.tensor([3, 4])
    items = [(log_probs_of(model, rows), None, ids + 5 * index) for index in range(2)]
    with pytest.raises(ValueError, match="one more batch on 1 of 2 ranks"):
        regularizer.set_reference(items[: 2 - rank])
    items = [(log_probs_of(model, rows), None, ids + 5 * index) for index in range(2)]
    regularizer.set_reference(items)
    assert sorted(regularizer.state_dict()["reference_ids"]) == list(range(10))


def divided_otherwise(rank, factor):
    """FSDP2 divides by a number of the user's, so a loss of another size comes to the same; so must the penalty."""
    truth = PlainNeurons(tiny_exact(), WEIGHT, target="log_probability")
    model = sharded(tiny_exact())
    for module in [*model.model.layers, model]:
        module.set_gradient_divide_factor(factor)
    regularizer = neurons(model, WEIGHT)
    for number in range(3):
        rows = batch(seed=number)
        expected, expected_penalty = truth.step(rows)
        log_probs = log_probs_of(model, mine(rows, rank))
        penalty = regularizer.backward(log_probs).item()
        (factor * log_probs.sum() / answer_token_counts(rows["labels"]).sum()).backward()
        assert penalty == pytest.approx(expected_penalty, rel=1e-9)
        assert_same(whole_gradients(model), expected)
        move(model, truth.model)
    assert penalty > 0


def sync_off(rank):
    """FSDP2 keeps the first micro-batch's gradient to itself, until the passes of the second."""
    truth = PlainNeurons(tiny_exact(), WEIGHT, target="log_probability", reference="initial")
    model = sharded(tiny_exact())
    regularizer = neurons(model, WEIGHT, reference="initial")
    rows, ids = batch(samples=4, seed=0), torch.arange(4)
    for _ in range(3):
        expected, expected_penalty = truth.step(rows, ids)
        for index in range(2):
            place = 2 * rank + index
            model.set_requires_gradient_sync(index == 1)
            some = part(rows, place, place + 1)
            log_probs = log_probs_of(model, some)
            penalty = regularizer.backward(log_probs, last=index == 1, sample_ids=ids[place : place + 1])
            (WORLD * log_probs.sum() / answer_token_counts(rows["labels"]).sum()).backward()
        assert penalty.item() == pytest.approx(expected_penalty, rel=1e-9)
        assert_same(whole_gradients(model), expected)
        move(model, truth.model)
    assert penalty > 0


def errors_with_samples(rank):
    model = DistributedDataParallel(tiny_exact())
    rows = mine(batch(seed=0), rank)
    regularizer = neurons(model, reference="initial")
    ids = torch.arange(3) if rank == 0 else torch.tensor([2, 3])
    with pytest.raises(ValueError, match="sample id 2 on two ranks"):
        regularizer.set_reference([(log_probs_of(model, rows), None, ids)])
    with pytest.raises(ValueError, match="no batch"):
        regularizer.set_reference([])
    # one rank's share is empty; a forward pass of DDP itself would wait for the other rank's
    regularizer.set_reference([(log_probs_of(model.module, rows), None, ids)] if rank else [])
    with pytest.raises(ValueError, match="sample id 0 was not in the pass" if rank == 0 else "on rank 0: sample id 0"):
        regularizer.backward(log_probs_of(model, rows), sample_ids=ids)
    with pytest.raises(ValueError, match="give sample_ids"):
        regularizer.backward(log_probs_of(model, rows), sample_ids=ids if rank else None)


def twice_in_a_step(rank):
    """A sample on both ranks is compared with one attribution."""
    model = DistributedDataParallel(tiny_exact())
    regularizer = neurons(model, WEIGHT, reference="initial")
    truth = PlainNeurons(tiny_exact(), WEIGHT, target="log_probability", reference="initial")
    rows = {name: tensor[[0, 1, 2, 0, 3]] for name, tensor in batch(seed=0).items()}
    ids = torch.tensor([4, 5, 6, 4, 7])
    for _ in range(2):
        expected, _ = truth.step(rows, ids)
        distributed_step(model, regularizer, rows, rank, ids)
        assert_same(whole_gradients(model), expected)
        move(model, truth.model)
    assert sorted(regularizer.state_dict()["reference_ids"]) == [4, 5, 6, 7]


class Scaled(torch.autograd.Function):
    """An identity that multiplies the gradient by what the factor is by then."""

    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def nonfinite(rank, reference, how):
    """What isn't finite on one rank is left out by all whose sum it is in; all count it, or raise."""
    model, alone = Branches(), Branches()
    factor = torch.ones(6, dtype=torch.float64)
    model.layers[0].register_forward_hook(lambda module, inputs, output: Scaled.apply(output, factor))
    model = DistributedDataParallel(model, find_unused_parameters=True)
    rows, ids = batch(seed=0), torch.arange(5)
    rows["input_ids"][:, 0] = 1
    regularizer = neurons(model, 1.0, reference=reference, nonfinite=how, parameters=["layers.0.weight"])
    # above the hook, so that the tap sees what it makes of the gradient
    model.module.layers[0]._forward_hooks.move_to_end(next(iter(model.module.layers[0]._forward_hooks)))
    distributed_step(model, regularizer, rows, rank, ids)
    move(model, alone)
    before = {n: t.clone() for n, t in regularizer.state_dict()["references"].items()}
    factor[5] = torch.inf if rank else 1.0
    log_probs = log_probs_of(model, mine(rows, rank))
    named = {"sample_ids": ids[:CUT] if rank == 0 else ids[CUT:]}
    # of the batch, or of the second rank's two samples
    count = 1 if reference == "previous" else 2
    if how == "raise":
        with pytest.raises(FloatingPointError, match=rf"layers.0 \({count}\)"):
            regularizer.backward(log_probs, **named)
        return
    assert regularizer.backward(log_probs, **named).isfinite()
    assert regularizer.last_step.nonfinite == count
    factor[5] = 1.0
    tokens = answer_token_counts(rows["labels"]).sum()
    (WORLD * log_probs.sum() / tokens).backward()
    loss = log_probs_of(alone, rows).sum() / tokens
    (expected,) = torch.autograd.grad(loss, [alone.layers[0].weight])
    gradient = model.module.layers[0].weight.grad
    assert gradient.isfinite().all()
    differs = ((gradient - expected).abs() > 1e-9 * expected.abs().max()).any(1)
    assert differs[:5].any()
    # of samples, the other rank's are punished all the same
    assert reference == "initial" or not differs[5]
    assert_equal_everywhere({n: t.tolist() for n, t in regularizer.state_dict()["references"].items()})
    for name, tensor in regularizer.state_dict()["references"].items():
        assert (tensor == before[name])[..., 5].all()


CASES = {}
for wrap in WRAPPERS:
    for target, one_sided in (("probability", False), ("log_probability", True), ("mean_token_probability", False)):
        CASES[f"previous-{wrap}-{target}"] = partial(as_plain_autograd, wrap=wrap, target=target, one_sided=one_sided)
    CASES[f"previous-{wrap}-every-2-scaled"] = partial(as_plain_autograd, wrap=wrap, every=2, scale=1024.0, cut=4)
    for given, micro_batches, one_sided in ((True, 1, False), (True, 2, True), (False, 1, True), (False, 2, False)):
        CASES[f"initial-{wrap}-{'given' if given else 'first'}-{micro_batches}"] = partial(
            initial, wrap=wrap, given=given, micro_batches=micro_batches, one_sided=one_sided
        )
    CASES[f"ten-steps-{wrap}-sgd"] = partial(
        ten_steps, wrap=wrap, dtype=torch.float64, optimizer=partial(torch.optim.SGD, lr=0.1), bound=1e-9
    )
    CASES[f"ten-steps-{wrap}-adamw"] = partial(
        ten_steps, wrap=wrap, dtype=torch.float32, optimizer=partial(torch.optim.AdamW, lr=1e-3), bound=1e-4
    )
for reference in ("previous", "initial"):
    CASES[f"one-rank-only-{reference}"] = partial(one_rank_only, reference=reference)
    CASES[f"calibrated-ddp-{reference}"] = partial(calibrated, wrap="ddp", reference=reference)
    for how in ("count", "raise"):
        CASES[f"nonfinite-{reference}-{how}"] = partial(nonfinite, reference=reference, how=how)
    CASES[f"resumed-{reference}"] = partial(resumed, reference=reference)
CASES["calibrated-ddp-initial-2"] = partial(calibrated, wrap="ddp", reference="initial", micro_batches=2)
CASES["errors-of-one-rank"] = errors_of_one_rank
for reference in ("previous", "initial"):
    CASES[f"errors-under-fsdp2-{reference}"] = partial(errors_under_fsdp2, reference=reference)
CASES["fewer-batches-under-fsdp2"] = fewer_batches_under_fsdp2
CASES["sync-off"] = sync_off
CASES["divided-otherwise"] = partial(divided_otherwise, factor=1.0)
CASES["errors-with-samples"] = errors_with_samples
CASES["twice-in-a-step"] = twice_in_a_step
