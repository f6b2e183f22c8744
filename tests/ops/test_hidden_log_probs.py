"""sequence_log_probs_from_hidden: what sequence_log_probs gives of the head's logits, which never exist."""

import sys

import pytest
import torch
from three_way import assert_three_way
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from ssiuu_fast import sequence_log_probs, sequence_log_probs_from_hidden
from ssiuu_fast.ops.sequence_log_probs import ROW_FUNCTIONS
from ssiuu_fast.planning.live_memory import LiveMemory

# the function has the module's name
MODULE = sys.modules[sequence_log_probs.__module__]
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.fixture(params=[1, 7 * 11, 10**9], ids=["narrow", "some", "whole"])
def chunk(request, monkeypatch):
    """Slices of the vocabulary as narrow as they get (as wide as a row of hidden), wider ones, one."""
    monkeypatch.setattr(MODULE, "CHUNK_ELEMENTS", request.param)


def rows(dtype=torch.float64, samples=3, length=6, width=4, vocabulary=11, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    hidden, weight, bias = leaf(samples, length, width), leaf(vocabulary, width), leaf(vocabulary)
    labels = torch.randint(0, vocabulary, (samples, length), generator=generator)
    labels[torch.rand(samples, length, generator=generator) < 0.4] = -100
    labels[0, :4] = -100
    return hidden, weight, bias, labels


def plain(hidden, weight, bias, labels):
    return sequence_log_probs(linear(hidden, weight, bias), labels)


def gradients(log_probs, weights, leaves, **options):
    return torch.autograd.grad(log_probs @ weights.to(log_probs), leaves, **options)


def test_by_hand():
    # hidden states of one element, 1 and 2; head 0 and ln 3: probabilities 1/4, 3/4 and 1/10, 9/10
    hidden = torch.tensor([[[1.0], [2.0], [5.0]]], requires_grad=True)
    weight = torch.tensor([[0.0], [3.0]]).log().nan_to_num(neginf=0.0).requires_grad_()
    # the label of position 0 has nothing before it, and nothing comes after position 2
    labels = torch.tensor([[0, 1, 0]])
    log_probs = sequence_log_probs_from_hidden(hidden, weight, labels)
    torch.testing.assert_close(log_probs, torch.tensor([3 / 4 * 1 / 10]).log())
    of_hidden, of_weight = torch.autograd.grad(log_probs.sum(), [hidden, weight])
    ln3 = torch.tensor(3.0).log()
    # Σ_v (1[v=y] − p_v) w_v, and Σ_t (1[v=y_t] − p_v) h_t
    torch.testing.assert_close(of_hidden, torch.stack([ln3 / 4, -ln3 * 9 / 10, 0 * ln3]).reshape(1, 3, 1))
    torch.testing.assert_close(of_weight, torch.tensor([[-1 / 4 + 2 * 9 / 10], [1 / 4 - 2 * 9 / 10]]))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients(chunk, dtype, biased):
    close = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
    for seed, shape in enumerate([{}, {"samples": 1, "length": 2}, {"length": 31, "vocabulary": 53}, {"width": 1}]):
        hidden, weight, bias, labels = rows(dtype, seed=seed, **shape)
        leaves = [hidden, weight, bias] if biased else [hidden, weight]
        bias = bias if biased else None
        ours = sequence_log_probs_from_hidden(hidden, weight, labels, bias=bias)
        truth = plain(hidden, weight, bias, labels)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, truth, **close)
        weights = torch.linspace(-1, 2, len(labels))
        for found, expected in zip(gradients(ours, weights, leaves), gradients(truth, weights, leaves), strict=True):
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elements", [1, 10**9], ids=["narrow", "whole"])
def test_half_precision_is_no_worse_than_the_heads_own(dtype, elements, monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK_ELEMENTS", elements)
    for seed in range(3):
        # 63 slices of the vocabulary, or one
        leaves = rows(dtype, samples=4, length=40, width=16, vocabulary=1001, seed=seed)
        *leaves, labels = leaves
        weights = torch.linspace(-1, 2, 4)

        def both(form, leaves, labels=labels, weights=weights):
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            log_probs = form(*leaves, labels)
            return [log_probs, *gradients(log_probs, weights, leaves)]

        def ours(hidden, weight, bias, labels):
            return sequence_log_probs_from_hidden(hidden, weight, labels, bias=bias)

        found, transcribed = both(ours, leaves), both(plain, leaves)
        truth = both(plain, [leaf.double() for leaf in leaves])
        for name, *three in zip(("value", "hidden's", "weight's", "bias's"), found, transcribed, truth, strict=True):
            assert three[0].dtype == three[1].dtype
            assert_three_way(*three, name)


def test_backward_twice_over_one_graph_with_other_weights(chunk):
    *leaves, labels = rows()
    hidden, weight, bias = leaves
    ours = sequence_log_probs_from_hidden(hidden, weight, labels, bias=bias)
    truth = plain(hidden, weight, bias, labels)
    for weights in (torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.0, 1.0, 0.0])):
        found = gradients(ours, weights, leaves, retain_graph=True)
        expected = gradients(truth, weights, leaves, retain_graph=True)
        torch.testing.assert_close(found, expected)


