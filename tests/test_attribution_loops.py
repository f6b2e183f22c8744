"""attribute() on batches and models as they come: padding, checkpointing, frozen, adapters, shards; what it leaves."""

import pytest
import torch
from neurons import left_padded
from tiny import batch, exactly, part, tiny_gpt2, tiny_llama, tiny_model

from ssiuu_fast import attribute
from ssiuu_fast.attribution import Site


def assert_same(a, b, bound=1e-9):
    assert a.samples == b.samples
    for role in ("max", "positive_max", "min"):
        mine, other = getattr(a, role), getattr(b, role)
        assert mine.keys() == other.keys()
        for site in other:
            error = (mine[site] - other[site]).abs().max()
            assert error <= bound * other[site].abs().max(), (role, site.text, error)


def one_by_one(rows):
    """Each sample as a batch of its own length."""
    for index, length in enumerate(rows["attention_mask"].sum(1).tolist()):
        yield {name: tensor[:, :length] for name, tensor in part(rows, index, index + 1).items()}


@pytest.mark.parametrize("tiny", [tiny_llama, tiny_gpt2])
def test_mixed_lengths_equal_one_by_one_and_left_padding(tiny):
    model = exactly(tiny())
    rows = batch()
    assert (rows["attention_mask"].sum(1) < 9).any()
    alone = attribute(model, one_by_one(rows))
    padded = attribute(model, [rows])
    left = attribute(model, [left_padded(rows)])
    # rotary angles of transformers are fp32
    assert_same(padded, alone)
    assert_same(left, alone)
    assert left.settings == padded.settings == alone.settings


@pytest.mark.parametrize("positions", ["prompt", "answer", "no_bos"])
def test_positions_are_of_the_sample_whatever_the_padding(positions):
    model = exactly(tiny_llama())
    rows = batch()
    left = attribute(model, [left_padded(rows)], positions=positions)
    assert_same(left, attribute(model, one_by_one(rows), positions=positions))


@pytest.mark.parametrize("tiny", [tiny_llama, tiny_gpt2])
def test_checkpointing_changes_nothing(tiny):
    plain = attribute(tiny(), [batch()])
    model = tiny()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = []
    block = (model.model.layers if tiny is tiny_llama else model.transformer.h)[1]
    block.mlp.register_forward_pre_hook(lambda module, inputs: recomputed.append(block.training))
    assert_same(attribute(model, [batch()]), plain, bound=1e-12)
    # once in the forward and once in the backward pass; the blocks themselves run in evaluation mode
    assert recomputed == [False, False]


def test_dropout_is_off_under_checkpointing_too():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32, embd_pdrop=0.5, resid_pdrop=0.5)
    model = GPT2LMHeadModel(config).double().train()
    first = attribute(model, [batch()])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(attribute(model, [batch()]), first, bound=1e-12)
    assert all(module.training for module in model.modules())


def test_the_model_is_left_as_it_was():
    model = tiny_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    model.model.layers[1].eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = state(model)
    attribute(model, [batch()])
    assert state(model) == before
    with pytest.raises(ValueError, match="no 'labels'"):
        attribute(model, [batch(), {"input_ids": batch()["input_ids"], "attention_mask": batch()["attention_mask"]}])
    assert state(model) == before


def state(model):
    return (
        [(name, p.requires_grad, p.grad is None, p.detach().sum().item()) for name, p in model.named_parameters()],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    )


def test_a_frozen_model_and_no_grad_around():
    truth = attribute(tiny_llama(), [batch()])
    frozen = tiny_llama().requires_grad_(False).eval()
    with torch.no_grad():
        assert_same(attribute(frozen, [batch()]), truth, bound=1e-12)
    with torch.inference_mode():
        assert_same(attribute(frozen, [batch()]), truth, bound=1e-12)


def test_inputs_that_require_grad_as_trainers_make_them():
    model = tiny_llama()
    model.enable_input_require_grads()
    assert_same(attribute(model, [batch()]), attribute(tiny_llama(), [batch()]), bound=1e-12)


def test_no_gradient_of_a_weight_is_computed():
    """The backward of a linear module with a frozen weight has nothing to multiply its input with: it isn't kept."""
    model = tiny_llama()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        attribute(model, [batch()])
    frozen = []
    model.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: frozen.append(tensor.shape) or tensor, lambda t: t):
        attribute(model, [batch()])
    assert kept == frozen


