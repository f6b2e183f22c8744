"""SSIUURegularizer(granularity="neuron") in people's loops: what it touches, what it keeps, what passes through."""

import copy
import gc
import pickle
from types import SimpleNamespace

import pytest
import torch
from live_memory import LiveMemory
from plain_neurons import PlainNeurons
from steps import assert_close, gradients, step
from tiny import batch, log_probs_of, part, tiny_gpt2, tiny_llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssiuu_fast import SSIUURegularizer

# λ at which the penalty is most of tiny_llama's gradient
WEIGHT = 1e-2
IDS = torch.arange(5)


def neurons(model, weight=WEIGHT, **options):
    return SSIUURegularizer(model, weight, granularity="neuron", **({"target": "log_probability"} | options))


def two_steps(model, regularizer, batches=None, **how):
    """The gradient of the second step, after a small move, and its R."""
    batches = batches or [batch(seed=0), batch(seed=1)]
    step(model, regularizer, batches[0], ids=IDS, **how)
    move(model)
    penalty = step(model, regularizer, batches[1], ids=IDS, **how)
    return gradients(model), penalty


def move(model):
    model.zero_grad()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)


def transcribed(model, batches=None, **options):
    """two_steps by plain autograd."""
    batches = batches or [batch(seed=0), batch(seed=1)]
    truth = PlainNeurons(model, WEIGHT, **({"target": "log_probability"} | options))
    truth.step(batches[0], IDS)
    move(model)
    return truth.step(batches[1], IDS)


def left_padded(rows):
    lengths = rows["attention_mask"].sum(1)
    width = rows["input_ids"].shape[1]
    return {
        name: torch.stack([row.roll(width - int(n)) for row, n in zip(tensor, lengths, strict=True)])
        for name, tensor in rows.items()
    }


