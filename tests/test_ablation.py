import json
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from attributions import attribution
from taught import small_task
from tiny import batch, tiny_gpt2, tiny_llama
from torch import nn

from ssiuu_fast import attribute, influence_variation
from ssiuu_fast.ablation import ablate, ablation_check, log_grid
from ssiuu_fast.attribution import Site
from ssiuu_fast.data.collate import collate
from ssiuu_fast.evaluation.scores import score
from ssiuu_fast.influence import Neuron

Q_PATH = "model.layers.0.self_attn.q_proj"
UP_PATH = "model.layers.1.mlp.up_proj"


def outputs(model, path, rows):
    seen = []
    hook = model.get_submodule(path).register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    finally:
        hook.remove()
    return seen[0].detach(), logits.detach()


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_the_named_outputs_are_zero_and_no_others():
    model, rows = tiny_llama(), batch()
    plain, logits = outputs(model, UP_PATH, rows)
    with ablate(model, [Neuron(UP_PATH, 3), Neuron(UP_PATH, 20), Neuron(UP_PATH, 3), Neuron(Q_PATH, 0)]):
        silenced, changed = outputs(model, UP_PATH, rows)
        assert not outputs(model, Q_PATH, rows)[0][..., 0].any()
    assert (silenced == 0).all(dim=(0, 1)).nonzero().flatten().tolist() == [3, 20]
    assert not torch.equal(logits, changed)
    assert hooks(model) == 0
    assert torch.equal(outputs(model, UP_PATH, rows)[1], logits)


def test_it_is_the_model_whose_weights_of_these_neurons_are_zero():
    model, rows = tiny_llama(), batch()
    with ablate(model, [Neuron(UP_PATH, 7)]):
        _, silenced = outputs(model, UP_PATH, rows)
    with torch.no_grad():
        model.get_submodule(UP_PATH).weight[7] = 0
    assert torch.equal(outputs(model, UP_PATH, rows)[1], silenced)


def test_the_hooks_are_gone_after_an_exception():
    model = tiny_llama()
    with pytest.raises(KeyboardInterrupt), ablate(model, [Neuron(UP_PATH, 0), Neuron(Q_PATH, 1)]):
        assert hooks(model) == 2
        raise KeyboardInterrupt
    assert hooks(model) == 0


def test_nested():
    model, rows = tiny_llama(), batch()
    with ablate(model, [Neuron(UP_PATH, 1), Neuron(UP_PATH, 2)]):
        with ablate(model, [Neuron(UP_PATH, 2), Neuron(UP_PATH, 5)]):
            inner = outputs(model, UP_PATH, rows)[0]
        outer = outputs(model, UP_PATH, rows)[0]
    assert (inner == 0).all(dim=(0, 1)).nonzero().flatten().tolist() == [1, 2, 5]
    assert (outer == 0).all(dim=(0, 1)).nonzero().flatten().tolist() == [1, 2]


def test_fused_modules_and_attributions_of_the_silenced_model():
    model, rows = tiny_gpt2(), batch()
    plain = attribute(model, [rows])
    keys, queries = Site(1, "K"), Site(1, "Q")
    with ablate(model, [Neuron(*plain.address(keys, 5))]):
        silenced = attribute(model, [rows])
    # the bias is silenced too; queries of the same module are not, but one is multiplied by nothing but this key
    assert plain.max[keys][5] != 0
    assert silenced.max[keys][5] == silenced.min[keys][5] == 0
    assert (silenced.max[keys] != 0).sum() == (plain.max[keys] != 0).sum() - 1
    assert (silenced.max[queries] == 0).nonzero().flatten().tolist() == [5]


def test_generation_is_that_of_the_silenced_model():
    model = tiny_llama().eval()
    prompt = batch(samples=1)["input_ids"][:, :4]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    path = "model.layers.0.mlp.down_proj"
    neurons = [Neuron(path, index) for index in range(16)]
    plain = model.generate(prompt, **settings)
    with ablate(model, neurons):
        silenced = model.generate(prompt, **settings)
    with torch.no_grad():
        model.get_submodule(path).weight.zero_()
    assert torch.equal(model.generate(prompt, **settings), silenced)
    assert not torch.equal(plain, silenced)


def test_what_is_not_finite_is_silenced_and_so_is_its_gradient():
    model = nn.Sequential(nn.Linear(2, 3))
    with torch.no_grad():
        model[0].weight[1] = float("inf")
    inputs = torch.ones(4, 2, requires_grad=True)
    with ablate(model, [Neuron("0", 1)]):
        model(inputs).sum().backward()
    assert torch.equal(model[0].weight.grad[1], torch.zeros(2))


