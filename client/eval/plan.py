"""`octavo-eval suite --dry-run`: which variants, loaded when, how many requests, and about how long. Nothing is kept.

The time is that of a probe: the first few items of each task put to the first variant that the server holds, at the
concurrency of the run, times what is left to ask. Where variants are loaded, their loading comes on top.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from client.api import NotFound, OctavoClient
from client.eval.data import EvalError
from client.eval.loading import Served
from client.eval.results import BASELINE
from client.eval.suite import Task, title, whole

PROBE = 24  # items of each task; of those after them the examples are in the prefix cache too


async def print_plan(
    client: OctavoClient, held: Sequence[Served], wanted: Sequence[Served], tasks: Sequence[Task], out: Path, load: bool
) -> None:
    """Raises what the tasks raise."""
    items = [await task.items(client, wanted[0].id) for task in tasks]
    left = {title(task): 0 for task in tasks}
    done = []
    there = {s.id for s in held}
    for variant in wanted:
        sizes = [0 if whole(out, variant, task, its) else len(its) for task, its in zip(tasks, items, strict=True)]
        if not any(sizes):
            done.append(variant.variant)
        for name, size in zip(left, sizes, strict=True):
            left[name] += size if load or variant.id in there else 0
    absent = [s.variant for s in wanted if s.id not in there and s.variant not in done]
    print(f"Held by the server: {', '.join(s.variant for s in held)}.")
    if done:
        print(f"Measured already, in {out}: {', '.join(done)}.")
    if absent and load:
        print(f"To be loaded, in this order: {', '.join(absent)}.")
        for together in groups(*await room(client), absent):
            print(f"  together: {', '.join(together)}")
        print("  (by the most bytes that each may take; where the next has no room the oldest is dropped)")
    elif absent:
        print(f"Not measured, since the server does not hold them and there is no --admin-key: {', '.join(absent)}.")
    seconds = 0.0
    print(f"{'task':<22}{'requests':>10}{'seconds':>10}")
    for task, its in zip(tasks, items, strict=True):
        name = title(task)
        count = left[name]
        spent = count * await pace(client, held[0], task, its) if count else 0.0
        seconds += spent
        print(f"{name:<22}{count:>10,}{spent:>10.0f}")
    print(f"About {seconds / 60:.0f} minutes at the pace of a probe of {PROBE} requests of each on {held[0].variant}.")


async def room(client: OctavoClient) -> tuple[int, int]:
    """Bytes that the server keeps for variants to come, and those of bf16's own matrices."""
    try:
        answer = await client.variants()
        own = next(int(card["own_bytes"]) for card in answer["data"] if card["name"] == BASELINE)
        return int(answer["headroom_bytes"]), own
    except NotFound:
        raise EvalError("the server has no /v1/variants: leave --admin-key out") from None
    except (StopIteration, KeyError, TypeError, ValueError):
        raise EvalError(f"the server's /v1/variants does not tell its room and the bytes of {BASELINE}") from None


def groups(headroom: int, own: int, names: Sequence[str]) -> list[list[str]]:
    """Which variants are in memory together as they are loaded in turn, where each takes at most what its kind can: a
    fake one bf16's `own` bytes, any other half of that and a scale of four bytes for each 64 inputs."""
    found: list[list[str]] = []
    here: list[tuple[str, float]] = []
    for name in names:
        size = own * (1.0 if "-fake" in name else 0.5 + 4 / 64 / 2)
        if here and sum(s for _, s in here) + size > headroom:
            found.append([n for n, _ in here])
            while here and sum(s for _, s in here) + size > headroom:
                here.pop(0)
        here.append((name, size))
    return [*found, [n for n, _ in here]] if here else found


async def pace(client: OctavoClient, variant: Served, task: Task, items: Sequence[tuple[str, object]]) -> float:
    """Seconds an item, over the first PROBE."""
    ask = await task.asker(client, variant.id)
    probe = items[:PROBE]
    start = time.monotonic()
    await client.map(lambda pair: ask(pair[1]), probe)
    return (time.monotonic() - start) / len(probe)
