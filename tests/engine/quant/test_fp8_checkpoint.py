"""A checkpoint that is stored as Qwen's own FP8 ones are: served as it is, and what other variants make of it."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine import LLM, SamplingParams
from engine.config import ModelError
from engine.kernels import reference
from engine.memory import planned_weights
from engine.quant.linear import PlainLinear, W8A8Linear, WeightOnlyLinear
from engine.quant.memory import count_bytes
from engine.quant.quantize import dequantize, quantize
from engine.weights import SafetensorsCheckpoint

POCKET = Path(__file__).resolve().parents[3] / "models" / "pocket"
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
OWN = "w8a8-fp8-block"
IDS = torch.randint(4000, (24,), generator=torch.Generator().manual_seed(3)).tolist()

Tensors = dict[str, torch.Tensor]


def stored_tensors() -> Tensors:
    """The bundled model's, every matrix of a layer in blocks. Scales are bfloat16, as in Qwen's files."""
    tensors = load_file(POCKET / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        qdata, scale = quantize(tensors[name], torch.float8_e4m3fn, "block")
        tensors[name], tensors[f"{name}_scale_inv"] = qdata, scale[::128].bfloat16()
    return tensors


def write(folder: Path, tensors: Tensors, **quantization: Any) -> Path:
    shutil.copy(POCKET / "tokenizer.json", folder / "tokenizer.json")
    config = json.loads((POCKET / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = QUANTIZATION | quantization
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return stored_tensors()


@pytest.fixture(scope="module")
def folder(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("fp8"), tensors)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, variants=["auto", "bf16", "int8-row", "fp8-g64-fake"], kv_cache_tokens=1024, num_threads=1)


@pytest.fixture(scope="module")
def dequantised(tensors: Tensors) -> Any:
    """transformers' model with the fp32 weights that the file stands for."""
    model: Any = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32, attn_implementation="eager").eval()
    for path, module in model.named_modules():
        if path.endswith("_proj"):
            scale = tensors[f"{path}.weight_scale_inv"].float()
            blocks = scale.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
            module.weight.data = tensors[f"{path}.weight"].float() * blocks
    return model


def logprobs(llm: LLM, variant: str) -> torch.Tensor:
    """[len(IDS) - 1, 20]: each position's most likely."""
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=20)
    out = llm.generate([IDS], params, variant=variant, use_tqdm=False)[0]["prompt_logprobs"]
    return torch.tensor([p.values[1:] for p in out[1:]])


def expected(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([IDS])).logits[0, :-1].log_softmax(-1).topk(20).values
    return found


def test_its_own_variant_is_the_default_and_holds_the_stored_codes(llm: LLM, tensors: Tensors) -> None:
    assert llm.engine.info.default_variant == OWN
    for i, layer in enumerate(llm.engine.runner.variants[OWN].model.layers):
        products = {"self_attn": {"q": layer.qkv, "k": layer.qkv, "v": layer.qkv, "o": layer.out}}
        products["mlp"] = {"gate": layer.gate_up, "up": layer.gate_up, "down": layer.down}
        for where, parts in products.items():
            begun: dict[int, int] = {}
            for part, linear in parts.items():
                assert isinstance(linear, W8A8Linear)
                name = f"model.layers.{i}.{where}.{part}_proj.weight"
                qdata, scale = tensors[name], tensors[f"{name}_scale_inv"].float().repeat_interleave(128, dim=0)
                first = begun.get(id(linear), 0)
                rows = slice(first, first + len(qdata))
                begun[id(linear)] = rows.stop
                assert torch.equal(linear.qdata[rows].view(torch.int8), qdata.view(torch.int8)), name
                assert torch.equal(linear.scale[rows], scale), name


@torch.no_grad()
def test_logits_are_the_dequantised_models(llm: LLM, dequantised: Any) -> None:
    """bf16 exactly; the own variant with tokens in 8 bits on the way in; others are quantised from the same numbers."""
    torch.testing.assert_close(logprobs(llm, "bf16"), expected(dequantised), atol=2e-4, rtol=0)
    tokens, int8 = deepcopy(dequantised), deepcopy(dequantised)
    for path, module in tokens.named_modules():
        if path.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, args: through_8_bits(args[0]))
    for path, module in int8.named_modules():
        if path.endswith("_proj"):
            module.weight.data = dequantize(*quantize(module.weight.data, torch.int8, "row"), 0, torch.float32)
    # as in test_variants: a value near a boundary may fall on its other side
    assert (logprobs(llm, OWN) - expected(tokens)).abs().mean() < 0.15
    torch.testing.assert_close(logprobs(llm, "int8-row"), expected(int8), atol=2e-4, rtol=0)
    layer, theirs = llm.engine.runner.variants[OWN].model.layers[1], tokens.model.layers[1]
    x = torch.randn(5, 512)
    torch.testing.assert_close(layer.down(x), theirs.mlp.down_proj(x), atol=1e-4, rtol=1e-4)