class TwoLayers(nn.Module):
    """x → layers.0 (1 → 2) → layers.1 (2 → 1) → log P = its output + offset."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)])
        self.offset = 0.0

    def set(self, first, second, offset):
        with torch.no_grad():
            self.layers[0].weight.copy_(torch.tensor(first).reshape(2, 1))
            self.layers[1].weight.copy_(torch.tensor(second).reshape(1, 2))
        self.offset = offset

    def forward(self, x):
        return self.layers[1](self.layers[0](x)).reshape(-1) + self.offset


def test_two_layers_by_hand():
    model = TwoLayers()
    x = torch.ones(1, 1, 1)
    regularizer = SSIUURegularizer(model, weight=0.25, granularity="neuron")
    # h₀ = (1, −2), h₁ = −1, log P = 0, P = 1: g₁ = 1, A₁ = −1; g₀ = (1, 1), A₀ = (1, −2)
    model.set([1.0, -2.0], [1.0, 1.0], offset=1.0)
    log_probs = model(x)
    assert regularizer.backward(log_probs).item() == 0
    log_probs.sum().backward()
    assert model.layers[1].weight.grad.tolist() == [[1, -2]]
    assert model.layers[0].weight.grad.tolist() == [[1], [1]]

    # h₀ = (2, −4), h₁ = −2, P = 1 again: A₁ = −2 is 1 under its reference, A₀ = (2, −4) is (–, 2) under: R = 1 + 4
    model.zero_grad()
    model.set([2.0, -4.0], [1.0, 1.0], offset=2.0)
    log_probs = model(x)
    assert regularizer.backward(log_probs).item() == 5
    assert model.layers[0].weight.grad is None
    # ∂ log P/∂h₁ = 1; ¼ · 2 · (−1) · 1 = −½ is added: ½. ∂/∂h₀ = ½ · (1, 1) + ¼ · 2 · (0, −2) = (½, −½)
    log_probs.sum().backward()
    assert model.layers[1].weight.grad.tolist() == [[0.5 * 2, 0.5 * -4]]
    assert model.layers[0].weight.grad.tolist() == [[0.5], [-0.5]]
    last = regularizer.last_step
    assert (last.penalty, last.negative_share, last.underflows, last.nonfinite) == (5, pytest.approx(2 / 3), 0, 0)
    assert (last.penalty_gradient_norm, last.added_norm, last.absent) == (None, None, 0)
    assert regularizer.penalty_share(1.0) is None


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("reference", ["previous", "initial"])
@pytest.mark.filterwarnings("ignore:reference='initial'", "ignore:`gradient_checkpointing_enable`")
def test_non_reentrant_checkpointing_changes_nothing(reference, make):
    model, checkpointed = make(), make()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected, penalty = two_steps(model, neurons(model, reference=reference))
    ours, ours_penalty = two_steps(checkpointed, neurons(checkpointed, reference=reference))
    assert penalty > 0
    assert ours_penalty == pytest.approx(penalty, rel=1e-12)
    assert_close(ours, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_reentrant_checkpointing_is_refused_with_the_remedy():
    model = tiny_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="'use_reentrant': False"):
        step(model, neurons(model), batch())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_frozen_weights_have_neurons_too(checkpointing):
    def frozen():
        model = tiny_llama()
        model.requires_grad_(False)
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
        return model

    model = frozen()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    regularizer = neurons(model)
    assert regularizer.parameter_names == ["model.layers.0.mlp.up_proj.weight"]
    ours, penalty = two_steps(model, regularizer)
    ours = {name: gradient for name, gradient in ours.items() if gradient is not None}
    # the same neurons count, and in the frozen model those under the weight change nothing
    expected, expected_penalty = transcribed(tiny_llama())
    assert penalty == pytest.approx(expected_penalty, rel=1e-9)
    assert_close(ours, {name: expected[name] for name in regularizer.parameter_names})


@pytest.mark.parametrize("reference", ["previous", "initial"])
@pytest.mark.filterwarnings("ignore:reference='initial'")
def test_left_padding(reference):
    batches = [left_padded(batch(seed=seed)) for seed in range(2)]
    assert not batches[0]["attention_mask"][:, 0].all()
    model = tiny_llama()
    ours, penalty = two_steps(model, neurons(model, reference=reference), batches)
    expected, expected_penalty = transcribed(tiny_llama(), batches, reference=reference)
    assert penalty == pytest.approx(expected_penalty, rel=1e-9)
    assert_close(ours, expected)


@pytest.mark.parametrize("count", [2, 5])
def test_initial_references_are_of_samples_so_batches_can_be_split(count):
    """Rows of different lengths, together and one by one."""
    ends = []
    for micro_batches in (1, count):
        model = tiny_llama()
        regularizer = neurons(model, reference="initial")
        rows = batch(seed=0)
        regularizer.set_reference(
            (log_probs_of(model, part(rows, index, index + 1)), None, IDS[index : index + 1]) for index in range(5)
        )
        move(model)
        penalty = step(model, regularizer, rows, micro_batches=micro_batches, ids=IDS)
        figures = regularizer.last_step
        ends.append((gradients(model), penalty, figures.negative_share, figures.absent))
    (whole, penalty, *figures), (parts, parts_penalty, *parts_figures) = ends
    assert penalty > 0
    assert parts_penalty == pytest.approx(penalty, rel=1e-9)
    assert parts_figures == figures
    assert_close(parts, whole)


def test_set_reference_is_the_attribution_of_each_sample_at_the_start():
    model = tiny_llama()
    truth = PlainNeurons(copy.deepcopy(model), WEIGHT, target="log_probability", reference="initial")
    rows = batch(seed=0)
    truth.set_reference(rows, IDS)
    regularizer = neurons(model, reference="initial")
    regularizer.set_reference(
        (log_probs_of(model, part(rows, start, start + 3)), None, IDS[start : start + 3]) for start in (0, 3)
    )
    assert all(p.grad is None for p in model.parameters())
    move(model), move(truth.model)
    # in another order, one of them twice
    order = torch.tensor([3, 0, 0, 4])
    again = {name: tensor[order] for name, tensor in rows.items()}
    penalty = step(model, regularizer, again, ids=IDS[order])
    expected, expected_penalty = truth.step(again, IDS[order])
    assert penalty == pytest.approx(expected_penalty, rel=1e-9)
    assert_close(gradients(model), expected)


def test_scale_multiplies_the_gradient_alone():
    model, scaled = tiny_llama(), tiny_llama()
    regularizers = neurons(model), neurons(scaled)
    expected, penalty = two_steps(model, regularizers[0])
    ours, scaled_penalty = two_steps(scaled, regularizers[1], scale=1024.0)
    assert scaled_penalty == pytest.approx(penalty, rel=1e-12)
    assert_close({name: g / 1024 for name, g in ours.items()}, expected)
    one, other = (regularizer.state_dict()["references"] for regularizer in regularizers)
    assert_close(other, one)


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


def test_autocast():
    model, exact = tiny_llama(torch.float32), tiny_llama(torch.float32)
    regularizer = neurons(model, weight=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, penalty = two_steps(model, regularizer)
    expected, expected_penalty = two_steps(exact, neurons(exact, weight=1e-3))
    assert penalty == pytest.approx(expected_penalty, rel=0.2)
    assert all(tensor.dtype == torch.float32 for tensor in regularizer.state_dict()["references"].values())
    for name, gradient in expected.items():
        error = (ours[name] - gradient).norm() / gradient.norm()
        assert error < 0.15, f"{name}: {error:.2f}"


class Residual(nn.Module):
    """Linear layers on a stream that is written in place, or not."""

    def __init__(self, in_place):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(48, 6, dtype=torch.float64)
        self.layers = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))
        self.head = nn.Linear(6, 48, dtype=torch.float64)
        self.in_place = in_place

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        first, second, third = self.layers
        if self.in_place:
            x = torch.tanh(first(x).add_(x))
            y = second(x)
            y += x
            y.view(-1)[:5] *= 2
        else:
            x = torch.tanh(first(x) + x)
            y = second(x) + x
            y = y * torch.ones_like(y).flatten().index_fill(0, torch.arange(5), 2.0).view_as(y)
        return SimpleNamespace(logits=self.head(third(y)))


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


def test_every_skips_steps_and_multiplies_the_weight():
    model, other = tiny_llama(), tiny_llama()
    every, plain = neurons(model, every=2), neurons(other, weight=2 * WEIGHT)
    for seed in range(4):
        model.zero_grad()
        step(model, every, batch(seed=seed))
        if seed % 2 == 0:
            other.zero_grad()
            step(other, plain, batch(seed=seed))
            assert_close(gradients(model), gradients(other), bound=0)


class Sometimes(Residual):
    """Its last layer takes part when it is told to."""

    def __init__(self):
        super().__init__(in_place=False)
        self.whole = True

    def forward(self, input_ids, attention_mask):
        first, second, third = self.layers
        x = second(torch.tanh(first(self.embedding(input_ids))))
        return SimpleNamespace(logits=self.head(third(x) if self.whole else x))


@pytest.mark.parametrize("reference", ["previous", "initial"])
@pytest.mark.filterwarnings("ignore:reference='initial'")
def test_a_module_outside_the_graph_keeps_its_reference_and_is_counted(reference):
    model = Sometimes()
    regularizer = neurons(model, reference=reference)
    absent = []
    for whole in (True, False, True):
        model.whole = whole
        step(model, regularizer, batch(seed=0), ids=IDS)
        absent.append(regularizer.last_step.absent)
        if whole:
            stored = regularizer.state_dict()["references"]["layers.2"].clone()
        else:
            assert torch.equal(regularizer.state_dict()["references"]["layers.2"], stored)
    assert absent == [0, 1, 0]


class Adapted(nn.Module):
    """A linear module with a low-rank adapter, as PEFT builds it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False, dtype=torch.float64)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_neurons_of_an_adapted_module_are_those_of_the_whole():
    model, merged = Residual(in_place=False), Residual(in_place=False)
    model.layers[1] = Adapted(model.layers[1])
    regularizers = neurons(model), neurons(merged)
    for seed in range(2):
        adapted = model.layers[1]
        merged.layers[1].weight.data = adapted.base_layer.weight + adapted.lora_B.weight @ adapted.lora_A.weight
        penalties = [step(m, r, batch(seed=seed)) for m, r in zip((model, merged), regularizers, strict=True)]
        assert penalties[0] == pytest.approx(penalties[1], rel=1e-9)
    assert penalties[0] > 0
    one, other = (regularizer.state_dict() for regularizer in regularizers)
    assert one["neurons"] == other["neurons"] == {f"layers.{index}": 6 for index in range(3)}
    assert_close(one["references"], other["references"])


def test_ddp_in_one_process_is_the_plain_model(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, wrapped = tiny_llama(), nn.parallel.DistributedDataParallel(tiny_llama())
        expected, _ = two_steps(model, neurons(model))
        ours, _ = two_steps(wrapped, neurons(wrapped))
        assert_close({name.removeprefix("module."): g for name, g in ours.items()}, expected)
    finally:
        torch.distributed.destroy_process_group()
