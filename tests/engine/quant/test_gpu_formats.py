"""Smoothed formats and quantised heads on a GPU: what a CPU calibrates, multiplies and answers."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import LLM, SamplingParams
from engine.quant.linear import Linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
POCKET = Path(__file__).resolve().parents[3] / "models" / "pocket"
VARIANTS = ["w8a8-int8-row-smooth", "w8a8-fp8-row-smooth", "int8-row", "fp8-g128", "w8a8-int8-row"]
TOKEN_TOLERANCE = 0.15  # as in test_variants


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LLM]:
    """The same variants on both, the head in their formats too, each with factors of its own in `cache_dir`."""
    folder = tmp_path_factory.mktemp("gpu-formats")
    text = folder / "text.txt"
    text.write_text((POCKET / "prose.txt").read_text(encoding="utf-8")[:1500], encoding="utf-8")
    made = {}
    for device in ("cpu", "cuda"):
        settings = {"calibration_file": str(text), "cache_dir": str(folder / device), "keep_bf16": ()}
        made[device] = LLM(
            POCKET, variants=VARIANTS, device=device, dtype="float32", kv_cache_tokens=4096, max_num_seqs=16, **settings
        )
    return made


def on_gpu(linear: Linear) -> Linear:
    tensors = {f.name: getattr(linear, f.name) for f in fields(linear)}
    return replace(linear, **{name: t.cuda() for name, t in tensors.items() if isinstance(t, torch.Tensor)})


def test_both_calibrate_alike(llms: dict[str, LLM]) -> None:
    found = []
    for llm in llms.values():
        (file,) = (Path(llm.engine.config.cache_dir) / "smooth").iterdir()
        found.append(load_file(file))
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=1e-2)


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("variant", VARIANTS)
def test_products_agree(llms: dict[str, LLM], variant: str, rows: int) -> None:
    model = llms["cpu"].engine.runner.variants[variant].model
    layer = model.layers[1]
    for linear in (layer.qkv, layer.out, layer.gate_up, layer.down, model.head):
        x = torch.randn(rows, linear.tensors[0].shape[1], generator=torch.Generator().manual_seed(rows))
        torch.testing.assert_close(on_gpu(linear)(x.cuda()).cpu(), linear(x), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_agree(llms: dict[str, LLM], variant: str) -> None:
    """Logprobs of a prompt; and decode, through CUDA graphs, runs to its end."""
    ids = torch.randint(4000, (24,), generator=torch.Generator().manual_seed(3)).tolist()
    params = SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=0, ignore_eos=True)
    outputs = [llm.generate([ids], params, variant=variant, use_tqdm=False)[0] for llm in llms.values()]
    values = [torch.tensor([p.values[0] for p in out["prompt_logprobs"][1:]]) for out in outputs]
    assert (values[0] - values[1]).abs().mean() < TOKEN_TOLERANCE
    assert all(len(out["token_ids"]) == 12 for out in outputs)
