"""What SSIUURegularizer(granularity="neuron") refuses or warns of, before anything is changed."""

from types import SimpleNamespace

import pytest
import torch
from neurons import IDS, Residual, move, neurons
from steps import gradients, step
from tiny import batch, log_probs_of, tiny_llama
from torch import nn

from ssiuu_fast import SSIUURegularizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dtype": torch.bfloat16}, "state_dtype=torch.bfloat16 is of no use with granularity='neuron'"),
        ({"offload": True}, "offload=True is of no use with granularity='neuron'"),
        ({"parameters": ["*no_such*"]}, r"pattern '\*no_such\*' matches none of the 15 weights of linear modules"),
        ({"parameters": ["*norm.weight"]}, "matches none of the 15 weights of linear modules"),
        ({"parameters": "*weight"}, "list of glob patterns"),
        ({"backend": "fastest"}, "backend must be one of"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        neurons(tiny_llama(), **options)


def test_state_dtype_fp32_is_what_it_is():
    neurons(tiny_llama(), state_dtype=torch.float32)


def test_parameters_instead_of_a_model():
    with pytest.raises(ValueError, match="give the model, not its parameters"):
        neurons(tiny_llama().named_parameters())


def test_a_model_without_anything_to_train():
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        neurons(tiny_llama().requires_grad_(False))


def test_patterns_choose_modules_by_their_weights():
    model = tiny_llama()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    regularizer = neurons(model, parameters=["*down_proj.weight", "lm_head.weight"])
    step(model, regularizer, batch())
    assert regularizer.state_dict()["neurons"] == {
        "model.layers.0.mlp.down_proj": 16,
        "model.layers.1.mlp.down_proj": 16,
        "lm_head": 48,
    }


def test_compiled_models():
    for model in (torch.compile(tiny_llama()), nn.Sequential(torch.compile(nn.Linear(2, 2)))):
        with pytest.raises(ValueError, match="is compiled: .* before torch.compile"):
            neurons(model)
    model = tiny_llama()
    model.model.layers[1].compile()
    with pytest.raises(ValueError, match=r"model\.layers\.1 is compiled"):
        neurons(model)


def test_a_model_that_is_compiled_later():
    torch.compiler.reset()
    model = tiny_llama(torch.float32)
    regularizer = neurons(model)
    compiled = torch.compile(model)
    with pytest.raises(RuntimeError, match="0 of 14 tapped modules .* compiled after the regulariser was built"):
        regularizer.backward(log_probs_of(compiled, batch()))


def test_earlier_micro_batches_need_an_initial_reference():
    model = tiny_llama()
    regularizer = neurons(model)
    with pytest.raises(ValueError, match=r"last=False: .* one micro-batch, or use reference='initial'"):
        step(model, regularizer, batch(), micro_batches=2)
    assert all(p.grad is None for p in model.parameters())
    assert regularizer.state_dict()["references"] == {}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "give sample_ids, a whole number a sample"),
        (torch.arange(4), r"5 whole numbers, shape \[5\], got torch.int64 \[4\]"),
        (torch.arange(5.0), r"got torch.float32 \[5\]"),
        (torch.ones(5, dtype=torch.bool), r"got torch.bool \[5\]"),
        ([0, 1, 2, 3, 4], r"got \[0, 1, 2, 3, 4\]"),
    ],
)
def test_sample_ids(ids, message):
    model = tiny_llama()
    regularizer = neurons(model, reference="initial")
    with pytest.raises(ValueError, match=message):
        regularizer.backward(log_probs_of(model, batch()), sample_ids=ids)
    with pytest.raises(ValueError, match=message):
        regularizer.set_reference([(log_probs_of(model, batch()), None, ids)])
    assert regularizer.last_step is None


