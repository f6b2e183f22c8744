"""KLUE against its formula, one sample and one answer at a time."""

import copy
import random

import pytest
import torch
from plain_attribution import plain_means
from plain_objectives import backward, encoded, gd, totals
from steps import WEIGHT, assert_close, gradients
from tiny import batch, exactly, log_probs_of, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_model

from ssiuu_fast import SSIUURegularizer
from ssiuu_fast.data.collate import Encoded, collate
from ssiuu_fast.objectives import make_objective
from ssiuu_fast.objectives.klue import other_questions
from ssiuu_fast.objectives.objective import ForgetBatch

FORGET, RETAIN = batch(7, seed=1), batch(7, seed=3)
MODELS = {
    "llama": (lambda: exactly(tiny_llama()), ("gate_proj", "up_proj", "down_proj")),
    "gpt2": (tiny_gpt2, ("mlp.c_fc", "mlp.c_proj")),
    # one module holds gate and up
    "phi3": (lambda: exactly(tiny_model("phi3")), ("gate_up_proj", "down_proj")),
}


def prepared(model, seed=0, **options):
    objective = make_objective("klue", **options)
    objective.prepare(model, encoded(FORGET), seed=seed, batch_size=3)
    return objective


def ffn_modules(model, names):
    return [name for name, _ in model.named_modules() if name.endswith(names)]


def plain_importance(model, modules, weight=10.0, others=5, seed=0):
    """{module path: I of its neurons}, from the text of METHOD."""
    rows = encoded(FORGET)
    answers = [[label for label in row.labels if label != -100] for row in rows]
    longest = max(len(row.input_ids) for row in rows)
    pairs = []
    for index, answer in enumerate(answers):
        candidates = [place for place, other in enumerate(answers) if other != answer]
        for drawn in random.Random(f"{seed} {index}").sample(candidates, others):
            prompt = rows[drawn].input_ids[: -len(answers[drawn])]
            ids = (prompt + answer)[:longest]
            pairs.append(Encoded(ids, [-100] * len(prompt) + ids[len(prompt) :]))
    own = plain_means(model, [collate(rows)], modules)
    other = plain_means(model, [collate([pair]) for pair in pairs], modules)
    return {name: own[name][0] - weight * other[name][0] for name in modules}


def plain_rows(importance, share=0.1):
    everything = sorted(((value, -place, name) for name in importance
                         for place, value in enumerate(importance[name].tolist())), reverse=True)  # fmt: skip
    rows = {}
    for _, place, name in everything[: round(share * len(everything))]:
        rows.setdefault(name, []).append(-place)
    return {name: sorted(places) for name, places in rows.items()}


def moving(model, rows):
    """{name: 1 where a parameter may move, else 0} for weights and biases of these rows."""
    masks = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for path, places in rows.items():
        turned = type(model.get_submodule(path)).__name__ == "Conv1D"
        masks[f"{path}.weight"][(slice(None), places) if turned else places] = 1
        if f"{path}.bias" in masks:
            masks[f"{path}.bias"][places] = 1
    return masks


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", MODELS)
def test_neurons_and_gradient_are_those_of_the_formula(kind):
    make, names = MODELS[kind]
    model = make()
    modules = ffn_modules(model, names)
    importance = plain_importance(copy.deepcopy(model), modules)
    rows = plain_rows(importance)
    objective = prepared(model)
    found = {name.removeprefix("rows."): places.tolist() for name, places in objective.state_dict().items()}
    assert found == rows
    masks = moving(model, rows)
    assert trained(model) == {name for name, mask in masks.items() if mask.any()}
    assert model.training

    loss = gd(model, None, FORGET, None, RETAIN)
    loss.backward()
    expected = {name: g * masks[name] for name, g in gradients(model).items() if g is not None}
    assert any(g.abs().sum() for g in expected.values())
    for micro in ((7,), (2, 5)):
        model.zero_grad()
        assert backward(objective, model, FORGET, RETAIN, micro=micro) == pytest.approx(loss.item(), rel=1e-9)
        assert_close({name: g for name, g in gradients(model).items() if g is not None}, expected)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("penalty", [False, True])
def test_rows_that_stay_stay_to_the_bit(kind, penalty):
    model = MODELS[kind][0]()
    objective = prepared(model)
    rows = {name.removeprefix("rows."): places.tolist() for name, places in objective.state_dict().items()}
    masks = moving(model, rows)
    regularizer = SSIUURegularizer(model, weight=WEIGHT) if penalty else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(4):
        optimizer.zero_grad()
        backward(objective, model, FORGET, RETAIN, micro=(2, 5), regularizer=regularizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal((parameter != before[name]), masks[name].bool()), name


def test_the_penalty_adds_what_it_adds_alone():
    found = {}
    for kind in ("together", "objective", "penalty"):
        model = MODELS["llama"][0]()
        objective = prepared(model)
        penalty = None if kind == "objective" else SSIUURegularizer(model, weight=WEIGHT)
        for step in range(2):
            model.zero_grad()
            if kind == "penalty":
                penalty.backward(log_probs_of(model, FORGET))
                objective.finish_gradients(model)
            else:
                backward(objective, model, FORGET, RETAIN, regularizer=penalty, micro=(2, 5))
            if step == 0:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1.05)
        found[kind] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert sum(alone.abs().sum() for alone in found["penalty"].values()) > 0
    size = max(gradient.abs().max() for gradient in found["together"].values())
    for name, alone in found["penalty"].items():
        added = found["together"][name] - found["objective"][name]
        assert (added - alone).abs().max() <= 1e-12 * size


