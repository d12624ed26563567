"""Results on disk: for each (model, variant, task, method) a journal and one JSON file.

    OUT/MODEL/VARIANT/TASK-METHOD.jsonl   a heading (what was asked, of what), then a row for each item as it is done
    OUT/MODEL/VARIANT/TASK-METHOD.json    when all are done: the heading, the figures, the rows

A journal is only ever appended to, so a run that is killed loses what was in flight; a half-written last line is cut
off. A row with an "error" is asked again by the next run. The JSON file is written aside and moved into place.
"""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from client.eval.data import EvalError

JSON = dict[str, Any]
VERSION = 2
BASELINE = "bf16"
NEEDED = ("model", "variant", "task", "method", "settings", "figures", "rows")


def path(out: Path, model: str, variant: str, task: str, method: str, suffix: str) -> Path:
    """Where one of the two files is. Names become safe as file names."""
    parts = [re.sub(r"[^\w.+-]+", "--", part).strip(".-") or "unnamed" for part in (model, variant)]
    return out.joinpath(*parts, f"{task}-{method}{suffix}")


def as_read(value: JSON) -> JSON:
    """As it comes back from a file: tuples are lists."""
    found: JSON = json.loads(json.dumps(value))
    return found


class Journal:
    """The rows of one result, on disk as they come. Raises EvalError for a file of another run or a broken one."""

    def __init__(self, path: Path, heading: JSON) -> None:
        self.path = path
        self.rows: dict[str, JSON] = {}
        self._heading = as_read(heading)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = self._read()
            self._file: IO[bytes] = path.open("ab")
            if whole < self._file.tell():
                self._file.truncate(whole)
        except OSError as e:
            raise EvalError(f"cannot write {path}: {e.strerror or e}") from None
        if not whole:
            self._append(self._heading)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, row: JSON) -> None:
        """Keep a row; it must have an "id"."""
        self.rows[row["id"]] = row
        self._append(row)

    @property
    def date(self) -> str:
        """When the last row was written, ISO 8601 in UTC."""
        return datetime.fromtimestamp(self.path.stat().st_mtime, UTC).isoformat(timespec="seconds")

    def _append(self, value: JSON) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _read(self) -> int:
        """Take in what is there; the number of bytes up to the end of the last whole line."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data.rfind(b"\n") + 1
        for i, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
            try:
                value = json.loads(line)
                if i > 1:
                    self.rows[value["id"]] = value
            except (ValueError, KeyError, TypeError):
                raise EvalError(f"{self.path}:{i} is broken: delete the line, or start anew with --fresh") from None
            if i == 1 and value != self._heading:
                different = sorted(k for k in value.keys() | self._heading if value.get(k) != self._heading.get(k))
                raise EvalError(
                    f"{self.path} is of a run with other {', '.join(different)}: give another --out, or --fresh"
                )
        return whole


def write(path: Path, text: str) -> None:
    """Put `text` at `path`, whole or not at all. Raises EvalError."""
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as e:
        raise EvalError(f"cannot write {path}: {e.strerror or e}") from None


def dump(path: Path, result: JSON) -> None:
    """Write a result, its rows one a line."""
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in result["rows"])
    head = json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1, ensure_ascii=False)
    write(path, f'{head.removesuffix("}").rstrip()},\n "rows": [\n{rows}\n]}}\n')


def load(path: Path) -> JSON:
    """Read a result. Raises EvalError where it is not one."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise EvalError(f"cannot read {path}: {e.strerror or e}") from None
    except ValueError as e:
        raise EvalError(f"{path} is not whole: {e}; run the evaluation again to complete it") from None
    if not isinstance(result, dict) or any(name not in result for name in NEEDED):
        raise EvalError(f"{path} is not a result of octavo-eval")
    if result.get("version") != VERSION:
        raise EvalError(
            f"{path} is of version {result.get('version')}, not {VERSION}: run the evaluation again, with --fresh"
        )
    return result
