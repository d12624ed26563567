"""What a load test is: every setting, from the command line, a scenario file (TOML) and defaults; the first wins.

`Settings` is the whole list: a field is the option `--field-name` and the scenario's key `field_name`. Words are parsed
by the same functions wherever they come from, so that a wrong one reads the same: one line that names it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

ARRIVALS = ("closed", "poisson", "gamma", "fixed", "trace")
APIS = ("completions", "chat")
LIMIT = re.compile(r"(ttft|itl|tpot|e2e|queue)_(mean|p50|p90|p95|p99|max)=(\d+(?:\.\d+)?)(us|ms|s)")
ERROR_LIMIT = re.compile(r"errors=(\d+(?:\.\d+)?)%")
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


class LoadError(ValueError):
    """The load test cannot be run as asked. The message is one line for the user."""


class Span(NamedTuple):
    """Lengths in tokens, drawn uniformly from `low` to `high`, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


class Limit(NamedTuple):
    """One condition of an SLO: statistic `name` (such as "p99") of `measure` is at most `value` milliseconds."""

    measure: str
    name: str
    value: float

    def __str__(self) -> str:
        return f"{self.measure}_{self.name}={self.value:g}ms"


class Slo(NamedTuple):
    """Limits that a run must keep, and the largest share of requests that may fail."""

    limits: tuple[Limit, ...]
    errors: float = 0.01


def parse_slo(text: str) -> Slo:
    """`ttft_p99=500ms,itl_p99=50ms,errors=1%`."""
    limits, errors = [], 0.01
    for word in filter(None, (w.strip() for w in text.split(","))):
        if found := LIMIT.fullmatch(word):
            limits.append(Limit(found[1], found[2], float(found[3]) * UNITS[found[4]]))
        elif found := ERROR_LIMIT.fullmatch(word):
            errors = float(found[1]) / 100
        else:
            raise ValueError(f"cannot read {word!r}; an example is ttft_p99=500ms,itl_p99=50ms,errors=1%")
    return Slo(tuple(limits), errors)


def parse_span(text: str) -> Span:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not found or not 1 <= int(found[1]) <= int(found[2] or found[1]):
        raise ValueError(f"must be a length such as 128 or a span such as 64-256, got {text!r}")
    return Span(int(found[1]), int(found[2] or found[1]))


def parse_mix(text: str) -> tuple[tuple[str, float], ...]:
    """`bf16=1,int8-row=2`: variants and their weights; a bare name weighs 1."""
    mix = []
    for word in filter(None, (w.strip() for w in text.split(","))):
        name, _, weight = word.partition("=")
        try:
            number = float(weight or 1)
        except ValueError:
            number = 0.0
        if not name or not 0 < number < 1e9:
            raise ValueError(f"cannot read {word!r}; an example is bf16=1,int8-row=2")
        mix.append((name, number))
    return tuple(mix)


def _number(kind: type[int] | type[float], low: float, text: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"must be a number, got {text!r}") from None
    if not low <= value < 1e12:
        raise ValueError(f"must be at least {low:g}, got {text}")
    return value


def whole(low: int) -> Callable[[str], int]:
    return lambda text: int(_number(int, low, text))


def real(low: float) -> Callable[[str], float]:
    return lambda text: float(_number(float, low, text))


def several(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(parse(word) for word in text.split(","))


def one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"must be one of {', '.join(words)}, got {text!r}")
        return text

    return parse


def yes_or_no(text: str) -> bool:
    return one_of("true", "false")(text.lower()) == "true"


def share(text: str) -> float:
    value = real(0)(text)
    if value > 1:
        raise ValueError(f"must be a share from 0 to 1, got {text}")
    return value


