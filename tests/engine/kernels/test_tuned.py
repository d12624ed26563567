"""Tables of tuned choices: written and read back, and every kind of bad entry named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import ModelError
from engine.kernels import tuned

GOOD = {"gemv/1/4096x2048": (8192, 8, 0), "w8a8/int8/64/4096x2048": (64, 64, 256, 4, 5, 0, 1)}


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "new" / "table.json"
    tuned.write(file, "A GPU", "today", GOOD)
    assert tuned.read(file, "A GPU") == GOOD
    with pytest.raises(ModelError, match="Another"):
        tuned.read(file, "Another")


def test_keys_are_those_that_a_table_may_have() -> None:
    assert tuned.gemv_key(1, 4096, 2048) in GOOD
    assert tuned.product_key("w8a8", torch.int8, 33, 4096, 2048) in GOOD
    assert tuned.product_key("w8a8", torch.int8, 65, 4096, 2048) not in GOOD
    assert tuned.table_path("NVIDIA GeForce RTX 4090").name == "nvidia-geforce-rtx-4090.json"
    assert tuned.choices(torch.device("cpu")) == {}


@pytest.mark.parametrize(
    ("key", "numbers"),
    [
        ("gemv/3/4096x2048", [4096, 4, 6]),
        ("gemv/2/4096x0", [4096, 4, 6]),
        ("gemv/2/4096x2048", [4095, 4, 6]),
        ("gemv/2/4096x2048", [4096, 4]),
        ("gemv/2/4096x2048", [4096, 4, -1]),
        ("gemv/2/4096x2048", "4096"),
        (tuned.product_key("plain", torch.bfloat16, 257, 4096, 2048), [64, 64, 64, 4, 4, 1, 1]),
        ("plain/bfloat16/48/4096x2048", [64, 64, 64, 4, 4, 1, 1]),
        ("plain/bfloat16/64/4096x2048", [64, 64, 64, 4, 4, 2, 1]),
        ("plain/bfloat16/64/4096x2048", [64, 64, 64, 4, 4, True, 1]),
        ("plain/bfloat16/64/4096x2048", [8, 64, 64, 4, 4, 1, 1]),
        ("plain/bfloat16/64/4096x2048", [64, 64, 64, 3, 4, 1, 1]),
        ("plain/bfloat16/64/4096x2048", [64, 64, 64, 4, 9, 1, 1]),
        ("plain/bfloat16/64/4096x2048", [64, 64, 64, 4, 4, 1, 1.5]),
    ],
)
def test_bad_entries_are_named(key: str, numbers: Any, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"gpu": "A GPU", "choices": {**GOOD, key: numbers}}))
    with pytest.raises(ModelError, match="valid entry") as e:
        tuned.read(file, "A GPU")
    assert str(file) in str(e.value) and key in str(e.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"choices": []}', "{", "\x00"])
def test_a_file_that_is_no_table_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(text)
    with pytest.raises(ModelError, match=r"table\.json"):
        tuned.read(file, "A GPU")
    with pytest.raises(ModelError, match=r"none\.json"):
        tuned.read(tmp_path / "none.json", "A GPU")


def test_the_tables_that_come_along_are_valid() -> None:
    for file in tuned.FOLDER.glob("*.json"):
        gpu = json.loads(file.read_text())["gpu"]
        assert tuned.read(file, gpu) and tuned.table_path(gpu) == file
