"""Objectives on log-probabilities against METHOD's formulas, sample by sample."""

import pytest
import torch
from plain_objectives import PLAIN, backward, encoded, moved
from steps import WEIGHT, assert_close, gradients
from tiny import batch, exactly, log_probs_of, tiny_gpt2, tiny_llama

from ssiuu_fast import SSIUURegularizer
from ssiuu_fast.objectives import OBJECTIVES, make_objective
from ssiuu_fast.objectives.objective import ForgetBatch, Totals
from ssiuu_fast.objectives.reference import reference_log_probs

FORGET, REFUSALS, RETAIN = batch(seed=1), batch(seed=2), batch(seed=3)
MODELS = {"llama": lambda: exactly(tiny_llama()), "gpt2": tiny_gpt2}
OPTIONS = {
    "ga": [{}],
    "gd": [{}, {"gamma": 0.3, "alpha": 2.0}],
    "npo": [{}, {"gamma": 0.3, "alpha": 2.0, "beta": 0.5}],
    "dpo": [{}, {"gamma": 0.3, "alpha": 2.0, "beta": 0.5}],
    "simnpo": [{}, {"gamma": 0.3, "alpha": 2.0, "beta": 2.5, "delta": 0.7}],
}
CASES = [(name, options) for name, choices in OPTIONS.items() for options in choices]


def references(start):
    return reference_log_probs(start, [*encoded(FORGET), *encoded(REFUSALS)], None)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradient_is_that_of_the_formula(name, options, kind):
    model, start = moved(MODELS[kind]())
    loss = PLAIN[name](model, start, FORGET, REFUSALS, RETAIN, **options)
    loss.backward()
    expected = gradients(model)
    objective = make_objective(name, **options)
    reference = references(start) if objective.needs_reference else None
    for micro in ((5,), (2, 3)):
        model.zero_grad()
        value = backward(objective, model, FORGET, RETAIN, refusals=REFUSALS, reference=reference, micro=micro)
        assert value == pytest.approx(loss.item(), rel=1e-9)
        assert_close(gradients(model), expected)


@pytest.mark.parametrize("name", ["dpo", "npo"])
def test_at_the_start_half_the_weight_of_ascent(name):
    """σ(0) = ½: −(2/β)·∂logσ(βz) = −∂z, whatever β."""
    model = exactly(tiny_llama())
    reference = references(model)
    found = []
    for beta in (0.1, 0.5):
        model.zero_grad()
        objective = make_objective(name, beta=beta, alpha=0)
        value = backward(objective, model, FORGET, RETAIN, refusals=REFUSALS, reference=reference)
        assert value == pytest.approx(2 / beta * 0.6931471805599453)
        found.append(gradients(model))
    assert_close(found[0], found[1])