def sweep_span(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    values = real(0.001)(low), real(0.001)(high)
    if values[0] >= values[1]:
        raise ValueError(f"must be LOW:HIGH in requests a second, got {text!r}")
    return values


def _option(default: Any, parse: Callable[[str], Any], metavar: str, text: str) -> Any:
    return field(default=default, metadata={"parse": parse, "metavar": metavar, "help": text})


@dataclass(frozen=True)
class Settings:
    """A load test. Lengths are in tokens, times in seconds, rates in requests a second."""

    url: str = _option("", str, "URL", "the server, without /v1")
    model: str = _option("", str, "NAME", "model name (default: the first that the server lists)")
    mix: tuple[tuple[str, float], ...] = _option(
        (), parse_mix, "NAME=W,…", "spread over variants by weight: bf16=1,int8-row=2 asks for MODEL:bf16 and so on"
    )
    api: str = _option("completions", one_of(*APIS), "API", "completions or chat")
    arrivals: str = _option(
        "closed", one_of(*ARRIVALS), "KIND", "closed: --concurrency streams; poisson, gamma, fixed: --rate; or trace"
    )
    concurrency: tuple[int, ...] = _option((16,), several(whole(1)), "N,…", "streams at once; a run for each number")
    rate: tuple[float, ...] = _option((1.0,), several(real(0.001)), "R,…", "requests a second; a run for each number")
    burstiness: float = _option(
        1.0, real(0.01), "SHAPE", "shape of the gamma distribution: 1 is Poisson, less is burstier"
    )
    requests: int = _option(0, whole(0), "N", "requests in a run (0: 4 for each stream, or until --duration)")
    duration: float = _option(0.0, real(0), "SECONDS", "no new request after so long (0: no limit)")
    trace: str = _option("", str, "FILE", "arrivals and lengths of an Azure (.csv) or Mooncake (.jsonl) trace, or .xz")
    trace_speed: float = _option(1.0, real(0.001), "FACTOR", "replay the trace so many times faster")
    length_scale: float = _option(1.0, real(0.0001), "FACTOR", "multiply the trace's lengths")
    longest: int = _option(0, whole(0), "TOKENS", "leave out trace rows of more tokens in and out (0: none)")
    prompts: str = _option(
        "synthetic", str, "FILE", "synthetic: random ids (words for chat); a text; or .jsonl of prompt, turns, messages"
    )
    input_tokens: Span = _option(Span(128, 128), parse_span, "N[-M]", "length of a prompt (of a text: in words)")  # noqa: RUF009
    output_tokens: Span = _option(Span(64, 64), parse_span, "N[-M]", "length of an answer")  # noqa: RUF009
    prefix_tokens: int = _option(0, whole(0), "N", "length of a common prefix before the prompt")
    prefix_share: float = _option(1.0, share, "SHARE", "share of requests with a common prefix")
    prefixes: int = _option(1, whole(1), "N", "number of different common prefixes")
    ignore_eos: bool = _option(True, yes_or_no, "true|false", "answers always have their full length")
    temperature: float = _option(0.0, real(0), "T", "sampling temperature")
    min_token_id: int = _option(3, whole(0), "ID", "smallest id in a synthetic prompt")
    max_token_id: int = _option(999, whole(1), "ID", "largest id in a synthetic prompt")
    seed: int = _option(0, whole(0), "N", "of prompts and arrivals")
    warmup: int = _option(1, whole(0), "N", "requests to each variant before the clock runs")
    timeout: float = _option(600.0, real(0.001), "SECONDS", "for one request")
    processes: int = _option(1, whole(1), "N", "client processes")
    slo: Slo = _option(  # noqa: RUF009
        Slo(()), parse_slo, "LIMITS", "what a run must keep: ttft_p99=500ms,itl_p99=50ms,errors=1%%"
    )
    sweep: tuple[float, float] | None = _option(
        None, sweep_span, "LOW:HIGH", "find the highest rate that keeps --slo; each trial lasts --duration (default 20)"
    )


OPTIONS = {f.name: f for f in fields(Settings)}


def read_scenario(path: str) -> dict[str, str]:
    """A scenario file's words, ready to be parsed. Raises LoadError."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise LoadError(f"--scenario: cannot read {path}: {' '.join(str(e).split())}") from None
    words = {}
    for key, value in table.items():
        if key not in OPTIONS:
            raise LoadError(f"{path}: there is no such key: {key}")
        if isinstance(value, list):
            words[key] = ",".join(str(item) for item in value)
        elif isinstance(value, str | int | float):
            words[key] = str(value)
        else:
            raise LoadError(f"{path}: {key} must be a word, a number or a list")
    for key in ("prompts", "trace"):  # named from where the scenario lies
        if words.get(key, "synthetic") not in ("", "synthetic"):
            words[key] = str(Path(path).parent / words[key])
    return words


def settings_from(options: Mapping[str, str], scenario: str = "") -> Settings:
    """Settings of the command line's words over those of a scenario file. Raises LoadError."""
    given = {f"--{key.replace('_', '-')}": (key, text) for key, text in options.items()}
    in_file = read_scenario(scenario) if scenario else {}
    given |= {f"{scenario}: {key}": (key, text) for key, text in in_file.items() if key not in options}
    values = {}
    for source, (key, text) in given.items():
        try:
            values[key] = OPTIONS[key].metadata["parse"](text)
        except ValueError as e:
            raise LoadError(f"{source}: {e}") from None
    return _checked(Settings(**values))


def _checked(s: Settings) -> Settings:
    """Settings that fit together. Raises LoadError."""
    if not re.match(r"https?://.", s.url):
        raise LoadError(f"URL must begin with http:// or https://, got {s.url!r}")
    if s.min_token_id > s.max_token_id:
        raise LoadError("--max-token-id must not be below --min-token-id")
    if (s.arrivals == "trace") != bool(s.trace):
        raise LoadError("--arrivals trace and --trace FILE go together")
    if s.sweep and s.arrivals not in ("poisson", "gamma", "fixed"):
        raise LoadError("--sweep needs --arrivals poisson, gamma or fixed")
    if s.sweep and not s.slo.limits:
        raise LoadError("--sweep needs --slo")
    if s.arrivals in ("poisson", "gamma", "fixed") and not (s.requests or s.duration or s.sweep):
        raise LoadError(f"--arrivals {s.arrivals} needs --requests or --duration")
    return s
