"""What SSIUURegularizer(granularity="neuron") carries from step to step: its saved state and the calibrated weight."""

import copy

import pytest
import torch
from neurons import IDS, move, neurons
from plain_neurons import PlainNeurons
from steps import assert_close, gradients, step
from tiny import batch, log_probs_of, tiny_llama

from ssiuu_fast import SSIUURegularizer, answer_token_counts, neuron_references
from ssiuu_fast.planning.live_memory import LiveMemory


@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_state_round_trip(reference, tmp_path):
    model = tiny_llama()
    options = {"weight": 1e-3, "relative_weight": 3.0, "reference": reference}
    whole = neurons(model, **options)
    if reference == "initial":
        whole.set_reference([(log_probs_of(model, batch(seed=seed)), None, IDS + 5 * seed) for seed in range(3)])
    for seed in range(3):
        move(model)
        step(model, whole, batch(seed=seed), ids=IDS + 5 * seed)
        whole.after_backward()
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    other_model = copy.deepcopy(model)
    resumed = neurons(other_model, **options)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in (0, 1, 2, 0, 1):
        move(model), move(other_model)
        ids = IDS + 5 * seed
        penalty = step(model, whole, batch(seed=seed), ids=ids)
        assert penalty == step(other_model, resumed, batch(seed=seed), ids=ids) > 0
        whole.after_backward(), resumed.after_backward()
        assert_close(gradients(other_model), gradients(model), bound=0)
    assert whole.weight is not None
    assert whole.weight == resumed.weight
    if reference == "initial":
        with pytest.raises(ValueError, match="sample id 15 was not in the pass"):
            step(other_model, resumed, batch(), ids=IDS + 11)


def test_a_state_of_another_kind_is_refused_and_changes_nothing():
    model = tiny_llama()
    regularizer = neurons(model)
    step(model, regularizer, batch())
    state = regularizer.state_dict()
    other = SSIUURegularizer(model, target="log_probability")
    with pytest.raises(ValueError, match="granularity='neuron', this regulariser granularity='parameter'"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="granularity='parameter', this regulariser granularity='neuron'"):
        neurons(model).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="reference='previous', this regulariser reference='initial'"):
        neurons(model, reference="initial").load_state_dict(state)
    fewer = neurons(model, parameters=["*down_proj*"])
    with pytest.raises(
        ValueError, match=r"other modules: model\.layers\.0\.mlp\.gate_proj has 24 neurons there, no here"
    ):
        fewer.load_state_dict(state)
    wider = tiny_llama(intermediate_size=32)
    with pytest.raises(ValueError, match=r"gate_proj has 24 neurons there, 32 here"):
        neurons(wider).load_state_dict(state)
    assert fewer.state_dict()["references"] == {}


def plain_norms(truth, rows):
    """(‖∇L‖, ‖∂R/∂φ‖) of the step by plain autograd."""
    log_probs, counts, outputs = truth.forward(rows)
    parameters = list(truth.model.parameters())
    loss = torch.autograd.grad(log_probs.sum() / counts.sum(), parameters, retain_graph=True)
    attributions, g = truth.measure(log_probs, counts, outputs)
    total = sum(
        (2 * torch.where(a < 0, a - truth.stored.get(name, a), 0.0) * g[name] * outputs[name]).sum()
        for name, a in attributions.items()
    )
    truth.stored = attributions
    penalty = torch.autograd.grad(total, parameters, allow_unused=True)
    return tuple(
        sum((gradient**2).sum() for gradient in gradients if gradient is not None).sqrt().item()
        for gradients in (loss, penalty)
    )


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_relative_weight_is_r_times_the_median_ratio_and_adds_nothing_before(checkpointing, scale):
    model, plain = tiny_llama(), tiny_llama()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    truth = PlainNeurons(tiny_llama(), 0.0, target="log_probability")
    regularizer = neurons(model, relative_weight=30.0)
    ratios = []
    for seed in range(5):
        rows = batch(seed=seed)
        model.zero_grad(), plain.zero_grad()
        step(model, regularizer, rows, scale=scale)
        (scale * log_probs_of(plain, rows).sum() / answer_token_counts(rows["labels"]).sum()).backward()
        # .grad is the loss's alone
        assert_close(gradients(model), gradients(plain), bound=1e-12 if checkpointing else 0)
        loss_norm, penalty_norm = plain_norms(truth, rows)
        assert regularizer.last_step.penalty_gradient_norm == pytest.approx(penalty_norm, rel=1e-9)
        assert regularizer.last_step.added_norm == regularizer.penalty_share(1.0) == 0
        regularizer.after_backward(scale)
        if seed:
            ratios.append(loss_norm / penalty_norm)
    assert regularizer.weight == pytest.approx(30.0 * (sorted(ratios)[1] + sorted(ratios)[2]) / 2)
    model.zero_grad()
    step(model, regularizer, batch(seed=5), scale=scale)
    assert regularizer.last_step.penalty_gradient_norm is None
    assert regularizer.last_step.added_norm is None
    regularizer.after_backward(scale)