def test_samples_without_answers(chunk):
    hidden, weight, bias, labels = rows()
    labels[1] = -100
    log_probs = sequence_log_probs_from_hidden(hidden, weight, labels, bias=bias)
    assert log_probs[1] == 0 and log_probs[2] != 0
    of_hidden, of_weight = gradients(log_probs, torch.ones(3), [hidden, weight])
    assert (of_hidden[1] == 0).all() and of_weight.any()
    none = sequence_log_probs_from_hidden(hidden, weight, torch.full_like(labels, -100), bias=bias)
    assert none.tolist() == [0, 0, 0]
    assert not any(gradient.any() for gradient in gradients(none, torch.ones(3), [hidden, weight, bias]))
    assert sequence_log_probs_from_hidden(hidden[:, :1], weight, labels[:, :1]).tolist() == [0, 0, 0]
    assert sequence_log_probs_from_hidden(hidden[:0], weight, labels[:0]).shape == (0,)


def test_positions_outside_the_answer_may_hold_anything():
    hidden, weight, _, labels = rows()
    poisoned = hidden.detach().clone()
    outside = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1) == -100
    poisoned[outside] = float("nan")
    poisoned.requires_grad_()
    log_probs = sequence_log_probs_from_hidden(poisoned, weight, labels)
    torch.testing.assert_close(log_probs, plain(hidden, weight, None, labels))
    of_hidden, of_weight = gradients(log_probs, torch.ones(3), [poisoned, weight])
    assert (of_hidden[outside] == 0).all() and of_weight.isfinite().all()


def test_any_strides_and_another_ignored_index():
    hidden, weight, _, labels = rows()
    labels = labels.masked_fill(labels == -100, 7)
    turned = hidden.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    turned_weight = weight.detach().T.contiguous().T.requires_grad_()
    ours = sequence_log_probs_from_hidden(turned, turned_weight, labels, ignore_index=7)
    truth = sequence_log_probs(hidden @ weight.T, labels, ignore_index=7)
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(
        gradients(ours, torch.ones(3), [turned, turned_weight]), gradients(truth, torch.ones(3), [hidden, weight])
    )


def test_what_is_frozen_costs_no_product():
    hidden, weight, bias, labels = rows()
    answers = (labels[:, 1:] != -100).sum().item()
    product = 2 * answers * weight.numel()
    # the logits once more, and a product for each of the two that have a gradient
    for frozen, products in ((weight, 2), (hidden, 2), (None, 3)):
        leaves = [leaf.detach().requires_grad_(leaf is not frozen) for leaf in (hidden, weight)]
        log_probs = sequence_log_probs_from_hidden(*leaves, labels, bias=bias.detach())
        with LiveMemory() as memory:
            log_probs.sum().backward()
        assert memory.flops == products * product
        assert [leaf.grad is not None for leaf in leaves] == [leaf.requires_grad for leaf in leaves]
        truth = gradients(plain(hidden, weight, bias, labels), torch.ones(3), [hidden, weight])
        for leaf, expected in zip(leaves, truth, strict=True):
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, expected)
    with torch.no_grad():
        assert not sequence_log_probs_from_hidden(hidden, weight, labels).requires_grad


def test_what_a_pass_does_not_lead_to_costs_no_product():
    hidden, weight, bias, labels = rows()
    product = 2 * (labels[:, 1:] != -100).sum().item() * weight.numel()
    log_probs = sequence_log_probs_from_hidden(hidden.tanh(), weight, labels, bias=bias)
    for leaves, products in (([hidden], 2), ([weight], 2), ([hidden, weight, bias], 3), ([bias], 1)):
        with LiveMemory() as memory:
            found = gradients(log_probs, torch.ones(3), leaves, retain_graph=True)
        assert memory.flops == products * product
        truth = gradients(plain(hidden.tanh(), weight, bias, labels), torch.ones(3), leaves)
        torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("inside", [False, True])
