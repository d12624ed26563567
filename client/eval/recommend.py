"""Which variant to choose, in words: the smallest without a loss that is both beyond noise and more than tolerable."""

from __future__ import annotations

from client.eval.compare import Comparison
from client.eval.findings import Findings, difference, megabytes
from client.eval.results import BASELINE

TOLERABLE = {"mmlu": 0.01, "wikitext": 0.01}  # a share of all questions; a share of bf16's perplexity
RULE = "beyond noise and more than 1 point of accuracy or 1 % of perplexity"


def recommend(findings: Findings) -> list[str]:
    """Which variant to choose, in sentences, each with its reason."""
    if BASELINE not in findings.variants or not findings.comparisons:
        return [f"None: without {BASELINE} and another variant on this server there is nothing to compare."]
    judged = {BASELINE, *(c.second for c in findings.comparisons if c.verdict != "unknown")}
    fit = [v for v in findings.variants if v in judged and not any(map(_intolerable, findings.compared(v)))]
    sizes = {v: findings.bytes(v) for v in findings.variants}
    if any(size is None for size in sizes.values()):
        lines = ["None by size: the server does not tell the bytes of its variants."]
    else:
        lines = _smallest(findings, fit, {v: size for v, size in sizes.items() if size is not None})
    for variant in findings.variants:
        losses = "; ".join(difference(c) for c in findings.compared(variant) if _intolerable(c))
        if losses:
            lines.append(f"Not {variant}: worse than {BASELINE} beyond noise and tolerance in {losses}.")
        gains = "; ".join(difference(c) for c in findings.compared(variant) if c.verdict == "better")
        if gains:
            lines.append(f"{variant} is better than {BASELINE} beyond noise in {gains}.")
    return lines


def _intolerable(c: Comparison) -> bool:
    size = abs(c.difference) / (1 if c.task == "mmlu" else c.base)
    return c.verdict == "worse" and size > TOLERABLE[c.task]


def _smallest(findings: Findings, fit: list[str], sizes: dict[str, int]) -> list[str]:
    def percent(variant: str) -> int:
        """Of bf16's bytes: scales make no variant larger that are less than a hundredth of it."""
        return round(100 * sizes[variant] / sizes[BASELINE])

    def rank(variant: str) -> tuple[int, float, float]:
        """Bytes; then speed; then how far the answers are from bf16's."""
        kl = next((c.kl for c in findings.compared(variant, "mmlu", "direct") if c.kl is not None), 0.0)
        return percent(variant), -findings.speeds.get(variant, 0.0), kl

    best = min(fit, key=rank)
    if best == BASELINE:
        return [f"{BASELINE}: every smaller variant has a loss {RULE}."]
    lines = [
        f"{best}: the smallest without a loss {RULE}. "
        f"Its weights take {megabytes(sizes[best])}, {percent(best)} % of {BASELINE}'s {megabytes(sizes[BASELINE])}."
    ]
    if best in findings.speeds and BASELINE in findings.speeds:
        lines.append(f"It decodes {_speed(findings, best)}.")
        fastest = max((v for v in fit if v in findings.speeds), key=lambda v: findings.speeds[v])
        if fastest not in (best, BASELINE):
            lines.append(f"For speed alone: {fastest} decodes {_speed(findings, fastest)}, without such a loss either.")
    for c in findings.compared(best):
        lines.append(f"Against {BASELINE}: {difference(c)}: {c.verdict}{', but tolerable' * (c.verdict == 'worse')}.")
    direct = findings.compared(best, "mmlu", "direct")
    if direct and direct[0].low is not None and direct[0].low < 0:
        lines.append(f"A loss of up to {-100 * direct[0].low:.1f} points of accuracy would not have been seen here.")
    equal = [v for v in fit if v not in (best, BASELINE) and percent(v) == percent(best)]
    if equal:
        reason = "slower" if best in findings.speeds else f"with answers farther from {BASELINE}'s"
        lines.append(f"As small, but {reason}: {', '.join(equal)}.")
    return lines


def _speed(findings: Findings, variant: str) -> str:
    speed = findings.speeds[variant]
    return f"{speed:,.0f} tokens/s, {speed / findings.speeds[BASELINE]:.2f} times {BASELINE}'s"