def through_8_bits(x: torch.Tensor) -> torch.Tensor:
    codes = reference.quantize_tokens(x.flatten(0, -2), torch.float8_e4m3fn, 128)
    return dequantize(*codes, 128, torch.float32).view(x.shape)


def test_it_is_what_the_format_makes_of_the_unquantised_checkpoint(llm: LLM) -> None:
    """The file was made by our own definition, so both ways to the variant give the same bytes and the same logits."""
    made = LLM(POCKET, variants=[OWN], kv_cache_tokens=1024, num_threads=1)
    assert torch.equal(logprobs(llm, OWN), logprobs(made, OWN))


def test_what_it_leaves_unquantised_stays_so(tensors: Tensors, tmp_path: Path) -> None:
    plain = load_file(POCKET / "model.safetensors")
    names = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up")]
    changed = {k: v for k, v in tensors.items() if not k.startswith(tuple(names))} | {n: plain[n] for n in names}
    llm = LLM(write(tmp_path, changed), variants=["auto", "int8-row"], kv_cache_tokens=512, num_threads=1)
    for variant, kind in ((OWN, W8A8Linear), ("int8-row", WeightOnlyLinear)):
        layers = llm.engine.runner.variants[variant].model.layers
        assert isinstance(layers[1].gate_up, PlainLinear) and isinstance(layers[0].gate_up, kind)
        assert isinstance(layers[1].down, kind)
        assert torch.equal(layers[1].gate_up.weight, torch.cat([plain[n] for n in names]).float())


def test_a_plan_is_what_is_loaded(llm: LLM, folder: Path) -> None:
    runner = llm.engine.runner
    formats = [v.format for v in runner.variants.values()]
    with SafetensorsCheckpoint(folder, shapes_only=True) as shapes:
        planned = planned_weights(runner.model_config, shapes, formats, runner.dtype, runner.kept)
    assert planned == count_bytes({name: v.model for name, v in runner.variants.items()})


def test_random_weights_of_its_shape_are_quantised_here(folder: Path) -> None:
    llm = LLM(folder, load_format="dummy", kv_cache_tokens=512, num_threads=1)
    assert isinstance(llm.engine.runner.variants[OWN].model.layers[0].down, W8A8Linear)


NAME = "model.layers.1.mlp.up_proj.weight"
SCALE = f"{NAME}_scale_inv"


def damaged(tensors: Tensors, kind: str) -> Tensors:
    t, nan = dict(tensors), torch.tensor(torch.nan)
    if kind == "no scale":
        del t[SCALE]
    elif kind == "no weight":
        del t[NAME]
    elif kind == "scale of another shape":
        t[SCALE] = t[SCALE][:, :3].contiguous()
    elif kind == "scale of whole numbers":
        t[SCALE] = torch.ones_like(t[SCALE], dtype=torch.int32)
    elif kind == "weight not in 8 bits":
        t[NAME] = t[NAME].bfloat16()
    elif kind == "half of a product":
        t[NAME] = t[NAME].bfloat16()
        del t[SCALE]
    elif kind == "NaN code":
        t[NAME] = t[NAME].clone()
        t[NAME].view(torch.uint8)[3, 4] = 0xFF
    elif kind == "NaN scale":
        t[SCALE] = torch.where(torch.arange(4) == 2, nan, t[SCALE].float())
    elif kind == "infinite scale":
        t[SCALE] = t[SCALE] * torch.inf
    return t


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no scale", rf"{NAME} is torch\.float8_e4m3fn, but there is no {SCALE}"),
        ("no weight", rf"has no tensor {NAME}"),
        ("scale of another shape", rf"{SCALE} is .*\[4, 3\], the config asks for \[4, 4\]"),
        ("scale of whole numbers", rf"{SCALE} is I32 "),
        ("weight not in 8 bits", rf"{NAME} is torch\.bfloat16, but there is {SCALE}"),
        ("half of a product", rf"{NAME} .* not in 8 bits, but another part of the same product is"),
        ("NaN code", rf"{NAME} .*NaN or infinity"),
        ("NaN scale", rf"{NAME} .*NaN or infinity"),
        ("infinite scale", rf"{NAME} .*NaN or infinity"),
    ],
)
def test_what_does_not_fit_together_is_named(tensors: Tensors, tmp_path: Path, kind: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as e:
        LLM(write(tmp_path, damaged(tensors, kind)), kv_cache_tokens=512)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quant_method", "gptq"),
        ("quant_method", None),
        ("weight_block_size", [64, 128]),
        ("weight_block_size", None),
        ("activation_scheme", "static"),
        ("fmt", "e5m2"),
    ],
)
def test_other_kinds_of_quantisation_are_named(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ModelError, match=rf"quantization_config\.{field} .* is not supported, only "):
        LLM(write(tmp_path, {}, **{field: value}))
