"""Every format as a variant of the bundled model: its logits, what it shares, and all of them in one load."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
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
from engine.messages import AddRequest, pack_ids
from engine.models.qwen import Layer
from engine.quant.formats import FORMATS, Format, Stored, parse_format
from engine.quant.linear import Linear, PlainLinear, W8A8Linear, WeightOnlyLinear
from engine.quant.memory import count_bytes
from engine.quant.quantize import dequantize, quantize
from engine.quant.variants import build_linears, check_device
from engine.weights import SafetensorsCheckpoint

POCKET = Path(__file__).resolve().parents[3] / "models" / "pocket"
WEIGHT_TOLERANCE = 2e-4  # of a logprob, in fp32
# With 8-bit activations a value a hair from a boundary may fall on its other side, and the change travels: perturbing
# the embeddings by 1e-6 moves the definition's own logprobs by 0.01 to 0.07 on average, by up to 1. So the average is
# bounded here, and each matrix by itself in the test after it.
TOKEN_TOLERANCE = 0.15


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where SmoothQuant's factors are."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def options(cache: Path) -> dict[str, Any]:
    """A short text to calibrate with."""
    text = cache / "text.txt"
    text.write_text((POCKET / "prose.txt").read_text(encoding="utf-8")[:1500], encoding="utf-8")
    return {"calibration_file": str(text), "cache_dir": str(cache), "num_threads": 1}


@pytest.fixture(scope="module")
def llm(options: dict[str, Any]) -> LLM:
    """Every format at once."""
    return LLM(POCKET, variants=list(FORMATS), kv_cache_tokens=16384, **options)


@pytest.fixture(scope="module")
def factors(llm: LLM, cache: Path) -> dict[str, torch.Tensor]:
    """SmoothQuant's, by the name of a Linear of transformers' model."""
    (file,) = (cache / "smooth").iterdir()
    stored = load_file(file)
    products = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
    paths = {}
    for i in range(3):
        for part in ("q", "k", "v", "o", "gate", "up", "down"):
            where = "mlp" if part in ("gate", "up", "down") else "self_attn"
            product = products.get(f"{part}_proj", part)
            paths[f"model.layers.{i}.{where}.{part}_proj"] = stored[f"layers.{i}.{product}_proj"]
    return paths | {"lm_head": stored["lm_head"]}


@pytest.fixture(scope="module")
def plain() -> Any:
    """transformers' model with the checkpoint's bf16 weights in fp32, which loses nothing."""
    return AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32, attn_implementation="eager").eval()


def defined(plain: Any, name: str, factors: dict[str, torch.Tensor], kept: tuple[str, ...] = ("lm_head",)) -> Any:
    """The model that the format's definition describes: dequantised weights, and tokens quantised on the way in."""
    model, fmt = deepcopy(plain), FORMATS[name]
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or path.endswith(kept) or fmt.weight is None:
            continue
        assert fmt.granularity is not None
        weight, dtype = module.weight.data.bfloat16(), getattr(torch, fmt.weight)
        factor = factors[path] if fmt.smooth else None
        numbers = weight if factor is None else weight.float() * factor
        weight = dequantize(*quantize(numbers, dtype, fmt.granularity), fmt.group_size, torch.float32)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)  # the head's, too, is its own now
        if fmt.activation:
            module.register_forward_pre_hook(partial(quantise_inputs, fmt, factor))
    return model


def quantise_inputs(
    fmt: Format, factor: torch.Tensor | None, module: object, args: tuple[torch.Tensor]
) -> torch.Tensor:
    x = args[0] if factor is None else args[0] * (1.0 / factor)
    return round_trip(x, getattr(torch, str(fmt.activation)), fmt.group_size)


def round_trip(x: torch.Tensor, dtype: torch.dtype, group: int) -> torch.Tensor:
    return dequantize(*reference.quantize_tokens(x.flatten(0, -2), dtype, group), group, torch.float32).view(x.shape)


def matrices_of(layer: Layer) -> list[Linear]:
    return [layer.qkv, layer.out, layer.gate_up, layer.down]


