import json
import math
import random
import statistics

import pytest
import torch
from attributions import attribution, from_samples

from ssiuu_fast import influence_variation
from ssiuu_fast.attribution import Site

DOWN, UP, QUERY = Site(0, "down"), Site(0, "up"), Site(1, "Q")


def three_neurons():
    """Two samples of three neurons: max and min over tokens before, and after.

              max before     max after      min before     min after
    neuron 0   4    2         1   -3         -1   -1        -1   -1
    neuron 1   0.5  0.5       2    0          0    0        -4   -2
    neuron 2  -1   -1        -2   -4         -3   -5        -2   -4
    """
    before = torch.tensor([[4.0, 0.5, -1], [2, 0.5, -1]]), torch.tensor([[-1.0, 0, -3], [-1, 0, -5]])
    after = torch.tensor([[1.0, 2, -2], [-3, 0, -4]]), torch.tensor([[-1.0, -4, -2], [-1, -2, -4]])
    return tuple(from_samples({DOWN: tuple(side.double() for side in sides)}) for sides in (before, after))


def test_equations_4_and_5_by_hand():
    variation = influence_variation(*three_neurons())
    # neuron 0: 3 - mean(1, 0) = 2.5: the -3 counts as 0, or 4 would be lost
    # neuron 1: 0.5 - 1 is below 0, clamped; neuron 2: -1 - mean(0, 0) too
    assert variation.positive[DOWN].tolist() == [2.5, 0, 0]
    # neuron 1: 0 - (-3) = 3 is hidden; neuron 2: -4 - (-3) is below 0, clamped
    assert variation.negative[DOWN].tolist() == [0, 3, 0]
    total = variation.total()
    assert (total.positive.sum, total.negative.sum, total.neurons) == (2.5, 3, 3)
    assert (total.positive.unclamped, total.negative.unclamped) == (2.5 - 0.5, 3 - 1)
    assert total.positive.interval is None


def test_nothing_is_lost_from_a_model_to_itself_where_no_token_supports():
    # positions without the last token have maxima below 0
    below = torch.tensor([[-1.0, -2], [-3, -1]]).double()
    same = from_samples({DOWN: (below, below - 1)}, [[1, 0], [1, 1], [0, 2]])
    variation = influence_variation(same, same)
    lost = variation.total().positive
    assert (lost.sum, lost.unclamped, lost.interval) == (0, 0, (0, 0))
    assert variation.positive[DOWN].tolist() == [0, 0]


def several_sites():
    """D+ and D- as the comments say; "after" has no influence left but the negative one."""
    before = attribution(
        {DOWN: [5.0, 1, 0], UP: [3.0, 0], QUERY: [2.0, 2]}, {DOWN: [0.0, 0, 0], UP: [0.0, 0], QUERY: [0.0, 0]}
    )
    after = attribution(
        {DOWN: [0.0, 0, 0], UP: [0.0, 0], QUERY: [0.0, 0]}, {DOWN: [0.0, -1, -1], UP: [-1.0, 0], QUERY: [-7.0, 1]}
    )
    return before, after


def test_top_and_curves_sort_each_direction_on_its_own():
    variation = influence_variation(*several_sites())
    assert variation.top(1) == (5, 7)
    assert variation.top(3) == (10, 9)
    assert variation.top() == (13, 10)
    curves = variation.curves()
    assert curves.positive.tolist() == [5, 8, 10, 12, 13, 13, 13]
    assert curves.negative.tolist() == [7, 8, 9, 10, 10, 10, 10]


def test_the_table_has_kinds_in_order_and_means_of_the_top_100():
    scores = [float(value) for value in range(150)]
    random.Random(0).shuffle(scores)
    zeros = [0.0] * 150
    sites = [Site(1, "down"), Site(0, "down"), Site(0, "K"), Site(0, "Q")]
    before = attribution({site: scores for site in sites}, {site: zeros for site in sites})
    after = attribution({site: zeros for site in sites}, {site: [-v for v in scores[:150]] for site in sites})
    variation = influence_variation(before, after)
    cells = variation.by_module()
    assert [(cell.kind, cell.layer) for cell in cells] == [("Q", 0), ("K", 0), ("down", 0), ("down", 1)]
    for cell in cells:
        assert cell.neurons == 150
        assert cell.positive.sum == cell.negative.sum == sum(range(150))
        assert cell.positive.top_mean == cell.negative.top_mean == sum(range(50, 150)) / 100
    assert variation.total().positive.sum == 4 * sum(range(150))
    assert variation.share_in_qk() == (0.5, 0.5)


