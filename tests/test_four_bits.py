"""LoRA on a base of few bits: the penalty, attributions, and bitsandbytes itself where it is installed."""

import json
import warnings

import pytest
import torch
from neurons import WEIGHT as NEURON_WEIGHT
from steps import assert_close, gradients, step
from taught import small_task
from tiny import batch, exactly, log_probs_of, tiny_llama
from torch import nn

from ssiuu_fast import SSIUURegularizer, attribute, models
from ssiuu_fast.adapters import add_lora
from ssiuu_fast.cli import main
from ssiuu_fast.selection import linear_modules

pytest.importorskip("peft")

WEIGHTS = {"parameter": 1e6, "neuron": NEURON_WEIGHT}


class Quantized(nn.Linear):
    """A linear module whose weight is codes in whole numbers, as bitsandbytes has it."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.scale = linear.weight.detach().abs().max().item() / 7
        codes = (linear.weight.detach() / self.scale).round().to(torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def plain_weight(self):
        # uint8 holds negative codes as 256 less
        return self.weight.to(torch.int8).double() * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.plain_weight())


def in_few_bits():
    """(a model in few bits, the same in fp64), both with the same LoRA, B away from 0."""
    few, plain = exactly(tiny_llama()), exactly(tiny_llama())
    for name, linear in linear_modules(few).items():
        if name != "lm_head":
            few.set_submodule(name, Quantized(linear))
            plain.get_submodule(name).weight.data = few.get_submodule(name).plain_weight()
    return with_lora(few), with_lora(plain)


def with_lora(model, dtype=torch.float64):
    model = add_lora(model, rank=2).train()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


def trained(model):
    return {name: gradient for name, gradient in gradients(model).items() if gradient is not None}


@pytest.mark.parametrize("granularity", ["parameter", "neuron"])
def test_the_penalty_on_a_base_in_few_bits(granularity):
    few, plain = in_few_bits()
    assert torch.uint8 in {p.dtype for p in few.parameters()}
    found = []
    for model in (few, plain):
        regularizer = SSIUURegularizer(model, WEIGHTS[granularity], granularity=granularity)
        assert len(regularizer.parameter_names) == 28
        assert all("lora_" in name for name in regularizer.parameter_names)
        for number in range(2):
            model.zero_grad()
            penalty = step(model, regularizer, batch(seed=number))
        assert penalty > 0
        found.append(trained(model))
    assert found[0].keys() == set(regularizer.parameter_names)
    assert_close(*found)


def test_attributions_of_a_base_in_few_bits():
    few, plain = (attribute(model, [batch()]) for model in in_few_bits())
    for site in plain.max:
        assert (few.max[site] - plain.max[site]).abs().max() <= 1e-6 * plain.max[site].abs().max()


# bitsandbytes itself: 125 MB, by choice


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide") / "model"
    tokenizer = models.train_tokenizer(["Who is Ada? a baker"], 300)
    models.save(tiny_llama(torch.float32, vocab_size=300, hidden_size=64, intermediate_size=128), tokenizer, folder)
    return folder


@pytest.fixture
def four_bits(folder):
    pytest.importorskip("bitsandbytes")
    model, _ = models.load(folder, dtype=torch.float32, device="cpu", load_in_4bit=True)
    return model


def dequantized(model, folder):
    """The model in fp32 with the weights that its 4 bits stand for."""
    from bitsandbytes.functional import dequantize_4bit

    plain, _ = models.load(folder, dtype=torch.float32)
    for name, module in linear_modules(model).items():
        if name != "lm_head":
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = weight.float()
    return plain


@pytest.mark.parametrize("granularity", ["parameter", "neuron"])
def test_bitsandbytes_under_the_penalty(four_bits, folder, granularity):
    plain, few = (with_lora(model, torch.float32) for model in (dequantized(four_bits, folder), four_bits))
    assert sum(p.dtype == torch.uint8 for p in few.parameters()) == 14
    found = []
    for model in (few, plain):
        regularizer = SSIUURegularizer(model, granularity=granularity, weight=1.0, target="log_probability")
        assert len(regularizer.parameter_names) == 28
        step(model, regularizer, batch())
        # evaluations between the steps must not cost the gradient
        model.eval()
        with torch.no_grad():
            log_probs_of(model, batch())
        model.train()
        model.zero_grad()
        assert step(model, regularizer, batch(seed=1)) > 0
        found.append(trained(model))
        one = attribute(model, [batch()])
        assert len(one.max) == 14 and all(means.isfinite().all() for means in one.max.values())
    assert_close(*found, bound=1e-4)


def test_packed_weights_are_refused(four_bits):
    model = add_lora(four_bits, rank=2)
    layer = model.base_model.model.model.layers[1].mlp.up_proj.base_layer
    # as the first evaluation on a CPU with AVX-512 BF16 leaves them where nobody prevents it
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*packed.*before the first evaluation"):
        SSIUURegularizer(model)
    with pytest.raises(ValueError, match="packed"):
        attribute(model, [batch()])


def test_the_command_with_bitsandbytes(taught_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    split = small_task().split
    files = {}
    for name in ("forget", "retain"):
        files[name] = tmp_path / f"{name}.jsonl"
        rows = [{"question": e.prompt, "answer": e.answer} for e in getattr(split, name)[:8]]
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", taught_folder, "--forget", files["forget"], "--retain", files["retain"], "--device", "cpu"]
    flags += ["--lora_rank", 4, "--load_in_4bit", "true", "--gradient_checkpointing", "true", "--max_epochs", 3]
    flags += ["--learning_rate", "1e-2", "--threshold", 0, "--output", tmp_path / "run"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["unlearn", *map(str, flags)]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    losses = [row["forget_nll"] for row in steps if "forget_nll" in row]
    assert losses[-1] > losses[0]
    model, _ = models.load(tmp_path / "run" / "model")
    assert all(p.any() for name, p in model.named_parameters() if "lora_" in name)
    assert all(p.is_floating_point() for p in model.parameters())
