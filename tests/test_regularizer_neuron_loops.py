"""SSIUURegularizer(granularity="neuron") in people's loops: what arrives where, whatever the model is wrapped in."""

import copy
from types import SimpleNamespace

import pytest
import torch
from neurons import IDS, WEIGHT, Residual, left_padded, move, neurons, transcribed, two_steps
from plain_neurons import PlainNeurons
from steps import assert_close, gradients, step
from tiny import batch, log_probs_of, part, tiny_gpt2, tiny_llama
from torch import nn

from ssiuu_fast import SSIUURegularizer


class TwoLayers(nn.Module):
    """x → layers.0 (1 → 2) → layers.1 (2 → 1) → log P = its output + offset."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)])
        self.offset = 0.0

    def set(self, first, second, offset):
        with torch.no_grad():
            self.layers[0].weight.copy_(torch.tensor(first).reshape(2, 1))
            self.layers[1].weight.copy_(torch.tensor(second).reshape(1, 2))
        self.offset = offset

    def forward(self, x):
        return self.layers[1](self.layers[0](x)).reshape(-1) + self.offset


def test_two_layers_by_hand():
    model = TwoLayers()
    x = torch.ones(1, 1, 1)
    regularizer = SSIUURegularizer(model, weight=0.25, granularity="neuron")
    # h₀ = (1, −2), h₁ = −1, log P = 0, P = 1: g₁ = 1, A₁ = −1; g₀ = (1, 1), A₀ = (1, −2)
    model.set([1.0, -2.0], [1.0, 1.0], offset=1.0)
    log_probs = model(x)
    assert regularizer.backward(log_probs).item() == 0
    log_probs.sum().backward()
    assert model.layers[1].weight.grad.tolist() == [[1, -2]]
    assert model.layers[0].weight.grad.tolist() == [[1], [1]]

    # h₀ = (2, −4), h₁ = −2, P = 1 again: A₁ = −2 is 1 under its reference, A₀ = (2, −4) is (–, 2) under: R = 1 + 4
    model.zero_grad()
    model.set([2.0, -4.0], [1.0, 1.0], offset=2.0)
    log_probs = model(x)
    assert regularizer.backward(log_probs).item() == 5
    assert model.layers[0].weight.grad is None
    # ∂ log P/∂h₁ = 1; ¼ · 2 · (−1) · 1 = −½ is added: ½. ∂/∂h₀ = ½ · (1, 1) + ¼ · 2 · (0, −2) = (½, −½)
    log_probs.sum().backward()
    assert model.layers[1].weight.grad.tolist() == [[0.5 * 2, 0.5 * -4]]
    assert model.layers[0].weight.grad.tolist() == [[0.5], [-0.5]]
    last = regularizer.last_step
    assert (last.penalty, last.negative_share, last.underflows, last.nonfinite) == (5, pytest.approx(2 / 3), 0, 0)
    assert (last.penalty_gradient_norm, last.added_norm, last.absent) == (None, None, 0)
    assert regularizer.penalty_share(1.0) is None


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("reference", ["previous", "initial"])
@pytest.mark.filterwarnings("ignore:reference='initial'", "ignore:`gradient_checkpointing_enable`")
def test_non_reentrant_checkpointing_changes_nothing(reference, make):
    model, checkpointed = make(), make()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected, penalty = two_steps(model, neurons(model, reference=reference))
    ours, ours_penalty = two_steps(checkpointed, neurons(checkpointed, reference=reference))
    assert penalty > 0
    assert ours_penalty == pytest.approx(penalty, rel=1e-12)
    assert_close(ours, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_reentrant_checkpointing_is_refused_with_the_remedy():
    model = tiny_llama()
    before = neurons(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        neurons(model)
    with pytest.raises(RuntimeError, match="'use_reentrant': False"):
        step(model, before, batch())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_frozen_weights_have_neurons_too(checkpointing):
    def frozen():
        model = tiny_llama()
        model.requires_grad_(False)
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
        return model

    model = frozen()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    regularizer = neurons(model)
    assert regularizer.parameter_names == ["model.layers.0.mlp.up_proj.weight"]
    ours, penalty = two_steps(model, regularizer)
    ours = {name: gradient for name, gradient in ours.items() if gradient is not None}
    # the same neurons count, and in the frozen model those under the weight change nothing
    expected, expected_penalty = transcribed(tiny_llama())
    assert penalty == pytest.approx(expected_penalty, rel=1e-9)
    assert_close(ours, {name: expected[name] for name in regularizer.parameter_names})


@pytest.mark.parametrize("reference", ["previous", "initial"])
@pytest.mark.filterwarnings("ignore:reference='initial'")
def test_left_padding(reference):
    batches = [left_padded(batch(seed=seed)) for seed in range(2)]
    assert not batches[0]["attention_mask"][:, 0].all()
    model = tiny_llama()
    ours, penalty = two_steps(model, neurons(model, reference=reference), batches)
    expected, expected_penalty = transcribed(tiny_llama(), batches, reference=reference)
    assert penalty == pytest.approx(expected_penalty, rel=1e-9)
    assert_close(ours, expected)


@pytest.mark.parametrize("count", [2, 5])
def test_initial_references_are_of_samples_so_batches_can_be_split(count):
    """Rows of different lengths, together and one by one."""
    ends = []
    for micro_batches in (1, count):
        model = tiny_llama()
        regularizer = neurons(model, reference="initial")
        rows = batch(seed=0)
        regularizer.set_reference(
            (log_probs_of(model, part(rows, index, index + 1)), None, IDS[index : index + 1]) for index in range(5)
        )
        move(model)
        penalty = step(model, regularizer, rows, micro_batches=micro_batches, ids=IDS)
        figures = regularizer.last_step
        ends.append((gradients(model), penalty, figures.negative_share, figures.absent))
    (whole, penalty, *figures), (parts, parts_penalty, *parts_figures) = ends
    assert penalty > 0
    assert parts_penalty == pytest.approx(penalty, rel=1e-9)
    assert parts_figures == figures
    assert_close(parts, whole)


def test_set_reference_is_the_attribution_of_each_sample_at_the_start():
    model = tiny_llama()
    truth = PlainNeurons(copy.deepcopy(model), WEIGHT, target="log_probability", reference="initial")
    rows = batch(seed=0)
    truth.set_reference(rows, IDS)
    regularizer = neurons(model, reference="initial")
    regularizer.set_reference(
        (log_probs_of(model, part(rows, start, start + 3)), None, IDS[start : start + 3]) for start in (0, 3)
    )
    assert all(p.grad is None for p in model.parameters())
    move(model), move(truth.model)
    # in another order, one of them twice
    order = torch.tensor([3, 0, 0, 4])
    again = {name: tensor[order] for name, tensor in rows.items()}
    penalty = step(model, regularizer, again, ids=IDS[order])
    expected, expected_penalty = truth.step(again, IDS[order])
    assert penalty == pytest.approx(expected_penalty, rel=1e-9)
    assert_close(gradients(model), expected)


def test_scale_multiplies_the_gradient_alone():
    model, scaled = tiny_llama(), tiny_llama()
    regularizers = neurons(model), neurons(scaled)
    expected, penalty = two_steps(model, regularizers[0])
    ours, scaled_penalty = two_steps(scaled, regularizers[1], scale=1024.0)
    assert scaled_penalty == pytest.approx(penalty, rel=1e-12)
    assert_close({name: g / 1024 for name, g in ours.items()}, expected)
    one, other = (regularizer.state_dict()["references"] for regularizer in regularizers)
    assert_close(other, one)


def test_autocast():
    model, exact = tiny_llama(torch.float32), tiny_llama(torch.float32)
    regularizer = neurons(model, weight=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, penalty = two_steps(model, regularizer)
    expected, expected_penalty = two_steps(exact, neurons(exact, weight=1e-3))
    assert penalty == pytest.approx(expected_penalty, rel=0.2)
    assert all(tensor.dtype == torch.float32 for tensor in regularizer.state_dict()["references"].values())
    for name, gradient in expected.items():
        error = (ours[name] - gradient).norm() / gradient.norm()
        assert error < 0.15, f"{name}: {error:.2f}"


def test_every_skips_steps_and_multiplies_the_weight():
    model, other = tiny_llama(), tiny_llama()
    every, plain = neurons(model, every=2), neurons(other, weight=2 * WEIGHT)
    for seed in range(4):
        model.zero_grad()
        step(model, every, batch(seed=seed))
        if seed % 2 == 0:
            other.zero_grad()
            step(other, plain, batch(seed=seed))
            assert_close(gradients(model), gradients(other), bound=0)


class Sometimes(Residual):
    """Its last layer takes part when it is told to."""

    def __init__(self):
        super().__init__(in_place=False)
        self.whole = True

    def forward(self, input_ids, attention_mask):
        first, second, third = self.layers
        x = second(torch.tanh(first(self.embedding(input_ids))))
        return SimpleNamespace(logits=self.head(third(x) if self.whole else x))


def test_a_module_outside_the_graph_has_an_attribution_of_zero_and_is_counted():
    model = Sometimes()
    regularizer = neurons(model)
    references, absent = [], []
    for whole in (True, False, True):
        model.whole = whole
        penalty = step(model, regularizer, batch(seed=0))
        references.append(regularizer.state_dict()["references"])
        absent.append(regularizer.last_step.absent)
    assert absent == [0, 1, 0]
    _, before, now = references
    assert "layers.2" not in before
    # R = Σ (A − A_before)² where A < 0
    expected = sum(((a - before.get(name, 0)) ** 2)[a < 0].sum().item() for name, a in now.items())
    assert penalty == pytest.approx(expected)
    assert penalty > (now["layers.2"].clamp(max=0) ** 2).sum() > 0


@pytest.mark.filterwarnings("ignore:reference='initial'")
def test_a_module_outside_the_graph_keeps_its_initial_references():
    model = Sometimes()
    regularizer = neurons(model, reference="initial")
    step(model, regularizer, batch(seed=0), ids=IDS)
    stored = regularizer.state_dict()["references"]["layers.2"].clone()
    model.whole = False
    step(model, regularizer, batch(seed=0), ids=IDS + 3)
    model.whole = True
    kept = regularizer.state_dict()["references"]["layers.2"]
    assert torch.equal(kept[:5], stored)
    # of new samples it is learnt when it comes
    assert kept[5:].isnan().all()
    step(model, regularizer, batch(seed=0), ids=IDS + 3)
    kept = regularizer.state_dict()["references"]["layers.2"]
    assert torch.equal(kept[:5], stored) and not kept.isnan().any()


class Adapted(nn.Module):
    """A linear module with a low-rank adapter, as PEFT builds it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False, dtype=torch.float64)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_neurons_of_an_adapted_module_are_those_of_the_whole():
    model, merged = Residual(in_place=False), Residual(in_place=False)
    model.layers[1] = Adapted(model.layers[1])
    regularizers = neurons(model), neurons(merged)
    for seed in range(2):
        adapted = model.layers[1]
        merged.layers[1].weight.data = adapted.base_layer.weight + adapted.lora_B.weight @ adapted.lora_A.weight
        penalties = [step(m, r, batch(seed=seed)) for m, r in zip((model, merged), regularizers, strict=True)]
        assert penalties[0] == pytest.approx(penalties[1], rel=1e-9)
    assert penalties[0] > 0
    one, other = (regularizer.state_dict() for regularizer in regularizers)
    assert one["neurons"] == other["neurons"] == {f"layers.{index}": 6 for index in range(3)}
    assert_close(one["references"], other["references"])


def test_ddp_in_one_process_is_the_plain_model(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, wrapped = tiny_llama(), nn.parallel.DistributedDataParallel(tiny_llama())
        expected, _ = two_steps(model, neurons(model))
        ours, _ = two_steps(wrapped, neurons(wrapped))
        assert_close({name.removeprefix("module."): g for name, g in ours.items()}, expected)
        # its reducer must not be the last owner of the process group: that would join a thread that waits for the GIL
        del wrapped
    finally:
        torch.distributed.destroy_process_group()
