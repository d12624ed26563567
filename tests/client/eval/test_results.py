"""Journals and results on disk: nothing is lost, nothing half-written is believed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client.eval.data import EvalError
from client.eval.results import VERSION, Journal, dump, load, path, write

HEADING = {"version": VERSION, "settings": {"limit": None, "letters": ("a",)}}


def test_names_are_safe() -> None:
    out = Path("out")
    assert path(out, "Qwen/Qwen3-1.7B", "int8-g128+kv8", "mmlu", "direct", ".json") == Path(
        "out/Qwen--Qwen3-1.7B/int8-g128+kv8/mmlu-direct.json"
    )
    assert path(out, "../..", "a b", "mmlu", "direct", ".jsonl") == Path("out/unnamed/a--b/mmlu-direct.jsonl")


def test_a_journal_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "m" / "bf16" / "mmlu-direct.jsonl"
    with Journal(path, HEADING) as journal:
        journal.add({"id": "a/0", "picked": 1})
        journal.add({"id": "a/1", "error": "500"})
    with path.open("ab") as file:
        file.write(b'{"id": "a/2", "pick')  # killed while writing
    with Journal(path, HEADING) as journal:
        assert journal.rows == {"a/0": {"id": "a/0", "picked": 1}, "a/1": {"id": "a/1", "error": "500"}}
        journal.add({"id": "a/1", "picked": 2})
    with Journal(path, HEADING) as journal:
        assert journal.rows["a/1"] == {"id": "a/1", "picked": 2}
        assert journal.date.endswith("+00:00")
    assert len(path.read_bytes().splitlines()) == 4


def test_a_half_written_heading_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"version"')
    with Journal(path, HEADING) as journal:
        journal.add({"id": "é"})
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == [
        json.loads(json.dumps(HEADING)),
        {"id": "é"},
    ]


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    Journal(path, HEADING).__exit__(None, None, None)
    with pytest.raises(EvalError, match="other settings: give another --out, or --fresh"):
        Journal(path, HEADING | {"settings": {}})
    for broken in (b"{}}\n", b"[]\n", b'{"picked": 1}\n'):
        path.write_bytes(json.dumps(HEADING).encode() + b"\n" + broken)
        with pytest.raises(EvalError, match=r"j\.jsonl:2 is broken"):
            Journal(path, HEADING)
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match="cannot write"):
        Journal(tmp_path / "file" / "j.jsonl", HEADING)
    with pytest.raises(EvalError, match="cannot write"):
        write(tmp_path / "file" / "r.json", "")


def test_results(tmp_path: Path) -> None:
    result = {"version": VERSION, "model": "m", "variant": "v", "task": "mmlu", "method": "direct", "settings": {}}
    result |= {"figures": {"n": 2}, "rows": [{"id": "0"}, {"id": "é"}]}
    path = tmp_path / "r.json"
    dump(path, result)
    assert load(path) == result and path.read_text(encoding="utf-8").count("\n") > len(result)
    whole = path.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "is not whole"),
        (b"[1]", "is not a result"),
        (b'{"model": "m"}', "is not a result"),
        (whole.replace(b'"version": 2', b'"version": 1'), "is of version 1, not 2"),
    ):
        path.write_bytes(content)
        with pytest.raises(EvalError, match=message):
            load(path)
    with pytest.raises(EvalError, match="cannot read"):
        load(tmp_path / "none.json")
