"""SSIUURegularizer in the loops that people write: what it touches and what it keeps."""

import math

import pytest
import torch
from steps import WEIGHT, assert_close, gradients, step, two_steps
from tiny import batch, log_probs_of, part, tiny_llama
from torch import nn

from ssiuu_fast import SSIUURegularizer


@pytest.mark.parametrize("reference", ["previous", "initial"])
@pytest.mark.parametrize("target", ["probability", "mean_token_probability"])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.filterwarnings("ignore:reference='initial'")
def test_micro_batches_are_one_batch(count, target, reference):
    options = {"weight": WEIGHT, "target": target, "reference": reference}
    one, other = tiny_llama(), tiny_llama()
    whole, penalty = two_steps(one, SSIUURegularizer(one, **options))
    parts, parts_penalty = two_steps(other, SSIUURegularizer(other, **options), micro_batches=count)
    assert penalty > 0
    assert parts_penalty == pytest.approx(penalty, rel=1e-9)
    assert_close(parts, whole)


def test_grad_is_untouched_by_earlier_micro_batches():
    model = tiny_llama()
    regularizer = SSIUURegularizer(model, weight=WEIGHT)
    rows = batch()
    assert regularizer.backward(log_probs_of(model, part(rows, 0, 2)), last=False).item() == 0
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="between the micro-batches"):
        regularizer.state_dict()


def test_only_regularised_parameters_are_touched():
    model = tiny_llama()
    regularizer = SSIUURegularizer(model, weight=WEIGHT)
    for seed in range(2):
        regularizer.backward(log_probs_of(model, batch(seed=seed)))
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == set(regularizer.parameter_names)
    assert touched == {name for name, _ in model.named_parameters() if "_proj" in name}


def test_grad_that_holds_something_is_added_to():
    model, other = tiny_llama(), tiny_llama()
    expected, _ = two_steps(model, SSIUURegularizer(model, weight=WEIGHT))
    regularizer = SSIUURegularizer(other, weight=WEIGHT)
    step(other, regularizer, batch(seed=0))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.01)
            p.grad = torch.full_like(p, 0.25)
    held = [p.grad for p in other.parameters()]
    step(other, regularizer, batch(seed=1))
    assert all(p.grad is tensor for p, tensor in zip(other.parameters(), held, strict=True))
    assert_close({name: g - 0.25 for name, g in gradients(other).items()}, expected, bound=1e-8)


