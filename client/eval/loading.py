"""The variants of a server: those that it holds, and those that the suite has it hold for a while.

`VariantLoader.ensure` loads a variant through POST /v1/variants. Where there is no room (409), what the suite loaded
before and is done with goes first; what the operator chose to serve is never dropped. `close` drops the suite's own,
so that the server is left as it was found. Their names stand in OUT/loaded.json meanwhile, so that a run which was
killed still knows them when it goes on.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.api import APIError, Conflict, NotFound, OctavoClient, OctavoError, Unauthorized
from client.eval import results
from client.eval.data import EvalError

JSON = dict[str, Any]
KEPT = "loaded.json"


class Unavailable(Exception):
    """This variant cannot be measured on this server; the message says why."""


@dataclass(frozen=True)
class Served:
    """One variant of a server. `id` is the name to ask for; bytes (of all its weights) None where not told."""

    id: str
    model: str
    variant: str
    root: str | None = None
    bytes: int | None = None


async def served(client: OctavoClient) -> list[Served]:
    """The variants that a server holds, `bf16` first."""
    found: dict[str, Served] = {}
    for entry in await client.models():
        name = str(entry.get("id"))
        variant = str(entry.get("variant") or name.partition(":")[2] or "default")
        own, shared = entry.get("own_bytes"), entry.get("shared_bytes")
        size = None if own is None or shared is None else int(own) + int(shared)
        kept = Served(name, name.removesuffix(f":{variant}"), variant, entry.get("root"), size)
        if f"{name}:{variant}" not in found:  # the bare name is the default variant once more
            found.pop(kept.model, None)
            found[name] = kept
    if not found:
        raise EvalError("the server has no model loaded")
    return sorted(found.values(), key=lambda s: s.variant != results.BASELINE)


def pick(held: Sequence[Served], only: Sequence[str] | None, preset: Sequence[str], can_load: bool) -> list[Served]:
    """The variants to measure: `bf16` first, then what is held, then what would have to be loaded.

    only: variants or model names. Raises EvalError for one that is neither held nor could be loaded.
    """
    chosen = list(held)
    names = preset
    if only is not None:
        chosen = [s for s in held if s.variant in only or s.id in only]
        names = [name for name in only if not any(name in (s.variant, s.id) for s in held)]
        if names and not can_load:
            has = ", ".join(s.id for s in held)
            raise EvalError(f"{names[0]} is not loaded; the server has {has} (with --admin-key the suite loads more)")
    there, model = {s.variant for s in chosen}, held[0].model
    wanted = [Served(f"{model}:{name}", model, name) for name in dict.fromkeys(names) if name not in there]
    return sorted([*chosen, *wanted], key=lambda s: s.variant != results.BASELINE)


class VariantLoader:
    """Use as an async context manager; leaving it drops what it loaded. `can_load`: the client has an admin key."""

    def __init__(self, client: OctavoClient, held: Sequence[Served], out: Path, can_load: bool) -> None:
        self._client = client
        self._held = {s.id: s for s in held}
        self._path = out / KEPT
        self._can_load = can_load
        variants = {s.variant for s in held}
        self._ours = [name for name in self._read() if name in variants] if can_load else []

    async def __aenter__(self) -> VariantLoader:
        return self

    async def __aexit__(self, *_: object) -> None:
        while self._ours:
            await self._drop(self._ours[0])

    async def ensure(self, wanted: Served) -> Served:
        """The variant, loaded where it was not. Raises Unavailable with the reason, and the client's errors."""
        if wanted.id not in self._held:
            if not self._can_load:
                raise Unavailable("not loaded, and without --admin-key the suite loads none")
            await self._load(wanted.variant)
            self._held |= {s.id: s for s in await served(self._client)}
        if wanted.id not in self._held:
            raise Unavailable("the server says that it has loaded it, but does not list it")
        return self._held[wanted.id]

    async def _load(self, name: str) -> None:
        while True:
            try:
                await self._client.load_variant(name)
                break
            except Conflict as e:
                if not self._ours:
                    raise Unavailable(e.message) from None
                await self._drop(self._ours[0])
            except Unauthorized as e:
                raise EvalError(f"the server takes no variants from this --admin-key: {e.message}") from None
            except NotFound:
                raise Unavailable("the server cannot load variants while it runs (it has no /v1/variants)") from None
            except APIError as e:
                raise Unavailable(e.message) from None
        self._ours.append(name)
        self._write()

    async def _drop(self, name: str) -> None:
        self._ours.remove(name)
        try:
            await self._client.drop_variant(name)
        except OctavoError as e:  # loaded.json still names it, for the next run
            print(f"octavo-eval: {name} stays loaded: {e}", file=sys.stderr)
            return
        self._held = {key: s for key, s in self._held.items() if s.variant != name}
        self._write()

    def _read(self) -> list[str]:
        if not self._path.exists():
            return []
        try:
            names = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise EvalError(f"cannot read {self._path}: {e}; delete it") from None
        return [name for name in names if isinstance(name, str)]

    def _write(self) -> None:
        if self._ours:
            results.write(self._path, json.dumps(self._ours))
        else:
            self._path.unlink(missing_ok=True)


def is_pocket(held: Sequence[Served]) -> bool:
    """Whether the server has the bundled model."""
    return all(s.root is not None and re.split(r"[/\\]", s.root)[-1] == "pocket" for s in held)