def test_under_checkpointing(inside):
    hidden, weight, _, labels = rows()

    def run(hidden):
        hidden = torch.tanh(hidden @ torch.eye(4, dtype=hidden.dtype))
        return sequence_log_probs_from_hidden(hidden, weight, labels) if inside else hidden

    ours = checkpoint(run, hidden, use_reentrant=False)
    if not inside:
        ours = sequence_log_probs_from_hidden(ours, weight, labels)
    truth = plain(torch.tanh(hidden), weight, None, labels)
    for weights in (torch.ones(3), torch.tensor([0.0, -1.0, 2.0])):
        torch.testing.assert_close(
            gradients(ours, weights, [hidden, weight], retain_graph=True),
            gradients(truth, weights, [hidden, weight], retain_graph=True),
        )


def test_under_autocast_it_does_what_the_head_does(chunk):
    *leaves, labels = rows(torch.float32, length=20)
    hidden, weight, bias = leaves
    with torch.autocast("cpu", torch.bfloat16):
        ours = sequence_log_probs_from_hidden(hidden, weight, labels, bias=bias)
        logits = linear(hidden, weight, bias)
        truth = sequence_log_probs(logits, labels)
        assert logits.dtype == torch.bfloat16
        # a backward pass inside or outside of it is the same
        inside = gradients(ours, torch.ones(3), leaves, retain_graph=True)
        doubles = (leaf.detach().double() for leaf in leaves[:2])
        assert sequence_log_probs_from_hidden(*doubles, labels).dtype == torch.float64
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
    outside = gradients(ours, torch.ones(3), leaves)
    for found, again, expected in zip(inside, outside, gradients(truth, torch.ones(3), leaves), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, again)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_fp32_in_autocasts_backward_stays_fp32():
    *leaves, labels = rows(torch.float32)
    log_probs = sequence_log_probs_from_hidden(*leaves[:2], labels)
    expected = gradients(log_probs, torch.ones(3), leaves[:2], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(log_probs, torch.ones(3), leaves[:2])
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_never_exist(dtype, monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK_ELEMENTS", 2**18)
    hidden, weight, _, labels = rows(dtype, samples=4, length=128, width=32, vocabulary=4000)
    answers = (labels[:, 1:] != -100).sum().item()
    # what the passes make anew: slices of logits, in fp32 and in passing; gradients; rows and their gradient
    kept = answers * (32 * dtype.itemsize + 3 * 8 + 4)
    made = (hidden.numel() + weight.numel()) * dtype.itemsize + answers * 32 * 4
    slices = 3 * 4 * 2**18
    with torch.profiler.profile(profile_memory=True) as profile, LiveMemory() as memory:
        log_probs = sequence_log_probs_from_hidden(hidden, weight, labels)
        assert memory.bytes() <= kept + 4096
        log_probs.sum().backward()
    assert memory.peak < kept + made + slices < labels.numel() * 4000 * dtype.itemsize
    assert max(event.cpu_memory_usage for event in profile.events()) <= max(4 * 2**18, weight.nbytes)


def test_functions_with_a_row_for_each_sample():
    hidden, weight, _, labels = rows()
    for log_probs in (sequence_log_probs_from_hidden(hidden, weight, labels), plain(hidden, weight, None, labels)):
        assert any(isinstance(log_probs.grad_fn, function._backward_cls) for function in ROW_FUNCTIONS)
        gradient = torch.autograd.grad(log_probs.exp().sum(), weight, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(2, 3)}, r"shape \[B, T, H\], got torch.float32 \[2, 3\]"),
        ({"weight": torch.zeros(5, 3)}, r"weight must be of shape \[V, 4\], as the head of hidden \[2, 3, 4\]"),
        ({"weight": torch.zeros(5, 4, dtype=torch.float64)}, "weight is torch.float64 and hidden torch.float32"),
        ({"bias": torch.zeros(4)}, r"bias must be of shape \[5\] like the weight's rows, got \[4\]"),
        ({"bias": torch.zeros(5).half()}, "bias is torch.float16 and hidden torch.float32"),
        ({"labels": torch.zeros(2, 4, dtype=torch.int64)}, r"\[2, 3\] like the hidden states, got \[2, 4\]"),
        ({"labels": torch.zeros(2, 3)}, "labels must be int64"),
        ({"labels": torch.full((2, 3), 5)}, "label 5 is outside the vocabulary of 5"),
        ({"labels": torch.full((2, 3), -1)}, "label -1 is outside"),
    ],
)
def test_bad_input(changed, message):
    arguments = {
        "hidden": torch.zeros(2, 3, 4),
        "weight": torch.zeros(5, 4),
        "labels": torch.zeros(2, 3, dtype=torch.int64),
    } | changed
    with pytest.raises(ValueError, match=message):
        sequence_log_probs_from_hidden(**arguments)
