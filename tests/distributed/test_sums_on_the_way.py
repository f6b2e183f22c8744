"""With one backward pass the ranks sum g while it is under way, where all go through their graphs in the same order."""

from unittest import mock

import pytest
import torch
from steps import WEIGHT
from tiny import batch, exactly, log_probs_of, part, tiny_llama
from torch import nn

from ssiuu_fast import SSIUURegularizer, ranks, sequence_log_probs
from ssiuu_fast.graph_order import leaf_order
from ssiuu_fast.ranks import Ranks, RunningSums

# rank 1 has one row, of which every gradient is a multiple of the loss's; rank 0 has to tell rows apart
ROWS, SPLIT, LONG = 6, 5, 28


def rows_of(seed, underflowing):
    """Rank 1's row may have an answer so long that its P is nothing in fp32."""
    rows = batch(ROWS, seed=seed, length=LONG + 2)
    if underflowing:
        rows["attention_mask"][SPLIT:] = 1
        rows["labels"][SPLIT:, 2:] = rows["input_ids"][SPLIT:, 2:]
    return rows


def rows_of_rank(rank, seed, underflowing):
    return part(rows_of(seed, underflowing), *((0, SPLIT) if rank == 0 else (SPLIT, ROWS)))


def fitting_model():
    return exactly(tiny_llama())


def two_passes(underflowing):
    """Two steps in one process: what was in `.grad` after the second."""
    model = fitting_model()
    regularizer = SSIUURegularizer(model, weight=WEIGHT)
    for seed in (1, 2):
        model.zero_grad()
        log_probs = log_probs_of(model, rows_of(seed, underflowing))
        regularizer.backward(log_probs)
        log_probs.sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def one_pass(rank, how, underflowing):
    """The same on two ranks with one pass: `.grad`, and when in the second step sums of g began and gradients came."""
    model = fitting_model()
    if how == "another order" and rank == 1:
        mlp = model.model.layers[0].mlp
        mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x) * mlp.act_fn(mlp.gate_proj(x)))
    wrapped = model if how == "plain" else nn.parallel.DistributedDataParallel(model)
    if how == "hook of DDP":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        wrapped.register_comm_hook(None, allreduce_hook)
    regularizer = SSIUURegularizer(wrapped, weight=WEIGHT)
    events, kept = [], None
    model.get_input_embeddings().weight.register_hook(lambda gradient: events.append("last gradient"))
    start = RunningSums._start

    def started(self, *arguments):
        events.append("sum")
        start(self, *arguments)

    with mock.patch.object(RunningSums, "_start", started), mock.patch.object(ranks, "BUCKET", 4096):
        for seed in (1, 2):
            model.zero_grad()
            events.clear()
            rows = rows_of_rank(rank, seed, underflowing)
            log_probs = log_probs_of(wrapped, rows)
            # the mean over ranks of this is the sum over all rows
            regularizer.backward(log_probs, loss=2 * log_probs.sum())
            kept = regularizer.kept_rows
            assert regularizer.road == "one backward"
    if how == "plain":
        for parameter in model.parameters():
            Ranks().sum_(parameter.grad).div_(2)
    return {name: parameter.grad for name, parameter in model.named_parameters()}, events, kept


@pytest.mark.parametrize("how", ["ddp", "plain", "another order", "hook of DDP"])
@pytest.mark.parametrize("underflowing", [False, True])
def test_they_are_the_sums_of_one_process(two_ranks, how, underflowing):
    expected = two_passes(underflowing)
    results = two_ranks(one_pass, how, underflowing)
    for found, events, _ in results:
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), name
        # 14 matrices of up to 3 kB; those that fit together travel together
        assert 7 <= events.count("sum") < 14
        # all but what is left for a last buffer
        on_the_way = events.index("last gradient")
        assert on_the_way == (events.count("sum") - 1 if how == "ddp" else 0)
    assert [kept for *_, kept in results] == [SPLIT, 0 if underflowing else ROWS - SPLIT]


class WithAside(nn.Module):
    """Has an output that no loss makes use of; DDP reaches its parameters all the same, with no gradient."""

    def __init__(self):
        super().__init__()
        self.model = fitting_model()
        self.aside = nn.Linear(16, 3, bias=False, dtype=torch.float64)

    def forward(self, **rows):
        outputs = self.model(**rows, output_hidden_states=True)
        return {"logits": outputs.logits, "aside": self.aside(outputs.hidden_states[-1])}


def with_aside(rank):
    torch.manual_seed(0)
    model = WithAside()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    regularizer = SSIUURegularizer(wrapped, weight=WEIGHT, parameters=["*proj.weight", "aside.weight"])
    events, start = [], RunningSums._start
    model.model.get_input_embeddings().weight.register_hook(lambda gradient: events.append("last gradient"))
    with (
        mock.patch.object(RunningSums, "_start", lambda *to: events.append("sum") or start(*to)),
        mock.patch.object(ranks, "BUCKET", 4096),
    ):
        for seed in (1, 2):
            model.zero_grad()
            events.clear()
            rows = rows_of_rank(rank, seed, True)
            labels = rows.pop("labels")
            log_probs = sequence_log_probs(wrapped(**rows)["logits"], labels)
            regularizer.backward(log_probs, loss=2 * log_probs.sum())
            assert regularizer.road == "one backward"
    # no optimizer is to move it, not even by decay
    assert model.aside.weight.grad is None
    return {name: parameter.grad for name, parameter in model.model.named_parameters()}, events.index("last gradient")


