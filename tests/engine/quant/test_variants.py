"""Every format as a variant of the bundled model: its logits, what it shares, and all of them in one load."""

from __future__ import annotations

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
from engine.messages import AddRequest, pack_ids
from engine.models.qwen import Layer
from engine.quant.formats import FORMATS
from engine.quant.linear import Linear, PlainLinear, W8A8Linear, WeightOnlyLinear
from engine.quant.memory import count_bytes
from engine.quant.quantize import dequantize, quantize
from engine.quant.variants import check_device
from engine.weights import SafetensorsCheckpoint

POCKET = Path(__file__).resolve().parents[3] / "models" / "pocket"
WEIGHT_TOLERANCE = 2e-4  # of a logprob, in fp32
# With 8-bit activations a value a hair from a boundary may fall on its other side, and the change travels: perturbing
# the embeddings by 1e-6 moves the definition's own logprobs by 0.01 to 0.07 on average, by up to 1. So the average is
# bounded here, and each matrix by itself in the test after it.
TOKEN_TOLERANCE = 0.15


@pytest.fixture(scope="module")
def llm() -> LLM:
    """Every format at once."""
    return LLM(POCKET, variants=list(FORMATS), kv_cache_tokens=16384, num_threads=1)


@pytest.fixture(scope="module")
def plain() -> Any:
    """transformers' model with the checkpoint's bf16 weights in fp32, which loses nothing."""
    return AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32, attn_implementation="eager").eval()


def defined(plain: Any, name: str) -> Any:
    """The model that the format's definition describes: dequantised weights, and tokens quantised on the way in."""
    model, fmt = deepcopy(plain), FORMATS[name]
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or path == "lm_head" or fmt.weight is None:
            continue
        assert fmt.granularity is not None
        qdata, scale = quantize(module.weight.data.bfloat16(), getattr(torch, fmt.weight), fmt.granularity)
        module.weight.data = dequantize(qdata, scale, fmt.group_size, torch.float32)
        if fmt.activation:
            module.register_forward_pre_hook(lambda _, args, d=qdata.dtype, g=fmt.group_size: round_trip(args[0], d, g))
    return model


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
def test_logits_are_the_definitions(llm: LLM, plain: Any, name: str) -> None:
    ids = torch.randint(4000, (24,), generator=torch.Generator().manual_seed(3)).tolist()
    want = defined(plain, name)(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).topk(20).values
    got = logprobs(llm, ids, name)
    if FORMATS[name].activation:
        assert (got - want).abs().mean() < TOKEN_TOLERANCE
    else:
        torch.testing.assert_close(got, want, atol=WEIGHT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [f.name for f in FORMATS.values() if f.activation])
@torch.no_grad()
def test_each_matrix_with_8_bit_activations_is_the_definitions(llm: LLM, plain: Any, name: str) -> None:
    layer, theirs = llm.engine.runner.variants[name].model.layers[2], defined(plain, name).model.layers[2]
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
    """Greedy tokens of all formats' requests in the same steps, against one request at a time."""
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = {name: f"Chapter {i}. The old house stood" for i, name in enumerate(FORMATS)}
    alone = {n: llm.generate([p], greedy, variant=n, use_tqdm=False)[0]["token_ids"] for n, p in prompts.items()}
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
    stored: dict[tuple[str | None, str | None, bool], set[int]] = {}
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
    assert variants["w8a8-fp8-block"].own_bytes == matrices + matrices // 128 * 4


def test_a_plan_of_every_format_is_what_is_loaded(llm: LLM) -> None:
    runner = llm.engine.runner
    formats = [v.format for v in runner.variants.values()]
    with SafetensorsCheckpoint(POCKET) as checkpoint:
        planned = planned_weights(runner.model_config, checkpoint, formats, runner.dtype)
    assert planned == runner.plan.weights == count_bytes({n: v.model for n, v in runner.variants.items()})


def test_a_real_variant_agrees_with_its_fake_and_fake_is_rounded_once() -> None:
    """In bf16: the fake weight is the stored one rounded, and the two products agree within that rounding."""
    llm = LLM(POCKET, variants=["int8-g128", "int8-g128-fake"], dtype="bfloat16", kv_cache_tokens=512, num_threads=1)
    real, fake = (v.model.layers[0].down for v in llm.engine.runner.variants.values())
    assert isinstance(real, WeightOnlyLinear) and isinstance(fake, PlainLinear)
    assert torch.equal(fake.weight, dequantize(real.qdata, real.scale, 128, torch.bfloat16))
    x = torch.randn(5, 512).bfloat16()
    torch.testing.assert_close(real(x), fake(x), atol=2e-2, rtol=2e-2)


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
