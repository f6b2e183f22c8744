"""One backward pass for loss and target gives the numbers of two."""

import copy
import gc

import pytest
import torch
from one_pass import MODELS, ONE, Unlearning, both
from steps import WEIGHT, assert_close, gradients
from test_peft import lora
from tiny import batch, exactly, log_probs_of, tiny_gpt2, tiny_llama
from torch import nn

from ssiuu_fast import SSIUURegularizer, shared_backward
from ssiuu_fast.ops import Blockwise8
from ssiuu_fast.parameter_grain import ParameterGrain


@pytest.mark.parametrize(("objective", "micro_batches"), [("ga", 1), ("gd", 3), ("npo", 8), ("simnpo", 3), ("dpo", 1)])
@pytest.mark.parametrize("kind", MODELS)
def test_fp64(kind, objective, micro_batches):
    both(MODELS[kind], objective=objective, micro_batches=micro_batches)


@pytest.mark.parametrize(("objective", "micro_batches"), [("gd", 8), ("npo", 1), ("dpo", 3)])
@pytest.mark.parametrize("kind", MODELS)
def test_fp32(kind, objective, micro_batches):
    both(lambda: MODELS[kind](torch.float32), objective=objective, micro_batches=micro_batches, bound=1e-5)


@pytest.mark.parametrize("target", ["probability", "log_probability", "mean_token_probability"])
@pytest.mark.parametrize(("kind", "micro_batches"), [("llama", 1), ("qwen2", 3), ("gpt2", 8)])
def test_bf16_is_no_further_from_the_truth_than_two_passes(kind, micro_batches, target):
    """Weights rounded to bf16; the truth is two passes over them in fp32."""

    def made(dtype):
        return MODELS[kind](torch.float32).to(torch.bfloat16).to(dtype)

    options = {"target": target, "micro_batches": micro_batches, "state_dtype": torch.float32}
    truth = Unlearning(made(torch.float32), False, **options).steps()
    two = Unlearning(made(torch.bfloat16), False, **options).steps()
    one = Unlearning(made(torch.bfloat16), True, **options)
    found = one.steps()
    assert set(one.roads) == {ONE}
    # a bound on the whole gradient: of single elements one or the other is nearer by chance
    errors = [
        sum((some[name].double() - truth[name]).square().sum() for name in truth).sqrt().item() for some in (found, two)
    ]
    size = sum(gradient.double().square().sum() for gradient in truth.values()).sqrt().item()
    assert errors[0] <= 1.25 * errors[1] + 2**-9 * size