def test_a_parameter_whose_node_gets_no_gradient(two_ranks):
    expected = two_passes(True)
    for found, on_the_way in two_ranks(with_aside):
        assert on_the_way
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), name


def nothing_to_sum(rank):
    """P of every row is nothing: how many rows had a part."""
    model = nn.parallel.DistributedDataParallel(fitting_model())
    regularizer = SSIUURegularizer(model, weight=WEIGHT)
    with mock.patch.object(RunningSums, "_start", side_effect=AssertionError("nothing is to be summed")):
        for seed in (1, 2):
            log_probs = log_probs_of(model, part(rows_of(seed, True), SPLIT, ROWS))
            regularizer.backward(log_probs, loss=log_probs.sum())
    return regularizer.kept_rows


def test_nothing_is_summed_where_no_row_has_a_part(two_ranks):
    assert two_ranks(nothing_to_sum) == [0, 0]


def one_rank_in_ddp(rank, view):
    """DDP of a single process copies its buckets over every `.grad` at the end of a backward pass."""
    group = [torch.distributed.new_group([number]) for number in range(2)][rank]
    model = fitting_model()
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=view)
    regularizer = SSIUURegularizer(wrapped, weight=WEIGHT)
    for seed in (1, 2):
        model.zero_grad()
        log_probs = log_probs_of(wrapped, rows_of(seed, False))
        regularizer.backward(log_probs, loss=log_probs.sum())
        assert regularizer.road == "one backward"
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("view", [False, True])
def test_one_rank_in_ddp(two_ranks, view):
    expected = two_passes(False)
    for found in two_ranks(one_rank_in_ddp, view):
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), name


def sums_of_many(rank):
    generator = torch.Generator().manual_seed(rank)
    shapes = [(3, 5), (1,), (0,), (64, 8), (7,), (2, 2, 2), (512,), (9, 9)] * 3
    dtypes = [torch.float32, torch.float64, torch.bfloat16]
    given = [
        torch.randn(shape, generator=generator).to(dtypes[index % len(dtypes)]) for index, shape in enumerate(shapes)
    ]
    before = [tensor.clone() for tensor in given]
    with mock.patch.object(ranks, "BUCKET", 256):
        sums = RunningSums(Ranks())
        for tensor in given:
            sums.add(tensor)
        sums.finish()
    return before, given


def test_sums_of_many_tensors(two_ranks):
    (first, found), (second, same) = two_ranks(sums_of_many)
    for one, two, both, again in zip(first, second, found, same, strict=True):
        assert torch.equal(both, again)
        torch.testing.assert_close(both, one + two)


def test_the_order_is_that_in_which_autograd_comes_to_its_leaves():
    weights = [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]

    def came(build):
        """What leaf_order says, and what a backward pass does."""
        top, seen = build(torch.randn(3, 4), *weights).sum(), []
        said = leaf_order(top, weights)
        handles = [
            weight.register_hook(lambda _, place=place: seen.append(place)) for place, weight in enumerate(weights)
        ]
        top.backward()
        for handle in handles:
            handle.remove()
        return said, seen

    def left_made_first(x, a, b, c):
        left = x @ a
        return left + (x @ b).relu() @ c

    def right_made_first(x, a, b, c):
        right = (x @ b).relu() @ c
        return x @ a + right

    def more_nodes(x, a, b, c):
        left = (x @ a) * 1
        return left.tanh() + (x @ b).tanh().unsqueeze(0).squeeze(0) @ c

    def two_at_once(x, a, b, c):
        return x @ c * (a * b).sum()

    def two_at_once_and_much_that_waits(x, a, b, c):
        waiting = [(x.sum() + c[row, column]).exp() for row in range(3) for column in range(4)]
        return x @ c * (a * b).sum() + torch.stack(waiting).sum()

    def two_at_once_the_other_way_round(x, a, b, c):
        return x @ c * (b * a).sum()

    def shared(x, a, b, c):
        return ((x @ a) @ b) @ a @ c

    builds = [left_made_first, right_made_first, more_nodes, two_at_once, shared, lambda x, a, b, c: x @ b @ c]
    builds += [two_at_once_and_much_that_waits, two_at_once_the_other_way_round]
    results = [came(build) for build in builds]
    for one, (said, seen) in enumerate(results):
        for said_there, seen_there in results[one:]:
            assert (said == said_there) is (seen == seen_there), (seen, seen_there)
    assert results[0][1] == results[2][1] != results[1][1]


def test_no_order_on_several_devices():
    here, there = nn.Parameter(torch.randn(3)), nn.Parameter(torch.empty(3, device="meta"))
    assert leaf_order((here * 2).sum(), [here]) is not None
    assert leaf_order((here.to("meta") * there).sum(), [here, there]) is None


def test_no_order_where_three_leaves_are_ready_at_once():
    a, b, c = (nn.Parameter(torch.randn(3)) for _ in range(3))
    assert leaf_order(torch.stack([a, b, c]).sum(), [a, b, c]) is None
