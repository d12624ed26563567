"""Frozen settings of the checkpoint (`ModelConfig`, read from its folder) and of the engine. No torch here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec


class ModelError(ValueError):
    """A checkpoint folder is missing, incomplete, broken or of an unsupported kind. The message is one line for the
    user.
    """


class VariantRefused(ValueError):
    """A variant cannot be added or removed while serving. The message names what to do; `code` is for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class YarnScaling(msgspec.Struct, frozen=True):
    """YaRN rope scaling (Peng et al., 2023, arXiv:2309.00071), as transformers' `rope_type: yarn` defines it."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of one dense Qwen2, Qwen2.5 or Qwen3 checkpoint. Families differ in fields: `qkv_bias`, `qk_norm`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    yarn: YarnScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    dtype: str  # the checkpoint's: "bfloat16", "float16" or "float32"
    own_variant: str  # the format that serves the checkpoint as it is stored
    eos_token_ids: list[int]
    generation: dict[str, float]  # sampling defaults of generation_config.json: temperature, top_p, top_k, …


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one engine.

    model: a local folder. variants: names of `quant.formats`; the first is the default; "auto" is the checkpoint as it
    is stored. keep_bf16: patterns of `quant.formats.kept_matrices`, what no variant quantises. smooth_alpha,
    calibration_file: of SmoothQuant (`quant.smooth`); no file is the bundled prose. cache_dir: where its factors are
    kept; empty is the user's cache folder. dtype: "auto" is the
    checkpoint's on a GPU and float32 on a CPU. load_format: "auto" reads safetensors, "dummy" makes random weights from
    the config alone. max_num_batched_tokens: the budget of one step over all variants. max_prefill_beside_decode:
    prefill tokens of a step that also decodes; it bounds the gap between two tokens of a stream. block_size and
    kv_cache_tokens: of one block and of the whole KV pool, in tokens of the computing dtype (an 8-bit cache fits two or
    four for one); 0 takes `gpu_memory_utilization` of the GPU, or 1 GiB on a CPU. overlap: step N+1 is launched before
    the tokens of step N reach the host; None means on a GPU only. cuda_graphs: on a GPU, decode steps are captured at
    start and replayed. keep_in_l2: what their kernels hand to one another stays in L2, see `l2`. num_threads: of torch
    on a CPU; 0 is torch's own. variant_headroom: bytes kept free of the KV pool for variants that are added while
    serving. kernels_for: choose kernels as on another chip, such as "sm_89"; empty: the one that is here.
    """

    model: str
    variants: tuple[str, ...] = ("auto",)
    keep_bf16: tuple[str, ...] = ("lm_head",)
    smooth_alpha: float = 0.5
    calibration_file: str = ""
    cache_dir: str = ""
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    dtype: str = "auto"
    load_format: str = "auto"
    max_model_len: int = 0  # 0: the checkpoint's, or what fits the pool if that is less
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 0  # 0: 8192 on a GPU, 2048 on a CPU
    max_prefill_beside_decode: int = 2048
    block_size: int = 16
    kv_cache_tokens: int = 0
    gpu_memory_utilization: float = 0.85
    variant_headroom: int = 0
    enable_prefix_caching: bool = True
    overlap: bool | None = None
    cuda_graphs: bool = True
    keep_in_l2: bool = True
    num_threads: int = 0
    seed: int = 0
    kernels_for: str = ""


def load_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}: is it a model folder?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ModelError(f"cannot read {path}: {e}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value


def load_model_config(folder: str | Path) -> ModelConfig:
    """Read `config.json` and, where present, `generation_config.json` of a checkpoint folder.

    Raises ModelError with one line that names the file and the field.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist")
    raw = load_json(folder / "config.json")
    generation = load_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    return parse_model_config(raw, generation, str(folder / "config.json"))


def parse_model_config(raw: dict[str, Any], generation: dict[str, Any], source: str = "config.json") -> ModelConfig:
    family = raw.get("model_type")
    if family not in ("qwen2", "qwen3"):
        raise ModelError(f"{source}: model_type {family!r} is not supported; supported: qwen2 (Qwen2, Qwen2.5), qwen3")

    def need(key: str, kind: type) -> Any:
        value: Any = raw.get(key)
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, int | float) or isinstance(value, bool) or not isinstance(value, kind):
            raise ModelError(f"{source}: {key} must be a {kind.__name__}, got {value!r}")
        if not (value > 0 and math.isfinite(value)):
            raise ModelError(f"{source}: {key} must be positive, got {value!r}")
        return value

    if raw.get("use_sliding_window"):
        raise ModelError(f"{source}: use_sliding_window is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{source}: hidden_act {raw['hidden_act']!r} is not supported, only silu")
    hidden, heads = need("hidden_size", int), need("num_attention_heads", int)
    kv_heads = raw.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ModelError(f"{source}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    head_dim = raw.get("head_dim") or hidden // heads
    theta, yarn = _rope(raw, source)
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    return ModelConfig(
        vocab_size=need("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=need("intermediate_size", int),
        num_layers=need("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=need("rms_norm_eps", float),
        rope_theta=theta,
        yarn=yarn,
        max_position_embeddings=need("max_position_embeddings", int),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or bool(raw.get("attention_bias", False)),
        qk_norm=family == "qwen3",
        dtype=str(dtype).removeprefix("torch."),
        own_variant=_own_variant(raw, source),
        eos_token_ids=[] if eos is None else list(eos) if isinstance(eos, list) else [eos],
        generation={
            k: generation[k]
            for k in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if isinstance(generation.get(k), int | float)
        }
        | ({"temperature": 0.0} if generation.get("do_sample") is False else {}),
    )


def _own_variant(raw: dict[str, Any], source: str) -> str:
    """The format that a checkpoint is stored in: unquantised, or as Qwen's own FP8 ones are."""
    quantization = raw.get("quantization_config")
    if not quantization:
        return "bf16"
    if not isinstance(quantization, dict):
        raise ModelError(f"{source}: quantization_config must be an object, got {quantization!r}")
    known = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
    for key, value in known.items():
        found = quantization.get(key, value if key in ("activation_scheme", "fmt") else None)
        if found != value:
            raise ModelError(
                f"{source}: quantization_config.{key} {found!r} is not supported, only {value!r}: serve the "
                "unquantised checkpoint"
            )
    return "w8a8-fp8-block"


def _rope(raw: dict[str, Any], source: str) -> tuple[float, YarnScaling | None]:
    """rope_theta and scaling in the old spelling (`rope_theta`, `rope_scaling`) or the new (`rope_parameters`)."""
    new = raw.get("rope_parameters") or {}
    scaling = new if new.get("rope_type", "default") != "default" else (raw.get("rope_scaling") or {})
    theta = new.get("rope_theta", raw.get("rope_theta"))
    if not isinstance(theta, int | float) or theta <= 0:
        raise ModelError(f"{source}: neither rope_theta nor rope_parameters.rope_theta gives the rotary base")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return float(theta), None
    if kind != "yarn":
        raise ModelError(f"{source}: rope scaling {kind!r} is not supported, only yarn")
    original = scaling.get("original_max_position_embeddings") or raw.get("max_position_embeddings")
    factor = scaling.get("factor")
    if not isinstance(factor, int | float) or factor < 1 or not isinstance(original, int):
        raise ModelError(f"{source}: yarn needs factor >= 1 and original_max_position_embeddings")
    optional = {
        k: scaling[k]
        for k in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
        if scaling.get(k) is not None
    }
    return float(theta), YarnScaling(factor=float(factor), original_max_position_embeddings=original, **optional)