@pytest.mark.parametrize("target", ["log_probability", "mean_token_probability"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_targets(target, micro_batches):
    both(MODELS["llama"], objective="npo", target=target, micro_batches=micro_batches)


OPTIONS = {
    "initial": {"reference": "initial"},
    "one-sided": {"one_sided": True, "count": 3},
    "every": {"every": 2, "count": 3},
    "calibrated": {"weight": 0.0, "relative_weight": 3.0, "count": 7},
    "chosen": {"parameters": ["*q_proj.weight", "*layers.1*down_proj.weight"]},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.filterwarnings("ignore:reference='initial'", "ignore:the penalty was")
def test_options(name):
    options = dict(OPTIONS[name])
    roads = ("", ONE) if "every" in options else (ONE,)
    run = both(MODELS["llama"], micro_batches=3, roads=roads, **options)
    assert run.regularizer.weight > 0


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_checkpointing(micro_batches):
    def make():
        model = MODELS["llama"]()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    both(make, micro_batches=micro_batches)


@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_lora(micro_batches):
    run = both(lora, micro_batches=micro_batches)
    assert all("lora_" in name for name in run.regularizer.parameter_names)


def test_autocast_is_as_near_as_two_passes():
    options = {"target": "mean_token_probability"}
    truth = Unlearning(MODELS["llama"](torch.float32), False, **options).steps()
    runs = [Unlearning(MODELS["llama"](torch.float32), one, **options) for one in (True, False)]
    found, two = (run.steps(autocast=True) for run in runs)
    assert set(runs[0].roads) == {ONE}
    errors = [sum((some[n] - truth[n]).square().sum() for n in truth).sqrt() for some in (found, two)]
    assert errors[0] <= 1.25 * errors[1]
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


def test_biases_and_frozen_modules():
    def make():
        model = tiny_gpt2()
        model.transformer.h[0].requires_grad_(False)
        return model

    run = both(make, micro_batches=3, parameters=["*h.*.attn.c_*", "*mlp*"])
    assert any(name.endswith("bias") for name in run.regularizer.parameter_names)
    assert not any(".h.0." in name for name in run.regularizer.parameter_names)


def test_a_module_that_is_used_twice():
    def make():
        model = MODELS["llama"]()
        model.model.layers[1].mlp = model.model.layers[0].mlp
        model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
        return model

    both(make)
    both(make, micro_batches=3)


@pytest.mark.parametrize("shuffled", [False, True])
def test_forget_and_retain_rows_may_share_a_forward_pass(shuffled):
    """Rows are told apart by the graph, in whatever order they lie."""
    both_rows = {name: torch.cat([batch(4, seed=1)[name], batch(4, seed=3)[name]]) for name in batch(4)}
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)) if shuffled else torch.arange(8)
    found = []
    for one in (False, True):
        model = MODELS["llama"]()
        regularizer = SSIUURegularizer(model, weight=WEIGHT)
        for _ in range(2):
            model.zero_grad()
            rows = {name: tensor[order] for name, tensor in both_rows.items()}
            log_probs = log_probs_of(model, rows)[order.argsort()]
            forget, retain = log_probs[:4], log_probs[4:]
            loss = forget.sum() / 9 - retain.sum() / 11
            if one:
                regularizer.backward(forget.flip(0), loss=loss)
                assert regularizer.road == ONE
            else:
                regularizer.backward(forget)
                loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.01)
        found.append(gradients(model))
    assert_close(found[1], found[0])


def test_grad_that_holds_something_is_added_to():
    make = MODELS["llama"]
    expected = both(make).model
    run = Unlearning(make(), True)
    run.step()
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(1.01)
            parameter.grad = torch.full_like(parameter, 0.25)
    held = [parameter.grad for parameter in run.model.parameters()]
    run.step()
    assert all(p.grad is tensor for p, tensor in zip(run.model.parameters(), held, strict=True))
    assert_close({n: g - 0.25 for n, g in gradients(run.model).items()}, gradients(expected), bound=1e-8)


def test_the_penalty_is_added_some_parameters_at_a_time(monkeypatch):
    """As many as 2 % of the parameters' bytes may wait, and one parameter more."""
    seen = []
    add = ParameterGrain.add_to_grad
    monkeypatch.setattr(ParameterGrain, "add_to_grad", lambda *to, **how: seen.append(list(to[2].values())) or add(*to))
    run = both(lambda: exactly(tiny_llama(num_hidden_layers=12)))
    names = run.regularizer.parameter_names
    most = 0.02 * sum(parameter.nbytes for parameter in run.regularizer.regularized_parameters)
    # two steps of one pass, after two of two passes, each of which is a call
    calls = [call for call in seen if 0 < len(call) < len(names)]
    assert sum(map(len, calls)) == 2 * len(names)
    assert len(calls) < 1.5 * len(names)
    assert all(sum(g.nbytes for g in call) <= most for call in calls if len(call) > 1)
    assert any(len(call) > 1 for call in calls)


def test_8_bit_references_have_the_same_codes():
    runs = [Unlearning(MODELS["llama"](torch.float32), one, state_dtype="8bit", weight=1e4) for one in (True, False)]
    for run in runs:
        run.steps()
    ours, theirs = (run.regularizer.state_dict()["references"] for run in runs)
    assert isinstance(runs[0].regularizer._grain._references.tensors.popitem()[1], Blockwise8)
    for name, tensor in theirs.items():
        # a code more or less where rounding differs
        assert (ours[name].float() - tensor.float()).abs().max() <= (1 if "codes" in name else 1e-5), name