def test_the_top_mean_of_a_small_module_is_of_all_its_neurons():
    cells = influence_variation(*several_sites()).by_module()
    assert [(cell.kind, cell.positive.top_mean) for cell in cells] == [("Q", 2), ("up", 1.5), ("down", 2)]


def test_the_share_of_nothing_is_not_a_number():
    before, _ = several_sites()
    assert all(math.isnan(share) for share in influence_variation(before, before).share_in_qk())


def test_spurious_neurons_by_name_with_ties_in_a_fixed_order():
    before, after = several_sites()
    variation = influence_variation(before, after)
    found = variation.spurious(10)
    assert [(neuron.site, neuron.index, neuron.before, neuron.after, neuron.score) for neuron in found] == [
        (QUERY, 0, 0, -7, 7),
        (UP, 0, 0, -1, 1),
        (DOWN, 1, 0, -1, 1),
        (DOWN, 2, 0, -1, 1),
    ]
    assert found[0].module == "model.layers.1.self_attn.q_proj"
    assert variation.spurious(2) == found[:2]
    assert variation.erased(3) == [
        ("model.layers.0.mlp.down_proj", 0),
        ("model.layers.0.mlp.up_proj", 0),
        ("model.layers.1.self_attn.q_proj", 0),
    ]


def test_the_order_of_the_sites_in_the_files_does_not_matter():
    before, after = several_sites()
    turned = attribution(
        *({site: means[site].tolist() for site in (QUERY, DOWN, UP)} for means in (after.max, after.min))
    )
    first, second = influence_variation(before, after), influence_variation(before, turned)
    assert first.spurious(10) == second.spurious(10)
    assert first.by_module() == second.by_module()


def test_permuted_neurons_move_their_scores_and_change_no_sum():
    generator = torch.Generator().manual_seed(0)
    sides = [[torch.randn(40, generator=generator) for _ in range(2)] for _ in range(2)]
    order = torch.randperm(40, generator=generator)

    def variation(order):
        before, after = (attribution({DOWN: top[order].tolist()}, {DOWN: low[order].tolist()}) for top, low in sides)
        return influence_variation(before, after)

    plain, permuted = variation(torch.arange(40)), variation(order)
    assert torch.equal(permuted.negative[DOWN], plain.negative[DOWN][order])
    assert torch.equal(permuted.curves().negative, plain.curves().negative)
    assert [order[neuron.index] for neuron in permuted.spurious(9)] == [neuron.index for neuron in plain.spurious(9)]


def drawn(generator, samples, replicates, sites=(DOWN, QUERY), neurons=3):
    """Before and after of `samples` samples, with the Poisson weights of both."""
    weights = torch.poisson(torch.ones(replicates, samples), generator=generator).tolist()

    def side():
        return {
            site: tuple(torch.randn(samples, neurons, generator=generator, dtype=torch.float64) for _ in range(2))
            for site in sites
        }

    before, after = side(), side()
    return before, after, weights


def test_intervals_are_those_of_a_plain_recomputation():
    before, after, weights = drawn(torch.Generator().manual_seed(1), samples=7, replicates=200)
    variation = influence_variation(from_samples(before, weights), from_samples(after, weights))
    cell = {(cell.kind, cell.layer): cell for cell in variation.by_module()}["Q", 1]

    def plain_interval(per_sample):
        redrawn = sorted(
            sum(w * value for w, value in zip(row, per_sample, strict=True)) / sum(row) for row in weights if sum(row)
        )

        def quantile(share):
            place = share * (len(redrawn) - 1)
            low = math.floor(place)
            return redrawn[low] + (place - low) * (redrawn[min(low + 1, len(redrawn) - 1)] - redrawn[low])

        return quantile(0.025), quantile(0.975)

    # one number a sample: what its neurons lost, or gained, together
    lost = [
        sum(max(a, 0.0) - max(b, 0.0) for a, b in zip(had, has, strict=True))
        for had, has in zip(before[QUERY][0].tolist(), after[QUERY][0].tolist(), strict=True)
    ]
    gained = (before[QUERY][1] - after[QUERY][1]).sum(dim=1).tolist()
    assert cell.positive.unclamped == pytest.approx(statistics.mean(lost))
    assert cell.positive.interval == pytest.approx(plain_interval(lost))
    assert cell.negative.unclamped == pytest.approx(statistics.mean(gained))
    assert cell.negative.interval == pytest.approx(plain_interval(gained))
    low, high = variation.total().negative.interval
    assert low < variation.total().negative.unclamped < high