def logprobs(llm: LLM, ids: list[int], variant: str) -> torch.Tensor:
    """[len(ids) - 1, 20]: each position's most likely."""
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=20)
    out = llm.generate([ids], params, variant=variant, use_tqdm=False)[0]["prompt_logprobs"]
    return torch.tensor([p.values[1:] for p in out[1:]])


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_logits_are_the_definitions(llm: LLM, plain: Any, factors: dict[str, torch.Tensor], name: str) -> None:
    check_logits(llm, defined(plain, name, factors), name)


def check_logits(llm: LLM, model: Any, name: str) -> None:
    ids = torch.randint(4000, (24,), generator=torch.Generator().manual_seed(3)).tolist()
    want = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).topk(20).values
    got = logprobs(llm, ids, name)
    if FORMATS[name].activation:
        assert (got - want).abs().mean() < TOKEN_TOLERANCE
    else:
        torch.testing.assert_close(got, want, atol=WEIGHT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [f.name for f in FORMATS.values() if f.activation])
@torch.no_grad()
def test_each_matrix_with_8_bit_activations_is_the_definitions(
    llm: LLM, plain: Any, factors: dict[str, torch.Tensor], name: str
) -> None:
    layer, theirs = llm.engine.runner.variants[name].model.layers[2], defined(plain, name, factors).model.layers[2]
    x = torch.randn(7, 512)
    x[1] *= 100
    x[2, 9] = 300.0
    x[3] = 0.0
    gate_up = torch.cat([theirs.mlp.gate_proj(x), theirs.mlp.up_proj(x)], dim=1)
    torch.testing.assert_close(layer.gate_up(x), gate_up, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.down(x), theirs.mlp.down_proj(x), atol=1e-4, rtol=1e-4)
    wide = torch.randn(5, 1024)
    torch.testing.assert_close(layer.out(wide), theirs.self_attn.o_proj(wide), atol=1e-4, rtol=1e-4)


def test_variants_mixed_in_one_load_answer_as_alone(llm: LLM) -> None:
    """Greedy tokens of all formats' requests in the same steps, against one request at a time; where activations are
    rounded to 8 bits, against both of its requests together: a product of two rows differs from one of one row in the
    last bit on some CPUs, and rounding makes a step of that.
    """
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = {name: f"Chapter {i}. The old house stood" for i, name in enumerate(FORMATS)}
    alone = {}
    for name, prompt in prompts.items():
        together = [prompt] * (2 if FORMATS[name].activation else 1)
        alone[name] = llm.generate(together, greedy, variant=name, use_tqdm=False)[0]["token_ids"]
    assert llm.tokenizer is not None
    keys = [(name, i) for i in range(2) for name in FORMATS]
    for number, (name, _) in enumerate(keys):
        ids = llm.tokenizer.encode(prompts[name]).ids
        llm.engine.add(AddRequest(number, name, pack_ids(ids), greedy, b"", []))
    mixed: dict[tuple[str, int], list[int]] = {key: [] for key in keys}
    most = 0
    while llm.engine.has_work:
        result = llm.engine.step()
        most = max(most, len({keys[n][0] for n in result.sequence_ids}))
        for number, token in zip(result.sequence_ids, result.token_ids, strict=True):
            mixed[keys[number]].append(token)
    assert most == len(FORMATS)
    assert mixed == {(name, i): alone[name] for name, i in keys}