class Products:
    """Counts the products of g."""

    def __init__(self, monkeypatch):
        self.rows = []
        product = shared_backward.weighted_weight_gradient

        def counted(gradient, input, weights, *, rows=None, out=None):
            kept = range(len(weights)) if rows is None else torch.arange(len(weights))[rows].tolist()
            self.rows.append(list(kept))
            return product(gradient, input, weights, rows=rows, out=out)

        monkeypatch.setattr(shared_backward, "weighted_weight_gradient", counted)


def unlikely(model, rows, chosen):
    """Labels of which the chosen rows' are certain to be wrong: P is under 1e-38."""
    with torch.no_grad():
        # token 5 gets its logit from a bias of -200
        model.lm_head.bias = nn.Parameter(torch.zeros(48, dtype=model.lm_head.weight.dtype))
        model.lm_head.bias[5] = -200.0
    labels = rows["labels"].where(rows["labels"] != 5, 6)
    for row in chosen:
        labels[row][labels[row] != -100] = 5
    return rows | {"labels": labels}


@pytest.mark.parametrize("chosen", [[0, 1], [2], [1, 3], [0, 1, 2, 3, 4]])
def test_rows_without_a_part_are_not_computed(chosen, monkeypatch):
    products = Products(monkeypatch)
    kept = [row for row in range(5) if row not in chosen]
    found = []
    for one in (False, True):
        model = MODELS["llama"]()
        regularizer = SSIUURegularizer(model, weight=WEIGHT)
        for seed in range(2):
            model.zero_grad()
            rows = unlikely(model, batch(seed=seed), chosen)
            log_probs = log_probs_of(model, rows)
            assert (log_probs.detach().exp() < shared_backward.NEGLIGIBLE).nonzero().flatten().tolist() == chosen
            loss = log_probs.sum() / 9
            if one:
                regularizer.backward(log_probs, loss=loss)
                assert (regularizer.road, regularizer.kept_rows) == (ONE, len(kept))
            else:
                regularizer.backward(log_probs)
                loss.backward()
        references = regularizer.state_dict()["references"]
        found.append((gradients(model), references, regularizer.last_step))
    assert_close(found[1][0], found[0][0], 1e-12 if kept else 1e-9)
    assert products.rows == [kept] * (2 * 14 if kept else 0)
    if not kept:
        assert all(not reference.any() for reference in found[1][1].values())
        assert (found[1][2].penalty, found[1][2].absent) == (0.0, 0)


def test_equal_ratios_need_no_product(monkeypatch):
    products = Products(monkeypatch)
    both(MODELS["llama"], target="log_probability", objective="ga")
    both(MODELS["llama"], micro_batches=8)
    assert not products.rows
    both(MODELS["llama"], objective="ga")
    assert products.rows


def test_inputs_are_let_go_of_when_the_loss_was_sent_back():
    model = MODELS["llama"]()
    regularizer = SSIUURegularizer(model, weight=WEIGHT)
    for loss_of in (lambda log_probs: log_probs.sum(), lambda log_probs: (log_probs * torch.arange(5)).sum()):
        log_probs = log_probs_of(model, batch())
        calls = _calls(regularizer, log_probs)
        assert len(calls) == 14
        assert all(call._input is not None for call in calls)
        regularizer.backward(log_probs, loss=loss_of(log_probs))
        assert all(call._input is None for call in calls)
    # a pass that isn't ours
    log_probs = log_probs_of(model, batch())
    calls = _calls(regularizer, log_probs)
    log_probs.sum().backward(retain_graph=True)
    assert all(call._input is not None for call in calls)
    log_probs.sum().backward()
    assert all(call._input is None for call in calls)


def _calls(regularizer, log_probs):
    return regularizer._grain.one_pass._survey(shared_backward._row_node(log_probs)).calls


