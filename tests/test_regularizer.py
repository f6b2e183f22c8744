"""SSIUURegularizer against Algorithm 1 written out with plain autograd."""

import copy
import itertools
import warnings

import pytest
import torch
from steps import gradients, step
from tiny import batch, log_probs_of, tiny_llama
from torch import nn

from ssiuu_fast import SSIUURegularizer, answer_token_counts
from ssiuu_fast.ops import Blockwise8

# with every=2 the second regularised step is the third
STEPS = 3


def loss_of(model, rows):
    """A loss of the objective's kind: −NLL a token."""
    return log_probs_of(model, rows).sum() / answer_token_counts(rows["labels"]).sum()


def target_of(log_probs, counts, target):
    return {
        "probability": lambda: log_probs.exp().sum(),
        "log_probability": lambda: log_probs.sum(),
        "mean_token_probability": lambda: (log_probs / counts).exp().sum(),
    }[target]()


def block_weights(model, part="_proj.weight"):
    return {name: p for name, p in model.named_parameters() if part in name}


def algorithm_1(
    model,
    batches,
    *,
    weight,
    target="probability",
    reference="previous",
    one_sided=False,
    every=1,
    part="_proj.weight",
    state_dtype=None,
):
    """The gradient of every parameter in every step, R too; plain SGD between the steps."""
    chosen = block_weights(model, part)
    stored = None
    gradients, penalties = [], []
    for number, rows in enumerate(batches):
        counts = answer_token_counts(rows["labels"])
        loss = dict(
            zip(
                dict(model.named_parameters()),
                torch.autograd.grad(loss_of(model, rows), list(model.parameters())),
                strict=True,
            )
        )
        penalty = 0.0
        if number % every == 0:
            g = torch.autograd.grad(target_of(log_probs_of(model, rows), counts, target), list(chosen.values()))
            attribution = {name: (p * gradient).detach() for (name, p), gradient in zip(chosen.items(), g, strict=True)}
            for name, gradient in zip(chosen, g, strict=True):
                a = attribution[name]
                difference = torch.zeros_like(a) if stored is None else torch.where(a < 0, a - stored[name], 0.0)
                if one_sided:
                    difference = difference.clamp(max=0.0)
                penalty += (difference**2).sum().item()
                loss[name] = loss[name] + weight * every * 2 * difference * gradient
            if stored is None or reference == "previous":
                stored = {name: as_stored(a, state_dtype) for name, a in attribution.items()}
        gradients.append(loss)
        penalties.append(penalty)
        descend(model, loss)
    return gradients, penalties


def as_stored(attribution, state_dtype):
    if state_dtype == "8bit":
        return Blockwise8.encode(attribution).decode()
    return attribution.to(state_dtype or attribution.dtype).to(attribution.dtype)


def descend(model, gradients, rate=0.5):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p -= rate * gradients[name]


def regularized(model, batches, regularizer):
    collected, penalties = [], []
    for rows in batches:
        model.zero_grad()
        penalties.append(step(model, regularizer, rows))
        collected.append(gradients(model))
        descend(model, collected[-1])
    return collected, penalties


def assert_same_gradients(ours, truth, bound):
    for number, (a, b) in enumerate(zip(ours, truth, strict=True)):
        assert a.keys() == b.keys()
        for name in b:
            error = (a[name] - b[name]).abs().max() / b[name].abs().max()
            assert error <= bound, f"step {number}, {name}: {error:.2e}"


def penalty_norm_share(model, batches, weight, **options):
    with_penalty, _ = algorithm_1(copy.deepcopy(model), batches, weight=weight, **options)
    without, _ = algorithm_1(copy.deepcopy(model), batches[:2], weight=0.0, **options)
    difference = sum(((with_penalty[1][n] - without[1][n]) ** 2).sum() for n in without[1]).sqrt()
    return (difference / sum((g**2).sum() for g in with_penalty[1].values()).sqrt()).item()


