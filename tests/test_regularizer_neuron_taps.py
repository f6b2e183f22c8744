"""Taps of SSIUURegularizer(granularity="neuron"): what passes through them, what they keep and when they end."""

import copy
import gc
import pickle
from types import SimpleNamespace

import pytest
import torch
from neurons import IDS, WEIGHT, Residual, move, neurons
from plain_neurons import PlainNeurons
from steps import assert_close, gradients, step
from tiny import batch, log_probs_of, tiny_gpt2, tiny_llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssiuu_fast.planning.live_memory import LiveMemory


def test_other_forward_passes_go_through_untouched():
    model, plain = tiny_llama(), tiny_llama()
    regularizer = neurons(model)
    step(model, regularizer, batch(seed=0))
    move(model), move(plain)
    # the retain batch goes forward between the two backward passes of the forget batch, and back before the second
    log_probs = log_probs_of(model, batch(seed=1))
    regularizer.backward(log_probs)
    log_probs_of(model, batch(seed=2)).sum().backward()
    log_probs_of(plain, batch(seed=2)).sum().backward()
    assert_close(gradients(model), gradients(plain), bound=0)
    model.zero_grad()
    log_probs.sum().backward()
    model.zero_grad(), plain.zero_grad()
    # the penalty arrived with that pass, and in no later one
    log_probs_of(model, batch(seed=1)).sum().backward()
    log_probs_of(plain, batch(seed=1)).sum().backward()
    assert_close(gradients(model), gradients(plain), bound=0)


def test_the_penalty_arrives_once_in_a_graph_that_is_kept():
    model = tiny_llama()
    regularizer = neurons(model)
    step(model, regularizer, batch(seed=0))
    move(model)
    plain = copy.deepcopy(model)
    log_probs = log_probs_of(model, batch(seed=1))
    regularizer.backward(log_probs)
    log_probs.sum().backward(retain_graph=True)
    model.zero_grad()
    log_probs.sum().backward()
    log_probs_of(plain, batch(seed=1)).sum().backward()
    assert_close(gradients(model), gradients(plain), bound=0)


@torch.no_grad()
def test_evaluation_and_generation_are_untouched():
    model, plain = tiny_llama().eval(), tiny_llama().eval()
    regularizer = neurons(model)
    rows = batch()
    assert torch.equal(log_probs_of(model, rows), log_probs_of(plain, rows))
    ids, mask = rows["input_ids"][:, :5], rows["attention_mask"][:, :5]
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))
    assert regularizer.last_step is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_zero_is_no_regulariser(dtype):
    model, plain = tiny_llama(dtype), tiny_llama(dtype)
    regularizer = neurons(model, weight=0.0)
    for seed in range(3):
        step(model, regularizer, batch(seed=seed))
        rows = batch(seed=seed)
        (log_probs_of(plain, rows).sum() / (rows["labels"][:, 1:] != -100).sum()).backward()
    assert regularizer.last_step.penalty > 0
    assert regularizer.last_step.added_norm == 0
    assert_close(gradients(model), gradients(plain), bound=0)


def test_a_model_that_writes_into_the_outputs():
    model = Residual(in_place=True)
    regularizer = neurons(model)
    truth = PlainNeurons(Residual(in_place=False), WEIGHT, target="log_probability")
    penalties = []
    for seed in range(4):
        model.zero_grad()
        penalties.append(step(model, regularizer, batch(seed=seed)))
        expected, penalty = truth.step(batch(seed=seed))
        assert penalties[-1] == pytest.approx(penalty, rel=1e-9)
        assert_close(gradients(model), expected)
    assert min(penalties[1:]) > 0