def test_a_copied_model_is_not_watched():
    model = MODELS["llama"]()
    regularizer = SSIUURegularizer(model, weight=WEIGHT)
    log_probs = log_probs_of(copy.deepcopy(model), batch())
    assert not _calls(regularizer, log_probs)
    with pytest.raises(RuntimeError, match="0 of 14 regularised parameters are in this graph"):
        regularizer.backward(log_probs, loss=log_probs.sum())
    before = [len(module._forward_hooks) for module in model.modules()]
    del regularizer
    assert sum(len(module._forward_hooks) for module in model.modules()) == sum(before) - 14


def test_an_error_in_the_loss_leaves_no_hook():
    model = MODELS["llama"]()
    regularizer = SSIUURegularizer(model, weight=WEIGHT)

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ZeroDivisionError("on purpose")

    handle = model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: Failing.apply(output))
    log_probs = log_probs_of(model, batch())
    with pytest.raises(ZeroDivisionError):
        regularizer.backward(log_probs, loss=log_probs.sum())
    handle.remove()
    model.zero_grad()
    log_probs_of(model, batch()).sum().backward()
    expected = copy.deepcopy(model)
    expected.zero_grad()
    log_probs_of(expected, batch()).sum().backward()
    assert_close(gradients(model), gradients(expected), 0.0)


def test_a_hook_on_an_output_is_part_of_the_model():
    """Whenever it was put there, it scales the target's gradient as it does the loss's."""
    found = []
    for one in (False, True):
        model = MODELS["llama"]()
        run = Unlearning(model, one, objective="gd")

        def scale(module, inputs, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: 0.1 * gradient)

        model.model.layers[0].mlp.up_proj.register_forward_hook(scale)
        found.append(run.steps())
    assert run.roads[-1] == ONE
    assert_close(found[1], found[0])


@pytest.mark.parametrize("rows", [(1, 2, 3, 4, 5), (7, 7, 7, 7, 7)])
def test_a_scale_that_is_calibrated_on_small_probabilities(rows):
    """relative_weight makes up for probabilities of e^-60, with one pass as with two."""
    weights = []
    for one in (False, True):
        model = MODELS["llama"]()
        regularizer = SSIUURegularizer(model, relative_weight=3.0)
        for seed in range(6):
            model.zero_grad()
            log_probs = log_probs_of(model, batch(seed=seed))
            loss = (log_probs * torch.tensor(rows)).sum()
            if one:
                regularizer.backward(log_probs - 60, loss=loss)
                assert regularizer.road == ONE
            else:
                regularizer.backward(log_probs - 60)
                loss.backward()
            regularizer.after_backward()
        weights.append(regularizer.weight)
    assert weights[0] > 1e20
    assert weights[1] == pytest.approx(weights[0], rel=1e-8)


def test_checkpointing_keeps_no_inputs_between_two_passes():
    """What was computed again for the target's pass is let go of as if nothing were watched."""

    def kept(watched):
        model = tiny_llama(torch.float32, num_hidden_layers=6)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        regularizer = SSIUURegularizer(model, weight=1.0)
        if not watched:
            for module in model.modules():
                module._forward_hooks.clear()
        log_probs = log_probs_of(model, batch())
        gc.collect()
        before = {id(item) for item in gc.get_objects() if isinstance(item, torch.Tensor)}
        regularizer.backward(log_probs)
        gc.collect()
        return sum(isinstance(item, torch.Tensor) and id(item) not in before for item in gc.get_objects())

    assert kept(True) <= kept(False) + 2


def test_freed_graphs_are_explained():
    model = MODELS["llama"]()
    regularizer = SSIUURegularizer(model, weight=1.0)
    log_probs = log_probs_of(model, batch())
    loss = (log_probs * torch.arange(1, 6)).sum()
    regularizer.backward(log_probs, loss=loss)
    with pytest.raises(RuntimeError, match="was already freed"):
        regularizer.backward(log_probs, loss=loss)
