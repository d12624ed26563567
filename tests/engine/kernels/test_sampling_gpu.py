"""Drawing and ranking on a GPU at Qwen's vocabulary, against the twins; no launch waits for the device."""

from __future__ import annotations

import pytest
import torch

from engine import kernels
from engine.kernels import columns, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels need one"),
]
VOCAB, NUM_IDS = 151936, 151669


def some(values: list[float], rows: int) -> torch.Tensor:
    return torch.tensor(values, device="cuda")[torch.randint(len(values), (rows,), device="cuda")]


def sampling_case(rows: int, spread: float, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Logits, rows, positions, tables, with every mix of parameters."""
    logits = (torch.randn(rows, VOCAB, device="cuda") * spread).to(dtype)
    logits[3, 2000:] = -torch.inf
    logits[5] = 1.0  # all tie
    at = torch.randperm(rows + 3, device="cuda")[:rows].int()
    floats = torch.zeros(rows + 3, columns.NUM_FLOATS, device="cuda")
    ints = torch.randint(-(2**31), 2**31, (rows + 3, columns.NUM_INTS), device="cuda").int()
    floats[:, columns.TEMPERATURE] = some([0.6, 1.0, 0.3, 2.0, 0.01, 0.0], rows + 3)
    floats[:, columns.TOP_P] = some([0.05, 0.5, 0.9, 0.95, 0.999, 1.0], rows + 3)
    floats[:, columns.MIN_P] = some([0.0, 0.0, 0.0, 0.1], rows + 3)
    ints[:, columns.TOP_K] = some([0, 0, 1, 5, 20, 64], rows + 3)
    ints[:, columns.NUM_LOGPROBS] = some([-1, 0, 1, 5, 20], rows + 3)
    return logits, at, torch.arange(rows, device="cuda").int(), floats, ints


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [0.9, 6.0])  # a nucleus of most ids; one of a few
@pytest.mark.parametrize("filtered", ["no", "yes", "wide"])  # wide: a top-k beyond what the kernels rank
@pytest.mark.parametrize("top", [-1, 20])
def test_draw(dtype: torch.dtype, spread: float, filtered: str, top: int) -> None:
    """The twin's ids. Sums and logs round differently: a row may differ whose id lies on the edge of what is kept, or
    of which two scores nearly tie.
    """
    torch.manual_seed(0)
    rows, width, nucleus = 200, 64, True
    logits, at, positions, floats, ints = sampling_case(rows, spread, dtype)
    if filtered == "no":
        floats[:, columns.TOP_P], floats[:, columns.MIN_P], ints[:, columns.TOP_K] = 1, 0, 0
        width, nucleus = 0, False
    elif filtered == "wide":
        ints[::3, columns.TOP_K] = width = 500
    tables = torch.zeros(2, rows + 3, 300, dtype=torch.int32, device="cuda")
    args = (NUM_IDS, width, nucleus, top)
    torch.use_deterministic_algorithms(filtered != "wide")  # memory that was not written holds NaN
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = kernels.draw(logits, at, positions, floats, ints, tables[0], *args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    assert torch.equal(tables[0][at.long(), positions.long()], got[:, 0])
    assert int((tables[0] != 0).sum()) <= rows
    # in parts: whole, the twin and what follows take gigabytes
    same = [
        as_the_twin(logits[i], at[i], positions[i], floats, ints, tables[1], got[i], args)
        for i in (slice(first, first + 40) for first in range(0, rows, 40))
    ]
    assert sum(same) >= 0.97 * rows, same


def as_the_twin(
    logits: torch.Tensor,
    at: torch.Tensor,
    positions: torch.Tensor,
    floats: torch.Tensor,
    ints: torch.Tensor,
    table: torch.Tensor,
    got: torch.Tensor,
    args: tuple[int, int, bool, int],
) -> int:
    """Asserts what must hold of every row; how many ids are the twin's."""
    want, top = reference.draw(logits, at, positions, floats, ints, table, *args), args[3]
    tokens, where = got[:, 0].long(), at.long()
    t, p, k = floats[where, columns.TEMPERATURE], floats[where, columns.TOP_P], ints[where, columns.TOP_K]
    known = logits[:, :NUM_IDS].double()
    chosen = known.gather(1, tokens[:, None])
    mass = (known / t.clamp(min=1e-5).double()[:, None]).softmax(-1)
    above = torch.where(known > chosen, mass, 0).sum(-1)
    checked = (t > 0) & (p < 1) & (k <= 0)
    assert (above[checked] < p[checked] + 1e-5).all()
    ranked = (t > 0) & (k > 0)
    assert ((known > chosen).sum(-1) < k)[ranked].all()
    assert (chosen[:, 0] == known.max(-1).values)[t == 0].all()
    same = int((got[:, 0] == want[:, 0]).sum())
    if top < 0:
        return same
    (ids, values), (best, _) = got.chunk(2, dim=1), want.chunk(2, dim=1)
    expected = logits.float().log_softmax(-1)
    for row, wanted in enumerate(ints[where, columns.NUM_LOGPROBS].tolist()):
        shown = ids[row, : 1 + wanted].long()
        logprobs = values[row, : 1 + wanted].view(torch.float32)
        torch.testing.assert_close(logprobs, expected[row, shown], atol=2e-4, rtol=1e-5)
        assert torch.equal(logits[row, shown[1:]], logits[row, best[row, 1 : 1 + wanted].long()])
        assert len(set(shown[1:].tolist())) == max(wanted, 0)
    return same


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
