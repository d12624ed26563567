from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from engine.quant.formats import FORMATS, MATRICES, kept_matrices, parse_format

GRANULARITIES = ["tensor", "row", "g64", "g128", "g256", "g512"]


def test_the_formats_are_all_there():
    weight_only = [f"{dtype}-{g}" for dtype in ("int8", "fp8") for g in GRANULARITIES]
    w8a8 = ["w8a8-int8-row", "w8a8-fp8-row", "w8a8-fp8-tensor", "w8a8-fp8-block"]
    smooth = ["w8a8-int8-row-smooth", "w8a8-fp8-row-smooth"]
    assert list(FORMATS) == ["bf16", *weight_only, *(f"{f}-fake" for f in weight_only), *w8a8, *smooth]
    assert all(f.name == name for name, f in FORMATS.items())


def test_names_and_spellings():
    for spelling in ("int8-row", "INT8-ROW", "INT8_Per_Row", "int8_per_row", " int8-row "):
        assert parse_format(spelling) is FORMATS["int8-row"]
    studys = {
        "FP8_Per_Row": "fp8-row",
        "BF16": "bf16",
        "INT8_Per_Tensor": "int8-tensor",
        "FP8_Per_Group_128": "fp8-g128",
        "INT8_Per_Group_512": "int8-g512",
        "INT8_Per_Tensor_Fake": "int8-tensor-fake",
        "FP8_Per_Group_64_Fake": "fp8-g64-fake",
        "W8A8_FP8_Per_Row": "w8a8-fp8-row",
        "w8a8_int8_row": "w8a8-int8-row",
        "W8A8_INT8_Per_Row_Smooth": "w8a8-int8-row-smooth",
    }
    for spelling, name in studys.items():
        assert parse_format(spelling) is FORMATS[name]


@pytest.mark.parametrize("name", ["", "int4", "int8", "int8-g32", "INT8_Per_Group_100", "bf16-fake", "x\ny"])
def test_an_unknown_name_is_told_what_is_supported(name):
    with pytest.raises(ValueError, match="supported: bf16, int8-tensor, int8-row, int8-g64") as error:
        parse_format(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_any_format_takes_an_8_bit_cache():
    for name, plain in FORMATS.items():
        for suffix, dtype in (("+kv8", "float8_e4m3fn"), ("+kvint8", "int8")):
            fmt = parse_format(name.upper() + suffix.upper())
            assert fmt == replace(plain, name=name + suffix, kv=dtype)
            assert fmt.stored == plain.stored
    assert parse_format("FP8_Per_Group_128+kvint8").name == "fp8-g128+kvint8"
    for name in ("bf16+", "bf16+kv", "bf16+fp8", "+kv8", "kv8", "bf16+kv8+kvint8", "bf16 + kv8"):
        with pytest.raises(ValueError, match=r"supported: bf16.* each also with \+kv8 or \+kvint8"):
            parse_format(name)


def test_what_shares_a_scale_and_what_shares_bytes():
    sizes = {f.granularity: f.group_size for f in FORMATS.values()}
    assert sizes == {None: 0, "tensor": 0, "row": 0, "g64": 64, "g128": 128, "g256": 256, "g512": 512, "block": 128}
    assert FORMATS["int8-row"].stored == FORMATS["w8a8-int8-row"].stored
    assert FORMATS["fp8-tensor"].stored == FORMATS["w8a8-fp8-tensor"].stored
    shared = ("w8a8-int8-row", "w8a8-fp8-row", "w8a8-fp8-tensor")
    apart = [f.stored for n, f in FORMATS.items() if n not in shared]
    assert len(set(apart)) == len(apart)


def test_matrices_to_keep_are_named_by_kind_layer_or_pattern():
    assert kept_matrices([], 2) == set()
    assert kept_matrices(["lm_head"], 2) == {"lm_head"}
    assert kept_matrices(["down_proj", "lm_head"], 2) == {"lm_head", "layers.0.down_proj", "layers.1.down_proj"}
    assert kept_matrices(["layers.1.o_proj"], 2) == {"layers.1.o_proj"}
    assert kept_matrices(["layers.0.*"], 11) == {f"layers.0.{name}" for name in MATRICES}
    assert kept_matrices(["layers.1?.qkv_proj"], 12) == {"layers.10.qkv_proj", "layers.11.qkv_proj"}
    assert len(kept_matrices(["*"], 3)) == 13


@pytest.mark.parametrize("pattern", ["q_proj", "layers.2.o_proj", "LM_HEAD", "", "model.layers.0.down_proj", "norm"])
def test_a_name_of_no_matrix_is_told_the_names(pattern):
    with pytest.raises(ValueError, match=r"names: lm_head, qkv_proj, o_proj, .* to layers\.1\.down_proj") as error:
        kept_matrices(["lm_head", pattern], 2)
    assert repr(pattern) in str(error.value)


def test_formats_need_no_torch():
    code = "import sys, engine.quant.formats; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