def test_a_sample_that_the_reference_pass_did_not_see():
    model = tiny_llama()
    regularizer = neurons(model, reference="initial")
    regularizer.set_reference([(log_probs_of(model, batch()), None, IDS)])
    before = regularizer.state_dict()
    with pytest.raises(ValueError, match="sample id 5 was not in the pass of set_reference"):
        step(model, regularizer, batch(), ids=IDS + 1)
    assert all(p.grad is None for p in model.parameters())
    assert regularizer.state_dict()["reference_ids"] == before["reference_ids"] == [0, 1, 2, 3, 4]
    # the same graph may be tried again
    step(model, regularizer, batch(), ids=IDS)


def test_a_sample_given_to_the_reference_pass_twice():
    model = tiny_llama()
    regularizer = neurons(model, reference="initial")
    for items in ([IDS, IDS + 4], [torch.tensor([0, 1, 4, 4, 2])]):
        with pytest.raises(ValueError, match="sample id 4 twice"):
            regularizer.set_reference((log_probs_of(model, batch()), None, ids) for ids in items)
    with pytest.raises(ValueError, match="the forget set is empty"):
        regularizer.set_reference([])


def test_without_a_reference_pass_the_first_attributions_are_kept_with_one_warning():
    model = tiny_llama()
    regularizer = neurons(model, reference="initial")
    with pytest.warns(UserWarning, match="without set_reference") as said:
        assert step(model, regularizer, batch(seed=0), ids=IDS) == 0
        move(model)
        # two of these are known
        assert step(model, regularizer, batch(seed=0), ids=IDS + 3) > 0
    assert len(said) == 1
    assert regularizer.state_dict()["reference_ids"] == list(range(8))


@pytest.mark.filterwarnings("ignore:reference='initial'")
def test_of_a_sample_that_is_new_and_twice_in_a_batch_the_first_counts():
    model = tiny_llama()
    references = []
    for ids in (torch.arange(5), torch.tensor([0, 1, 2, 0, 1])):
        regularizer = neurons(model, reference="initial")
        step(model, regularizer, batch(), ids=ids)
        references.append(regularizer.state_dict()["references"])
    for name, rows in references[1].items():
        assert torch.equal(rows, references[0][name][:3])


def test_a_freed_graph_names_the_right_order():
    model = tiny_llama()
    log_probs = log_probs_of(model, batch())
    regularizer = neurons(model)
    log_probs = log_probs_of(model, batch())
    log_probs.sum().backward()
    with pytest.raises(RuntimeError, match=r"regularizer\.backward\(log_probs\) before loss\.backward\(\)"):
        regularizer.backward(log_probs)


def test_a_graph_is_measured_once():
    model = tiny_llama()
    regularizer = neurons(model)
    log_probs = log_probs_of(model, batch())
    regularizer.backward(log_probs)
    with pytest.raises(RuntimeError, match="was measured before"):
        regularizer.backward(log_probs)


def test_no_tapped_module_in_the_graph():
    model = tiny_llama()
    log_probs = log_probs_of(model, batch())
    with pytest.raises(RuntimeError, match="0 of 14 tapped modules are in this graph"):
        neurons(model).backward(log_probs)


class Twice(Residual):
    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        for layer in (0, 1, 0):
            x = torch.tanh(self.layers[layer](x))
        return SimpleNamespace(logits=self.head(x))


class Flat(Residual):
    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        x = self.layers[0](x) + self.layers[1](x.flatten(0, 1)).view_as(x)
        return SimpleNamespace(logits=self.head(x))


