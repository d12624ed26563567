"""SmoothQuant (Xiao et al., 2022, arXiv:2211.10438): outliers of activations move into the weights before both are cut
to 8 bits.

Each input channel j of a product gets a factor s_j = (largest |x_j|)^alpha / (largest |w_j|)^(1 - alpha); x is divided
by it and w multiplied. The largest |x_j| are those of a calibration text, which the unquantised model reads once,
before anything else is loaded; torchao's `RunningAbsMaxSmoothQuantObserver` collects them and gives the factors. Its
convert step fails for FP8, so what follows is ours: weights are `quantize` of w * s in fp32, and tokens are multiplied
by 1 / s in fp32 before they are quantised, torchao's own numbers for an fp32 model. q, k and v read the same x and are
one product here, so they share a factor, as do gate and up: the largest |w_j| is of all rows of the stacked matrix.

The factors are not folded into the norm before a product, where there is one: norms are shared by all variants, and a
norm that absorbs a factor is rounded to 16 bits again, so that the numbers would no longer be the definition's.
`W8A8Linear` holds 1 / s instead, and whatever quantises its tokens multiplies by it in passing.

Factors are kept on disk, in a safetensors file that is named by all that they depend on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from engine import kernels
from engine.batch import Tables, prefill_batch
from engine.config import EngineConfig, ModelConfig, ModelError
from engine.kernels import Codes, Quantised
from engine.kv_pool import KVPool
from engine.models.qwen import Layer, Qwen
from engine.quant.formats import HEAD, MATRICES
from engine.quant.linear import Linear, PlainLinear
from engine.quant.variants import Smoothing

BUNDLED_TEXT = Path(__file__).resolve().parents[2] / "models" / "pocket" / "prose.txt"
MAX_TOKENS = 8192  # of the text that are read
MAX_CHARACTERS = 1 << 20  # of it that are looked at
WINDOW = 512  # tokens that are read at one time, each window from position 0
_BLOCK = 16
_LOG_SECONDS = 2.0

log = logging.getLogger("octavo.engine")


@dataclass(frozen=True)
class _Observed(PlainLinear):
    """Shows its inputs to an observer of torchao's on the way."""

    observer: Any = None

    def __call__(self, x: Tensor | Quantised, out: Tensor | None = None, planes: bool = False) -> Tensor:
        assert isinstance(x, Tensor)
        self.observer(x.float())
        return super().__call__(x, out, planes)

    def gated(self, x: Tensor | Quantised, codes: Codes | None) -> Tensor | Quantised:
        return kernels.silu_mul(self(x), codes)

    def added(self, x: Tensor | Quantised, residual: Tensor) -> Tensor | None:
        """None: the product is this object's own call, which the observer sees."""


def smoothing_for(
    config: EngineConfig,
    model_config: ModelConfig,
    identity: bytes,
    build: Callable[[], Qwen],
    device: torch.device,
    dtype: torch.dtype,
) -> Smoothing:
    """The factors of a checkpoint for the settings of `config`, from the cache or by calibration.

    identity: the checkpoint's. build: makes its unquantised model on `device`, computing in `dtype`; called only if the
    cache has nothing. Raises ModelError, naming the option, for an alpha out of range or a text that cannot be read.
    """
    alpha = config.smooth_alpha
    if not 0 <= alpha <= 1:
        raise ModelError(f"smooth_alpha must be from 0 (all to the activations) to 1 (all to the weights), got {alpha}")
    ids = _calibration_ids(config, model_config)
    what = f"smooth 1 alpha {alpha!r} {dtype} {len(ids)} tokens".encode()
    fingerprint = hashlib.sha256(what + identity + ids.numpy().tobytes()).digest()
    path = cache_folder(config) / f"{fingerprint.hex()}.safetensors"
    shapes = _shapes(model_config)
    factors = _load(path, fingerprint, shapes)
    if factors is None:
        try:
            factors = _calibrate(build(), ids, alpha, dtype, device)
        except torch.OutOfMemoryError:
            raise ModelError(
                f"SmoothQuant's calibration runs the unquantised model, which {device} has no room for"
            ) from None
        bad = [name for name, factor in factors.items() if not _is_usable(factor, shapes[name])]
        if bad:
            raise ModelError(f"calibration gave no usable factors for {bad[0]}: activations overflow in {dtype}")
        _save(path, fingerprint, factors)
    return Smoothing(fingerprint, {name: factor.to(device) for name, factor in factors.items()})


def cache_folder(config: EngineConfig) -> Path:
    """Where factors are kept: the setting's folder, or that of the user's caches."""
    if config.cache_dir:
        return Path(config.cache_dir) / "smooth"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo" / "smooth"


def _shapes(c: ModelConfig) -> dict[str, int]:
    """The number of inputs of every matrix."""
    inputs = (c.hidden_size, c.num_heads * c.head_dim, c.hidden_size, c.intermediate_size)
    layers = {f"layers.{i}.{name}": k for i in range(c.num_layers) for name, k in zip(MATRICES, inputs, strict=True)}
    return {**layers, HEAD: c.hidden_size}