def test_modules_on_several_devices():
    # meta is the second device that every machine has
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3, device="meta")})
    with ablate(model, [Neuron("a", 1), Neuron("b", 2)]):
        for _ in range(2):
            assert model["a"](torch.ones(1, 2))[0, 1] == 0
            assert model["b"](torch.ones(1, 2, device="meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("neuron", "said"),
    [
        (Neuron("model.layers.9.mlp.up_proj", 0), "no module 'model.layers.9.mlp.up_proj'"),
        (Neuron(UP_PATH, 24), "has outputs 0 to 23, not 24"),
        (Neuron(UP_PATH, -1), "has outputs 0 to 23, not -1"),
        (Neuron("model.layers.0", 0), "is LlamaDecoderLayer, not a linear module"),
    ],
)
def test_unknown_neurons_are_refused_before_anything_is_silenced(neuron, said):
    model = tiny_llama()
    with pytest.raises(ValueError, match=said), ablate(model, [Neuron(Q_PATH, 0), neuron]):
        raise AssertionError("not reached")
    assert hooks(model) == 0


def test_compiled_models_are_refused():
    in_place = nn.Sequential(nn.Linear(2, 2))
    in_place.compile()
    for model in (torch.compile(nn.Sequential(nn.Linear(2, 2))), in_place):
        with pytest.raises(ValueError, match="is compiled"), ablate(model, []):
            raise AssertionError("not reached")


def made_up(neurons=20):
    """A variation of a model of one linear module, whose neurons are all spurious, the last one most."""
    site = Site(0, "up")
    zeros = [0.0] * neurons
    before = attribution({site: [1.0] * neurons}, {site: zeros}, modules={site.text: "0"})
    after = attribution({site: zeros}, {site: [-1.0 - place for place in range(neurons)]}, modules={site.text: "0"})
    return nn.Sequential(nn.Linear(1, neurons)), influence_variation(before, after)


def silenced_places(model):
    return (model(torch.ones(1, 1)) == 0).flatten().nonzero().flatten().tolist()


def test_the_check_silences_what_it_says():
    model, variation = made_up()
    seen = []

    def score(model):
        seen.append(silenced_places(model))
        return len(seen[-1])

    rows = ablation_check(model, score, variation, ms=[2, 1], seeds=[5])
    assert [(row.choice, row.m, row.score) for row in rows[:5]] == [
        ("none", 0, 0),
        ("spurious", 2, 2),
        ("spurious", 1, 1),
        ("erased", 2, 2),
        ("erased", 1, 1),
    ]
    assert seen[:5] == [[], [18, 19], [19], [0, 1], [0]]
    assert json.loads(json.dumps([asdict(row) for row in rows]))[0]["choice"] == "none"
    assert hooks(model) == 0


def test_random_neurons_depend_on_seed_and_m_alone():
    model, variation = made_up()

    def drawn(ms, seeds):
        rows = ablation_check(
            model, lambda model: sum(2**place for place in silenced_places(model)), variation, ms, seeds
        )
        return {(row.m, row.seed): row.score for row in rows if row.choice == "random"}

    one, other = drawn([3, 6], [0, 1]), drawn([6, 5, 3], [7, 1])
    assert one[3, 1] == other[3, 1] and one[6, 1] == other[6, 1]
    assert one[6, 0] != one[6, 1]
    counts = Counter(
        place for score in drawn([4], range(200)).values() for place in range(20) if int(score) >> place & 1
    )
    assert counts.total() == 4 * 200
    assert set(counts) == set(range(20)) and max(counts.values()) < 3 * min(counts.values())


def test_the_same_neurons_are_scored_once():
    model, variation = made_up()
    calls = []
    ablation_check(model, lambda model: calls.append(1) or 0.0, variation, ms=[20], seeds=[0, 1, 2])
    assert len(calls) == 2


def test_grids():
    assert log_grid(1) == [1]
    assert log_grid(100) == [1, 3, 10, 30, 100]
    assert log_grid(99) == [1, 3, 10, 30]
    model, variation = made_up()
    rows = ablation_check(model, lambda model: 0.0, variation, seeds=[0])
    assert [row.m for row in rows if row.choice == "random"] == [1]
    for m in (0, 21):
        with pytest.raises(ValueError, match="between 1 and 20 neurons"):
            ablation_check(model, lambda model: 0.0, variation, ms=[m])


def test_the_accuracy_of_a_model_that_knows_people(taught):
    model, encoder = taught
    rows = small_task().split.forget
    found = attribute(model, [collate([encoder.encode(row) for row in rows], encoder.pad_id)])
    variation = influence_variation(found, found)

    def accuracy(model):
        return score(model, encoder, rows).mean

    known, *others = ablation_check(model, accuracy, variation, ms=[variation.neurons], seeds=[0])
    assert known.score == accuracy(model) >= 0.9
    assert [(row.choice, row.silenced) for row in others] == [
        ("spurious", 0),
        ("erased", 0),
        ("random", variation.neurons),
    ]
    # nothing changed, so nothing is spurious or erased; without any neuron, little is known
    assert others[0].score == others[1].score == known.score
    assert others[2].score < 0.7