class SeesProducts(TorchDispatchMode):
    """Shapes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.shapes.append(tuple(result.shape))
        return result


def test_no_gradient_of_a_weight_is_computed_in_the_measuring_pass():
    model = tiny_llama()
    weights = {tuple(p.shape) for p in model.parameters()}
    regularizer = neurons(model)
    log_probs = log_probs_of(model, batch())
    with SeesProducts() as measuring:
        regularizer.backward(log_probs)
    assert measuring.shapes and not weights & set(measuring.shapes)
    with SeesProducts() as loss:
        log_probs.sum().backward()
    assert weights & set(loss.shapes)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_one_tensor_of_each_tapped_output_is_kept(make):
    rows = {name: tensor.repeat(40, 1) for name, tensor in batch(length=24).items()}
    plain, model = make(), make()
    sizes = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head or type(module).__name__ == "Conv1D":
            module.register_forward_hook(lambda module, inputs, output: sizes.append(output.nbytes))
    with torch.no_grad():
        log_probs_of(model, rows)
    kept = sum(sizes)
    # a figure a neuron and sums
    little = kept / 50

    def memory(model, regularizer=None):
        """Live bytes after the forward pass, after the measuring and after the loss's pass, and with the graph gone."""
        with LiveMemory() as live:
            start = live.bytes()
            log_probs = log_probs_of(model, rows)
            after = [live.bytes() - start]
            if regularizer is not None:
                regularizer.backward(log_probs)
                after.append(live.bytes() - start)
            model.zero_grad(set_to_none=False)
            log_probs.sum().backward()
            after.append(live.bytes() - start)
            del log_probs
            return [*after, live.bytes() - start]

    regularizer = neurons(model)
    # the first step looks whether the model writes into its outputs, and makes .grad
    memory(plain), memory(model, regularizer)
    forward, sent_back, gone = memory(plain)
    with_taps, measured, *after = memory(model, regularizer)
    # some outputs are saved by the model anyway
    assert forward < with_taps < forward + 0.7 * kept
    assert forward + 0.9 * kept < measured <= forward + kept + little
    assert after <= [sent_back + little, gone + little]
    # a graph that isn't measured, like that of the retain batch, is let go of as it is sent back
    unmeasured, *after = memory(model)
    assert unmeasured == with_taps
    assert after <= [sent_back + little, gone + little]
    # and nothing is kept where nothing is to be added
    regularizer.weight = 0.0
    assert memory(model, regularizer)[1] <= forward + little


def test_a_forward_pass_that_is_never_sent_back_leaves_nothing():
    model = tiny_llama()
    regularizer = neurons(model)
    step(model, regularizer, batch())
    with LiveMemory() as live:
        log_probs = log_probs_of(model, batch())
        assert live.bytes() > 0
        del log_probs
        assert live.bytes() == 0


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_the_taps_end_with_the_regulariser():
    model = tiny_llama()
    gc.disable()
    try:
        regularizer = neurons(model)
        assert hooks(model) == 14
        step(model, regularizer, batch(seed=0))
        move(model)
        expected = copy.deepcopy(model)
        log_probs = log_probs_of(model, batch(seed=1))
        regularizer.backward(log_probs)
        del regularizer
        # a graph that runs through them may still be sent back
        assert hooks(model) == 14
        log_probs.sum().backward()
        del log_probs
        assert hooks(model) == 0
    finally:
        gc.enable()
    log_probs_of(expected, batch(seed=1)).sum().backward()
    with pytest.raises(AssertionError):
        assert_close(gradients(model), gradients(expected))


def test_a_copied_or_saved_model_is_not_tapped():
    model = tiny_llama()
    regularizer = neurons(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match="0 of 14 tapped modules are in this graph"):
            regularizer.backward(log_probs_of(other, batch()))


class DropsInPlace(Residual):
    """Writes into the output of a linear module, in training alone."""

    def __init__(self):
        super().__init__(in_place=False)
        self.dropout = nn.Dropout(0.5, inplace=True)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = self.dropout(layer(x))
        return SimpleNamespace(logits=self.head(torch.tanh(x)))


def test_what_a_model_writes_is_another_matter_in_training():
    model = DropsInPlace().eval()
    regularizer = neurons(model, reference="initial")
    regularizer.set_reference([(log_probs_of(model, batch()), None, IDS)])
    model.train()
    for _ in range(2):
        step(model, regularizer, batch(), ids=IDS)
    assert regularizer.last_step.penalty > 0