def test_options():
    model = tiny_llama()
    modules = ffn_modules(model, ("up_proj",))
    importance = plain_importance(exactly(copy.deepcopy(model)), modules, weight=0.5, others=2, seed=3)
    objective = prepared(
        exactly(model), seed=3, others_weight=0.5, others=2, share=0.25, modules=["layers.*.up"], gamma=2.0, alpha=0.5
    )
    rows = {name.removeprefix("rows."): places.tolist() for name, places in objective.state_dict().items()}
    assert rows == plain_rows(importance, share=0.25)
    assert sum(map(len, rows.values())) == 12
    value = backward(objective, model, FORGET, RETAIN, micro=(7,))
    assert value == pytest.approx(gd(model, None, FORGET, None, RETAIN, gamma=2.0, alpha=0.5).item(), rel=1e-9)


def test_one_neuron_at_least():
    objective = prepared(tiny_llama(), share=1e-6)
    assert [len(places) for places in objective.state_dict().values()] == [1]


def test_another_question_with_the_same_answer():
    rows = [
        Encoded([1, 2, 3, 40, 41], [-100, -100, -100, 40, 41]),
        Encoded([1, 5, 42, 43, 44], [-100, -100, 42, 43, 44]),
        # the same answer as the first
        Encoded([7, 40, 41], [-100, 40, 41]),
    ]
    pairs = other_questions(rows, 1, seed=0)
    assert pairs[0] == Encoded([1, 5, 40, 41], [-100, -100, 40, 41])
    # cut to the longest row
    assert pairs[1] in (
        Encoded([1, 2, 3, 42, 43], [-100, -100, -100, 42, 43]),
        Encoded([7, 42, 43, 44], [-100, 42, 43, 44]),
    )
    assert pairs[2] == pairs[0]
    assert len({str(other_questions(rows, 1, seed)) for seed in range(10)}) == 2
    with pytest.raises(ValueError, match="forget row 0 has 1 rows with another answer.*others=2 of them"):
        other_questions(rows, 2, seed=0)
    with pytest.raises(ValueError, match="the forget set is empty"):
        other_questions([], 2, seed=0)


def test_a_resumed_run_moves_the_same_rows():
    model = tiny_llama()
    objective = prepared(model)
    state = objective.state_dict()
    changed = tiny_llama(seed=1)
    other = prepared(changed)
    assert {name: places.tolist() for name, places in other.state_dict().items()} != {
        name: places.tolist() for name, places in state.items()
    }
    other.load_state_dict(state, changed)
    assert trained(changed) == trained(model)
    backward(other, changed, FORGET, RETAIN, micro=(7,))
    masks = moving(changed, {name.removeprefix("rows."): places.tolist() for name, places in state.items()})
    assert all(
        torch.equal(p.grad != 0, masks[name].bool()) for name, p in changed.named_parameters() if p.requires_grad
    )
    other.release(changed)
    assert all(parameter.requires_grad for parameter in changed.parameters())


def test_what_it_cannot_work_with():
    class Arguments:
        weight_decay = 0.01

    objective = make_objective("klue")
    with pytest.raises(ValueError, match="weight_decay=0.01 would shrink the rows.*set weight_decay=0"):
        objective.refuse(Arguments)
    Arguments.weight_decay = 0.0
    objective.refuse(Arguments)
    with pytest.raises(ValueError, match="forget row 0 has 6 rows with another answer.*others=7 of them"):
        prepared(tiny_llama(), others=7)
    with pytest.raises(ValueError, match="MixtralForCausalLM has no linear module.*gate or up or down"):
        prepared(tiny_mixtral())
    with pytest.raises(RuntimeError, match="KLUE was not prepared"):
        objective.forget_loss(tiny_llama(), ForgetBatch(FORGET, 7), totals(FORGET))
    with pytest.raises(RuntimeError, match="KLUE was not prepared"):
        objective.finish_gradients(tiny_llama())
    with pytest.raises(ValueError, match="this is no state of KLUE: it holds direction"):
        objective.load_state_dict({"direction": torch.zeros(1)}, tiny_llama())
    state = {"rows.model.layers.0.mlp.up_proj": torch.tensor([1, 24])}
    with pytest.raises(ValueError, match="moves neuron 24 of model.layers.0.mlp.up_proj, which has 24"):
        objective.load_state_dict(state, tiny_llama())
    model = tiny_llama()
    assert len(trained(model)) == len(list(model.named_parameters()))


def test_quantised_weights_are_refused():
    model = tiny_llama()
    weight = model.model.layers[0].mlp.down_proj.weight
    codes = torch.nn.Parameter(weight.detach().to(torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.down_proj.weight = codes
    for name in ("rmu", "klue"):
        with pytest.raises(ValueError, match=r"down_proj.weight, which is quantised \(torch.uint8\)"):
            make_objective(name).prepare(model, encoded(FORGET), seed=0, batch_size=2)