class TimeFirst(Residual):
    def forward(self, input_ids, attention_mask):
        x = self.layers[0](self.embedding(input_ids).transpose(0, 1))
        return SimpleNamespace(logits=self.head(x.transpose(0, 1)))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Twice, {}, r"layers\.0 is used twice in this graph.*parameters="),
        (Flat, {}, r"layers\.1 puts out \[45, 6\].*\[batch, tokens, neurons\]"),
        (TimeFirst, {"reference": "initial"}, r"layers\.0 puts out \[9, 5, 6\] for 5 samples"),
    ],
)
def test_outputs_that_neurons_cannot_be_told_from(kind, options, message):
    model = kind(in_place=False)
    regularizer = neurons(model, **options)
    with pytest.raises(ValueError, match=message):
        step(model, regularizer, batch(), ids=IDS)
    assert regularizer.state_dict()["references"] == {}
    assert regularizer.last_step is None
    # such a module can be left out
    left_out = message[:9].replace("\\", "")
    others = [f"layers.{index}.weight" for index in range(3) if f"layers.{index}" != left_out]
    if kind is not TimeFirst:
        step(model, neurons(model, parameters=others, **options), batch(), ids=IDS)


def test_a_loss_of_another_forward_pass_is_warned_of_once():
    model = tiny_llama()
    regularizer = neurons(model)
    step(model, regularizer, batch())
    with pytest.warns(UserWarning, match="at 14 modules the penalty of the last backward.* was never added") as said:
        for _ in range(3):
            regularizer.backward(log_probs_of(model, batch(seed=1)))
            log_probs_of(model, batch(seed=1)).sum().backward()
    assert len(said) == 1


class Breaks(nn.Module):
    """One linear layer, one sample: log P = Σ h, whose gradient is `value` at neuron 0."""

    def __init__(self, value):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 3, bias=False)])
        nn.init.constant_(self.layers[0].weight, -1.0)
        self.value = value

    def forward(self):
        h = self.layers[0](torch.ones(1, 1, 1))
        h.register_hook(lambda g: torch.where(torch.arange(3) == 0, self.value, g))
        return h.sum().reshape(1)


@pytest.mark.parametrize("reference", ["previous", "initial"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore:reference='initial'")
def test_non_finite_attributions(value, reference):
    model = Breaks(1.0)
    ids = torch.tensor([7])
    counting = neurons(model, weight=1.0, reference=reference, nonfinite="count")
    counting.backward(model(), sample_ids=ids)
    kept = counting.state_dict()["references"]["layers.0"].clone()
    assert kept.flatten().tolist() == [-1, -1, -1]
    with torch.no_grad():
        model.layers[0].weight.mul_(2)
    model.value = torch.tensor(value)
    log_probs = model()
    # A = (broken, −2, −2): R = 1 + 1, and 2 · (−1) · 1 is added at the sound ones
    assert counting.backward(log_probs, sample_ids=ids).item() == 2
    assert counting.last_step.nonfinite == 1
    assert counting.last_step.negative_share == pytest.approx(2 / 3)
    model.value = torch.tensor(1.0)
    log_probs.sum().backward()
    assert model.layers[0].weight.grad.flatten().tolist() == [1, -1, -1]
    stored = counting.state_dict()["references"]["layers.0"].flatten().tolist()
    assert stored == ([-1, -2, -2] if reference == "previous" else [-1, -1, -1])

    raising = neurons(model, weight=1.0, reference=reference)
    model.value = torch.tensor(value)
    with pytest.raises(FloatingPointError, match=r"non-finite attributions in layers\.0 \(1\)"):
        raising.backward(model(), sample_ids=ids)
    # not known yet: the first finite one becomes the reference, and adds nothing
    model.value = torch.tensor(1.0)
    assert raising.backward(model(), sample_ids=ids).item() == 0
    assert raising.state_dict()["references"]["layers.0"].flatten().tolist() == [-2, -2, -2]
    if reference == "initial":
        model.value = torch.tensor(value)
        with pytest.raises(FloatingPointError, match="reference attribution of layers.0 is not finite"):
            neurons(model, reference=reference).set_reference([(model(), None, ids)])


def test_log_probs_that_are_no_numbers():
    model = tiny_llama()
    regularizer = SSIUURegularizer(model, granularity="neuron")
    with pytest.raises(ValueError, match="is nan"):
        regularizer.backward(log_probs_of(model, batch()) * float("nan"))
    assert all(gradient is None for gradient in gradients(model).values())