def test_intervals_cover_the_truth_in_most_draws():
    # standard normal before and after: the truth is 0 for what is gained
    covered = 0
    for seed in range(150):
        before, after, weights = drawn(torch.Generator().manual_seed(seed), samples=40, replicates=200, sites=(DOWN,))
        variation = influence_variation(from_samples(before, weights), from_samples(after, weights))
        low, high = variation.total().negative.interval
        covered += low < 0 < high
    assert 0.87 < covered / 150 < 0.99


def test_a_replicate_that_drew_no_sample_is_left_out():
    values = {DOWN: (torch.ones(2, 1).double(), -torch.ones(2, 1).double())}
    gone = {DOWN: (torch.zeros(2, 1).double(), torch.zeros(2, 1).double())}
    weights = [[0, 0], [1, 0], [2, 1]]
    variation = influence_variation(from_samples(values, weights), from_samples(gone, weights))
    assert variation.total().positive.interval == pytest.approx((1, 1))


def test_no_interval_where_the_samples_were_redrawn_differently():
    before, after, weights = drawn(torch.Generator().manual_seed(1), samples=4, replicates=6)
    other = [row[::-1] for row in weights]
    other[0][0] += 1
    variation = influence_variation(from_samples(before, weights), from_samples(after, other))
    assert variation.total().positive.interval is None
    assert any("no intervals" in note for note in variation.notes)
    assert influence_variation(from_samples(before, weights), from_samples(after)).total().positive.interval is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": "other"}, "different data .*'5ha256' before, 'other' after"),
        ({"target": "log_probability"}, "different targets: 'probability' before, 'log_probability' after"),
        ({"positions": "prompt"}, "different positions: 'all' before, 'prompt' after"),
        ({"samples": 5}, "4 samples before and 5 after"),
    ],
)
def test_attributions_that_do_not_belong_together_are_refused(change, said):
    numbers = {DOWN: [1.0]}, {DOWN: [0.0]}
    with pytest.raises(ValueError, match=said):
        influence_variation(attribution(*numbers), attribution(*numbers, **change))


def test_other_modules_and_sizes_are_refused():
    first = attribution({DOWN: [1.0], UP: [1.0]}, {DOWN: [0.0], UP: [0.0]})
    with pytest.raises(ValueError, match="only the first has up of layer 0, only the second none"):
        influence_variation(first, attribution({DOWN: [1.0]}, {DOWN: [0.0]}))
    with pytest.raises(ValueError, match="up of layer 0 has 1 neurons in the first and 2 in the second"):
        influence_variation(first, attribution({DOWN: [1.0], UP: [1.0, 1]}, {DOWN: [0.0], UP: [0.0, 0]}))


def test_means_that_are_not_numbers_are_refused():
    good = attribution({DOWN: [1.0]}, {DOWN: [0.0]})
    broken = attribution({DOWN: [1.0]}, {DOWN: [math.nan]})
    with pytest.raises(ValueError, match="the attribution after has 1 neurons in down of layer 0 whose min mean"):
        influence_variation(good, broken)


def test_notes_are_carried_over_and_another_dtype_is_one():
    numbers = {DOWN: [1.0]}, {DOWN: [0.0]}
    before = attribution(*numbers, target="logit_difference", notes=["q/k norm"])
    after = attribution(*numbers, target="logit_difference", notes=["q/k norm", "cut"])
    assert influence_variation(before, after).notes == ("q/k norm", "cut")
    after.settings["dtype"] = "bfloat16"
    variation = influence_variation(before, after)
    assert variation.notes[:2] == ("q/k norm", "cut")
    assert "float32 before and in bfloat16 after" in variation.notes[2]
    assert json.loads(json.dumps(variation.settings))["after"]["dtype"] == "bfloat16"


def test_what_a_target_cannot_show_is_a_note():
    for target in ("probability", "mean_token_probability", "log_probability"):
        numbers = attribution({DOWN: [1.0]}, {DOWN: [0.0]}, target=target)
        (note,) = influence_variation(numbers, numbers).notes
        assert note.startswith(f"target {target}:")