def test_formats_that_store_the_same_bytes_hold_them_once(llm: LLM) -> None:
    variants = llm.engine.runner.variants
    stored: dict[Stored, set[int]] = {}
    for name, variant in variants.items():
        fmt, layer = FORMATS[name], variant.model.layers[1]
        kind = PlainLinear if fmt.fake or not fmt.weight else W8A8Linear if fmt.activation else WeightOnlyLinear
        assert {type(m) for m in matrices_of(layer)} == {kind}
        stored.setdefault(fmt.stored, set()).add(layer.down.tensors[0].data_ptr())
    assert all(len(pointers) == 1 for pointers in stored.values())
    assert len(set.union(*stored.values())) == len(stored)
    assert variants["w8a8-int8-row"].own_bytes == variants["int8-row"].own_bytes == 0  # each other's
    matrices = sum(m.tensors[0].numel() for layer in variants["bf16"].model.layers for m in matrices_of(layer))
    assert variants["bf16"].own_bytes == variants["int8-g64-fake"].own_bytes == 4 * matrices
    assert matrices < variants["int8-g512"].own_bytes < 1.02 * matrices
    assert variants["int8-g64"].own_bytes == matrices + matrices // 64 * 4
    assert variants["w8a8-fp8-block"].own_bytes == matrices + (matrices // 128 + matrices // 128**2) * 4


def test_a_plan_of_every_format_is_what_is_loaded(llm: LLM) -> None:
    runner = llm.engine.runner
    formats = [v.format for v in runner.variants.values()]
    with SafetensorsCheckpoint(POCKET, shapes_only=True) as shapes:
        planned = planned_weights(runner.model_config, shapes, formats, runner.dtype, runner.kept)
    assert planned == runner.plan.weights == count_bytes({n: v.model for n, v in runner.variants.items()})


def test_real_variants_agree_with_fake_ones_within_bf16() -> None:
    """In bf16, every weight-only format: the fake weight is the stored one rounded once, and logprobs differ by no more
    than two ways of rounding one model can: each strays from float32 by what the fake one does.
    """
    pairs = [(name, f"{name}-fake") for name, f in FORMATS.items() if f.weight and not f.activation and not f.fake]
    assert len(pairs) == 12
    names = [name for pair in pairs for name in pair]
    llm = LLM(POCKET, variants=names, dtype="bfloat16", kv_cache_tokens=1024, num_threads=1)
    wide = LLM(POCKET, variants=names[1::2], dtype="float32", kv_cache_tokens=1024, num_threads=1)
    ids = torch.randint(4000, (24,), generator=torch.Generator().manual_seed(3)).tolist()
    x = torch.randn(5, 512).bfloat16()
    for pair in pairs:
        real, fake = (llm.engine.runner.variants[name].model.layers[0].down for name in pair)
        assert isinstance(real, WeightOnlyLinear) and isinstance(fake, PlainLinear)
        assert torch.equal(fake.weight, dequantize(real.qdata, real.scale, real.group_size, torch.bfloat16))
        torch.testing.assert_close(real(x), fake(x), atol=2e-2, rtol=2**-7)
        got, expected = (logprobs(llm, ids, name) for name in pair)
        apart, rounding = (got - expected).abs(), (expected - logprobs(wide, ids, pair[1])).abs()
        assert 0 < apart.mean() < 2 * rounding.mean() and apart.max() < 2 * rounding.max()


@torch.no_grad()
def test_matrices_that_stay_in_bf16(plain: Any, llm: LLM, options: dict[str, Any], factors: dict[str, Any]) -> None:
    """They are bf16's own tensors in every variant, and the rest is the definition's."""
    names = ["bf16", "int8-row", "fp8-g64-fake", "w8a8-int8-row-smooth"]
    keep = ("lm_head", "down_proj", "layers.1.qkv_proj")
    some = LLM(POCKET, variants=names, keep_bf16=keep, kv_cache_tokens=1024, **options)
    variants = some.engine.runner.variants
    for name in names[1:]:
        for i, (layer, bf16) in enumerate(zip(variants[name].model.layers, variants["bf16"].model.layers, strict=True)):
            assert layer.down is bf16.down and (layer.qkv is bf16.qkv) == (i == 1)
            assert layer.out is not bf16.out and layer.gate_up is not bf16.gate_up
        assert variants[name].model.head is variants["bf16"].model.head
        assert variants[name].fingerprint != llm.engine.runner.variants[name].fingerprint
    kept = ("lm_head", "down_proj", *(f"layers.1.self_attn.{part}_proj" for part in "qkv"))
    for name in names[1:3]:
        check_logits(some, defined(plain, name, factors, kept), name)


@torch.no_grad()
def test_a_quantised_head(plain: Any, options: dict[str, Any], factors: dict[str, Any]) -> None:
    """In each variant's format, once for those that store the same bytes; the embedding stays what it is."""
    names = ["bf16", "int8-row", "w8a8-int8-row", "int8-tensor", "fp8-g128-fake", "w8a8-fp8-row-smooth"]
    llm = LLM(POCKET, variants=names, keep_bf16=(), kv_cache_tokens=1024, **options)
    variants = llm.engine.runner.variants
    models = {name: v.model for name, v in variants.items()}
    embedding = models["bf16"].embedding
    assert models["bf16"].head.tensors == [embedding] and all(m.embedding is embedding for m in models.values())
    assert models["int8-row"].head.tensors[0] is models["w8a8-int8-row"].head.tensors[0]
    kinds = [PlainLinear, WeightOnlyLinear, W8A8Linear, WeightOnlyLinear, PlainLinear, W8A8Linear]
    assert [type(models[name].head) for name in names] == kinds
    table = load_file(POCKET / "model.safetensors")["model.embed_tokens.weight"]
    for name, granularity in (("int8-row", "row"), ("int8-tensor", "tensor")):
        for stored, expected in zip(models[name].head.tensors, quantize(table, torch.int8, granularity), strict=True):
            assert torch.equal(stored, expected)
    matrices = sum(m.tensors[0].numel() for layer in models["bf16"].layers for m in matrices_of(layer))
    scales = sum(m.tensors[1].numel() for layer in models["int8-row"].layers for m in matrices_of(layer))
    assert variants["int8-tensor"].own_bytes == matrices + 4 * scales + table.numel() + 4 * len(table)
    for name in names:
        check_logits(llm, defined(plain, name, factors, kept=("none",)), name)
    with SafetensorsCheckpoint(POCKET, shapes_only=True) as shapes:
        formats = [v.format for v in variants.values()]
        planned = planned_weights(llm.engine.runner.model_config, shapes, formats, torch.float32, frozenset())
    assert planned == count_bytes(models)


def test_pieces_of_rows_are_quantised_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.quant.variants._ROWS", 256)
    weight = torch.randn(700, 200).bfloat16()
    formats = [f for f in FORMATS.values() if f.weight is not None and not f.fake and not f.smooth]
    for name, linear in build_linears([weight], None, formats, torch.float32).items():
        fmt = FORMATS[name]
        qdata, scale = quantize(weight, getattr(torch, str(fmt.weight)), str(fmt.granularity))
        assert isinstance(linear, WeightOnlyLinear | W8A8Linear)
        assert torch.equal(linear.qdata.view(torch.int8), qdata.view(torch.int8)) and torch.equal(linear.scale, scale)


@pytest.mark.parametrize(("heights", "whole"), [((256, 128, 128), True), ((256, 64, 64), False), ((200,), False)])
def test_scales_of_blocks_are_there_once_where_no_block_straddles_matrices(
    heights: tuple[int, ...], whole: bool
) -> None:
    formats = [parse_format(name) for name in ("w8a8-fp8-block", "w8a8-fp8-block+kv8", "w8a8-fp8-row")]
    linears = build_linears([torch.randn(n, 300) for n in heights], None, formats[:1], torch.float32)
    again = build_linears([], None, formats[:2], torch.float32, there={formats[0].stored: linears["w8a8-fp8-block"]})
    linear = linears["w8a8-fp8-block"]
    assert isinstance(linear, W8A8Linear) and (linear.block_scale is not None) == whole
    for other in again.values():
        assert isinstance(other, W8A8Linear) and other.block_scale is linear.block_scale
    if linear.block_scale is not None:
        assert linear.block_scale.is_contiguous()
        assert torch.equal(linear.block_scale.repeat_interleave(128, dim=0), linear.scale)
    row = build_linears([torch.randn(128, 300)], None, formats, torch.float32)["w8a8-fp8-row"]
    assert isinstance(row, W8A8Linear) and row.block_scale is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    for file in POCKET.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(POCKET / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = bad
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name.replace('.', chr(92) + '.')} .*NaN or infinity"):
        LLM(tmp_path, variants=["int8-row"], kv_cache_tokens=512)


def test_a_gpu_without_fp8_is_told_what_it_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3090")
    gpu = torch.device("cuda")
    check_device([f for f in FORMATS.values() if f.activation != "float8_e4m3fn"], gpu)
    with pytest.raises(ModelError, match=r"w8a8-fp8-block .*RTX 3090 \(sm_86\).*w8a8-int8-row, or fp8-g128"):
        check_device([FORMATS["int8-row"], FORMATS["w8a8-fp8-block"]], gpu)
    with pytest.raises(ModelError, match="w8a8-int8-row, or fp8-row"):
        check_device([FORMATS["w8a8-fp8-row"]], gpu)
    check_device([FORMATS["w8a8-fp8-row"]], torch.device("cpu"))
