"""RMU against its formula with a live reference model."""

import copy

import pytest
import torch
from plain_attribution import unpadded
from plain_objectives import backward, encoded, totals
from steps import WEIGHT, assert_close, gradients
from tiny import batch, exactly, log_probs_of, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_model

from ssiuu_fast import SSIUURegularizer
from ssiuu_fast.objectives import make_objective
from ssiuu_fast.objectives.objective import ForgetBatch, Totals

FORGET, RETAIN = batch(seed=1), batch(seed=3)


def llama(layers=5, **config):
    return exactly(tiny_llama(num_hidden_layers=layers, **config))


def prepared(model, seed=0, **options):
    objective = make_objective("rmu", **options)
    objective.prepare(model, encoded(FORGET), seed=seed, batch_size=2)
    return objective


def direction(size=16, seed=0):
    u = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return u / u.square().sum().sqrt()


def hidden_states(model, row, layer):
    """[T, d] that block `layer` puts out for one sample without padding."""
    return model(input_ids=row["input_ids"][None], output_hidden_states=True).hidden_states[layer + 1][0]


def plain(model, start, layer, alpha=100.0, coefficient=20.0):
    target = coefficient * direction(model.config.hidden_size)
    forget = torch.cat([hidden_states(model, row, layer) - target for row in unpadded(FORGET)])
    retain = torch.cat(
        [hidden_states(model, row, layer) - hidden_states(start, row, layer).detach() for row in unpadded(RETAIN)]
    )
    return forget.square().mean() + alpha * retain.square().mean()


