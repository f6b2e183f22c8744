import math

import pytest
import torch
from attributions import attribution

from ssiuu_fast.attribution import Site
from ssiuu_fast.correlation import correlation, ranks

DOWN, UP, QUERY = Site(0, "down"), Site(0, "up"), Site(1, "Q")


def test_by_hand():
    # max means 1, 2, 4 and 3, 3, 6; min means -1, -1, -1 and -2, -2, 0
    a = attribution({DOWN: [1.0, 2], UP: [4.0]}, {DOWN: [-1.0, -1], UP: [-1.0]})
    b = attribution({DOWN: [3.0, 3], UP: [6.0]}, {DOWN: [-2.0, -2], UP: [0.0]})
    result = correlation(a, b)
    assert result.neurons == 3
    # deviations (-4, -1, 5)/3 and (-1, -1, 2): 15 / sqrt(42 · 6)
    assert result.max.pearson == pytest.approx(15 / math.sqrt(42 * 6))
    # ranks 1, 2, 3 and 1.5, 1.5, 3: 1.5 / sqrt(2 · 1.5)
    assert result.max.spearman == pytest.approx(1.5 / math.sqrt(2 * 1.5))
    assert math.isnan(result.min.pearson) and math.isnan(result.min.spearman)
    # up: two points, the larger stays the larger
    assert result.by_kind["up"] == pytest.approx((1, 1))
    # ranks of (1, 2, 4, -1, -1, -1) and (3, 3, 6, -2, -2, 0): 4, 5, 6, 2, 2, 2 and 4.5, 4.5, 6, 1.5, 1.5, 3
    together = torch.corrcoef(torch.tensor([[4, 5, 6, 2, 2, 2], [4.5, 4.5, 6, 1.5, 1.5, 3]]))[0, 1]
    assert result.spearman == pytest.approx(float(together))


def test_what_does_not_vary_correlates_with_nothing():
    # the mean of three times 0.1 isn't 0.1
    same = attribution({DOWN: [0.1, 0.1, 0.1]}, {DOWN: [-0.1, -0.2, -0.3]}, precision=torch.float64)
    result = correlation(same, same)
    assert math.isnan(result.max.pearson) and math.isnan(result.max.spearman)
    assert result.min == pytest.approx((1, 1))


def test_ranks_share_what_ties_take():
    assert ranks(torch.tensor([5.0, 1, 5, 2, 5])).tolist() == [4, 1, 4, 2, 4]
    assert ranks(torch.tensor([7.0])).tolist() == [1]


def test_against_torch_on_many_neurons():
    generator = torch.Generator().manual_seed(0)
    sites = (DOWN, UP, QUERY)

    def numbers():
        return {site: torch.randn(50, generator=generator).tolist() for site in sites}

    a, b = attribution(numbers(), numbers()), attribution(numbers(), numbers())
    result = correlation(a, b)
    rows = [[*side.max[site], *side.min[site]] for site in (DOWN,) for side in (a, b)]
    assert result.by_kind["down"].pearson == pytest.approx(float(torch.corrcoef(torch.tensor(rows))[0, 1]), abs=1e-6)
    maxima = torch.stack([torch.cat([side.max[site] for site in sites]) for side in (a, b)])
    assert result.max.pearson == pytest.approx(float(torch.corrcoef(maxima)[0, 1]), abs=1e-6)
    # no ties: 1 - 6 Σ d² / (n (n² - 1))
    places = maxima.argsort(dim=1).argsort(dim=1).double()
    known = 1 - 6 * float((places[0] - places[1]).square().sum()) / (150 * (150**2 - 1))
    assert result.max.spearman == pytest.approx(known)


def test_any_scale_down_to_where_squares_vanish():
    numbers = {DOWN: [1.0, 2, 3]}, {DOWN: [-1.0, -3, -2]}
    tiny = tuple({site: [value * 1e-200 for value in values] for site, values in side.items()} for side in numbers)
    same = correlation(attribution(*numbers), attribution(*tiny, precision=torch.float64))
    assert same.pearson == pytest.approx(1) and same.spearman == pytest.approx(1)


def test_other_neurons_are_refused():
    a = attribution({DOWN: [1.0, 2]}, {DOWN: [0.0, 0]})
    with pytest.raises(ValueError, match="2 neurons in the first and 1 in the second"):
        correlation(a, attribution({DOWN: [1.0]}, {DOWN: [0.0]}))
    with pytest.raises(ValueError, match="different modules: only the first has down of layer 0"):
        correlation(a, attribution({UP: [1.0]}, {UP: [0.0]}))
    with pytest.raises(ValueError, match="the second attribution has 1 neurons"):
        correlation(a, attribution({DOWN: [math.inf, 2]}, {DOWN: [0.0, 0]}))
