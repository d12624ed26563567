"""Statistics against closed forms and published values."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from client.eval import stats
from client.eval.stats import (
    holm,
    kl_divergence,
    mcnemar,
    paired_perplexity,
    paired_proportions,
    perplexity,
    proportion,
    ratio,
    softmax,
    t_cdf,
    t_quantile,
)


def test_proportion() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (Wilson): 81 of 263, 15 of 148, 0 of 20, 1 of 29
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (correct, n), (low, high) in published.items():
        found = proportion(correct, n)
        assert found.low == pytest.approx(low, abs=5e-5) and found.high == pytest.approx(high, abs=5e-5)
    assert proportion(80, 100).stderr == pytest.approx(math.sqrt(0.8 * 0.2 / 99))
    assert proportion(1, 1).stderr is None


def test_mcnemar() -> None:
    assert mcnemar(0, 0) == mcnemar(1, 1) == mcnemar(3, 3) == 1.0
    assert mcnemar(0, 6) == mcnemar(6, 0) == 2 / 64
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 1024)
    assert mcnemar(4, 16) == pytest.approx(0.011818, abs=5e-7)  # the sign test's table at n = 20
    # thousands of flips: near the normal's 2 * (1 - cdf(3.0))
    assert mcnemar(4850, 5150) == pytest.approx(0.0027, abs=1e-4)


def test_paired_proportions() -> None:
    difference = paired_proportions(20, 8, 100)
    assert difference.value == -0.12
    stderr = math.sqrt((20.5 + 8.5) - 12**2 / 102) / 102
    assert difference.low == pytest.approx(-12 / 102 - 1.959964 * stderr, abs=1e-6)
    assert difference.high == pytest.approx(-12 / 102 + 1.959964 * stderr, abs=1e-6)
    nothing = paired_proportions(0, 0, 500)
    assert nothing.value == 0 and nothing.low == -nothing.high < 0 and nothing.p == 1


def test_students_t() -> None:
    # any table: 97.5 % points
    for df, t in ((1, 12.7062), (2, 4.3027), (9, 2.2622), (30, 2.0423), (1000, 1.9623)):
        assert t_quantile(0.975, df) == pytest.approx(t, abs=6e-5)
        assert t_cdf(t, df) == pytest.approx(0.975, abs=1e-5)
        assert t_cdf(-t, df) == pytest.approx(0.025, abs=1e-5)
    assert t_cdf(0, 5) == pytest.approx(0.5)
    assert t_cdf(1, 1) == pytest.approx(0.75)  # Cauchy


def test_ratio_with_equal_weights_is_a_mean() -> None:
    values = [1.0, 4.0, 2.0, 5.0]
    found = ratio([2 * v for v in values], [2.0] * 4)
    deviation = math.sqrt(sum((v - 3) ** 2 for v in values) / 3)
    assert found.value == 3 and found.stderr == pytest.approx(deviation / 2)
    assert found.high == pytest.approx(3 + t_quantile(0.975, 3) * deviation / 2)
    assert ratio([3.0], [2.0]).stderr is None
    ppl = perplexity(values, [1.0] * 4)
    assert ppl.value == pytest.approx(math.exp(3)) and ppl.low == pytest.approx(math.exp(found.low or 0))


def test_paired_perplexity() -> None:
    rng = random.Random(1)
    weights = [rng.uniform(50, 500) for _ in range(40)]
    first = [w * rng.uniform(2, 4) for w in weights]
    same = paired_perplexity(first, first, weights)
    assert same is not None and (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    # the mean of the pairs' differences is known: compare the interval with its linearised standard error
    second = [x + w * rng.gauss(0.002, 0.01) for x, w in zip(first, weights, strict=True)]
    found = paired_perplexity(first, second, weights)
    logs = ratio([y - x for x, y in zip(first, second, strict=True)], weights)
    level = math.exp(math.fsum(first) / math.fsum(weights))
    assert found is not None and logs.low is not None and logs.high is not None
    assert found.value == pytest.approx(level * math.expm1(logs.value), rel=1e-9)
    assert found.low == pytest.approx(level * logs.low, abs=0.02) and found.high == pytest.approx(
        level * logs.high, abs=0.02
    )
    worse = paired_perplexity(first, [x + 0.05 * w for x, w in zip(first, weights, strict=True)], weights)
    assert worse is not None and worse.low > 0 and worse.p < 1e-3
    assert paired_perplexity([1.0], [2.0], [1.0]) is None
    assert paired_perplexity(first, second, weights) == found  # the seed is fixed


def test_few_documents_rarely_cry_wolf() -> None:
    """Of many pairs that differ only by chance, about one in twenty may be called different, also with 8 documents."""
    rng = random.Random(7)
    stats_resamples, called = stats.RESAMPLES, 0
    stats.RESAMPLES = 400
    try:
        for _ in range(400):
            first = [rng.gauss(300, 30) for _ in range(8)]
            second = [x + rng.gauss(0, 1) for x in first]
            found = paired_perplexity(first, second, [100.0] * 8)
            assert found is not None
            called += found.p < 0.05
    finally:
        stats.RESAMPLES = stats_resamples
    assert called / 400 < 0.08


def test_holm() -> None:
    # Holm 1979's procedure by hand: 0.01 * 4, max(0.04, 0.02 * 3), max(0.06, 0.03 * 2), 0.5
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([]) == [] and holm([0.04]) == [0.04] and holm([0.6, 0.7]) == [1, 1]


def test_divergence() -> None:
    p, q = [math.log(x) for x in (0.5, 0.25, 0.125, 0.125)], [math.log(0.25)] * 4
    assert kl_divergence(p, q) == pytest.approx(0.25 * math.log(2))
    assert kl_divergence(p, [x - 3 for x in p]) == pytest.approx(0, abs=1e-15)
    assert softmax([x - 700 for x in p]) == pytest.approx([0.5, 0.25, 0.125, 0.125])


@given(st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), min_size=4, max_size=4))
def test_divergence_is_never_negative(pairs: list[tuple[float, float]]) -> None:
    assert kl_divergence([a for a, _ in pairs], [b for _, b in pairs]) >= -1e-12


@example(0, 33)
@given(st.integers(0, 40), st.integers(0, 40))
def test_intervals_hold_their_value(a: int, b: int) -> None:
    found = proportion(a, a + b + 1)
    assert found.low is not None and found.high is not None and 0 <= found.low <= found.value <= found.high <= 1
    pair = paired_proportions(a, b, a + b + 1)
    assert pair.low <= pair.value <= pair.high or abs(pair.value) > 0.9
    assert 0 < pair.p <= 1