def test_relative_weight_over_micro_batches_and_frozen_weights():
    figures = []
    for micro_batches in (1, 3):
        model = tiny_llama()
        model.model.embed_tokens.requires_grad_(False)
        regularizer = neurons(model, relative_weight=30.0, reference="initial")
        rows = batch(seed=0)
        regularizer.set_reference([(log_probs_of(model, rows), None, IDS)])
        for _ in range(5):
            move(model)
            step(model, regularizer, rows, micro_batches=micro_batches, ids=IDS)
            norm = regularizer.last_step.penalty_gradient_norm
            regularizer.after_backward()
        figures.append((norm, regularizer.weight))
    assert figures[0] == pytest.approx(figures[1], rel=1e-9)
    assert figures[0][0] > 0


def test_relative_weight_needs_after_backward_and_a_literal_weight_refuses_it():
    model = tiny_llama()
    regularizer = neurons(model, relative_weight=30.0)
    step(model, regularizer, batch())
    with pytest.raises(RuntimeError, match=r"after_backward\(\) was not called"):
        step(model, regularizer, batch())
    with pytest.raises(RuntimeError, match="only for relative_weight"):
        neurons(model).after_backward()


def test_calibration_holds_one_gradient_at_a_time():
    """Weights much larger than outputs: what a pass holds at most is seen in the hooks of the parameters."""
    model = tiny_llama(vocab_size=64, hidden_size=128, intermediate_size=256)
    weights = sum(p.nbytes for p in model.parameters())
    rows = batch(samples=2)
    regularizer = neurons(model, relative_weight=3.0)
    step(model, regularizer, rows)
    regularizer.after_backward()
    move(model)
    highest = 0
    with LiveMemory() as live:
        log_probs = log_probs_of(model, rows)
        forward = live.bytes()

        def look(gradient):
            nonlocal highest
            highest = max(highest, live.bytes() - forward)

        handles = [p.register_hook(look) for p in model.parameters()]
        regularizer.backward(log_probs)
        for handle in handles:
            handle.remove()
        assert all(p.grad is None for p in model.parameters())
    assert regularizer.last_step.penalty_gradient_norm > 0
    assert 0 < highest < weights / 3


def test_a_share_that_is_not_known_is_not_warned_of(recwarn):
    model = tiny_llama(torch.float32)
    regularizer = neurons(model, weight=1e-9)
    for seed in range(15):
        step(model, regularizer, batch(seed=seed))
        share = regularizer.penalty_share(1.0)
        # in the first step R = 0, so nothing was added
        assert share == (None if seed else 0)
    assert not [warning for warning in recwarn if "too little" in str(warning.message)]


def test_a_step_of_another_size_is_warned_of_once():
    model = tiny_llama()
    regularizer = neurons(model)
    step(model, regularizer, batch(samples=5))
    with pytest.warns(UserWarning, match="3 forget samples is compared with a reference over 5") as said:
        step(model, regularizer, batch(samples=3))
        step(model, regularizer, batch(samples=4))
    assert len(said) == 1


def test_float16_is_calibrated_at_a_large_scale():
    weights = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 1024.0)):
        model = tiny_llama(dtype)
        regularizer = neurons(model, relative_weight=3.0)
        for seed in range(5):
            model.zero_grad()
            step(model, regularizer, batch(seed=seed), scale=scale)
            regularizer.after_backward(scale)
        weights.append(regularizer.weight)
    assert weights[1] == pytest.approx(weights[0], rel=0.05)