def test_three_parameters_by_hand():
    # log P = φ·x − 6 with φ = (2, −1, 3), x = (1, 2, 2): log P = 0, P = 1, g = P x = x, A = φ x = (2, −2, 6)
    weights = nn.Parameter(torch.tensor([2.0, -1.0, 3.0]))
    x = torch.tensor([1.0, 2.0, 2.0])
    regularizer = SSIUURegularizer([("w", weights)], weight=0.5)
    log_probs = ((weights * x).sum() - 6).reshape(1)
    assert regularizer.backward(log_probs).item() == 0
    assert weights.grad.tolist() == [0, 0, 0]

    # φ = (1, −1, 3.5): log P = 0 again, A = (1, −2, 7): A₂ = −2 as before, so R stays 0
    weights.data = torch.tensor([1.0, -1.0, 3.5])
    weights.grad = None
    assert regularizer.backward(((weights * x).sum() - 6).reshape(1)).item() == 0

    # φ = (−2, −3, 7): log P = 0, A = (−2, −6, 14), A − A_prev = (−3, −4, 7); the last is not negative
    # R = 9 + 16 = 25; ∂R/∂φ = 2 (A − A_prev) g = (−6, −16, 0); half of it joins the .grad of (1, 1, 1)
    weights.data = torch.tensor([-2.0, -3.0, 7.0])
    weights.grad = torch.ones(3)
    assert regularizer.backward(((weights * x).sum() - 6).reshape(1)).item() == 25
    assert weights.grad.tolist() == [1 - 3, 1 - 8, 1]
    last = regularizer.last_step
    assert (last.penalty, last.negative_share, last.underflows, last.nonfinite) == (25, pytest.approx(2 / 3), 0, 0)
    assert last.penalty_gradient_norm == pytest.approx((36 + 256) ** 0.5)
    assert last.added_norm == pytest.approx(0.5 * (36 + 256) ** 0.5)


OPTIONS = [
    {"target": target, "reference": reference, "one_sided": one_sided, "every": every}
    for target, reference, one_sided, every in itertools.product(
        ("probability", "log_probability", "mean_token_probability"), ("previous", "initial"), (False, True), (1, 2)
    )
]
# λ at which the penalty is at least a tenth of the gradient
WEIGHTS = {"probability": 1e6, "log_probability": 1.0, "mean_token_probability": 1e3}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_gradient_is_algorithm_1s(options, dtype, bound):
    model = tiny_llama(dtype)
    batches = [batch(seed=seed) for seed in range(STEPS)]
    weight = WEIGHTS[options["target"]]
    expected_model = copy.deepcopy(model)
    truth, penalties = algorithm_1(expected_model, batches, weight=weight, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, our_penalties = regularized(model, batches, SSIUURegularizer(model, weight, **options))
    assert_same_gradients(ours, truth, bound)
    assert our_penalties == pytest.approx(penalties, rel=100 * bound)
    assert sum(penalties) > 0


@pytest.mark.parametrize("target", WEIGHTS)
def test_the_weights_above_make_the_penalty_matter(target):
    model = tiny_llama()
    share = penalty_norm_share(model, [batch(seed=seed) for seed in range(2)], WEIGHTS[target], target=target)
    assert share > 0.1


@pytest.mark.parametrize("part", ["down_proj.weight", "embed_tokens", "norm.weight"])
def test_chosen_parameters(part):
    model = tiny_llama(tie_word_embeddings=True)
    batches = [batch(seed=seed) for seed in range(STEPS)]
    truth, penalties = algorithm_1(copy.deepcopy(model), batches, weight=1e6, part=part)
    regularizer = SSIUURegularizer(model, 1e6, parameters=[f"*{part}*"])
    ours, our_penalties = regularized(model, batches, regularizer)
    assert all(part in name for name in regularizer.parameter_names)
    assert_same_gradients(ours, truth, 1e-9)
    assert our_penalties == pytest.approx(penalties, rel=1e-7)
    assert sum(penalties) > 0


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "8bit"])
def test_references_of_fewer_bits(state_dtype):
    model = tiny_llama(torch.float32)
    batches = [batch(seed=seed) for seed in range(STEPS)]
    truth, penalties = algorithm_1(copy.deepcopy(model), batches, weight=1e6, state_dtype=state_dtype)
    exact, _ = algorithm_1(copy.deepcopy(model), batches, weight=1e6)
    ours, our_penalties = regularized(model, batches, SSIUURegularizer(model, 1e6, state_dtype=state_dtype))
    assert_same_gradients(ours, truth, 1e-5)
    assert our_penalties == pytest.approx(penalties, rel=1e-3)
    with pytest.raises(AssertionError):
        assert_same_gradients(ours, exact, 1e-5)
