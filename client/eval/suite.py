"""The suite: tasks over variants of one server, resumable.

Variants go one after another, `bf16` first, and under each the tasks, so that the generate method finds the direct
method's prompts in the prefix cache. A variant of which everything is measured already is not loaded again; one that
cannot be had is named with the reason, and the others go on. A question that the server answers with an error, after
the client's retries, is kept as failed and asked again by the next run; a server that is gone, an unknown model or an
answer of another shape ends the run, and what was done stays in the journals.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from client.api import BadRequest, OctavoClient, RateLimited, ServerError
from client.eval import mmlu, results, wikitext
from client.eval.data import EvalError, Exam, Text
from client.eval.loading import Served, Unavailable, VariantLoader

JSON = dict[str, Any]
Items = Sequence[tuple[str, Any]]  # of a task: (id, what to ask)


@dataclass(frozen=True)
class Outcome:
    """What a run found. missing: why a variant could not be measured, by its name."""

    results: list[JSON] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


class Task(Protocol):
    """What the suite runs; `mmlu.MMLU` and `wikitext.Wikitext`."""

    @property
    def name(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def settings(self) -> JSON: ...
    async def items(self, client: OctavoClient, model: str) -> Items: ...
    async def asker(self, client: OctavoClient, model: str) -> Callable[[Any], Awaitable[JSON]]: ...
    def figures(self, rows: Sequence[JSON]) -> JSON: ...


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


def title(task: Task) -> str:
    return f"{task.name}-{task.method}"


async def run(
    client: OctavoClient,
    url: str,
    wanted: Sequence[Served],
    loader: VariantLoader,
    tasks: Sequence[Task],
    out: Path,
    fresh: bool = False,
) -> Outcome:
    """Every task of every variant, each result also written under `out`. Raises EvalError, the client's errors.

    fresh: forget the journals that are there.
    """
    items = [await task.items(client, wanted[0].id) for task in tasks]  # variants share a tokenizer
    sizes = {title(task): len(its) for task, its in zip(tasks, items, strict=True)}
    outcome = Outcome()
    with Progress(sizes, len(wanted)) as progress:
        for variant in wanted:
            if fresh:
                forget(out, variant, tasks)
            known = [whole(out, variant, task, its) for task, its in zip(tasks, items, strict=True)]
            try:
                served = await loader.ensure(variant) if None in known else variant
            except Unavailable as e:
                outcome.missing[variant.variant] = str(e)
                outcome.results.extend(result for result in known if result is not None)
                progress.skip()
                continue
            for task, its, result in zip(tasks, items, known, strict=True):
                if result is None:
                    result = await run_task(client, url, served, task, its, out, progress)
                else:
                    progress.begin(title(task), variant.variant, len(its))
                outcome.results.append(result)
    return outcome


def forget(out: Path, variant: Served, tasks: Sequence[Task]) -> None:
    """Delete what is there of these tasks."""
    for task in tasks:
        for suffix in (".json", ".jsonl"):
            results.path(out, variant.model, variant.variant, task.name, task.method, suffix).unlink(missing_ok=True)


def whole(out: Path, variant: Served, task: Task, items: Items) -> JSON | None:
    """The result of an earlier run of the same settings with nothing left to ask. None: the journal has to decide."""
    path = results.path(out, variant.model, variant.variant, task.name, task.method, ".json")
    try:
        result = results.load(path) if path.exists() else None
    except EvalError:
        return None  # cut short or of another version; the journal beside it tells more
    if result is None or result["settings"] != results.as_read(task.settings):
        return None
    if variant.bytes is not None and result["server"] != {"root": variant.root, "bytes": variant.bytes}:
        return None
    done = {row["id"] for row in result["rows"] if "error" not in row}
    return result if done >= {key for key, _ in items} else None


async def run_task(
    client: OctavoClient,
    url: str,
    variant: Served,
    task: Task,
    items: Items,
    out: Path,
    progress: Progress,
) -> JSON:
    """One result, from its journal and what is still to ask. Raises EvalError where every item failed."""
    heading = {
        "version": results.VERSION,
        "model": variant.model,
        "variant": variant.variant,
        "task": task.name,
        "method": task.method,
        "settings": task.settings,
        "server": {"root": variant.root, "bytes": variant.bytes},
    }
    path = results.path(out, variant.model, variant.variant, task.name, task.method, ".jsonl")
    with results.Journal(path, heading) as journal:
        left = [(key, item) for key, item in items if "error" in journal.rows.get(key, {"error": ""})]
        progress.begin(title(task), variant.variant, len(items) - len(left))
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
        raise EvalError(f"{variant.id}: every {title(task)} request failed, the first with: {errors[0]}")
    result = heading | {"url": url, "date": journal.date, "figures": task.figures(rows), "rows": rows}
    results.dump(path.with_suffix(".json"), result)
    return result


class Progress:
    """What is done and the time left: one line on a terminal's standard error, a line a task elsewhere."""

    def __init__(self, sizes: Mapping[str, int], num_variants: int) -> None:
        """sizes: a variant's items, by task."""
        self._sizes = sizes
        self._left = {name: size * num_variants for name, size in sizes.items()}
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

    def skip(self) -> None:
        """A variant cannot be had: nothing of it is to do."""
        for name, size in self._sizes.items():
            self._left[name] -= size

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
