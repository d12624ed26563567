"""Errors of a figure, and what separates two variants that answered the same questions. Standard library only.

A proportion has Wilson's interval (1927). Two variants are compared on the same questions: McNemar's exact test, and
Agresti and Min's interval of the difference (2005, "Simple improved confidence intervals for comparing matched
proportions": half a question is added to each of the four cells, so that no flips at all still leave a width). A
perplexity is a ratio of sums over documents: its interval comes from the linearised ratio (Cochran, Sampling
Techniques, 1977, section 6) with Student's t. Two are compared by the paired bootstrap over documents: the interval is
of the resampled differences, widened for few documents (Hesterberg, 2015, arXiv:1411.5279, "expanded percentile"); p is
Student's, of the difference in loss over its standard error among the resamples, because a share of the resamples could
never be small enough to outlive the correction for many comparisons, which is Holm's (1979).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, stdev

LEVEL = 0.95  # of every interval
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
RESAMPLES = 10_000
SEED = 20261123


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error and interval. Where there is too little data, both are None."""

    value: float
    stderr: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """value: second less first, with its interval; p: two-sided, before correction."""

    value: float
    low: float
    high: float
    p: float


def proportion(correct: int, n: int) -> Estimate:
    """`correct` of `n`: standard error (sample deviation over the root of n) and Wilson's interval."""
    p = correct / n
    stderr = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    # At 0 and 1 the interval ends at p itself, which rounding may overshoot by a bit.
    return Estimate(p, stderr, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p of `lost` against `won` flips: a fair coin tossed lost + won times."""
    n, k = lost + won, min(lost, won)
    total = term = 1
    for i in range(k):
        term = term * (n - i) // (i + 1)
        total += term
    return min(1.0, float(2 * total / 2**n))


def paired_proportions(lost: int, won: int, n: int) -> Difference:
    """Of n questions, the second variant lost `lost` that the first had right, and won `won`."""
    total, net, flips = n + 2, won - lost, lost + won + 1
    stderr = math.sqrt(max(0.0, flips - net * net / total)) / total
    middle = net / total
    return Difference(net / n, max(-1.0, middle - Z * stderr), min(1.0, middle + Z * stderr), mcnemar(lost, won))


def ratio(sums: Sequence[float], weights: Sequence[float]) -> Estimate:
    """The ratio of two totals over documents (one entry each): linearised standard error, Student's t interval."""
    total, n = math.fsum(weights), len(sums)
    value = math.fsum(sums) / total
    if n < 2:
        return Estimate(value, None, None, None)
    spread = math.fsum((s - value * w) ** 2 for s, w in zip(sums, weights, strict=True))
    stderr = math.sqrt(spread * n / (n - 1)) / total
    half = t_quantile(0.5 + LEVEL / 2, n - 1) * stderr
    return Estimate(value, stderr, value - half, value + half)


def perplexity(losses: Sequence[float], weights: Sequence[float]) -> Estimate:
    """exp(losses / weights) over documents; the interval is the mean loss's, exponentiated."""
    mean = ratio(losses, weights)
    if mean.stderr is None or mean.low is None or mean.high is None:
        return Estimate(math.exp(mean.value), None, None, None)
    value = math.exp(mean.value)
    return Estimate(value, value * mean.stderr, math.exp(mean.low), math.exp(mean.high))


def paired_perplexity(first: Sequence[float], second: Sequence[float], weights: Sequence[float]) -> Difference | None:
    """Second perplexity less first, resampling documents with both their losses. None for fewer than two documents."""
    n = len(weights)
    if n < 2:
        return None
    rng = random.Random(SEED)
    rows = list(zip(first, second, weights, strict=True))
    differences, logs = [], []
    for _ in range(RESAMPLES):
        a = b = w = 0.0
        for x, y, z in rng.choices(rows, k=n):
            a, b, w = a + x, b + y, w + z
        differences.append(math.exp(b / w) - math.exp(a / w))
        logs.append((b - a) / w)
    differences.sort()
    widen = math.sqrt(n / (n - 1))
    tail = NormalDist().cdf(-widen * t_quantile(0.5 + LEVEL / 2, n - 1))
    total = math.fsum(weights)
    before, after = math.fsum(first) / total, math.fsum(second) / total
    stderr = stdev(logs) * widen
    if stderr > 1e-12:
        p = 2 * t_cdf(-abs(after - before) / stderr, n - 1)
    else:  # every document differs by as much
        p = 0.0 if abs(after - before) > 1e-12 else 1.0
    low, high = _quantile(differences, tail), _quantile(differences, 1 - tail)
    return Difference(math.exp(after) - math.exp(before), low, high, p)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the given order: below 0.05 means significant among all of them."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def softmax(logprobs: Sequence[float]) -> list[float]:
    """Probabilities of a few choices from their logprobs, normalised among themselves."""
    top = max(logprobs)
    weights = [math.exp(x - top) for x in logprobs]
    return [w / math.fsum(weights) for w in weights]


def kl_divergence(p: Sequence[float], q: Sequence[float]) -> float:
    """KL(p || q) in nats, of logprobs over the same choices, each normalised among themselves first."""
    log_p, log_q = _log_softmax(p), _log_softmax(q)
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def _log_softmax(logprobs: Sequence[float]) -> list[float]:
    top = max(logprobs)
    total = top + math.log(math.fsum(math.exp(x - top) for x in logprobs))
    return [x - total for x in logprobs]


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Between order statistics, linearly."""
    position = q * (len(ordered) - 1)
    i = min(int(position), len(ordered) - 2)
    return ordered[i] + (position - i) * (ordered[i + 1] - ordered[i])


def t_cdf(t: float, df: int) -> float:
    """Student's t distribution, by the incomplete beta function."""
    tail = 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + t * t))
    return tail if t < 0 else 1 - tail


def t_quantile(q: float, df: int) -> float:
    """The t with t_cdf(t) = q, for 0.5 <= q < 1, by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, df) < q:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < q else (low, middle)
    return high


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised, by Lentz's continued fraction (Numerical Recipes, 6.4)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    result = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / (1 + term * d)
            c = 1 + term / c
            result *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * result / a
