"""SmoothQuant: torchao's own numbers for INT8, less error where activations have outliers, and its cache on disk."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM

from engine import LLM, SamplingParams
from engine.config import ModelError
from engine.quant import smooth
from engine.quant.formats import FORMATS, MATRICES
from engine.quant.linear import W8A8Linear
from engine.quant.variants import build_linears

POCKET = Path(__file__).resolve().parents[3] / "models" / "pocket"
SMOOTH = ["w8a8-int8-row-smooth", "w8a8-fp8-row-smooth"]
TEXT = (POCKET / "prose.txt").read_text(encoding="utf-8")[:1000]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def make(model: Path, text: Path, cache: Path, *variants: str, **options: Any) -> LLM:
    options = {"kv_cache_tokens": 1024, "num_threads": 1, "calibration_file": str(text), **options}
    return LLM(model, variants=list(variants), cache_dir=str(cache), **options)


@pytest.fixture(scope="module")
def calibrated(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that has the factors of the bundled model and `text_file`."""
    cache = tmp_path_factory.mktemp("cache")
    make(POCKET, text_file, cache, SMOOTH[0])
    return cache


def cached(cache: Path) -> Path:
    (file,) = (cache / "smooth").iterdir()
    return file


def logits(llm: LLM, variant: str, ids: list[int]) -> torch.Tensor:
    """[len(ids) - 1, 20] logprobs of the ids that bf16 finds likely, so that variants can be compared."""
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)
    out = llm.generate([ids], params, variant=variant, use_tqdm=False)[0]["prompt_logprobs"]
    return torch.tensor([p.values[0] for p in out[1:]])


# The numbers


def torchao_smoothed(weight: torch.Tensor, x: torch.Tensor, alpha: float) -> torch.nn.Linear:
    """A Linear through torchao's three steps, with INT8 weights and dynamic INT8 activations by row."""
    quantization = pytest.importorskip("torchao.quantization")
    smoothquant = pytest.importorskip("torchao.prototype.smoothquant")
    holder = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    holder[0].weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    row = quantization.PerRow()
    base = quantization.Int8DynamicActivationInt8WeightConfig(version=2, granularity=row, set_inductor_config=False)
    for step in ("prepare", "convert"):
        settings = {"alpha": alpha, "use_running_absmax": True}
        quantization.quantize_(holder, smoothquant.SmoothQuantConfig(base_config=base, step=step, **settings))
        if step == "prepare":
            for part in x.split(20):
                holder(part)
    linear: torch.nn.Linear = holder[0]
    return linear


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_equals_torchaos_int8(alpha: float) -> None:
    """Codes, scales and what tokens are multiplied by, bit for bit, from torchao's factors; then the product."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 256, generator=generator).bfloat16() * 0.02 for n in (64, 32, 32)]
    x = torch.randn(50, 256, generator=generator)
    x[:, [3, 77]] *= 60
    theirs: Any = torchao_smoothed(torch.cat(parts).float(), x, alpha)
    stored = theirs.weight
    factor = smooth._observer(torch.cat(parts), alpha)
    for part in x.split(20):
        factor(part)
    (ours,) = build_linears(parts, None, [FORMATS[SMOOTH[0]]], torch.float32, factor.calculate_qparams()[0]).values()
    assert isinstance(ours, W8A8Linear) and ours.pre_scale is not None
    assert torch.equal(ours.pre_scale, stored.act_pre_scale)
    assert torch.equal(ours.scale, stored.scale) and torch.equal(ours.qdata, stored.qdata)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_factors_are_of_what_the_unquantised_model_multiplies(calibrated: Path) -> None:
    """Every product's inputs in transformers' own forward over the same windows, and the paper's formula."""
    model: Any = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32, attn_implementation="eager").eval()
    largest: dict[str, torch.Tensor] = {}

    def seen(name: str, x: torch.Tensor) -> None:
        found = x.flatten(0, -2).abs().amax(0)
        largest[name] = torch.maximum(found, largest.get(name, found))

    modules: dict[str, list[str]] = {"lm_head": ["lm_head"]}
    for i in range(3):
        parts = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
        parts += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
        for name, own in zip(MATRICES, parts, strict=True):
            modules[f"layers.{i}.{name}"] = [f"model.layers.{i}.{part}" for part in own]
    for name, own in modules.items():
        model.get_submodule(own[0]).register_forward_pre_hook(lambda _, args, n=name: seen(n, args[0]))
    ids = LLM(POCKET, kv_cache_tokens=512, num_threads=1).tokenizer.encode(TEXT).ids  # type: ignore[union-attr]
    for start in range(0, len(ids), smooth.WINDOW):
        model(torch.tensor([ids[start : start + smooth.WINDOW]]))
    factors = load_file(cached(calibrated))
    assert factors.keys() == modules.keys()
    for name, own in modules.items():
        weight = torch.cat([model.get_submodule(part).weight for part in own]).abs().amax(0)
        torch.testing.assert_close(factors[name], (largest[name] / weight) ** 0.5, atol=0, rtol=1e-3)


