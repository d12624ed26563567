"""The suite: tasks over the variants that a server has loaded, resumable, then the report and the gates.

Variants go one after another, `bf16` first, and under each the tasks, so that the generate method finds the direct
method's prompts in the prefix cache. A question that the server answers with an error, after the client's retries, is
kept as failed and asked again by the next run; a server that is gone, an unknown model or an answer of another shape
ends the run, and what was done stays in the journals.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from client.api import BadRequest, OctavoClient, RateLimited, ServerError
from client.eval import mmlu, results, wikitext
from client.eval.data import EvalError, Exam, Text

JSON = dict[str, Any]

_WEIGHT_ONLY = [
    f"{dtype}-{size}"
    for dtype in ("int8", "fp8")
    for size in ("tensor", "row", *map("g{}".format, (64, 128, 256, 512)))
]
STUDY = (
    results.BASELINE,
    *_WEIGHT_ONLY,
    *(f"{name}-fake" for name in _WEIGHT_ONLY),
    *(f"w8a8-{dtype}-row{smooth}" for smooth in ("", "-smooth") for dtype in ("int8", "fp8")),
)
PRESETS: dict[str, tuple[str, ...]] = {"pocket": (), "study": STUDY}  # the variants that should be there


class Task(Protocol):
    """What the suite runs; `mmlu.MMLU` and `wikitext.Wikitext`."""

    @property
    def name(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def settings(self) -> JSON: ...
    async def items(self, client: OctavoClient, model: str) -> Sequence[tuple[str, Any]]: ...
    async def asker(self, client: OctavoClient, model: str) -> Callable[[Any], Awaitable[JSON]]: ...
    def figures(self, rows: Sequence[JSON]) -> JSON: ...


@dataclass(frozen=True)
class Served:
    """One variant of a server. `id` is the name to ask for; bytes are None where the server does not tell."""

    id: str
    model: str
    variant: str
    root: str | None = None
    own_bytes: int | None = None
    shared_bytes: int | None = None


async def served(client: OctavoClient, only: Sequence[str] | None = None) -> list[Served]:
    """The variants of a server, `bf16` first. `only`: variants or model names. Raises EvalError for one not loaded."""
    found: dict[str, Served] = {}
    for entry in await client.models():
        name = str(entry.get("id"))
        variant = str(entry.get("variant") or name.partition(":")[2] or "default")
        kept = Served(
            name,
            name.removesuffix(f":{variant}"),
            variant,
            *(entry.get(field) for field in ("root", "own_bytes", "shared_bytes")),
        )
        if f"{name}:{variant}" not in found:  # the bare name is the default variant once more
            found.pop(kept.model, None)
            found[name] = kept
    chosen = list(found.values())
    if only is not None:
        for wanted in only:
            if not any(wanted in (s.id, s.variant) for s in chosen):
                raise EvalError(f"{wanted} is not loaded; the server has {', '.join(s.id for s in chosen)}")
        chosen = [s for s in chosen if s.variant in only or s.id in only]
    if not chosen:
        raise EvalError("the server has no model loaded")
    return sorted(chosen, key=lambda s: s.variant != results.BASELINE)


def is_pocket(variants: Sequence[Served]) -> bool:
    """Whether the server has the bundled model."""
    return all(s.root is not None and Path(s.root).name == "pocket" for s in variants)


def make_tasks(
    exam: Exam | None,
    text: Text | None,
    methods: Sequence[str],
    *,
    limit: int | None = None,
    shots: int = 5,
    seed: int = 0,
    text_limit: int | None = None,
    window: int = 2048,
    stride: int | None = None,
    join: str = "blank-lines",
    prefix: str = "<|endoftext|>",
) -> list[Task]:
    """The tasks of `methods` for which there is data."""
    made: list[Task] = []
    if exam is not None:
        made += [mmlu.MMLU(exam, m, limit, shots, seed) for m in mmlu.METHODS if m in methods]
    if text is not None:
        chosen = [m for m in wikitext.METHODS if m in methods]
        made += [wikitext.Wikitext(text, m, text_limit, window, stride, join, prefix) for m in chosen]
    return made


async def run(
    client: OctavoClient, url: str, variants: Sequence[Served], tasks: Sequence[Task], out: Path, fresh: bool = False
) -> list[JSON]:
    """Every task of every variant; the results, each also written under `out`. Raises EvalError, the client's errors.

    fresh: forget the journals that are there.
    """
    items = {id(task): await task.items(client, variants[0].id) for task in tasks}  # variants share a tokenizer
    progress = Progress([(f"{task.name}-{task.method}", len(items[id(task)])) for task in tasks], len(variants))
    found = []
    with progress:
        for variant in variants:
            for task in tasks:
                found.append(await run_task(client, url, variant, task, items[id(task)], out, fresh, progress))
    return found


async def run_task(
    client: OctavoClient,
    url: str,
    variant: Served,
    task: Task,
    items: Sequence[tuple[str, Any]],
    out: Path,
    fresh: bool,
    progress: Progress,
) -> JSON:
    """One result, from its journal and what is still to ask. Raises EvalError where every item failed."""
    stem = results.stem(out, variant.model, variant.variant, task.name, task.method)
    path = stem.with_name(f"{stem.name}.jsonl")
    if fresh:
        path.unlink(missing_ok=True)
    heading = {
        "version": results.VERSION,
        "model": variant.model,
        "variant": variant.variant,
        "task": task.name,
        "method": task.method,
        "settings": task.settings,
        "server": {"root": variant.root, "own_bytes": variant.own_bytes, "shared_bytes": variant.shared_bytes},
    }
    with results.Journal(path, heading) as journal:
        left = [(key, item) for key, item in items if "error" in journal.rows.get(key, {"error": ""})]
        progress.begin(f"{task.name}-{task.method}", variant.variant, len(items) - len(left))
        if left:
            ask = await task.asker(client, variant.id)

            async def work(pair: tuple[str, Any]) -> None:
                key, item = pair
                try:
                    row = await ask(item)
                except (BadRequest, RateLimited, ServerError) as e:
                    row = {"error": str(e)}
                journal.add({"id": key} | row)
                progress.step()

            await client.map(work, left)
        rows = [journal.rows[key] for key, _ in items]
    errors = [row["error"] for row in rows if "error" in row]
    if len(errors) == len(rows):
        raise EvalError(f"{variant.id}: every {task.name}-{task.method} request failed, the first with: {errors[0]}")
    result = heading | {"url": url, "date": journal.date, "figures": task.figures(rows), "rows": rows}
    results.dump(stem.with_name(f"{stem.name}.json"), result)
    return result


def load_speeds(path: Path) -> dict[str, float]:
    """tokens/s by model name from `octavo-load --json`, the largest of each. Raises EvalError."""
    speeds: dict[str, float] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            run = json.loads(line)
            if len(run["models"]) != 1:
                raise EvalError(f"{path}: a run mixes {', '.join(run['models'])}: run octavo-load for one variant each")
            name = str(run["models"][0])
            speeds[name] = max(speeds.get(name, 0.0), float(run["output_tokens_per_second"]))
    except OSError as e:
        raise EvalError(f"cannot read {path}: {e.strerror or e}") from None
    except (KeyError, TypeError, ValueError) as e:
        if isinstance(e, EvalError):
            raise
        raise EvalError(f"{path} is not the output of octavo-load --json: {type(e).__name__}: {e}") from None
    return speeds


class Progress:
    """What is done and the time left: one line on a terminal's standard error, a line a task elsewhere."""

    def __init__(self, tasks: Sequence[tuple[str, int]], num_variants: int) -> None:
        self._left = {name: size * num_variants for name, size in tasks}
        self._seconds: dict[str, tuple[float, int]] = {}  # spent on a task, for so many items
        self._name = self._variant = ""
        self._began = 0.0
        self._shown = sys.stderr.isatty()

    def begin(self, name: str, variant: str, num_known: int) -> None:
        """A task begins for a variant; `num_known` of its items are in the journal."""
        self._name, self._variant, self._began = name, variant, time.monotonic()
        self._left[name] -= num_known
        if not self._shown:
            known = f", {num_known} in its journal" if num_known else ""
            print(f"{variant} {name}{known}", file=sys.stderr)

    def step(self) -> None:
        """One item is done."""
        now = time.monotonic()
        spent, count = self._seconds.get(self._name, (0.0, 0))
        self._seconds[self._name] = (spent + now - self._began, count + 1)
        self._began = now
        self._left[self._name] -= 1
        if self._shown:
            minutes, seconds = divmod(round(self.seconds_left()), 60)
            text = f"{self._variant} {self._name}: {sum(self._left.values())} to do, about {minutes}:{seconds:02} left"
            print(f"\r{text:<79}", end="", file=sys.stderr, flush=True)

    def seconds_left(self) -> float:
        """What is left of each task at its own pace so far, or at the pace of all."""
        pace = {name: spent / count for name, (spent, count) in self._seconds.items()}
        of_all = sum(s for s, _ in self._seconds.values()) / sum(n for _, n in self._seconds.values())
        return sum(left * pace.get(name, of_all) for name, left in self._left.items())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print(file=sys.stderr)
