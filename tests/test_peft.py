"""SSIUURegularizer on models of PEFT: what it chooses, its gradient on A and B, checkpointing, the first steps."""

import copy
import math
import warnings

import pytest
import torch
from neurons import WEIGHT as NEURON_WEIGHT
from neurons import neurons
from steps import assert_close, gradients, step
from tiny import batch, exactly, log_probs_of, tiny_gpt2, tiny_llama, tiny_mixtral

from ssiuu_fast import SSIUURegularizer, answer_token_counts
from ssiuu_fast.adapters import merged
from ssiuu_fast.selection import select_modules
from ssiuu_fast.sites import find_sites

peft = pytest.importorskip("peft")

# λ at which the penalty matters
WEIGHT = 1e6
Q_AND_DOWN = ("self_attn.q_proj", "mlp.down_proj")


def lora(model=None, names=("default",), **options):
    """A tiny model with LoRA, B not at 0, so that everything has a gradient from the first step on."""
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
    model = exactly(tiny_llama()) if model is None else model
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(model, peft.LoraConfig(**config), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, peft.LoraConfig(**config))
    return model.train()


def ia3(model):
    config = peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, config).train()


def adapted(*modules, adapter="default", blocks=2):
    """The names of A and B of these modules in every block."""
    return {
        f"base_model.model.model.layers.{block}.{module}.lora_{matrix}.{adapter}.weight"
        for block in range(blocks)
        for module in modules
        for matrix in "AB"
    }


def chosen(model, **options):
    return set(SSIUURegularizer(model, **options).parameter_names)


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}, {"bias": "all"}])
def test_a_and_b_in_the_blocks_are_chosen_and_nothing_else(kind):
    model = lora(**kind)
    assert chosen(model) == adapted(*Q_AND_DOWN)
    assert all(p.requires_grad for p in SSIUURegularizer(model).regularized_parameters)


