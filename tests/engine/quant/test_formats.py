from __future__ import annotations

import subprocess
import sys

import pytest

from engine.quant.formats import FORMATS, parse_format


def test_names_and_spellings():
    assert list(FORMATS) == ["bf16", "int8-row", "fp8-row"]
    for spelling in ("int8-row", "INT8-ROW", "INT8_Per_Row", "int8_per_row", " int8-row "):
        assert parse_format(spelling) is FORMATS["int8-row"]
    assert parse_format("FP8_Per_Row") is FORMATS["fp8-row"]
    assert parse_format("BF16") is FORMATS["bf16"]


@pytest.mark.parametrize("name", ["", "int4", "int8", "int8-row-fake", "INT8_Per_Group_128", "bf16+kv8", "x\ny"])
def test_an_unknown_name_is_told_what_is_supported(name):
    with pytest.raises(ValueError, match="supported: bf16, int8-row, fp8-row") as error:
        parse_format(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_formats_need_no_torch():
    code = "import sys, engine.quant.formats; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
