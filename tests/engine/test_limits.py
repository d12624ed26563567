"""Limits are arithmetic: known shapes and rates give known figures; and works of a small model stay below theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import bench
from engine.benchmarks.limits import Limits, Product
from engine.benchmarks.tune import matrices
from engine.benchmarks.twins import compare
from engine.benchmarks.works import GREEDY, SAMPLED, Bench, longest, most_sequences, parse_works
from engine.config import load_model_config

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
SHAPES = [(2048, 4096), (2048, 2048), (2048, 12288), (6144, 2048)] * 28  # Qwen3-1.7B


def qwen3_on_an_h200(weight_bytes: int, rate: float, kv_bytes: int) -> Limits:
    """docs/performance.md's rates: 4,272 GB/s, 788 TFLOP/s in BF16; the head is in BF16."""
    return Limits(
        linears=[Product(k * n * weight_bytes, 2 * k * n, rate) for k, n in SHAPES],
        head=Product(151936 * 2048 * 2, 2 * 151936 * 2048, 788e12),
        kv_bytes=kv_bytes,
        attention_flops=4 * 16 * 128 * 28,
        attention_rate=788e12,
        copy=4272e9,
    )


def test_limits_of_a_known_model_on_a_known_gpu() -> None:
    bf16 = qwen3_on_an_h200(2, 788e12, 28 * 2 * 8 * 128 * 2)
    eight = qwen3_on_an_h200(1, 1500e12, 28 * 2 * 8 * 128)
    for batch, in_bf16, in_8_bits in ((1, 1240, 2100), (8, 9400, 15900), (32, 31000, 54000), (256, 89000, 164000)):
        for limits, known in ((bf16, in_bf16), (eight, in_8_bits)):
            assert batch / limits.decode_step(batch, batch * 256.5) == pytest.approx(known, rel=0.015)
    assert 32 * 2048 / bf16.prefill([2048] * 32) == pytest.approx(258_000, rel=0.01)
    assert 32 * 2048 / eight.prefill([2048] * 32) == pytest.approx(459_000, rel=0.01)


def test_a_generation_is_its_prompts_and_its_steps() -> None:
    limits = qwen3_on_an_h200(2, 788e12, 28 * 2 * 8 * 128 * 2)
    assert limits.generation([7, 5], [1, 1]) == limits.prefill([7, 5])
    steps = limits.decode_step(2, 8 + 6) + limits.decode_step(1, 9)
    assert limits.generation([7, 5], [3, 2]) == pytest.approx(limits.prefill([7, 5]) + steps)


def test_works_are_named_and_sized() -> None:
    assert parse_works("decode_b7, sampled_b2,linears") == ["decode_b7", "sampled_b2", "linears"]
    assert most_sequences(["decode_b7"]) == 256 and most_sequences(["sampled_b300", "prefill"]) == 300
    assert longest(["decode_b1"], 1) == 385 and longest(["prefill", "mixed256"], 1) == 2049


@pytest.mark.parametrize("works", ["decode", "decode_b0", "mixed", "", "prefill;linears"])
def test_unknown_works_are_refused(works: str) -> None:
    with pytest.raises(SystemExit, match="--works"):
        bench.main(["limits", str(POCKET), "--works", works])


def test_works_too_long_for_the_checkpoint_are_refused() -> None:
    with pytest.raises(SystemExit, match="--scale"):
        bench.main(["limits", str(POCKET), "--works", "mixed256,prefill", "--scale", "1", "--device", "cpu"])


def test_every_work_of_a_variant(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "limits.json"
    options = [
        "--works",
        "decode_b2,sampled_b2,prefill,mixed256,linears",
        "--scale",
        "64",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    bench.main(["limits", str(checkpoint("qwen3")), "--variants", "int8-row+kv8", *options, "--json", str(file)])
    written = json.loads(file.read_text())
    rows = [f"linears, {n} rows" for n in (1, 8, 32, 128, 256, 128)]
    figures = written["variants"]["int8-row+kv8"]
    assert [f["work"] for f in figures] == ["decode_b2", "sampled_b2", "prefill", "mixed256", *rows]
    assert all(f["measured"] > 0 and f["limit"] > 0 and f["fraction"] > 0 for f in figures)
    assert written["rates"]["copy"] > 0 and "float32" in written["rates"]["products"]
    assert "measured / limit" in capsys.readouterr().out


def test_a_slow_call_of_one_token_does_not_make_decode_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    llm: Any = SimpleNamespace(engine=SimpleNamespace(num_ids=100))
    limits: Any = SimpleNamespace(decode_step=lambda batch, tokens: 0.001)
    seconds = iter([0.0, 2.0, 1.0, 2.1, 1.8, 1.9, 1.0])  # the first once, then 257 tokens and one by turns
    bench = Bench(llm, "bf16", limits, scale=1, rounds=3)
    monkeypatch.setattr(bench, "_time", lambda inputs, outputs, sampling: (next(seconds), sum(outputs)))
    figure = bench.decode("decode_b4", 4, GREEDY)
    assert figure.measured == pytest.approx(4 * 256 / 0.9)
    assert figure.rounds == pytest.approx([4 * 256 / 1.0, 4 * 256 / 0.3, 4 * 256 / 0.9])


def test_sequences_that_end_early_do_not_make_decode_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    llm: Any = SimpleNamespace(engine=SimpleNamespace(num_ids=100))
    bench = Bench(llm, "bf16", SimpleNamespace(decode_step=lambda *_: 0.001), 1, 1)  # type: ignore[arg-type]
    answers = iter([(0.0, 8), (1.5, 4 * 257 // 2), (1.0, 4)])  # half of the tokens in 1.5 s: all would take 3
    monkeypatch.setattr(bench, "_time", lambda *_: next(answers))
    figure = bench.decode("sampled_b4", 4, SAMPLED)
    assert (figure.work, figure.measured) == ("sampled_b4", pytest.approx(4 * 256 / 2.0))


def test_selfcheck_reports_the_whole(checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--variants", "bf16,w8a8-fp8-row+kv8,int8-g64+kvint8", "--works", "decode_b2,linears", "--scale", "64"]
    bench.main(["selfcheck", str(checkpoint("qwen2")), *options, "--device", "cpu"])
    report = capsys.readouterr().out
    assert "no kernel of a GPU was run" in report and "KV pool" in report and "FAILED" not in report
    assert "84 of 84 comparisons within bounds" in report
    assert report.count("| decode_b2 |") == 3 and report.count("linears, 8 rows") == 3
    assert "0 kernels compiled before ready, 0 after." in report


def test_a_comparison_knows_wrong_numbers() -> None:
    right = torch.randn(30, 40)
    assert compare("", right.bfloat16(), right, torch.bfloat16).passed
    one_row_missing = right.clone()
    one_row_missing[7] = 0
    for wrong in (one_row_missing, right * 1.02, right.roll(1), right * torch.nan):
        assert not compare("", wrong, right, torch.bfloat16).passed


def test_tuning_needs_a_gpu() -> None:
    with pytest.raises(SystemExit, match="GPU"):
        bench.main(["tune", str(POCKET), "--device", "cpu"])


def test_tuning_covers_every_matrix_of_a_model() -> None:
    assert matrices(load_model_config(POCKET)) == [(2048, 512), (512, 1024), (1024, 512), (512, 512), (4096, 512)]