def train(model):
    """A step of the weights that are trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def trained(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def down(*layers):
    return [f"model.layers.{layer}.mlp.down_proj.weight" for layer in layers]


@pytest.mark.parametrize(
    ("make", "options", "layer", "names"),
    [
        (llama, {}, 2, down(0, 1, 2)),
        (llama, {"layer": 3, "alpha": 7, "coefficient": 2.5}, 3, down(1, 2, 3)),
        (tiny_gpt2, {"layer": 0}, 0, ["transformer.h.0.mlp.c_proj.weight"]),
        (llama, {"layer": 2, "modules": ["layers.1.O"]}, 2, ["model.layers.1.self_attn.o_proj.weight"]),
    ],
)
def test_gradient_is_that_of_the_formula(make, options, layer, names):
    torch.manual_seed(0)
    model = make()
    start = copy.deepcopy(model)
    objective = prepared(model, **options)
    assert trained(model) == names
    numbers = {name: options[name] for name in ("alpha", "coefficient") if name in options}
    for _ in range(2):
        train(model)
        model.zero_grad()
        loss = plain(model, start, layer, **numbers)
        loss.backward()
        expected = gradients(model)
        for micro in ((5,), (2, 3)):
            model.zero_grad()
            assert backward(objective, model, FORGET, RETAIN, micro=micro) == pytest.approx(loss.item(), rel=1e-9)
            assert_close({n: g for n, g in gradients(model).items() if g is not None},
                         {n: g for n, g in expected.items() if g is not None})  # fmt: skip


def test_default_layer():
    for layers, expected in ((2, 1), (3, 1), (6, 3), (7, 3), (8, 7), (9, 7)):
        model = llama(layers)
        prepared(model)
        assert trained(model) == down(*range(max(0, expected - 2), expected + 1))


@pytest.mark.parametrize(
    ("architecture", "config", "name"),
    [
        ("qwen2", {}, "model.layers.{}.mlp.down_proj.weight"),
        ("mistral", {}, "model.layers.{}.mlp.down_proj.weight"),
        ("phi", {}, "model.layers.{}.mlp.fc2.weight"),
        ("gpt_neox", {}, "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight"),
        ("bloom", {}, "transformer.h.{}.mlp.dense_4h_to_h.weight"),
        ("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16}, "model.decoder.layers.{}.fc2.weight"),
        ("gptj", {"rotary_dim": 4}, "transformer.h.{}.mlp.fc_out.weight"),
    ],
)
def test_down_projections_by_name(architecture, config, name):
    model = tiny_model(architecture, torch.float32, **config)
    objective = prepared(model)
    assert trained(model) == [name.format(layer) for layer in range(2)]
    backward(objective, model, FORGET, RETAIN)
    assert all(model.get_parameter(parameter).grad.abs().sum() > 0 for parameter in trained(model))


def test_the_direction_is_drawn_once_from_the_seed():
    states = [prepared(llama(), seed=seed).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(states[0]["direction"], states[1]["direction"])
    assert not torch.equal(states[0]["direction"], states[2]["direction"])
    torch.testing.assert_close(states[0]["direction"], direction(), rtol=1e-15, atol=0)
    assert states[0]["direction"].min() >= 0


def test_the_penalty_adds_what_it_adds_alone():
    torch.manual_seed(0)
    found = {}
    for kind in ("together", "objective", "penalty"):
        model = llama()
        objective = prepared(model)
        penalty = None if kind == "objective" else SSIUURegularizer(model, weight=WEIGHT)
        for step in range(2):
            model.zero_grad()
            if kind == "penalty":
                penalty.backward(log_probs_of(model, FORGET))
            else:
                backward(objective, model, FORGET, RETAIN, regularizer=penalty, micro=(2, 3))
            if step == 0:
                torch.manual_seed(1)
                train(model)
        found[kind] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, alone in found["penalty"].items():
        assert alone.abs().max() > 0
        added = found["together"][name] - found["objective"][name]
        assert (added - alone).abs().max() <= 1e-12 * found["together"][name].abs().max()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_pass_leaves_no_trace(checkpointing):
    """Same modes, same bits, with dropout in the training pass alone; also after an error in the middle."""
    model = tiny_gpt2()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    objective = prepared(model, layer=0)
    hidden = []
    handle = model.transformer.h[0].register_forward_hook(
        lambda module, inputs, output: hidden.append((module.training, torch.is_grad_enabled(), output))
    )
    train(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    objective.retain_loss(model, RETAIN, totals(RETAIN)).backward()
    assert [(training, graph) for training, graph, _ in hidden][:2] == [(False, False), (True, True)]
    objective.retain_loss(model, RETAIN, totals(RETAIN))
    references = [output for training, _, output in hidden if not training]
    assert torch.equal(*references)
    handle.remove()

    def fail(module, inputs):
        raise KeyError("in the middle")

    handle = model.transformer.h[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="in the middle"):
        objective.retain_loss(model, RETAIN, totals(RETAIN))
    handle.remove()
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = llama()
    objective = prepared(model)
    train(model)
    backward(objective, model, FORGET, RETAIN)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    backward(objective, model, FORGET, RETAIN)
    for name, gradient in expected.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)


def test_a_graph_that_is_alive_survives_the_exchange():
    """A loop may hold the forget graph while the retain rows run."""
    torch.manual_seed(0)
    model = llama()
    objective = prepared(model)
    train(model)
    alone, _ = objective.forget_loss(model, ForgetBatch(FORGET, 5), totals(FORGET))
    alone.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss, _ = objective.forget_loss(model, ForgetBatch(FORGET, 5), totals(FORGET))
    objective.retain_loss(model, RETAIN, totals(RETAIN))
    loss.backward()
    for name, gradient in expected.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)


def test_a_resumed_run_compares_with_the_start():
    torch.manual_seed(0)
    model = llama()
    objective = prepared(model)
    state = {name: value.clone() if torch.is_tensor(value) else value for name, value in objective.state_dict().items()}
    train(model)
    backward(objective, model, FORGET, RETAIN)
    resumed_model = copy.deepcopy(model).requires_grad_(True)
    # prepared from weights that aren't those of the start, and in place of it
    for first in (True, False):
        resumed_model.zero_grad()
        resumed = prepared(resumed_model, seed=5) if first else make_objective("rmu")
        resumed.load_state_dict(state, resumed_model)
        assert trained(resumed_model) == trained(model)
        backward(resumed, resumed_model, FORGET, RETAIN)
        for one, other in zip(model.parameters(), resumed_model.parameters(), strict=True):
            assert one.grad is other.grad is None or torch.equal(one.grad, other.grad)
        resumed.release(resumed_model)
        assert all(parameter.requires_grad for parameter in resumed_model.parameters())


def test_release_restores_what_was_frozen():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].mlp.down_proj.requires_grad_(False)
    before = trained(model)
    objective = prepared(model)
    assert "model.layers.0.mlp.down_proj.weight" in trained(model)
    objective.release(model)
    assert trained(model) == before


def test_bf16_states_are_compared_in_fp32():
    model = tiny_llama(torch.bfloat16, num_hidden_layers=3)
    objective = prepared(model)
    loss, _ = objective.forget_loss(model, ForgetBatch(FORGET, 5), totals(FORGET))
    assert loss.dtype == torch.float32
    exact = tiny_llama(torch.float32, num_hidden_layers=3).bfloat16()
    squares = []
    for row in unpadded(FORGET):
        squares.append((hidden_states(exact, row, 1).float() - 20 * direction().float()).square())
    assert loss.item() == pytest.approx(torch.cat(squares).mean().item(), rel=1e-3)


def test_what_it_cannot_work_with():
    with pytest.raises(ValueError, match="layer=5: the model has blocks 0 to 4; leave layer out"):
        prepared(llama(), layer=5)
    with pytest.raises(ValueError, match="layers.3.O is above block 2, whose output doesn't depend on it"):
        prepared(llama(), modules=["layers.[13].O"])
    with pytest.raises(ValueError, match="pattern 'nothing' fits none"):
        prepared(llama(), modules=["nothing"])
    with pytest.raises(ValueError, match=r"MixtralForCausalLM has no linear module .* name them by modules=\[...\]"):
        prepared(tiny_mixtral())
    with pytest.raises(RuntimeError, match="RMU was not prepared"):
        make_objective("rmu").forget_loss(llama(), ForgetBatch(FORGET, 5), totals(FORGET))
    model = llama()
    objective = prepared(model)
    with pytest.raises(ValueError, match="give Totals their number, attended"):
        objective.forget_loss(model, ForgetBatch(FORGET, 5), Totals(5, 14))
    with pytest.raises(ValueError, match="is compiled"):
        objective.forget_loss(torch.compile(model), ForgetBatch(FORGET, 5), totals(FORGET))
    with pytest.raises(ValueError, match="this is no state of RMU: it holds rows.x"):
        objective.load_state_dict({"rows.x": torch.zeros(1)}, model)
    with pytest.raises(ValueError, match=r"shape \[16, 24\], the model has \[16, 32\]"):
        objective.load_state_dict(objective.state_dict(), llama(intermediate_size=32))
    with pytest.raises(RuntimeError, match="no gradient reaches model.layers.2: was the model frozen after prepare"):
        objective.forget_loss(model.requires_grad_(False), ForgetBatch(FORGET, 5), totals(FORGET))


def test_adapters_are_refused():
    peft = pytest.importorskip("peft")
    for name in ("rmu", "klue"):
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["down_proj"], r=2))
        before = trained(model)
        with pytest.raises(ValueError, match=r"has adapters \(PEFT\).*merge_and_unload"):
            make_objective(name).prepare(model, encoded(FORGET), seed=0, batch_size=2)
        assert trained(model) == before
