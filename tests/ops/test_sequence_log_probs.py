"""sequence_log_probs: values, gradients, two backward passes, and no fp32 copy of all logits."""

import sys

import pytest
import torch

from ssiuu_fast import answer_token_counts, sequence_log_probs

# the function has the module's name
MODULE = sys.modules[sequence_log_probs.__module__]


@pytest.fixture(params=[1, 7 * 11, 10**9], ids=["token", "some", "whole"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK_ELEMENTS", request.param)


def rows(dtype=torch.float64, samples=3, length=6, vocabulary=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(samples, length, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, vocabulary, (samples, length), generator=generator)
    labels[torch.rand(samples, length, generator=generator) < 0.4] = -100
    labels[0, :4] = -100
    return logits.requires_grad_(), labels


def plain(logits, labels):
    log_probs = logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    chosen = log_probs.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    return torch.where(targets == -100, 0.0, chosen).sum(1)


def test_by_hand():
    # two classes with logits (0, ln 3): probabilities 1/4 and 3/4; answer tokens 1, 0 at positions 1 and 2
    logits = torch.tensor([0.0, 3.0]).log().nan_to_num(neginf=0.0).expand(1, 4, 2).contiguous()
    labels = torch.tensor([[1, 1, 0, -100]])
    # the label of position 0 has nothing before it and doesn't count
    expected = torch.tensor([3 / 4 * 1 / 4]).log()
    torch.testing.assert_close(sequence_log_probs(logits, labels), expected)
    assert answer_token_counts(labels).tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(chunk, dtype):
    for seed in range(5):
        logits, labels = rows(dtype, seed=seed)
        ours, truth = sequence_log_probs(logits, labels), plain(logits, labels)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, truth)
        weights = torch.linspace(-1, 2, 3, dtype=dtype)
        ours_gradient = torch.autograd.grad(ours @ weights, logits)[0]
        torch.testing.assert_close(ours_gradient, torch.autograd.grad(truth @ weights, logits)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_fp32(chunk, dtype):
    logits, labels = rows(dtype, length=40)
    ours = sequence_log_probs(logits, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain(logits.double(), labels).float(), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(ours.sum(), logits)
    truth = torch.autograd.grad(plain(logits.double(), labels).sum(), logits)[0]
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, truth, rtol=1e-2, atol=1e-6)


def test_backward_twice_over_one_graph_with_other_weights(chunk):
    logits, labels = rows()
    log_probs = sequence_log_probs(logits, labels)
    first = torch.autograd.grad(log_probs.exp().sum(), logits, retain_graph=True)[0]
    second = torch.autograd.grad(log_probs[1], logits)[0]
    torch.testing.assert_close(first, torch.autograd.grad(plain(logits, labels).exp().sum(), logits)[0])
    torch.testing.assert_close(second, torch.autograd.grad(plain(logits, labels)[1], logits)[0])


def test_any_strides():
    logits, labels = rows()
    turned = logits.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    torch.testing.assert_close(sequence_log_probs(turned, labels), plain(logits, labels).detach())


def test_positions_outside_the_answer_may_hold_anything():
    logits, labels = rows()
    poisoned = logits.detach().clone()
    outside = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1) == -100
    poisoned[outside] = float("nan")
    poisoned.requires_grad_()
    log_probs = sequence_log_probs(poisoned, labels)
    torch.testing.assert_close(log_probs, plain(logits, labels))
    (gradient,) = torch.autograd.grad(log_probs.sum(), poisoned)
    assert (gradient[outside] == 0).all()


def test_no_answer_tokens_and_one_position():
    logits, labels = rows()
    assert sequence_log_probs(logits, torch.full_like(labels, -100)).tolist() == [0, 0, 0]
    assert sequence_log_probs(logits[:, :1], labels[:, :1]).tolist() == [0, 0, 0]
    assert sequence_log_probs(logits[:0], labels[:0]).shape == (0,)


def test_the_logits_are_never_copied_whole():
    logits = torch.randn(4, 200, 4000, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 4000, (4, 200))
    with torch.profiler.profile(profile_memory=True) as profile:
        sequence_log_probs(logits, labels).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    # the gradient itself is 4·200·4000 bf16; an fp32 copy of all logits would be twice that
    assert largest < 4 * 200 * 4000 * 2 + 17 * 2**20 < 4 * 200 * 4000 * 4 + 17 * 2**20
    assert max(e.cpu_memory_usage for e in profile.events() if e.name in ("aten::logsumexp", "aten::exp")) <= 16 * 2**20


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), r"shape \[B, T, V\], got torch.float32 \[2, 3\]"),
        (torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64), r"\[2, 3\] like the logits, got \[2, 4\]"),
        (torch.zeros(2, 3, 5), torch.zeros(2, 3), "labels must be int64"),
        (torch.zeros(2, 3, 5), torch.full((2, 3), 5), "label 5 is outside the vocabulary of 5"),
        (torch.zeros(2, 3, 5), torch.full((2, 3), -1), "label -1 is outside"),
    ],
)
def test_bad_input(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        sequence_log_probs(logits, labels)
