"""What SSIUURegularizer carries from step to step: its saved state, the calibrated weight, the penalty's share."""

import copy

import pytest
import torch
from steps import WEIGHT, assert_close, gradients, step
from tiny import batch, log_probs_of, tiny_llama

from ssiuu_fast import SSIUURegularizer, answer_token_counts


@pytest.mark.parametrize("reference", ["previous", "initial"])
@pytest.mark.filterwarnings("ignore:reference='initial'")
def test_state_round_trip(reference, tmp_path):
    model = tiny_llama()
    options = {"relative_weight": 3.0, "reference": reference}
    whole = SSIUURegularizer(model, **options)
    for seed in range(3):
        step(model, whole, batch(seed=seed))
        whole.after_backward()
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    other_model = copy.deepcopy(model)
    other_model.zero_grad()
    model.zero_grad()
    resumed = SSIUURegularizer(other_model, **options)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in range(3, 9):
        assert step(model, whole, batch(seed=seed)) == step(other_model, resumed, batch(seed=seed))
        whole.after_backward()
        resumed.after_backward()
    assert whole.weight is not None
    assert whole.weight == resumed.weight
    assert_close(gradients(other_model), gradients(model), bound=0)


def test_a_state_of_other_settings_or_parameters_is_refused_and_changes_nothing():
    model = tiny_llama()
    regularizer = SSIUURegularizer(model, weight=WEIGHT)
    step(model, regularizer, batch())
    state = regularizer.state_dict()
    other = SSIUURegularizer(model, weight=WEIGHT, target="log_probability")
    with pytest.raises(ValueError, match="target='probability', this regulariser target='log_probability'"):
        other.load_state_dict(state)
    fewer = SSIUURegularizer(model, weight=WEIGHT, parameters=["*down_proj*"])
    with pytest.raises(ValueError, match="unknown here, 'model.layers.0.mlp.gate_proj.weight'"):
        fewer.load_state_dict(state)
    assert fewer.state_dict()["references"] is None


def test_relative_weight_is_r_times_the_median_ratio_and_adds_nothing_before():
    model, plain = tiny_llama(), tiny_llama()
    regularizer = SSIUURegularizer(model, relative_weight=30.0)
    ratios = []
    for seed in range(7):
        rows = batch(seed=seed)
        model.zero_grad()
        step(model, regularizer, rows)
        if seed < 5:
            plain.zero_grad()
            (log_probs_of(plain, rows).sum() / answer_token_counts(rows["labels"]).sum()).backward()
            # bit for bit: .grad is the loss's alone
            assert_close(gradients(model), gradients(plain), bound=0)
            norm = sum((p.grad**2).sum() for p in regularizer.regularized_parameters).sqrt().item()
            regularizer.after_backward()
            if seed:
                ratios.append(norm / regularizer.last_step.penalty_gradient_norm)
                assert regularizer.last_step.added_norm == 0
        else:
            assert regularizer.last_step.added_norm > 0
            regularizer.after_backward()
    # the first step has R = 0 and doesn't count
    assert len(ratios) == 4
    assert regularizer.weight == pytest.approx(30.0 * (sorted(ratios)[1] + sorted(ratios)[2]) / 2)


def test_relative_weight_needs_after_backward_and_a_literal_weight_refuses_it():
    model = tiny_llama()
    regularizer = SSIUURegularizer(model, relative_weight=30.0)
    step(model, regularizer, batch())
    with pytest.raises(RuntimeError, match=r"after_backward\(\) was not called"):
        step(model, regularizer, batch())
    with pytest.raises(RuntimeError, match="only for relative_weight"):
        SSIUURegularizer(model).after_backward()


def test_the_share_of_the_penalty_is_there_for_any_loop():
    model = tiny_llama()
    regularizer = SSIUURegularizer(model, weight=WEIGHT, every=2)
    shares = []
    for seed in range(3):
        model.zero_grad()
        step(model, regularizer, batch(seed=seed))
        shares.append(
            regularizer.penalty_share(torch.nn.utils.get_total_norm(p.grad for p in model.parameters()).item())
        )
    assert shares[:2] == [0, 0]
    assert shares[2] > 0.1


def test_a_penalty_that_cannot_matter_is_warned_of_once(recwarn):
    model = tiny_llama(torch.bfloat16)
    regularizer = SSIUURegularizer(model, weight=1e-9)
    for seed in range(15):
        step(model, regularizer, batch(seed=seed))
        regularizer.penalty_share(1.0)
    said = [str(warning.message) for warning in recwarn if "too little to matter" in str(warning.message)]
    assert len(said) == 1
    assert "16-bit gradients swallow" in said[0]


@pytest.mark.parametrize("granularity", ["parameter", "neuron"])
def test_a_calibration_that_comes_to_nothing_is_warned_of_once(granularity):
    model = tiny_llama(torch.float32)
    regularizer = SSIUURegularizer(model, relative_weight=3.0, granularity=granularity, target="log_probability")
    with pytest.warns(UserWarning, match="λ is not calibrated after 10 steps .* loss's gradient was inf") as said:
        for seed in range(15):
            model.zero_grad()
            step(model, regularizer, batch(seed=seed))
            for p in model.parameters():
                p.grad.fill_(float("inf"))
            regularizer.after_backward()
    assert len([warning for warning in said if "calibrated" in str(warning.message)]) == 1
    assert regularizer.weight is None


def test_a_state_without_a_key_is_refused_and_changes_nothing():
    model = tiny_llama()
    regularizer = SSIUURegularizer(model, weight=WEIGHT)
    step(model, regularizer, batch())
    state = regularizer.state_dict()
    other = SSIUURegularizer(model, weight=WEIGHT)
    for key in set(state) - {"version"}:
        with pytest.raises(ValueError, match=f"the saved state has no '{key}'"):
            other.load_state_dict({name: value for name, value in state.items() if name != key})
        assert other.state_dict()["references"] is None
        assert other.state_dict()["step"] == 0


@pytest.mark.parametrize("granularity", ["parameter", "neuron"])
def test_another_literal_weight_is_refused_by_name(granularity):
    model = tiny_llama()
    state = SSIUURegularizer(model, weight=2.0, granularity=granularity).state_dict()
    with pytest.raises(ValueError, match=r"the saved state has weight=2\.0, this regulariser weight=3\.0"):
        SSIUURegularizer(model, weight=3.0, granularity=granularity).load_state_dict(state)
    # with relative_weight it is the calibrated one that counts
    state = SSIUURegularizer(model, weight=2.0, relative_weight=1.0, granularity=granularity).state_dict()
    SSIUURegularizer(model, weight=3.0, relative_weight=1.0, granularity=granularity).load_state_dict(state)


def test_a_loaded_state_forgets_what_was_under_way():
    model = tiny_llama()
    regularizer = SSIUURegularizer(model, weight=WEIGHT, every=2, state_dtype=torch.bfloat16)
    state = regularizer.state_dict()
    for seed in range(2):
        step(model, regularizer, batch(seed=seed))
    # as if a GPU had counted one in that step
    regularizer._nonfinite.expect(["w"], torch.tensor([1]))
    regularizer.load_state_dict(state)
    assert regularizer.last_step is None
    assert not regularizer.step_was_skipped
    step(model, regularizer, batch())
    assert regularizer.last_step.penalty == 0