def with_outliers(folder: Path) -> Path:
    """The bundled model with channels of its norms 64 times as large, and the weights after them as much smaller: the
    same function exactly, as powers of two change no mantissa.
    """
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(POCKET / name, folder / name)
    tensors = load_file(POCKET / "model.safetensors")
    channels = torch.tensor([5, 99, 300])
    for i in range(3):
        layer = f"model.layers.{i}"
        after = {"input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]}
        after["post_attention_layernorm"] = ["mlp.gate_proj", "mlp.up_proj"]
        for norm, parts in after.items():
            tensors[f"{layer}.{norm}.weight"][channels] *= 64
            for part in parts:
                tensors[f"{layer}.{part}.weight"][:, channels] /= 64
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_outliers_cost_less_with_smoothing(text_file: Path, tmp_path: Path) -> None:
    names = ["bf16", "w8a8-int8-row", "w8a8-fp8-row", *SMOOTH]
    llm = make(with_outliers(tmp_path), text_file, tmp_path, *names)
    plain = make(POCKET, text_file, tmp_path, "bf16")
    ids = torch.randint(4000, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    bf16 = logits(plain, "bf16", ids)
    torch.testing.assert_close(logits(llm, "bf16", ids), bf16, atol=1e-4, rtol=0)
    error = {n: float((logits(llm, n, ids) - bf16).abs().mean()) for n in names[1:]}
    assert error["w8a8-int8-row-smooth"] < 0.5 * error["w8a8-int8-row"]
    assert error["w8a8-fp8-row-smooth"] < 1.1 * error["w8a8-fp8-row"]  # relative steps: outliers hurt FP8 little


def test_alpha_moves_the_burden(text_file: Path, tmp_path: Path) -> None:
    """0 leaves activations as large as they are beside the weights' factor, 1 makes every channel reach 1."""
    layers = {}
    for alpha in (0.0, 1.0):
        llm = make(POCKET, text_file, tmp_path / str(alpha), SMOOTH[0], smooth_alpha=alpha)
        layers[alpha] = load_file(cached(tmp_path / str(alpha)))["layers.1.gate_up_proj"]
        linear = llm.engine.runner.variants[SMOOTH[0]].model.layers[1].gate_up
        assert isinstance(linear, W8A8Linear) and linear.pre_scale is not None
        assert torch.equal(linear.pre_scale, 1 / layers[alpha])
    tensors = load_file(POCKET / "model.safetensors")
    weight = torch.cat([tensors[f"model.layers.1.mlp.{n}_proj.weight"] for n in ("gate", "up")]).float().abs().amax(0)
    torch.testing.assert_close(layers[0.0], 1 / weight, atol=0, rtol=1e-5)


# The cache


def started_with(caplog: pytest.LogCaptureFixture, *args: Any, **options: Any) -> tuple[bytes, list[str]]:
    """Start; the variant's fingerprint, and what was logged."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="octavo.engine"):
        llm = make(*args, **options)
    return llm.engine.runner.variants[SMOOTH[0]].fingerprint, [r.getMessage() for r in caplog.records]


def test_the_cache_is_hit_by_the_same_and_missed_by_anything_else(
    text_file: Path, calibrated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(calibrated, tmp_path, dirs_exist_ok=True)
    first, said = started_with(caplog, POCKET, text_file, tmp_path, SMOOTH[0])
    assert said == [f"SmoothQuant factors from {cached(tmp_path)}"]
    other = tmp_path / "other.txt"
    other.write_text(TEXT[:700], encoding="utf-8")
    fingerprints = {first}
    for text, options in ((text_file, {"smooth_alpha": 0.6}), (other, {}), (text_file, {"dtype": "bfloat16"})):
        fingerprint, said = started_with(caplog, POCKET, text, tmp_path, SMOOTH[0], **options)
        assert said[0].startswith("calibrating SmoothQuant: ") and said[-1].startswith("calibrated SmoothQuant in ")
        fingerprints.add(fingerprint)
    assert len(fingerprints) == len(list((tmp_path / "smooth").iterdir())) == 4
    again, said = started_with(caplog, POCKET, text_file, tmp_path, SMOOTH[0])
    assert again == first and len(said) == 1


def test_a_cache_that_is_broken_or_does_not_match_is_named_and_made_anew(
    text_file: Path, calibrated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(calibrated, tmp_path, dirs_exist_ok=True)
    file, name = cached(tmp_path), "layers.0.o_proj"
    whole, factors = file.read_bytes(), load(file.read_bytes())
    metadata = {"fingerprint": file.stem}
    damages: list[tuple[str, Any]] = [
        ("cannot be read", lambda: file.write_bytes(whole[:-100])),
        ("cannot be read", lambda: file.write_bytes(b"{}")),
        ("does not match", lambda: save_file(factors, file)),
        ("does not match", lambda: save_file(factors, file, {"fingerprint": "0" * 64})),
        ("does not match", lambda: save_file({**factors, name: torch.ones(3)}, file, metadata)),
        ("does not match", lambda: save_file({**factors, name: factors[name] * torch.nan}, file, metadata)),
        ("does not match", lambda: save_file({**factors, name: factors[name].half()}, file, metadata)),
        ("does not match", lambda: save_file({k: v for k, v in factors.items() if k != name}, file, metadata)),
    ]
    for words, damage in damages:
        damage()
        _, said = started_with(caplog, POCKET, text_file, tmp_path, SMOOTH[0])
        assert str(file) in said[0] and words in said[0] and "made anew" in said[0]
        assert said[1].startswith("calibrating")
        torch.testing.assert_close(load_file(file), factors, atol=0, rtol=1e-5)


def test_a_cache_that_cannot_be_written_costs_only_time(
    text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    _, said = started_with(caplog, POCKET, text_file, tmp_path / "file", SMOOTH[0])
    assert "cannot be kept in" in said[-1] and str(tmp_path / "file") in said[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_random_weights_are_not_calibrated(tmp_path: Path) -> None:
    llm = make(POCKET, Path("/no/such/file"), tmp_path, SMOOTH[0], load_format="dummy")
    linear = llm.engine.runner.variants[SMOOTH[0]].model.layers[1].down
    assert isinstance(linear, W8A8Linear) and linear.pre_scale is not None
    assert torch.equal(linear.pre_scale, torch.ones(512)) and not list(tmp_path.iterdir())


# Bad input


@pytest.mark.parametrize("alpha", [-0.1, 1.01, float("nan"), float("inf")])
def test_alpha_out_of_range_is_refused(text_file: Path, tmp_path: Path, alpha: float) -> None:
    with pytest.raises(ModelError, match=r"smooth_alpha must be from 0 .* to 1 "):
        make(POCKET, text_file, tmp_path, SMOOTH[0], smooth_alpha=alpha)


def test_a_text_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"calibration_file: cannot read .*missing\.txt"):
        make(POCKET, tmp_path / "missing.txt", tmp_path, SMOOTH[0])
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"calibration_file: cannot read .*utf-8"):
        make(POCKET, text, tmp_path, SMOOTH[0])
    text.write_text("")
    with pytest.raises(ModelError, match=r"calibration_file: .*text\.txt holds no text"):
        make(POCKET, text, tmp_path, SMOOTH[0])
    monkeypatch.setattr(smooth, "BUNDLED_TEXT", tmp_path / "nothing")
    with pytest.raises(ModelError, match="name one with calibration_file"):
        LLM(POCKET, variants=SMOOTH[:1], cache_dir=str(tmp_path))
    text.write_text("Some words.")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(POCKET / name, tmp_path / name)
    with pytest.raises(ModelError, match="needs the model's tokenizer"):
        make(tmp_path, text, tmp_path, SMOOTH[0])