def test_below_the_lowest_chosen_module_nothing_is_kept():
    model = tiny_llama(num_hidden_layers=8)
    kept = {}
    for pattern in ("layers.*", "layers.7.*"):
        sizes = kept.setdefault(pattern, [])
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            attribute(model, [batch()], modules=[pattern])
    assert sum(kept["layers.7.*"]) < sum(kept["layers.*"]) / 3


def test_chosen_modules_equal_those_of_all():
    model = tiny_llama()
    whole = attribute(model, [batch()])
    for modules in (["layers.1.Q", "layers.*.down"], ["model.layers.1.self_attn.q_proj", "*.down_proj"]):
        some = attribute(model, [batch()], modules=modules)
        assert list(some.max) == [Site(0, "down"), Site(1, "Q"), Site(1, "down")]
        for site, values in some.max.items():
            assert (values - whole.max[site]).abs().max() <= 1e-12 * values.abs().max()


def test_one_part_of_a_fused_module():
    model = tiny_model("phi3")
    whole = attribute(model, [batch()])
    some = attribute(model, [batch()], modules=["layers.0.K"])
    assert list(some.max) == [Site(0, "K")]
    assert (some.max[Site(0, "K")] == whole.max[Site(0, "K")]).all()


class Lora(torch.nn.Module):
    """A linear module with an adapter as PEFT builds it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(base.in_features, 2, bias=False).double()})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, base.out_features, bias=False).double()})

    def forward(self, hidden):
        return self.base_layer(hidden) + self.lora_B["default"](self.lora_A["default"](hidden))


def test_adapters_belong_to_their_module():
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
        layer.mlp.down_proj = Lora(layer.mlp.down_proj)
    found = attribute(model, [batch()])
    merged = tiny_llama()
    for mine, plain in zip(model.model.layers, merged.model.layers, strict=True):
        for adapted, linear in [
            (mine.self_attn.q_proj, plain.self_attn.q_proj),
            (mine.mlp.down_proj, plain.mlp.down_proj),
        ]:
            change = adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
            linear.weight.data += change.detach()
    assert_same(found, attribute(merged, [batch()]), bound=1e-5)


def test_a_model_spread_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    truth = attribute(tiny_llama(), [batch()])
    model = tiny_llama()
    # hooks that move activations between parts, as from_pretrained(device_map=...) puts them
    spread = accelerate.dispatch_model(
        model,
        {
            "model.embed_tokens": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "cpu",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "cpu",
        },
        main_device="cpu",
        force_hooks=True,
    )
    assert_same(attribute(spread, [batch()]), truth, bound=1e-12)


def test_weights_of_replicates_are_poisson_and_belong_to_the_sample():
    from ssiuu_fast.attribution_means import replicate_weights

    weights = replicate_weights(range(500))
    assert weights.shape == (200, 500)
    assert weights.mean().item() == pytest.approx(1, abs=0.02)
    assert weights.var().item() == pytest.approx(1, abs=0.03)
    assert (weights[:, 100:103] == replicate_weights(range(100, 103))).all()
    # Python's draws for sample 100: .633 .738 .820 .553 .577 .543 .042 .845; e^-1 = .368 and 2/e = .736 divide 0, 1, 2
    assert weights[:8, 100].tolist() == [1, 2, 2, 1, 1, 1, 0, 2]


def test_replicates_are_weighted_sums_of_the_samples():
    from ssiuu_fast.attribution_means import replicate_weights

    model = exactly(tiny_llama())
    rows = batch()
    found = attribute(model, [rows]).replicates
    alone = [attribute(model, [row]) for row in one_by_one(rows)]
    weights = replicate_weights(range(5))
    assert (found.weights == weights.sum(1)).all()
    for site in found.max:
        for role in ("max", "positive_max", "min"):
            expected = weights @ torch.stack([getattr(one, role)[site].sum() for one in alone])
            mine = getattr(found, role)[site]
            assert (mine - expected).abs().max() <= 1e-9 * expected.abs().max()


class EightBits(torch.nn.Module):
    """A frozen linear module that stores its weight as int8, as quantisers put one in place of nn.Linear."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.codes.to(hidden.dtype) * self.scale)


def test_a_quantised_model():
    quantised, plain = tiny_llama(), tiny_llama()
    for mine, theirs in zip(quantised.model.layers, plain.model.layers, strict=True):
        for name in ("q_proj", "o_proj"):
            module = EightBits(getattr(mine.self_attn, name))
            setattr(mine.self_attn, name, module)
            getattr(theirs.self_attn, name).weight.data = module.codes.double() * module.scale
    assert_same(attribute(quantised, [batch()]), attribute(plain, [batch()]), bound=1e-12)
