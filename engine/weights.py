"""A checkpoint's tensors, one at a time: from safetensors (sharded or not), or random ones made from a config."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import ModelConfig, ModelError, load_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class SafetensorsCheckpoint:
    """Reads tensors by name, as stored, onto the CPU. Only safetensors: nothing in a checkpoint is ever executed.

    Raises ModelError, in one line, for files that are missing, truncated or lack a tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
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

    def load(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor called `name`, which must have this shape and a floating dtype."""
        self.shape(name, shape)
        try:
            # opened anew: a mapping lives as long as its tensors do, and keeps what was read from it in memory
            tensor: Tensor = self._map(self.files[name]).get_tensor(name)
        except SafetensorError as e:
            raise ModelError(f"{self.folder / self.files[name]}: cannot read {name}: {e}") from None
        return tensor

    def shape(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """As `load`, from the file's header alone: a tensor on the meta device."""
        if name not in self.files:
            raise ModelError(f"{self.folder} has no tensor {name}")
        try:
            header = self._file(self.files[name]).get_slice(name)
        except SafetensorError as e:
            raise ModelError(f"{self.folder / self.files[name]}: cannot read {name}: {e}") from None
        dtype, found = header.get_dtype(), tuple(header.get_shape())
        if found != shape or dtype not in _FLOATS:
            raise ModelError(f"{self.folder}: {name} is {dtype} {list(found)}, the config asks for {list(shape)}")
        return torch.empty(shape, dtype=_FLOATS[dtype], device="meta")

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
    name.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device

    def __enter__(self) -> DummyCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def __contains__(self, name: str) -> bool:
        return name != "lm_head.weight" or not self.config.tie_word_embeddings

    def load(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device) * 0.02

    def shape(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """As `load`, but on the meta device."""
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def identity(self) -> bytes:
        return hashlib.sha256(b"dummy" + repr(self.config).encode()).digest()


class ShapeCheckpoint:
    """Another checkpoint's tensors as shapes on the meta device: what would be loaded, without reading any of it."""

    def __init__(self, whole: SafetensorsCheckpoint | DummyCheckpoint) -> None:
        self.whole = whole

    def __contains__(self, name: str) -> bool:
        return name in self.whole

    def load(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.whole.shape(name, shape)

    def identity(self) -> bytes:
        return self.whole.identity()


Checkpoint = SafetensorsCheckpoint | DummyCheckpoint | ShapeCheckpoint


def open_checkpoint(
    folder: str | Path, load_format: str, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> SafetensorsCheckpoint | DummyCheckpoint:
    """The checkpoint that `EngineConfig.load_format` names; `dtype` and `device` are of dummies."""
    return DummyCheckpoint(config, dtype, device) if load_format == "dummy" else SafetensorsCheckpoint(folder)


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