def test_adapters_outside_the_blocks_are_left_out():
    model = lora(target_modules=["q_proj", "embed_tokens", "lm_head"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("embed_tokens.lora_embedding" in name for name in trained) == 2
    assert sum("lm_head.lora_" in name for name in trained) == 2
    assert chosen(model) == adapted("self_attn.q_proj")


def test_the_name_of_an_adapter_is_no_block():
    model = lora(target_modules=["q_proj", "lm_head"], names=["0"])
    assert chosen(model) == adapted("self_attn.q_proj", adapter="0")
    model = lora(target_modules=["q_proj"], modules_to_save=["lm_head"], names=["7"])
    assert chosen(model) == adapted("self_attn.q_proj", adapter="7")


def test_a_linear_module_trained_as_a_whole_is_chosen_as_one():
    model = lora(target_modules=["q_proj"], modules_to_save=["down_proj", "lm_head"])
    whole = {f"base_model.model.model.layers.{b}.mlp.down_proj.modules_to_save.default.weight" for b in range(2)}
    assert chosen(model) == adapted("self_attn.q_proj") | whole


def test_only_adapters_that_are_trained_are_chosen():
    model = lora(names=["first", "second"])
    assert chosen(model) == adapted(*Q_AND_DOWN, adapter="first")
    model.set_adapter("second")
    assert chosen(model) == adapted(*Q_AND_DOWN, adapter="second")
    model.base_model.set_adapter(["first", "second"])
    assert chosen(model) == adapted(*Q_AND_DOWN, adapter="first") | adapted(*Q_AND_DOWN, adapter="second")


def test_adapters_of_other_models():
    gpt2 = lora(tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
    assert {name.split(".transformer.")[1] for name in chosen(gpt2)} == {
        f"h.{block}.attn.c_attn.lora_{matrix}.default.weight" for block in range(2) for matrix in "AB"
    }
    # PEFT's adapters of fused experts are linear modules too, though the experts are not; frozen, they need no warning
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mixtral = lora(tiny_mixtral(), target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
        assert chosen(mixtral) == adapted("self_attn.q_proj", "mlp.experts")


def test_what_is_not_a_matrix_is_chosen_by_name():
    model = ia3(tiny_llama())
    with pytest.raises(
        ValueError, match=r"none of the 14 .* requires grad; 4 other parameters do .*ia3_l.*parameters="
    ):
        SSIUURegularizer(model)
    assert len(chosen(model, parameters=["*ia3_l*"])) == 4
    dora = lora(use_dora=True)
    both = chosen(dora, parameters=["*.lora_[AB].*", "*lora_magnitude_vector*"])
    assert len(both) == 12 and both > adapted(*Q_AND_DOWN)


def test_neurons_are_those_of_whole_modules():
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for model in (lora(), lora(target_modules=["q_proj", "lm_head"], modules_to_save=["down_proj"], names=["0"])):
        modules = select_modules(model, None)
        assert [name.rpartition(".")[2] for name in modules] == 2 * every
        regularizer = neurons(model)
        step(model, regularizer, batch())
        assert regularizer.last_step.absent == 0
        assert [place.path for place in find_sites(model).values()] == list(modules)


def algorithm_1(model, batches, names, weight):
    """The gradient of every trained parameter in every step, by plain autograd; SGD between the steps."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found, stored = [], None
    for rows in batches:
        loss = log_probs_of(model, rows).sum() / answer_token_counts(rows["labels"]).sum()
        total = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        probability = log_probs_of(model, rows).exp().sum()
        g = dict(zip(names, torch.autograd.grad(probability, [trained[name] for name in names]), strict=True))
        a = {name: (trained[name] * g[name]).detach() for name in names}
        if stored is not None:
            for name in names:
                total[name] = total[name] + 2 * weight * (a[name] < 0) * (a[name] - stored[name]) * g[name]
        stored = a
        found.append(total)
        descend(trained, total)
    return found


def descend(trained, gradient, rate=0.02):
    with torch.no_grad():
        for name, p in trained.items():
            p -= rate * gradient[name]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["plain", "dora", "rslora", "fresh", "whole", "ia3"])
def test_gradient_is_algorithm_1(kind, seed):
    options = {
        "dora": {"use_dora": True},
        "rslora": {"use_rslora": True},
        # B = 0 at the start
        "fresh": {"init_lora_weights": True},
        "whole": {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]},
    }
    model = ia3(exactly(tiny_llama())) if kind == "ia3" else lora(**options.get(kind, {}))
    # small B, small attributions
    weight = 1e8 if kind == "fresh" else WEIGHT
    regularizer = SSIUURegularizer(model, weight, parameters=["*ia3_l*"] if kind == "ia3" else None)
    batches = [batch(seed=3 * seed + number) for number in range(3)]
    truth = algorithm_1(copy.deepcopy(model), batches, regularizer.parameter_names, weight)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for number, rows in enumerate(batches):
        model.zero_grad()
        penalty = step(model, regularizer, rows)
        assert (penalty > 0) == (number > 0)
        ours = {name: g for name, g in gradients(model).items() if g is not None}
        # the frozen base has no gradient at all
        assert ours.keys() == trained.keys()
        assert_close(ours, truth[number])
        descend(trained, ours)
    assert regularizer.last_step.added_norm > 1e-3 * math.sqrt(sum(g.square().sum().item() for g in ours.values()))


def test_neuron_penalty_reaches_a_and_b_as_it_reaches_the_merged_weight():
    model = lora()
    plain = merged(copy.deepcopy(model)).train()
    regularizers = neurons(model), neurons(plain)
    for number in range(2):
        model.zero_grad(), plain.zero_grad()
        penalties = [step(one, its, batch(seed=number)) for one, its in zip((model, plain), regularizers, strict=True)]
        assert penalties[0] == pytest.approx(penalties[1], rel=1e-9, abs=1e-30)
        # W + s·B·A: ∂/∂A = s·Bᵀ·∂/∂W, ∂/∂B = s·∂/∂W·Aᵀ
        for name, module in select_modules(plain, ["*q_proj.weight", "*down_proj.weight"]).items():
            layer = model.get_submodule(f"base_model.model.{name}")
            a, b, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
            whole = module.weight.grad
            expected = {"A": s * b.T @ whole, "B": s * whole @ a.T}
            assert_close({"A": a.grad, "B": b.grad}, {key: value.detach() for key, value in expected.items()})
    assert penalties[0] * NEURON_WEIGHT > 0


def test_merged_after_training_is_the_adapted_model():
    model = lora()
    before = log_probs_of(model, batch()).detach()
    train(model, SSIUURegularizer(model, WEIGHT))
    after = log_probs_of(model.eval(), batch()).detach()
    assert (after - before).abs().max() > 1e-3
    plain = merged(model)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    assert all(p.requires_grad for p in plain.parameters())
    assert (log_probs_of(plain, batch()) - after).abs().max() < 1e-9


def train(model, regularizer, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for number in range(steps):
        optimizer.zero_grad()
        step(model, regularizer, batch(seed=number))
        optimizer.step()


def checkpointed(model, reentrant):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def moved(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("granularity", ["parameter", "neuron"])
@pytest.mark.parametrize("inputs_require_grad", [False, True])
def test_checkpointed_adapters_on_a_frozen_model_are_trained(granularity, inputs_require_grad):
    found = []
    for checkpoint in (False, True):
        model = lora(init_lora_weights=True)
        if checkpoint:
            checkpointed(model, reentrant=False)
            if inputs_require_grad:
                model.enable_input_require_grads()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, SSIUURegularizer(model, NEURON_WEIGHT, granularity=granularity))
        assert moved(model, before) == adapted(*Q_AND_DOWN)
        found.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    assert_close(found[1], found[0])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("granularity", ["parameter", "neuron"])
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_reentrant_checkpointing_would_train_no_adapter_and_is_refused(granularity, modules_to_save):
    model = lora(modules_to_save=modules_to_save)
    early = SSIUURegularizer(model, granularity=granularity)
    checkpointed(model, reentrant=True)
    # what recent transformers switch on with checkpointing, and others don't
    if hasattr(model.get_base_model(), "_require_grads_hook"):
        model.disable_input_require_grads()
    # this is what would be missed: no adapter has a gradient
    loss = log_probs_of(model, batch()).sum()
    if modules_to_save:
        loss.backward()
    assert loss.requires_grad == bool(modules_to_save)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" in name)
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        SSIUURegularizer(model, granularity=granularity)
    # checkpointing that came after the regulariser
    with pytest.raises((ValueError, RuntimeError), match="use_reentrant=False"):
        step(model, early, batch())


@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_fresh_adapters_have_no_attribution_and_their_first_penalty_is_zero(reference):
    model = lora(init_lora_weights=True)
    regularizer = SSIUURegularizer(model, WEIGHT, reference=reference)
    if reference == "initial":
        regularizer.set_reference([log_probs_of(model, batch())])
    plain = torch.autograd.grad(
        log_probs_of(model, batch()).sum() / answer_token_counts(batch()["labels"]).sum(),
        regularizer.regularized_parameters,
    )
    assert step(model, regularizer, batch()) == 0
    assert regularizer.last_step.negative_share == 0 and regularizer.last_step.nonfinite == 0
    # A's gradient is 0 as B is, and B is 0 itself
    assert all(not reference.any() for reference in regularizer.state_dict()["references"].values())
    for parameter, loss in zip(regularizer.regularized_parameters, plain, strict=True):
        assert parameter.grad.isfinite().all() and (parameter.grad - loss).abs().max() < 1e-12
    # and not once B has moved
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p -= 0.05 * p.grad
    assert step(model, regularizer, batch(seed=1)) > 0
    assert 0 < regularizer.last_step.negative_share < 1


def test_steps_without_a_penalty_are_not_calibrated_by():
    model = lora(init_lora_weights=True)
    regularizer = SSIUURegularizer(model, relative_weight=3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for number in range(8):
        optimizer.zero_grad()
        penalty = step(model, regularizer, batch(seed=number))
        regularizer.after_backward()
        seen = len(regularizer.state_dict()["ratios"])
        # for three steps nothing moves: R = 0, and no ratio comes of it
        assert (penalty == 0) == (number <= 3)
        assert seen == min(4, max(0, number - 3))
        if number >= 3:
            optimizer.step()
    assert math.isfinite(regularizer.weight) and regularizer.weight > 0
