"""Tables of tuned choices: written and read back, and every kind of bad entry named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.benchmarks import tune
from engine.config import ModelError
from engine.kernels import chip, matmul, tuned
from engine.kernels.tiles import Tile, one_turn

GOOD = {
    "gemv/1/4096x2048": (8192, 8, 0),
    "gemv-g128/1/4096x2048": (8192, 8, 0),
    "w8a8/int8/64/4096x2048": (64, 64, 256, 4, 5, 0, 1),
    "digits-g128/int8/64/4096x2048": (64, 64, 128, 4, 12, tuned.BULK, 3),
    "plain/bfloat16/256/4096x2048": tuned.NOT_OURS,
    "gated/bfloat16/256/4096x2048": tuned.NOT_OURS,
}


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "new" / "table.json"
    tuned.write(file, "A GPU", "today", GOOD)
    assert tuned.read(file, "A GPU") == GOOD
    with pytest.raises(ModelError, match="Another"):
        tuned.read(file, "Another")


def test_numbers_stand_for_tiles() -> None:
    assert tuned.tile(GOOD["w8a8/int8/64/4096x2048"]) == (Tile(64, 64, 256, 4, 5, weight_left=False), 1)
    assert tuned.tile((64, 64, 256, 4, 5, 1, 3)) == (Tile(64, 64, 256, 4, 5), 3)
    assert tuned.tile((64, 64, 256, 4, 5, tuned.BULK, 2)) == (Tile(64, 64, 256, 4, 5, bulk=True), 2)


def test_keys_are_those_that_a_table_may_have() -> None:
    assert tuned.gemv_key(1, 4096, 2048) in GOOD and tuned.gemv_key(1, 4096, 2048, group_size=128) in GOOD
    assert tuned.product_key("w8a8", torch.int8, 33, 4096, 2048) in GOOD
    assert tuned.product_key("w8a8", torch.int8, 65, 4096, 2048) not in GOOD
    assert tuned.product_key("digits", torch.int8, 33, 4096, 2048, group_size=128) in GOOD
    assert tuned.product_key("digits", torch.int8, 33, 4096, 2048, group_size=64) not in GOOD
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
        ("gemv/2/4096x2048", []),
        ("w8a8/int8/64/4096x2048", []),
        ("gated/float8_e4m3fn/64/4096x2048", []),
        (tuned.product_key("plain", torch.bfloat16, 513, 4096, 2048), [64, 64, 64, 4, 4, 1, 1]),
        ("plain/bfloat16/48/4096x2048", [64, 64, 64, 4, 4, 1, 1]),
        ("plain/bfloat16/64/4096x2048", [64, 64, 64, 4, 4, 3, 1]),
        ("plain/bfloat16/64/4096x2048", [64, 64, 64, 2, 4, 2, 1]),
        ("gated/bfloat16/64/4096x2048", [64, 64, 64, 4, 4, 1, 1]),
        ("gated/bfloat16/64/4096x2048", [64, 64, 64, 4, 4, 2, 2]),
        ("plain/bfloat16/64/4096x2048", [64, 64, 64, 4, 4, True, 1]),
        ("plain/bfloat16/64/4096x2048", [8, 64, 64, 4, 4, 1, 1]),
        ("plain/bfloat16/64/4096x2048", [64, 64, 64, 3, 4, 1, 1]),
        ("plain/bfloat16/64/4096x2048", [64, 64, 64, 4, 9, 1, 1]),
        ("plain/bfloat16/64/4096x2048", [64, 64, 64, 4, 4, 1, 1.5]),
        ("plain-g128/bfloat16/64/4096x2048", [64, 64, 64, 4, 4, 2, 1]),
        ("digits-g96/int8/64/4096x2048", [64, 64, 128, 4, 4, 2, 1]),
        ("digits-g128/int8/64/4096x2048", [64, 64, 128, 4, 4, 1, 1]),
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


# Qwen3-1.7B on a chip with 132 multiprocessors and 227 KiB for a program
@pytest.mark.parametrize("shape", [(4096, 2048), (2048, 2048), (12288, 2048), (2048, 6144)])
@pytest.mark.parametrize(("kind", "dtype"), [("plain", torch.bfloat16), ("w8a8", torch.int8)])
def test_few_rows_are_tried_in_small_tiles_that_fit(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    for rows in (16, 32):
        case = tune.Case(kind, dtype, rows, *shape)
        small = list(tune.few_row_choices(case, 132, 227 << 10))
        assert 15 <= len(small) <= 60 and len(set(small)) == len(small)
        assert {choice[1] for choice in small} >= {16, 32}
        for block_m, block_n, block_k, _, num_stages, left, splits in small:
            assert block_m == rows and left == 1 and shape[1] // splits >= block_k * (num_stages - 1)
            assert num_stages * (block_m + block_n) * block_k * dtype.itemsize <= 227 << 10
        choices = tune.product_choices(case, 132, 227 << 10)
        assert set(small) <= set(choices) and len(set(choices)) == len(choices)
        assert all(tuned.valid(case.key, list(choice)) for choice in choices)
    more = tune.product_choices(tune.Case(kind, dtype, 64, *shape), 132, 227 << 10)
    assert all(choice[1] >= 32 for choice in more)  # the known tiles alone


@pytest.mark.parametrize("shape", [(4096, 2048), (2048, 2048), (12288, 2048), (2048, 6144)])
def test_bulk_tiles_are_tried_that_fit(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for kind, dtype, rows in (
        ("plain", torch.bfloat16, 16),
        ("gated", torch.bfloat16, 256),
        ("gated", torch.int8, 64),
        ("w8a8", torch.int8, 128),
        ("digits", torch.float8_e4m3fn, 512),
        ("digits-g128", torch.int8, 256),
        ("w8a8-g128", torch.float8_e4m3fn, 64),
    ):
        case = tune.Case(kind, dtype, rows, *shape)
        found = tune.bulk_choices(case, 132, 227 << 10)
        assert 4 <= len(found) <= 200 and len(set(found)) == len(found)
        assert all(tuned.valid(case.key, list(choice)) for choice in found)
        gates = 2 if kind == "gated" else 1
        for block_m, block_n, block_k, _, num_stages, _, _ in found:
            assert num_stages * (block_m + gates * block_n) * block_k * dtype.itemsize < 227 << 10
            assert rows // 8 <= block_m <= rows
            assert block_k == 128 or not case.group_size
        assert not any(choice[5:6] == (tuned.BULK,) for choice in tune.choices_of(case, cpu)) or kind == "gated"
    monkeypatch.setattr(chip, "capability", lambda device: (9, 0))
    assert matmul.takes_bulk(cpu, torch.bfloat16, *shape) and not matmul.takes_bulk(cpu, torch.float32, *shape)
    assert not matmul.takes_bulk(cpu, torch.int8, 2044, 2048) and not matmul.takes_bulk(cpu, torch.int8, 2048, 2040)
    case = tune.Case("plain", torch.bfloat16, 64, *shape)
    assert {choice[5] for choice in tune.choices_of(case, cpu) if choice} == {0, 1, tuned.BULK}
    wide = [tune.choices_of(tune.Case(kind, torch.bfloat16, 64, *shape), cpu) for kind in ("plain", "gated")]
    assert all(choices.count(tuned.NOT_OURS) == 1 for choices in wide)
    assert tuned.NOT_OURS not in tune.choices_of(tune.Case("gated", torch.int8, 64, *shape), cpu)
    grouped = {c.key for c in tune.cases([shape], ["w8a8-g128", "digits-g128"], [512], cpu)}
    size = f"{shape[0]}x{shape[1]}"
    assert grouped == {f"digits-g128/{dtype}/512/{size}" for dtype in ("int8", "float8_e4m3fn")}
    of_a_model = list(tune.cases([shape], ["plain", "gated"], [16, 256, 512], cpu, 2048, 6144))
    kinds = [c.kind for c in of_a_model]
    assert all(c.added == (shape[0] == 2048) for c in of_a_model)
    assert kinds.count("plain") == 2 and kinds.count("gated") == 3 * 2 * (shape == (12288, 2048))


def test_a_table_leaves_products_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(100, 64).bfloat16(), torch.randn(128, 64).bfloat16()
    table: tuned.Choices = {}
    launched: list[bool] = []

    def launch(x: torch.Tensor, *rest: object, gated: bool = False, **more: object) -> torch.Tensor:
        launched.append(gated)
        return x

    monkeypatch.setattr(tuned, "choices", lambda device: table)
    monkeypatch.setattr(matmul, "multiply", launch)
    monkeypatch.setattr(chip, "capability", lambda device: (9, 0))
    monkeypatch.setattr(chip, "num_sms", lambda device: 132)
    assert one_turn(100, 64, 132) is None
    assert matmul.linear(x, weight) is x and matmul.gated(x, weight) is x and launched == [False, True]
    table["plain/bfloat16/128/128x64"] = tuned.NOT_OURS
    assert torch.equal(matmul.linear(x, weight), torch.nn.functional.linear(x, weight))
    assert matmul.gated(x, weight) is x and launched == [False, True, True]
    table["gated/bfloat16/128/128x64"] = tuned.NOT_OURS
    assert matmul.gated(x, weight) is None and matmul.linear(x[:60], weight).shape == (60, 64)
    assert launched == [False, True, True, False]


def test_of_more_than_128_rows_the_library_multiplies_what_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the table says otherwise."""
    table: tuned.Choices = {}
    monkeypatch.setattr(tuned, "choices", lambda device: table)
    monkeypatch.setattr(matmul, "multiply", lambda *rest, **more: "ours")
    monkeypatch.setattr(matmul, "_by_library", lambda *rest: "the library's")
    monkeypatch.setattr(matmul, "_halves", lambda *rest: "its halves")
    monkeypatch.setattr(chip, "capability", lambda device: (9, 0))
    monkeypatch.setattr(chip, "num_sms", lambda device: 132)
    narrow, wide = torch.zeros(66 * 64, 64).bfloat16(), torch.zeros(67 * 64, 64).bfloat16()
    x = torch.zeros(200, 64).bfloat16()
    assert matmul.linear(x, narrow) == matmul.linear(x[:128], wide) == "ours"
    assert matmul.linear(x, wide) == "the library's"
    table["plain/bfloat16/256/4288x64"] = table["gated/bfloat16/256/60000x64"] = (128, 64, 64, 4, 4, 2, 1)
    assert matmul.linear(x, wide) == "ours"
    deep = torch.zeros(64, 128).bfloat16()
    assert matmul.linear(x.view(100, 128), deep) == "ours"
    many = x.view(100, 128).repeat(2, 1)
    assert matmul.linear(many, deep) == matmul.linear(many, deep, many[0], planes=True) == "the library's"
    assert matmul.linear(many, deep, planes=True) == "its halves"
    assert matmul.linear(many.repeat(2, 1), deep, planes=True) == "the library's"
    very_wide = torch.zeros(60000, 64).bfloat16()
    assert matmul.gated(x, very_wide) == matmul.gated(x[:128], very_wide) == "ours"
    del table["gated/bfloat16/256/60000x64"]
    assert matmul.gated(x, very_wide) is None


