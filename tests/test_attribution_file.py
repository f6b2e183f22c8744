"""Attributions on disk, what defines them, and a net that a person can work out."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny import batch, part, tiny_llama
from torch import nn

from ssiuu_fast import Attribution, attribute
from ssiuu_fast.attribution import ROLES, Site


class TwoLayers(nn.Module):
    """h0 = (x, -x), h1 = 2·h0[0] + h0[1] = x; the logits at a token are (0, Σ of h1 up to it)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(2, 1)
        self.layers = nn.ModuleList([nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)])
        with torch.no_grad():
            self.embedding.weight.copy_(torch.tensor([[2 * math.log(3)], [-math.log(3)]]))
            self.layers[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
            self.layers[1].weight.copy_(torch.tensor([[2.0, 1.0]]))

    def forward(self, input_ids, attention_mask):
        for_one = self.layers[1](self.layers[0](self.embedding(input_ids))).cumsum(1)
        return SimpleNamespace(logits=torch.cat([torch.zeros_like(for_one), for_one], -1))


def test_by_hand():
    # x = 2 ln 3 at token 0 and -ln 3 at token 1: the logits of what follows are (0, ln 3), so P(1) = 3/4 and
    # ∂P/∂h1 = P (1 - P) = 3/16 at both tokens, ∂P/∂h0 = (6/16, 3/16). The answer's own token, 1, changes nothing
    rows = {
        "input_ids": torch.tensor([[0, 1, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 1]]),
    }
    found = attribute(TwoLayers(), [rows], modules=["layers.*"])
    first, second = Site(0, "linear"), Site(1, "linear")
    # h0 · ∂P/∂h0, by token, in units of ln 3 / 16: neuron 0 has 12, -6, 0; neuron 1 has -6, 3, 0; h1 has 6, -3, 0
    unit = math.log(3) / 16
    assert found.max[first].tolist() == pytest.approx([12 * unit, 3 * unit])
    assert found.min[first].tolist() == pytest.approx([-6 * unit, -6 * unit])
    assert found.max[second].tolist() == pytest.approx([6 * unit])
    assert found.min[second].tolist() == pytest.approx([-3 * unit])


def test_the_clamp_is_inside_the_mean():
    # two samples of one token of prompt: x = 2 ln 3 and -ln 3, so P(1) = 9/10 and 1/4, P (1 - P) = 9/100 and 3/16
    rows = {
        "input_ids": torch.tensor([[0, 1], [1, 1]]),
        "attention_mask": torch.ones(2, 2, dtype=torch.int64),
        "labels": torch.tensor([[-100, 1], [-100, 1]]),
    }
    found = attribute(TwoLayers(), [rows], modules=["layers.1"], positions="prompt")
    positive, negative = 2 * math.log(3) * 9 / 100, -math.log(3) * 3 / 16
    site = Site(1, "linear")
    assert found.max[site].item() == found.min[site].item() == pytest.approx((positive + negative) / 2, abs=1e-7)
    assert found.positive_max[site].item() == pytest.approx(positive / 2)


def test_saved_and_loaded(tmp_path):
    found = attribute(tiny_llama(torch.float32), [batch()], target="log_probability", positions="no_bos")
    found.save(tmp_path / "before.safetensors")
    loaded = Attribution.load(tmp_path / "before.safetensors")
    assert loaded.samples == found.samples and loaded.settings == found.settings
    assert (loaded.replicates.weights == found.replicates.weights).all()
    for role in ROLES:
        for mine, theirs in [(loaded, found), (loaded.replicates, found.replicates)]:
            a, b = getattr(mine, role), getattr(theirs, role)
            assert list(a) == list(b)
            assert all(a[site].dtype == b[site].dtype and (a[site] == b[site]).all() for site in b)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors: no such file"):
        Attribution.load(tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("not tensors, but text that is long enough to be a header")
    with pytest.raises(ValueError, match="text is not an attribution: it is no safetensors file"):
        Attribution.load(tmp_path / "text")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="weights.safetensors is not an attribution .* its format is None"):
        Attribution.load(tmp_path / "weights.safetensors")


def test_settings_define_the_numbers():
    model = tiny_llama(torch.float32)
    rows = batch()
    settings = attribute(model, [rows]).settings
    assert settings["model"] == "LlamaForCausalLM"
    assert settings["dtype"] == "float32"
    assert settings["replicates"] == {"count": 200, "seed": 0}
    assert settings["modules"]["layers.1.down"] == "model.layers.1.mlp.down_proj"
    model.config._name_or_path = "runs/forgetful"
    assert attribute(model, [rows]).settings["model"] == "runs/forgetful"


def test_the_data_hash_sees_tokens_labels_and_order():
    model = tiny_llama(torch.float32)
    rows = batch()

    def data(batches):
        return attribute(model, batches, modules=["layers.1.down"]).settings["data"]

    whole = data([rows])
    assert data([part(rows, 0, 2), part(rows, 2, 5)]) == whole
    assert data([{name: tensor.flip(0) for name, tensor in rows.items()}]) != whole
    other = rows["labels"].clone()
    other[0, (other[0] != -100).nonzero()[0]] = -100
    assert data([rows | {"labels": other}]) != whole
    assert data([part(rows, 0, 4)]) != whole