def test_far_margins_are_finite():
    """A margin of 1e5 nats: log(σ(x)) by steps would be log 0."""
    model = tiny_llama()
    far = torch.full((5,), 1e5, dtype=torch.float64)
    for reference, slope in ((-far, 2.0), (far, 0.0)):
        model.zero_grad()
        loss, log_probs = make_objective("npo", beta=0.5).forget_loss(
            model, ForgetBatch(FORGET, 5, reference), Totals(5, 14)
        )
        assert loss.isfinite()
        (weights,) = torch.autograd.grad(loss, log_probs)
        torch.testing.assert_close(weights, torch.full_like(weights, slope / 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_the_loss_is_that_of_the_log_probs(dtype):
    model = tiny_llama(dtype)
    reference = references(tiny_llama(torch.float64))
    for name in ("dpo", "npo", "simnpo"):
        objective = make_objective(name)
        rows = batch(10, seed=1) if name == "dpo" else FORGET
        reference_of_rows = reference[: len(rows["labels"])]
        loss, log_probs = objective.forget_loss(model, ForgetBatch(rows, 5, reference_of_rows), Totals(5, 14))
        assert loss.dtype == log_probs.dtype == dtype


@pytest.mark.parametrize("name", OPTIONS)
def test_the_penalty_adds_what_it_adds_alone(name):
    """The second step's gradient with the regulariser minus without it is the penalty of these forget rows alone."""

    def second_step(objective, regularizer, add=True):
        model = exactly(tiny_llama())
        reference = references(model)
        penalty = regularizer(model) if regularizer else None
        for step in range(2):
            model.zero_grad()
            if objective is None:
                penalty.backward(log_probs_of(model, FORGET))
            else:
                chosen = reference if objective.needs_reference else None
                backward(
                    objective, model, FORGET, RETAIN, refusals=REFUSALS, reference=chosen, regularizer=penalty,
                    micro=(2, 3),
                )  # fmt: skip
            if step == 0:
                moved(model)
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}

    def regularizer(model):
        return SSIUURegularizer(model, weight=WEIGHT)

    objective = make_objective(name)
    alone = second_step(None, regularizer)
    together, without = second_step(objective, regularizer), second_step(objective, None)
    assert sum(gradient.abs().sum() for gradient in alone.values()) > 0
    size = max(gradient.abs().max() for gradient in together.values())
    for parameter in alone:
        assert (together[parameter] - without[parameter] - alone[parameter]).abs().max() <= 1e-12 * size, parameter


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gd", {"gamma": 0}, "gamma=0: must be a number above 0"),
        ("gd", {"alpha": -1}, "alpha=-1: must be a number of at least 0"),
        ("gd", {"alpha": "1"}, "alpha='1': must be a number of at least 0"),
        ("npo", {"beta": 0}, "beta=0: must be a number above 0"),
        ("npo", {"beta": -0.1}, "beta=-0.1: must be a number above 0"),
        ("npo", {"gamma": True}, "gamma=True: must be a number above 0"),
        ("dpo", {"beta": float("nan")}, "beta=nan: must be a number above 0"),
        ("dpo", {"gamma": float("inf")}, "gamma=inf: must be a number above 0"),
        ("simnpo", {"delta": float("nan")}, "delta=nan: must be a number$"),
        ("simnpo", {"beta": 0}, "beta=0: must be a number above 0"),
        ("rmu", {"alpha": -1}, "alpha=-1: must be a number of at least 0"),
        ("rmu", {"coefficient": 0}, "coefficient=0: must be a number above 0"),
        ("rmu", {"layer": -1}, "layer=-1: must be the number of a block"),
        ("rmu", {"layer": 1.5}, "layer=1.5: must be the number of a block"),
        ("rmu", {"modules": "layers.*"}, r"got the string 'layers.\*': write \['layers.\*'\]"),
        ("klue", {"gamma": 0}, "gamma=0: must be a number above 0"),
        ("klue", {"others_weight": -1}, "others_weight=-1: must be a number of at least 0"),
        ("klue", {"others": 0}, "others=0: must be a whole number of questions, at least 1"),
        ("klue", {"others": 2.5}, "others=2.5: must be a whole number"),
        ("klue", {"share": 0}, "share=0: must be a number above 0"),
        ("klue", {"share": 1.1}, "share=1.1: must be a part of the neurons"),
        ("klue", {"modules": "layers.*"}, "modules must be a list of patterns"),
        ("ga", {"gamma": 1}, "objective 'ga' has no option 'gamma'; it has none"),
        ("npo", {"delta": 1}, "objective 'npo' has no option 'delta'; it has gamma, alpha, beta"),
        ("nope", {}, "unknown objective 'nope'; known: ga, gd, dpo, npo, simnpo, rmu, klue"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_objective(name, **options)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_defaults_are_good(name):
    assert make_objective(name).name.lower() == name


def test_what_is_missing_is_said():
    model = tiny_llama()
    for name in ("npo", "dpo"):
        with pytest.raises(ValueError, match="give ForgetBatch its reference_log_probs"):
            rows = batch(10) if name == "dpo" else FORGET
            make_objective(name).forget_loss(model, ForgetBatch(rows, 5), Totals(5, 14))
    with pytest.raises(ValueError, match="needs a refusal beside each of 5 rows.*must hold 10 rows.*hold 5"):
        make_objective("dpo").forget_loss(model, ForgetBatch(FORGET, 5, torch.zeros(5)), Totals(5, 14))
    with pytest.raises(ValueError, match=r"one number for each of 5 rows, got \[4\]"):
        make_objective("npo").forget_loss(model, ForgetBatch(FORGET, 5, torch.zeros(4)), Totals(5, 14))


def test_objectives_without_a_start_have_no_state():
    model = tiny_llama()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    objective = make_objective("npo")
    objective.prepare(model, encoded(FORGET), seed=0, batch_size=2)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert objective.state_dict() == {}
    objective.load_state_dict({}, model)
    with pytest.raises(ValueError, match="NPO has no state, got rows.x: is it another objective's"):
        objective.load_state_dict({"rows.x": torch.zeros(1)}, model)
    objective.release(model)
