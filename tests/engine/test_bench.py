"""`octavo-bench`: both commands, run as the console script runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import bench
from engine.matmul_error import STUDY

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"


def test_element_wise_errors_are_the_studys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One scale a tensor fits the study's figures; smaller groups err less; a product has both its own figures."""
    file = tmp_path / "errors.json"
    bench.main(["matmul-error", "--shapes", "16x512,100x1024", "--seeds", "3", "--json", str(file)])
    printed = capsys.readouterr().out
    found = {(tuple(r["shape"]), r["error"], r["granularity"]): r for r in json.loads(file.read_text())["rows"]}
    for shape in ((16, 512), (100, 1024)):
        int8, fp8 = STUDY[shape]
        assert f"{int8:.6f}" in printed and f"{fp8:.6f}" in printed
        row = found[shape, "element", "tensor"]
        assert row["int8"][0] == pytest.approx(int8, rel=0.1) and row["fp8"][0] == pytest.approx(fp8, rel=0.02)
        for error in ("element", "product"):
            for stored in ("int8", "fp8"):
                order = [found[shape, error, g][stored][0] for g in ("g64", "g128", "g256", "g512", "tensor")]
                # FP8's steps are relative: how many share a scale hardly matters, and not in this order for certain.
                assert order == sorted(order) if stored == "int8" else order[0] < order[-1]
        weights, both = found[shape, "product", "row"], found[shape, "product, 8-bit activations", "row"]
        assert weights["int8"][0] < both["int8"][0] and weights["fp8"][0] < both["fp8"][0]
        assert found[shape, "element", "block"]["int8"] is None


def test_errors_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'octavo[plot]'")
    file = tmp_path / "errors.png"
    bench.main(["matmul-error", "--shapes", "3x70", "--seeds", "1", "--plot", str(file)])
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("shapes", ["16", "16x", "0x4", "x", "16x512,", "1e3x4"])
def test_a_shape_that_is_none_is_refused(shapes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["matmul-error", "--shapes", shapes])
    assert "is not ROWSxCOLUMNS" in capsys.readouterr().err


def test_throughput_of_two_variants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speed.json"
    sizes = ["--batch", "2", "--input-tokens", "5", "--output-tokens", "3", "--rounds", "2", "--threads", "1"]
    bench.main(["throughput", str(POCKET), "--variants", "bf16,int8-g128", *sizes, "--json", str(file)])
    written = json.loads(file.read_text())
    assert [r["name"] for r in written["results"]] == ["octavo bf16", "octavo int8-g128"]
    assert all(len(r["seconds"]) == 2 and r["best_tok_s"] > 0 for r in written["results"])
    for speeds in written["phases"].values():
        assert all(v > 0 for v in speeds.values())
        assert speeds["prefill_tok_s"] == pytest.approx(5 * speeds["prefill_samples_s"])
    assert written["settings"]["batch"] == 2 and "octavo int8-g128" in capsys.readouterr().out