def test_tuning_is_restricted_to_what_is_asked_for() -> None:
    assert tune.restricted("--rows", "32, 16,32", ["16", "32", "64"]) == ["32", "16"]
    assert tune.restricted("--shapes", "", ["2x3", "4x5"]) == ["2x3", "4x5"]
    with pytest.raises(SystemExit, match=r"--rows: unknown 8; known: 16, 32"):
        tune.restricted("--rows", "8", ["16", "32"])
    cpu = torch.device("cpu")
    assert [c.key for c in tune.cases([(64, 32), (1 << 17, 32)], ["gemv", "plain"], [16, 64], cpu)] == [
        "gemv/2/64x32",
        "plain/bfloat16/16/64x32",
        "gemv/1/64x32",
        "gemv/2/131072x32",
        "gemv/1/131072x32",
    ]


def test_every_version_is_compiled_once_in_processes(capsys: pytest.CaptureFixture[str]) -> None:
    """Here, where nothing can be compiled, each fails, which is no matter."""
    cpu = torch.device("cpu")
    tune.compile_all(tune.cases([(64, 512), (32, 512)], ["w8a8"], [64], cpu), cpu)
    known = {c[:6] for c in tune.product_choices(tune.Case("w8a8", torch.int8, 64, 64, 512), 1, 99 << 10)}
    assert f"compiled {len(known)} of {len(known)} versions" in capsys.readouterr().out