class Shared(nn.Module):
    """One linear module used twice, one frozen, one that only some batches use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in range(3))
        self.layers[1].weight.requires_grad_(False)

    def forward(self, x, extra):
        x = self.layers[1](torch.tanh(self.layers[0](torch.tanh(self.layers[0](x)))))
        if extra:
            x = self.layers[2](x)
        return torch.log_softmax(x, dim=-1)[:, 0]


def test_shared_frozen_and_unused_parameters():
    model = Shared()
    twice, frozen, sometimes = (layer.weight for layer in model.layers)
    regularizer = SSIUURegularizer(model, weight=3.0)
    assert regularizer.parameter_names == ["layers.0.weight", "layers.2.weight"]
    x = torch.randn(4, 6, dtype=torch.float64)
    previous = {}
    for extra in (True, False, True):
        model.zero_grad()
        chosen = [twice, sometimes] if extra else [twice]
        g = torch.autograd.grad(model(x, extra).exp().sum(), chosen)
        regularizer.backward(model(x, extra))
        assert frozen.grad is None
        attributions = dict(
            zip(chosen, (p.detach() * gradient for p, gradient in zip(chosen, g, strict=True)), strict=True)
        )
        for p, gradient in zip(chosen, g, strict=True):
            a = attributions[p]
            # before the first step there is no reference; a parameter outside the last step's graph had A = 0
            reference = previous.get(p, torch.zeros_like(a)) if previous else a
            torch.testing.assert_close(p.grad, 3.0 * 2 * torch.where(a < 0, a - reference, 0.0) * gradient)
        if not extra:
            assert sometimes.grad is None
        previous = attributions
        with torch.no_grad():
            twice.mul_(1.1)


def test_gradients_that_share_memory_are_parted():
    a, b = (nn.Parameter(torch.full((3,), value, dtype=torch.float64)) for value in (-1.0, 0.5))
    regularizer = SSIUURegularizer([("a", a), ("b", b)], weight=1.0)
    regularizer.backward((a + b).sum().sub(1.0).reshape(1))
    with torch.no_grad():
        a.sub_(1.0)
    # P = exp(-5.5), g = P for all, A_a = -2 P, A_a before = -exp(-2.5); b is positive
    regularizer.backward((a + b).sum().sub(1.0).reshape(1))
    p = math.exp(-5.5)
    torch.testing.assert_close(a.grad, torch.full_like(a, 2 * (-2 * p + math.exp(-2.5)) * p))
    assert b.grad.tolist() == [0, 0, 0]


def test_non_reentrant_checkpointing_changes_nothing():
    model, checkpointed = tiny_llama(), tiny_llama()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected, _ = two_steps(model, SSIUURegularizer(model, weight=WEIGHT))
    ours, _ = two_steps(checkpointed, SSIUURegularizer(checkpointed, weight=WEIGHT))
    assert_close(ours, expected)


def test_reentrant_checkpointing_is_refused_with_the_remedy():
    model = tiny_llama()
    before = SSIUURegularizer(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        SSIUURegularizer(model)
    with pytest.raises(RuntimeError, match="'use_reentrant': False"):
        step(model, before, batch())


def test_scale_multiplies_the_gradient_alone():
    model, scaled = tiny_llama(), tiny_llama()
    unscaled, regularizer = SSIUURegularizer(model, weight=WEIGHT), SSIUURegularizer(scaled, weight=WEIGHT)
    expected, penalty = two_steps(model, unscaled)
    ours, scaled_penalty = two_steps(scaled, regularizer, scale=1024.0)
    assert scaled_penalty == pytest.approx(penalty, rel=1e-12)
    assert_close({name: g / 1024 for name, g in ours.items()}, expected)
    added = regularizer.last_step.added_norm
    assert added == pytest.approx(unscaled.last_step.added_norm, rel=1e-9)


def test_half_precision_weights():
    model = tiny_llama(torch.bfloat16)
    regularizer = SSIUURegularizer(model, weight=1e3, target="log_probability")
    ours, _ = two_steps(model, regularizer)
    exact = tiny_llama(torch.float64)
    exact.load_state_dict(tiny_llama(torch.bfloat16).state_dict())
    truth, penalty = two_steps(exact, SSIUURegularizer(exact, weight=1e3, target="log_probability"))
    assert regularizer.last_step.penalty == pytest.approx(penalty, rel=0.2)
    for name in regularizer.parameter_names:
        assert ours[name].dtype == torch.bfloat16
        error = (ours[name].double() - truth[name]).norm() / truth[name].norm()
        assert error < 0.15, f"{name}: {error:.2f}"
    assert all(t.dtype == torch.bfloat16 for t in regularizer.state_dict()["references"].values())


def test_a_float16_parameter_has_a_float32_reference():
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    regularizer = SSIUURegularizer([("w", weight)])
    regularizer.backward((weight * 0.1).float().sum().reshape(1))
    assert regularizer.state_dict()["references"]["w"].dtype == torch.float32


def test_every_skips_steps_and_multiplies_the_weight():
    model = tiny_llama()
    regularizer = SSIUURegularizer(model, weight=WEIGHT, every=3)
    weights = []
    for seed in range(7):
        model.zero_grad()
        rows = batch(seed=seed)
        before = regularizer.last_step
        regularizer.backward(log_probs_of(model, rows))
        if seed % 3:
            assert all(p.grad is None for p in model.parameters())
            assert regularizer.last_step is before
        else:
            weights.append(regularizer.last_step.weight)
            assert regularizer.last_step.added_norm == 3 * WEIGHT * regularizer.last_step.penalty_gradient_norm
    assert weights == [WEIGHT] * 3


def test_underflow_is_counted():
    weight = nn.Parameter(torch.tensor([1.0, 1.0]))
    regularizer = SSIUURegularizer([("w", weight)])
    regularizer.backward(weight * torch.tensor([-200.0, -1.0]))
    assert regularizer.last_step.underflows == 1
    regularizer = SSIUURegularizer([("w", weight)], target="mean_token_probability")
    regularizer.backward(weight * torch.tensor([-200.0, -1.0]), token_counts=torch.tensor([40, 1]))
    assert regularizer.last_step.underflows == 0


def test_initial_reference_is_the_mean_over_the_forget_set():
    model = tiny_llama()
    batches = [part(batch(samples=6), 0, 4), part(batch(samples=6), 4, 6)]
    regularizer = SSIUURegularizer(model, weight=WEIGHT, reference="initial")
    regularizer.set_reference(log_probs_of(model, rows) for rows in batches)
    weights = {name: p for name, p in model.named_parameters() if name in regularizer.parameter_names}
    g = torch.autograd.grad(sum(log_probs_of(model, rows).exp().sum() for rows in batches), list(weights.values()))
    step(model, regularizer, batch(samples=3, seed=5))
    references = regularizer.state_dict()["references"]
    for (name, p), gradient in zip(weights.items(), g, strict=True):
        torch.testing.assert_close(references[name], p.detach() * gradient * 3 / 6)
    assert regularizer.last_step.penalty > 0


def test_the_gradient_against_an_initial_reference():
    model = tiny_llama()
    whole = batch(samples=6)
    regularizer = SSIUURegularizer(model, weight=WEIGHT, reference="initial")
    regularizer.set_reference([log_probs_of(model, whole)])
    weights = {name: p for name, p in model.named_parameters() if name in regularizer.parameter_names}

    def attributions(rows):
        g = torch.autograd.grad(log_probs_of(model, rows).exp().sum(), list(weights.values()))
        return g, [(p * gradient).detach() for p, gradient in zip(weights.values(), g, strict=True)]

    _, initial = attributions(whole)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    rows = batch(samples=3, seed=5)
    regularizer.backward(log_probs_of(model, rows))
    g, now = attributions(rows)
    for p, gradient, a, start in zip(weights.values(), g, now, initial, strict=True):
        expected = WEIGHT * 2 * torch.where(a < 0, a - start * 3 / 6, 0.0) * gradient
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12)


def test_an_initial_reference_of_16_bit_weights_is_summed_in_fp32():
    weight = nn.Parameter(torch.full((4,), -1.0, dtype=torch.bfloat16))
    regularizer = SSIUURegularizer([("w", weight)], reference="initial", target="log_probability")
    regularizer.set_reference((weight.float() + 0.0).sum().reshape(1) for _ in range(1000))
    assert regularizer.state_dict()["references"]["w"].tolist() == [-1.0] * 4


def test_initial_reference_stays():
    model = tiny_llama()
    regularizer = SSIUURegularizer(model, reference="initial")
    with pytest.warns(UserWarning, match="without set_reference"):
        step(model, regularizer, batch(seed=0))
    kept = {name: t.clone() for name, t in regularizer.state_dict()["references"].items()}
    step(model, regularizer, batch(seed=1))
    for name, tensor in regularizer.state_dict()["references"].items():
        assert torch.equal(tensor, kept[name])


def test_a_step_of_another_size_is_warned_of_once():
    model = tiny_llama()
    regularizer = SSIUURegularizer(model)
    step(model, regularizer, batch(samples=5))
    with pytest.warns(UserWarning, match="3 forget samples is compared with a reference over 5"):
        step(model, regularizer, batch(samples=3))


def test_ddp_in_one_process_is_the_plain_model(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, wrapped = tiny_llama(), nn.parallel.DistributedDataParallel(tiny_llama())
        expected, _ = two_steps(model, SSIUURegularizer(model, weight=WEIGHT))
        ours, _ = two_steps(wrapped, SSIUURegularizer(wrapped, weight=WEIGHT))
        assert_close({name.removeprefix("module."): g for name, g in ours.items()}, expected)
        # its reducer must not be the last owner of the process group: that would join a thread that waits for the GIL
        del wrapped
    finally:
        torch.distributed.destroy_process_group()


def test_a_call_that_raises_abandons_the_step():
    weight = nn.Parameter(torch.tensor([-1.0]))
    regularizer = SSIUURegularizer([("w", weight)], target="log_probability")
    regularizer.backward(weight * 1.0, last=False)
    with pytest.raises(ValueError, match="is nan"):
        regularizer.backward(weight * float("nan"))
    regularizer.backward(weight * 1.0)
    assert regularizer.state_dict()["references"]["w"].item() == -1
    assert regularizer.state_dict()["reference_samples"] == 1
