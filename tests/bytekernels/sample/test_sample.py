"""What is drawn, by every implementation: greedily, within top_k, top_p and min_p, as often as it should be."""

import math

import pytest
import torch

from tests.bytekernels.sample.conftest import make, plain

INF = math.inf


def kept(case, sampler, draws=60):
    """The indices that come up among draws from the case's first row."""
    many = case.rows([0] * draws).but(counters=torch.arange(draws))
    return sorted(set(many.draw(sampler).tolist()))


def test_greedy_takes_the_greatest_and_of_equal_ones_the_first(sampler):
    rows = [[1.0, 3.0, 3.0, 2.0], [-INF, -5.0, -INF, -5.0], [0.0, 0.0, -0.0, 0.0], [-0.0, 0.0, -1.0, 0.0]]
    case = plain([0.0] * 4, 4).but(logits=torch.tensor(rows), temperature=0.0)
    assert case.draw(sampler).tolist() == [1, 1, 0, 0]
    assert case.but(top_k=2, top_p=0.0, min_p=1.0).draw(sampler).tolist() == [1, 1, 0, 0]


def test_a_cold_draw_is_the_greedy_one(sampler):
    case = make(8)
    greedy = case.but(temperature=0.0).draw(sampler)
    cold = case.but(temperature=1e-38, logits=case.logits.clone().scatter_(1, greedy[:, None], 20.0))
    assert torch.equal(cold.draw(sampler), greedy)


@pytest.mark.parametrize(
    ("top_k", "expected"), [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (9, range(4))]
)
def test_top_k_of_equal_logits_takes_lower_indices(sampler, top_k, expected):
    case = plain([-0.5, 1.0, 0.0, 0.5], 1).but(top_k=top_k)
    assert kept(case, sampler) == list(expected)
    tied = plain([0.0, 0.5, 0.0, -0.0], 1).but(top_k=top_k)
    assert kept(tied, sampler) == {1: [1], 2: [0, 1], 3: [0, 1, 2]}.get(top_k, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.0, [2]), (0.49, [2]), (0.5, [2]), (0.51, [0, 2]), (0.75, [0, 2]), (0.76, [0, 1, 2]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_takes_the_shortest_prefix_that_reaches_it(sampler, top_p, expected):
    """Probabilities 1/4, 1/8, 1/2, 1/8, but for rounding; then of eight equal ones."""
    case = plain([math.log(2), 0.0, math.log(4), 0.0], 1)
    if top_p not in (0.5, 0.75):  # logarithms are rounded
        assert kept(case.but(top_p=top_p), sampler) == expected
    equal = plain([1.0] * 8, 1).but(top_p=top_p)
    assert kept(equal, sampler, 100) == list(range(max(1, math.ceil(8 * top_p))))


@pytest.mark.parametrize(("min_p", "expected"), [(0.0, range(4)), (0.26, [0, 2]), (0.51, [2]), (1.0, [2])])
def test_min_p_compares_with_the_likeliest(sampler, min_p, expected):
    case = plain([math.log(2), 0.0, math.log(4), 0.0], 1).but(min_p=min_p)
    assert kept(case, sampler) == list(expected)


def test_limits_apply_one_after_the_other(sampler):
    """top_p is of what top_k keeps: 3/4 of 4 : 2 is one less token than 3/4 of 4 : 2 : 1 : 1 : 1 : 1."""
    case = plain([math.log(4), math.log(2), 0.0, 0.0, 0.0, 0.0], 1).but(top_p=0.66)
    assert kept(case, sampler) == [0, 1, 2]
    assert kept(case.but(top_k=2), sampler) == [0]
    assert kept(case.but(temperature=0.5), sampler) == [0]  # 16 : 4 : 1 : 1 : 1 : 1


@pytest.mark.parametrize("settings", [{}, dict(temperature=0.7, top_k=5, top_p=0.95, min_p=0.02)], ids=["plain", "all"])
def test_draws_are_as_frequent_as_their_probabilities(sampler, settings):
    """Pearson's statistic of n draws stays below its mean k - 1 by four of its standard deviations sqrt(2 (k - 1))."""
    logits = [0.3, -1.0, 1.2, 0.0, -INF, 0.9, -0.4]
    draws = 400 if sampler.interpreted else 20000
    found = torch.bincount(plain(logits, draws).but(**settings).draw(sampler), minlength=len(logits)).double()
    p = (torch.tensor(logits, dtype=torch.float64) / settings.get("temperature", 1.0)).softmax(0)
    if settings:
        allowed = p.argsort(descending=True)[: settings["top_k"]]
        outside = torch.ones(len(p), dtype=torch.bool)
        outside[allowed] = False
        p[outside] = 0.0
        p /= p.sum()
        ranked = p.sort(descending=True)
        before = ranked.values.cumsum(0) - ranked.values
        p[ranked.indices[before >= settings["top_p"]]] = 0.0
        p[p < settings["min_p"] * p.max()] = 0.0
        p /= p.sum()
    possible = p > 0
    assert 1 < possible.sum() < len(p)
    assert found[~possible].sum() == 0
    expected = draws * p[possible]
    freedom = int(possible.sum()) - 1
    assert float(((found[possible] - expected) ** 2 / expected).sum()) < freedom + 4 * math.sqrt(2 * freedom)


def test_one_token_is_always_drawn(sampler):
    assert plain([5.0], 3).draw(sampler).tolist() == [0, 0, 0]
    assert plain([-INF, -1e30, -INF], 3).draw(sampler).tolist() == [1, 1, 1]


def test_rows_are_drawn_alone_as_in_any_batch(sampler):
    rows = 5 if sampler.interpreted else 40
    case = make(rows, 67)
    whole = case.draw(sampler)
    assert torch.equal(case.draw(sampler), whole)
    for row in range(rows):
        assert torch.equal(case.rows([row]).draw(sampler), whole[row : row + 1])
    backwards = torch.arange(rows - 1, -1, -1)
    assert torch.equal(case.rows(backwards).draw(sampler), whole[backwards])


def test_no_rows(sampler):
    drawn = make(0).draw(sampler)
    assert drawn.shape == (0,) and drawn.dtype == torch.int64
