"""Drawing and ranking on a GPU at Qwen's vocabulary, against the twins; no launch waits for the device."""

from __future__ import annotations

import pytest
import torch

from engine import kernels
from engine.kernels import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels need one"),
]
VOCAB, NUM_IDS = 151936, 151669


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [0.9, 6.0])  # a nucleus of most ids; one of a few
@pytest.mark.parametrize("filtered", [False, True])
def test_draws_from_the_nucleus(dtype: torch.dtype, spread: float, filtered: bool) -> None:
    """The twin's ids. Sums and logs round differently: a row may differ whose id lies on the edge of the nucleus."""
    torch.manual_seed(0)
    rows = 96
    logits = (torch.randn(rows, VOCAB, device="cuda") * spread).to(dtype)
    top_p = torch.tensor([0.05, 0.5, 0.9, 0.95, 0.999, 1.0], device="cuda").repeat(rows // 6)
    temperature = torch.tensor([0.6, 1.0, 0.3, 2.0], device="cuda").repeat_interleave(rows // 4)
    temperature[::13] = 0
    thresholds = logits.float().topk(500).values[:, -1].contiguous() if filtered else None
    seeds = torch.randint(-(2**31), 2**31, (2, rows), dtype=torch.int32, device="cuda")
    positions = torch.arange(rows, dtype=torch.int32, device="cuda")
    args = (logits, temperature, thresholds, top_p, *seeds, positions, NUM_IDS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = kernels.draw(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same = got == reference.draw(*args)
    assert same.float().mean() >= 0.97, same
    known = logits[:, :NUM_IDS].double()
    mass = (known / temperature.clamp(min=1e-5).double()[:, None]).softmax(-1)
    chosen = known.gather(1, got[:, None])
    above = torch.where(known > chosen, mass, 0).sum(-1)
    checked = (temperature > 0) & (top_p < 1)
    assert (above[checked] < top_p[checked] + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [0, 1, 5, 20, 64, 100])
def test_survey(dtype: torch.dtype, k: int) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(33, VOCAB, device="cuda") * 3).to(dtype)
    logits[:, NUM_IDS:] = 50
    logits[3, 20:] = -torch.inf
    torch.cuda.set_sync_debug_mode("error")
    try:
        log_sums, values, ids = kernels.survey(logits, k, NUM_IDS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(log_sums, logits.float().logsumexp(-1), atol=1e-4, rtol=1e-5)
    assert torch.equal(values, logits[:, :NUM_IDS].float().topk(k).values)
    assert torch.equal(logits.float().gather(1, ids), values)