@pytest.mark.parametrize(("relative_weight", "count"), [(1e-3, 1), (1.0, 0)])
def test_a_penalty_that_16_bits_swallow_is_known_by_its_calibration(relative_weight, count, recwarn):
    model = tiny_llama(torch.bfloat16)
    regularizer = neurons(model, relative_weight=relative_weight)
    for seed in range(8):
        model.zero_grad()
        step(model, regularizer, batch(seed=seed))
        regularizer.after_backward()
    said = [str(warning.message) for warning in recwarn if "too little to matter" in str(warning.message)]
    assert len(said) == count
    assert all("16-bit gradients swallow" in message for message in said)


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(reference):
    model = tiny_llama()
    regularizer = neurons(model, reference=reference)
    if reference == "initial":
        regularizer.set_reference([(log_probs_of(model, batch()), None, IDS)])
    step(model, regularizer, batch(), ids=IDS)
    state = regularizer.state_dict()
    name = "model.layers.0.mlp.down_proj"
    references = state["references"]
    keys = {"settings", "step", "weight", "ratios", "neurons", "references"}
    keys |= {"reference_samples"} if reference == "previous" else {"reference_ids", "reference_complete"}
    broken = {f"has no {key!r}": without(state, key) for key in keys}
    broken["of elsewhere, which is no tapped module"] = state | {"references": {"elsewhere": references[name]}}
    shape = r"\[17\], they must be \[16\]" if reference == "previous" else r"\[5, 17\], they must be \[5, 16\]"
    wide = torch.zeros(17) if reference == "previous" else torch.zeros(5, 17)
    broken[rf"{name} as {shape}"] = state | {"references": references | {name: wide}}
    if reference == "initial":
        broken[r"as \[5, 16\], they must be \[4, 16\]"] = state | {"reference_ids": [0, 1, 2, 3]}
        broken["a sample id twice"] = state | {"reference_ids": [0, 1, 2, 3, 3]}
    other = neurons(model, reference=reference)
    empty = other.state_dict()
    for message, bad in broken.items():
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(bad)
        assert other.state_dict() == empty
    other.load_state_dict(state)
    assert other.state_dict()["references"].keys() == references.keys()


def test_a_state_of_another_precision_is_cast():
    model, double = tiny_llama(torch.float32), tiny_llama(torch.float64)
    one, other = neurons(model), neurons(double)
    step(model, one, batch(seed=0))
    other.load_state_dict(one.state_dict())
    assert {tensor.dtype for tensor in other.state_dict()["references"].values()} == {torch.float64}
    move(model), move(double)
    rows = batch(seed=1)
    assert step(double, other, rows) == pytest.approx(step(model, one, rows), rel=1e-3)
    one.load_state_dict(other.state_dict())
    step(model, one, rows)


def test_initial_references_that_are_known_are_not_looked_at_again(monkeypatch):
    sent = []
    real = neuron_references.to_device
    monkeypatch.setattr(neuron_references, "to_device", lambda *what: sent.append(what) or real(*what))
    model = tiny_llama()
    regularizer = neurons(model, reference="initial")
    regularizer.set_reference([(log_probs_of(model, batch()), None, IDS)])
    stored = {name: tensor.clone() for name, tensor in regularizer.state_dict()["references"].items()}
    for _ in range(2):
        move(model)
        sent.clear()
        step(model, regularizer, batch(), ids=IDS.flip(0))
        # one index for all modules
        assert sent == [([4, 3, 2, 1, 0], torch.device("cpu"))]
    assert_close(regularizer.state_dict()["references"], stored, bound=0)


@pytest.mark.filterwarnings("ignore:reference='initial'")
def test_initial_references_that_come_with_the_steps_are_saved_without_their_room():
    model = tiny_llama()
    regularizer = neurons(model, reference="initial")
    expected = {}
    for number in range(4):
        step(model, regularizer, batch(seed=number, samples=2), ids=torch.tensor([2 * number, 2 * number + 1]))
        for name, tensor in regularizer.state_dict()["references"].items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            assert len(tensor) == 2 * number + 2
            if name in expected:
                assert torch.equal(tensor[:-2], expected[name])
            expected[name] = tensor.clone()