def _calibration_ids(config: EngineConfig, model_config: ModelConfig) -> Tensor:
    """The first tokens of the calibration text, [N] int32."""
    path = Path(config.calibration_file) if config.calibration_file else BUNDLED_TEXT
    if not config.calibration_file and not path.exists():
        raise ModelError("SmoothQuant needs a text to calibrate with: name one with calibration_file")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS)
    except (OSError, UnicodeDecodeError) as e:
        raise ModelError(f"calibration_file: cannot read {path}: {e}") from None
    tokenizer = Path(config.model) / "tokenizer.json"
    if not tokenizer.exists():
        raise ModelError(f"SmoothQuant needs the model's tokenizer to calibrate, and {config.model} has none")
    ids = [i for i in Tokenizer.from_file(str(tokenizer)).encode(text).ids if i < model_config.vocab_size][:MAX_TOKENS]
    if not ids:
        raise ModelError(f"calibration_file: {path} holds no text")
    return torch.tensor(ids, dtype=torch.int32)


# Calibration ----------------------------------------------------------------------------------------------------------


def _calibrate(model: Qwen, ids: Tensor, alpha: float, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Factors by matrix, [K] fp32 on the CPU."""
    model, observers = _observed(model, alpha)
    start = logged = time.monotonic()
    log.info("calibrating SmoothQuant: %d tokens through the unquantised model", len(ids))
    with torch.inference_mode():
        for done in _read(model, ids, dtype, device):
            if time.monotonic() - logged > _LOG_SECONDS:
                logged = time.monotonic()
                log.info("calibrating SmoothQuant: %d of %d tokens", done, len(ids))
        factors = {name: observer.calculate_qparams()[0].cpu() for name, observer in observers.items()}
    log.info("calibrated SmoothQuant in %.1f s", time.monotonic() - start)
    return factors


def _observed(model: Qwen, alpha: float) -> tuple[Qwen, dict[str, Any]]:
    """The same model with an observer before every product, and the observers."""
    observers: dict[str, Any] = {}

    def observe(name: str, linear: Linear) -> Linear:
        assert isinstance(linear, PlainLinear)
        observers[name] = _observer(linear.weight, alpha)
        return _Observed(linear.weight, linear.bias, observers[name])

    layers: list[Layer] = []
    for i, layer in enumerate(model.layers):
        qkv, out, gate_up, down = (f"layers.{i}.{name}" for name in MATRICES)
        layers.append(
            replace(
                layer,
                qkv=observe(qkv, layer.qkv),
                out=observe(out, layer.out),
                gate_up=observe(gate_up, layer.gate_up),
                down=observe(down, layer.down),
            )
        )
    return replace(model, layers=layers, head=observe(HEAD, model.head)), observers


def _observer(weight: Tensor, alpha: float) -> Any:
    """torchao's observer of what weight[N, K] is multiplied with: called with x[M, K] fp32, `calculate_qparams()[0]` is
    the factor [K] fp32.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it warns of kernels that are not needed here, and of itself
    try:
        from torchao.prototype.smoothquant import RunningAbsMaxSmoothQuantObserver
    except ImportError as e:
        raise ModelError(f"SmoothQuant calibrates through torchao, which cannot be imported: {e}") from None
    # All that it takes from the weight is each column's largest magnitude.
    return RunningAbsMaxSmoothQuantObserver(weight.abs().amax(dim=0, keepdim=True).float(), alpha)


def _read(model: Qwen, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Iterator[int]:
    """Run the text through the model, window by window; yields how many tokens have been read."""
    window = min(WINDOW, model.rotary.shape[0], len(ids))
    num_blocks = -(-window // _BLOCK)
    kv = KVPool(model.config, num_blocks, _BLOCK, dtype, [None], device).caches(None)
    tables = Tables.allocate(1, window, _BLOCK, device)
    tables.blocks[0] = torch.arange(num_blocks, dtype=torch.int32, device=device)
    for start in range(0, len(ids), window):
        part = ids[start : start + window].to(device)
        batch = prefill_batch(0, len(part), tables)
        hidden = model.forward(replace(batch, token_ids=part, slots=batch.positions), kv)
        assert isinstance(model.head, _Observed)
        model.head.observer(hidden.float())  # its product is not needed
        yield start + len(part)


# The cache ------------------------------------------------------------------------------------------------------------


def _is_usable(factor: Tensor, depth: int) -> bool:
    return factor.dtype == torch.float32 and factor.shape == (depth,) and bool((factor.isfinite() & (factor > 0)).all())


def _load(path: Path, fingerprint: bytes, shapes: dict[str, int]) -> dict[str, Tensor] | None:
    """The factors in a cache file; None, saying why if there is a file, where they have to be made."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            named = (file.metadata() or {}).get("fingerprint")
            factors = {name: file.get_tensor(name) for name in list(file.keys())}
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as e:
        log.warning("the SmoothQuant cache %s cannot be read and is made anew: %s", path, e)
        return None
    whole = factors.keys() == shapes.keys() and all(_is_usable(factors[name], k) for name, k in shapes.items())
    if named != fingerprint.hex() or not whole:
        log.warning("the SmoothQuant cache %s does not match this checkpoint and is made anew", path)
        return None
    log.info("SmoothQuant factors from %s", path)
    return factors


def _save(path: Path, fingerprint: bytes, factors: dict[str, Tensor]) -> None:
    """Write the file whole or not at all. A folder that cannot be written is said and costs the next start its time."""
    content = save({n: f.contiguous() for n, f in factors.items()}, metadata={"fingerprint": fingerprint.hex()})
    new = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(content)
        os.replace(new, path)
    except OSError as e:
        log.warning("the SmoothQuant factors cannot be kept in %s, the next start calibrates again: %s", path.parent, e)
        if new.exists():
            new.unlink()
