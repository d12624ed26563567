"""A checkpoint's tensors, one at a time: from safetensors (sharded or not), or random ones made from a config.

A checkpoint may be quantised already as Qwen's own FP8 ones are: `NAME.weight` in float8_e4m3fn, and beside it
`NAME.weight_scale_inv`, a number for each 128 x 128 of it that the stored values are multiplied by.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import ModelConfig, ModelError, load_json
from engine.quant.formats import BLOCK
from engine.quant.quantize import dequantize

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_FLOATS |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
SCALE_SUFFIX = "_scale_inv"


@dataclass(frozen=True)
class Blocks:
    """A matrix that the checkpoint holds in 8 bits: qdata [N, K] float8_e4m3fn, scale [N, ceil(K / 128)] fp32, a
    block's repeated for each of its outputs.
    """

    qdata: Tensor
    scale: Tensor

    def dequantized(self) -> Tensor:
        """[N, K] fp32, exactly what is stored."""
        return dequantize(self.qdata, self.scale, BLOCK, torch.float32)

    def to(self, device: torch.device) -> Blocks:
        return Blocks(self.qdata.to(device), self.scale.to(device))

    def is_finite(self) -> bool:
        """No code is NaN (e4m3fn has no infinity), and every scale is a number."""
        codes = self.qdata.view(torch.uint8) & 0x7F
        return bool((codes != 0x7F).all()) and bool(self.scale.isfinite().all())


class SafetensorsCheckpoint:
    """Reads tensors by name, as stored, onto the CPU. Only safetensors: nothing in a checkpoint is ever executed.
    shapes_only: from the headers alone, onto the meta device.

    Raises ModelError, in one line, for files that are missing, truncated or lack a tensor.
    """

    def __init__(self, folder: str | Path, shapes_only: bool = False) -> None:
        self.folder = Path(folder)
        self.shapes_only = shapes_only
        self._open: dict[str, Any] = {}
        if (self.folder / INDEX).exists():
            weight_map = load_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelError(f"{self.folder / INDEX} has no weight_map")
            self.files: dict[str, str] = weight_map
        elif (self.folder / SINGLE).exists():
            self.files = dict.fromkeys(self._names(SINGLE), SINGLE)
        else:
            raise ModelError(f"{self.folder} has neither {SINGLE} nor {INDEX}")

    def __enter__(self) -> SafetensorsCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._open.clear()

    def _names(self, file: str) -> list[str]:
        return list(self._file(file).keys())

    def _file(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = self._map(file)
        return self._open[file]

    def _map(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt", device="cpu")
        except FileNotFoundError:
            raise ModelError(f"{self.folder} lacks {file}, which {INDEX} names") from None
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{self.folder / file} is not a whole safetensors file: {e}") from None

    def __contains__(self, name: str) -> bool:
        return name in self.files

    @property
    def holds_blocks(self) -> bool:
        """Whether any matrix is in 8 bits."""
        return any(name.endswith(SCALE_SUFFIX) for name in self.files)

    def load(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor called `name`, which must have this shape and a floating dtype of at least 16 bits."""
        tensor = self._read(name, shape)
        if tensor.itemsize == 1:
            raise ModelError(f"{self.folder}: {name} is {tensor.dtype}, but there is no {name + SCALE_SUFFIX}")
        return tensor

    def load_blocks(self, name: str, shape: tuple[int, int]) -> Blocks | None:
        """The matrix called `name`, which must have this shape; None if it is not in 8 bits."""
        if name + SCALE_SUFFIX not in self.files:
            return None
        qdata = self._read(name, shape)
        if qdata.dtype != torch.float8_e4m3fn:
            raise ModelError(f"{self.folder}: {name} is {qdata.dtype}, but there is {name + SCALE_SUFFIX} to it")
        scale = self.load(name + SCALE_SUFFIX, (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK)))
        return Blocks(qdata, scale.float().repeat_interleave(BLOCK, dim=0)[: shape[0]].contiguous())

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.files:
            raise ModelError(f"{self.folder} has no tensor {name}")
        try:
            header = self._file(self.files[name]).get_slice(name)
            dtype, found = header.get_dtype(), tuple(header.get_shape())
            if found != shape or dtype not in _FLOATS:
                raise ModelError(f"{self.folder}: {name} is {dtype} {list(found)}, the config asks for {list(shape)}")
            if self.shapes_only:
                return torch.empty(shape, dtype=_FLOATS[dtype], device="meta")
            # opened anew: a mapping lives as long as its tensors do, and keeps what was read from it in memory
            tensor: Tensor = self._map(self.files[name]).get_tensor(name)
        except SafetensorError as e:
            raise ModelError(f"{self.folder / self.files[name]}: cannot read {name}: {e}") from None
        return tensor

    def identity(self) -> bytes:
        """SHA-256 over the config and every file's name, size and safetensors header: seeds the prefix hashes."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in sorted(set(self.files.values())):
            path = self.folder / file
            with path.open("rb") as f:
                header = f.read(int.from_bytes(f.read(8), "little"))
            digest.update(f"{file} {path.stat().st_size} {path.stat().st_mtime_ns}".encode() + header)
        return digest.digest()


class DummyCheckpoint:
    """Random weights of the right shapes, for benchmarks: normal with deviation 0.02, norms 1, biases 0; seeded by
    name. On the meta device, shapes alone.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device

    def __enter__(self) -> DummyCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        pass

    holds_blocks = False

    def __contains__(self, name: str) -> bool:
        return name != "lm_head.weight" or not self.config.tie_word_embeddings

    def load_blocks(self, name: str, shape: tuple[int, int]) -> Blocks | None:
        return None

    def load(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device) * 0.02

    def identity(self) -> bytes:
        return hashlib.sha256(b"dummy" + repr(self.config).encode()).digest()


Checkpoint = SafetensorsCheckpoint | DummyCheckpoint


def open_checkpoint(
    folder: str | Path, load_format: str, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Checkpoint:
    """The checkpoint that `EngineConfig.load_format` names, for `device`: the meta device wants shapes alone. dtype: of
    dummies.
    """
    if load_format == "dummy":
        return DummyCheckpoint(config, dtype, device)
    return SafetensorsCheckpoint(folder, shapes_only=device.type == "meta")


def count_token_ids(folder: str | Path) -> int | None:
    """Ids that the folder's tokenizer knows (its greatest id + 1); None where there is no tokenizer.json."""
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        vocab = raw["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        return 1 + max(ids + [token["id"] for token in raw.get("added_tokens", [])])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ModelError(f"cannot read {path}: {type(e).__name__}: {e}") from None
