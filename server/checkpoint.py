"""Finds the folder of a model and checks, without torch and without reading weights, that it can be served.

A MODEL is a local folder or a hub id ("Qwen/Qwen3-1.7B"). Hub files come through huggingface_hub, which honours
HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE; only JSON, safetensors and template files are taken, never code or pickles.
What the hub gives can be incomplete without an error, and what is on a disk can be cut short, so both are checked the
same: configuration, tokenizer, every shard of the index, and each shard's header against its size.

The safetensors layout: 8 bytes of header length (little-endian), a JSON header that gives each tensor's dtype, shape
and [begin, end) in the data that follows (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from engine.config import ModelError, load_json, load_model_config

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit

_SIDE_FILES = ["*.json", "*.jinja", "merges.txt", "vocab.txt"]
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16, "I16": 16, "U16": 16}
_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8}


def resolve_model(model: str, load_format: str) -> Path:
    """The local folder of MODEL, fetched from the hub when it is not one.

    With load_format "dummy" no weights are fetched. Raises ModelError with one line for the user.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{model} is a file; a model is a folder with config.json, tokenizer.json and safetensors")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        raise ModelError(f"model folder {model} does not exist")
    if folder.parent.is_dir():
        raise ModelError(
            f"model folder {model} does not exist (not sought on the hub: {folder.parent} is a folder here)"
        )
    return _fetch(model, load_format)


def _fetch(model: str, load_format: str) -> Path:
    # Imported late: it costs half a second, and reads its environment at import.
    import httpx
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    patterns = _SIDE_FILES if load_format == "dummy" else [*_SIDE_FILES, "*.safetensors"]
    where = f"at {constants.ENDPOINT}"
    try:
        # "*" matches "/" too: files in subfolders belong to other uses of the checkpoint.
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except GatedRepoError:
        raise ModelError(f"{model} {where} is gated: accept its terms there and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ModelError(f"{model} is neither a local folder nor a model {where} that may be read") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the hub {where} cannot be reached"
        raise ModelError(f"{model} is neither a local folder nor in the hub's cache, and {why}") from None
    except (HFValidationError, httpx.HTTPError, OSError) as e:
        raise ModelError(f"cannot fetch {model}: {' '.join(str(e).split())}") from None


def check_checkpoint(folder: Path, load_format: str) -> None:
    """Raise ModelError unless `folder` has what serving needs: a supported configuration, a tokenizer, whole weights.

    Only headers are read: milliseconds, whatever the size. With load_format "dummy" weights may be absent.
    """
    load_model_config(folder)
    load_json(folder / "tokenizer.json")
    if load_format == "dummy":
        return
    for shard, expected in _shards(folder).items():
        missing = expected - _tensor_names(shard)
        if missing:
            raise ModelError(f"{shard} lacks {min(missing)}, which {INDEX} says it holds")


def _shards(folder: Path) -> dict[Path, set[str]]:
    """Each weight file with the tensors that the index says it holds (none without an index)."""
    if not (folder / INDEX).exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder} has no *.safetensors weights; other formats are not read")
        return {file: set() for file in files}
    weight_map = load_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX} has no weight_map")
    shards: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{folder / INDEX}: {name!r} is not the name of a file beside it")
        shards.setdefault(folder / name, set()).add(tensor)
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise ModelError(f"{folder} lacks {len(absent)} of {len(shards)} weight files, such as {absent[0]}")
    return shards


def _tensor_names(file: Path) -> set[str]:
    """Names of the tensors in a safetensors file whose header agrees with itself and with the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ModelError(f"{file} is cut short or not safetensors: its header does not fit its {size} bytes")
            header = json.loads(f.read(length))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise ModelError(f"{file} has an unreadable safetensors header: {e}") from None
    if not isinstance(header, dict):
        raise ModelError(f"{file} has an unreadable safetensors header: not an object")
    header.pop("__metadata__", None)
    end = 0
    for begin, stop, name in sorted(_span(file, name, entry) for name, entry in header.items()):
        if begin != end:
            raise ModelError(f"{file}: {name} begins at byte {begin}, where the tensor before it ends at {end}")
        end = stop
    if size != 8 + length + end:
        what = "is cut short" if size < 8 + length + end else "has bytes too many"
        raise ModelError(f"{file} {what}: it has {size} bytes, its header asks for {8 + length + end}")
    return set(header)


def _span(file: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """A tensor's (begin, end, name), checked against its dtype and shape."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in _BITS:
        raise ModelError(f"{file}: {name} has dtype {dtype!r}, which is not supported")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ModelError(f"{file}: {name} has no valid shape and data_offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * _BITS[dtype] // 8:
        raise ModelError(f"{file}: {name} of shape {shape} in {dtype} does not fill bytes {begin} to {end}")
    return begin, end, name


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
