import json

import pytest
import torch
from tiny import batch, tiny_gpt2, tiny_llama

from ssiuu_fast import attribute
from ssiuu_fast.attribution import Site
from ssiuu_fast.sites import column_runs, find_sites


def tiny_neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return GPTNeoXForCausalLM(config).double()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_neox])
def test_every_neuron_is_found_in_its_module_again(build):
    model = build()
    found = attribute(model, [batch(samples=2)])
    # as it comes back from a file
    found.settings.update(json.loads(json.dumps(found.settings)))
    for site, place in find_sites(model).items():
        width = found.max[site].shape[0]
        columns = torch.arange(10_000)[place.columns][:width].tolist()
        assert [found.address(site, neuron) for neuron in range(width)] == [(place.path, column) for column in columns]


def test_by_hand():
    gpt2, neox = tiny_gpt2(), tiny_neox()
    path = "transformer.h.1.attn.c_attn"
    assert attribute(gpt2, [batch(samples=1)]).address(Site(1, "K"), 3) == (path, 16 + 3)
    # two heads of size 8: q, k, v of the first, then q, k, v of the second
    path = "gpt_neox.layers.0.attention.query_key_value"
    assert attribute(neox, [batch(samples=1)]).address(Site(0, "K"), 8 + 3) == (path, 24 + 8 + 3)


def test_runs_of_any_columns_and_of_a_single_one():
    assert column_runs(slice(None)) is None
    for columns in ([5], [4, 5, 6], [0, 1, 6, 7, 12, 13], [2, 5, 8]):
        runs = column_runs(torch.tensor(columns))
        assert [runs.column(neuron) for neuron in range(len(columns))] == columns
