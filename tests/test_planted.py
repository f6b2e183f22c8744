"""Erased or hidden? Two models built by hand, in which it is known."""

import planted
import pytest
import torch

from ssiuu_fast import attribute, influence_variation
from ssiuu_fast.ablation import ablate, ablation_check
from ssiuu_fast.attribution import Site
from ssiuu_fast.evaluation.logit_lens import Decoder, logit_lens


def variation(after, before=None, target="probability"):
    batch = planted.batch() | {"distractors": torch.tensor([planted.OTHER] * 2)}
    return influence_variation(
        *(attribute(model, [batch], target=target) for model in (before or planted.knowing(), after))
    )


def above_zero(scores):
    return {(site, int(index)) for site, values in scores.items() for index in values.nonzero()}


def test_the_model_is_what_its_description_says():
    states = planted.hiding()(torch.tensor([[planted.FILLER, planted.QUESTION]]), output_hidden_states=True)
    after_block_0 = states.hidden_states[1][0, -1]
    assert after_block_0[planted.ANSWER].item() == pytest.approx(3.93, abs=0.005)
    assert after_block_0[planted.QUESTION].item() == 1
    assert [planted.accuracy(build()) for build in (planted.knowing, planted.hiding, planted.erased)] == [1, 0, 0]


def test_the_hiding_neuron_is_named_first_and_nothing_counts_as_erased():
    hidden = variation(planted.hiding())
    assert above_zero(hidden.positive) == set()
    found = hidden.spurious(10)
    first = found[0]
    assert (first.site, first.module, first.index) == (Site(1, "gate"), "model.layers.1.mlp.gate_proj", planted.HIDES)
    assert first.before == 0 and first.after < 0 and first.score == pytest.approx(-first.after)
    # it is one neuron of the MLP, seen at its gate, its up projection and where it writes to, and nothing else hides
    assert {(neuron.site, neuron.index) for neuron in found} == {
        (Site(1, "gate"), planted.HIDES),
        (Site(1, "up"), planted.HIDES),
        (Site(1, "down"), planted.ANSWER),
    }


def test_silencing_it_brings_the_answer_back_exactly():
    model = planted.hiding()
    hidden = planted.logits(model)
    with ablate(model, variation(model).spurious(1)):
        assert torch.equal(planted.logits(model), planted.logits(planted.knowing()))
    assert torch.equal(planted.logits(model), hidden)


def test_ablation_check_of_hidden_knowledge():
    model = planted.hiding()
    rows = ablation_check(model, planted.accuracy, variation(model), ms=[1, 2], seeds=[0, 1])
    assert [(row.choice, row.m, row.silenced, row.seed, row.score) for row in rows] == [
        ("none", 0, 0, None, 0),
        ("spurious", 1, 1, None, 1),
        ("spurious", 2, 2, None, 1),
        ("erased", 1, 0, None, 0),
        ("erased", 2, 0, None, 0),
        ("random", 1, 1, 0, 0),
        ("random", 1, 1, 1, 0),
        ("random", 2, 2, 0, 0),
        ("random", 2, 2, 1, 0),
    ]


def test_erased_knowledge_is_seen_in_d_plus_alone_and_does_not_come_back():
    model = planted.erased()
    found = variation(model)
    assert above_zero(found.positive) == {
        (Site(0, "gate"), planted.KNOWS),
        (Site(0, "up"), planted.KNOWS),
        (Site(0, "down"), planted.ANSWER),
    }
    assert above_zero(found.negative) == set()
    assert found.share_in_qk().positive == 0
    assert found.erased(1) == [("model.layers.0.mlp.gate_proj", planted.KNOWS)]
    assert found.spurious(10) == []
    rows = ablation_check(model, planted.accuracy, found)
    assert {row.choice for row in rows} == {"none", "spurious", "erased", "random"}
    assert all(row.score == 0 for row in rows)


def test_the_same_hiding_looks_large_or_small_by_the_target_alone():
    def hidden(sure, target):
        found = variation(planted.hiding(sure), planted.knowing(sure), target)
        # whichever it is, the neuron is named
        assert (found.spurious(1)[0].site, found.spurious(1)[0].index) == (Site(1, "gate"), planted.HIDES)
        return found.total().negative.sum

    # the same weights hide the answer; in the second pair P falls from 1 to 4e-16, not from 0.66 to 0.02
    assert hidden(1, "probability") > 0.005
    assert hidden(10, "probability") < 1e-12
    assert hidden(10, "logit_difference") == pytest.approx(10 * hidden(1, "logit_difference"))


def test_the_table_says_which_block_hides():
    cells = {(cell.kind, cell.layer): cell for cell in variation(planted.hiding()).by_module()}
    assert cells["gate", 1].negative.sum > 0 and cells["gate", 0].negative.sum == 0
    # both samples are the same, so nothing depends on which are drawn
    low, high = cells["gate", 1].negative.interval
    assert low == pytest.approx(high) == pytest.approx(cells["gate", 1].negative.unclamped)


def test_the_logit_lens_sees_the_answer_before_it_is_hidden():
    decoder = Decoder(planted.knowing())
    batch = planted.batch() | {"distractors": torch.tensor([planted.OTHER] * 2)}

    def lens(model):
        return logit_lens(model, [batch], decoder).means

    assert all(share > 0.9 for share in lens(planted.knowing()))
    block_0, block_1 = lens(planted.hiding())
    assert block_0 > 0.9 and block_1 < 0.4
    # where nothing was written, an answer is as likely as another
    assert lens(planted.erased()) == [0.5, 0.5]
