import copy
import math
from statistics import fmean, harmonic_mean

import pytest
import torch

from ssiuu_fast.data.collate import Encoder, collate
from ssiuu_fast.data.example import Example
from ssiuu_fast.evaluation import memorisation, tofu_metrics
from ssiuu_fast.models import new_llama, train_tokenizer

ROWS = [
    Example(
        "Who is Ada?", "a baker", paraphrased_answer="she bakes bread", perturbed_answers=("a poet", "a cook of soup")
    ),
    Example("Where is Bo?", "in Rome", perturbed_answers=("in Paris", "at home now", "in Oslo")),
    Example("Is it late?", "yes, it is"),
]


@pytest.fixture(scope="module", params=[0, 1])
def rough(request):
    """A model with large random weights, and an encoder."""
    texts = [text for row in ROWS for text in (row.prompt, row.answer, *row.perturbed_answers)]
    tokenizer = train_tokenizer(texts, 300)
    model = new_llama(
        tokenizer, hidden_size=32, layers=2, heads=2, max_positions=96, seed=request.param, initializer_range=0.3
    )
    return model.double(), Encoder(tokenizer, max_length=96)


def _plain(model, encoder, example, answer):
    """(mean loss, predicted tokens) of one answer alone, position by position."""
    row = encoder.encode(example, answer=answer)
    with torch.no_grad():
        log_probs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
    places = [place for place, label in enumerate(row.labels) if label != -100]
    assert row.labels[places[-1]] == encoder.tokenizer.eos_token_id
    losses = [-log_probs[place - 1, row.labels[place]].item() for place in places]
    predicted = [log_probs[place - 1].argmax().item() == row.labels[place] for place in places[:-1]]
    return fmean(losses), predicted


def test_losses_are_means_over_each_answers_tokens_and_its_end(rough):
    model, encoder = rough
    for batch_size in (2, 64):
        found = memorisation.answer_losses(model, encoder, ROWS, batch_size)
        for example, losses in zip(ROWS, found, strict=True):
            alone = [
                _plain(model, encoder, example, answer)[0] for answer in (example.answer, *example.perturbed_answers)
            ]
            assert [losses.answer, *losses.perturbed] == pytest.approx(alone, rel=1e-9)
        assert found[0].paraphrased == pytest.approx(_plain(model, encoder, ROWS[0], "she bakes bread")[0], rel=1e-9)
        assert found[1].paraphrased is None


def test_truth_ratios_of_a_model(rough):
    model, encoder = rough
    first, second = memorisation.truth_ratios(model, encoder, ROWS[:2])
    loss = lambda row, answer: _plain(model, encoder, row, answer)[0]  # noqa: E731
    wrong = (loss(ROWS[0], "a poet") + loss(ROWS[0], "a cook of soup")) / 2
    assert first == pytest.approx(math.exp(loss(ROWS[0], "she bakes bread") - wrong), rel=1e-4)
    wrong = fmean(loss(ROWS[1], answer) for answer in ROWS[1].perturbed_answers)
    assert second == pytest.approx(math.exp(loss(ROWS[1], "in Rome") - wrong), rel=1e-4)
    with pytest.raises(ValueError, match=r"row 2 \('Is it late\?'\) has no perturbed answers"):
        memorisation.truth_ratios(model, encoder, ROWS)


def test_predicted_tokens_are_those_of_each_answer_alone(rough):
    model, encoder = rough
    taught = copy.deepcopy(model)
    batch = collate([encoder.encode(row) for row in ROWS], encoder.pad_id)
    optimizer = torch.optim.AdamW(taught.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        taught(**batch).loss.backward()
        optimizer.step()
    asked = [
        *ROWS,
        *(Example(row.prompt, f"{row.answer[:4]} soup") for row in ROWS),
        Example("Who is Ada?", "a poet of soup and bread, or so they say"),
    ]
    alone = [_plain(taught, encoder, row, row.answer)[1] for row in asked]
    assert all(map(all, alone[:3])) and any(map(any, alone[3:])) and not any(map(all, alone[3:]))
    for batch_size in (1, 3, 64):
        assert memorisation.predicted_tokens(taught, encoder, asked, batch_size) == alone


def test_a_cut_answer_keeps_its_last_token(rough):
    model, encoder = rough
    row = encoder.encode(ROWS[0])
    cut = Encoder(encoder.tokenizer, max_length=len(row.input_ids) - 1)
    assert memorisation.predicted_tokens(model, cut, ROWS[:1]) == memorisation.predicted_tokens(
        model, encoder, ROWS[:1]
    )


def test_a_broken_model_has_no_scores(rough):
    model, encoder = rough
    weight = model.model.layers[0].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = float("nan")
        for score in (memorisation.answer_losses, memorisation.predicted_tokens):
            with pytest.raises(FloatingPointError, match="weights are broken"):
                score(model, encoder, ROWS)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@pytest.mark.parametrize(
    ("predicted", "exact", "strength"),
    [
        ([True, True, True, True], 1.0, 1.0),
        ([False, False, True, True], 0.5, 0.5),
        ([True, False, True, True], 0.75, 0.5),
        ([True, True, True, False], 0.75, 0.25),
        ([False, False], 0.0, 0.5),
        ([], 0.0, 0.0),
    ],
)
def test_memorisation_by_hand(predicted, exact, strength):
    assert memorisation.exact_memorisation(predicted) == exact
    assert memorisation.extraction_strength(predicted) == strength


def test_tofu_metrics_by_hand():
    assert tofu_metrics.probability(math.log(4)) == pytest.approx(0.25)
    assert tofu_metrics.normalised_probability(0.2, [0.1, 0.1]) == pytest.approx(0.5)
    # wrong answers of 1/2 and 1/8 have the geometric mean 1/4; the arithmetic one is 5/16
    ratio = tofu_metrics.geometric_truth_ratio(math.log(2), [math.log(2), math.log(8)])
    assert ratio == pytest.approx(0.5)
    assert tofu_metrics.truth_ratio_of_forgotten([0.5, 2.0, 1.0]) == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert tofu_metrics.truth_ratio_of_kept([0.25, 3.0]) == pytest.approx(0.75 / 2)
    parts = [0.5] * 8 + [0.25]
    assert tofu_metrics.model_utility(parts) == pytest.approx(harmonic_mean(parts)) == pytest.approx(9 / 20)
    assert tofu_metrics.model_utility([0.5] * 8 + [0.0]) == 0.0
    with pytest.raises(ValueError, match="9 scores, and got 8"):
        tofu_metrics.model_utility(parts[1:])


def test_forget_quality_by_hand():
    assert tofu_metrics.forget_quality([1, 2, 3], [1, 2, 3]) == 1.0
    # all of one side below the other: 2 of the 6!/(3!·3!) = 20 orders are as far apart
    assert tofu_metrics.forget_quality([1, 2, 3], [4, 5, 6]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="got 3 and 0"):
        tofu_metrics.forget_quality([1, 2, 3], [])
