"""On a GPU in bf16, the kernels stray from the plain path no further than that path strays from itself.

The plain path is the twins, run on the same GPU: the same products by another number of rows are other sums, rounded
elsewhere, so its own logprobs differ between a batch of 1 and a batch of 32. Twice that is the bound. Four layers of
Qwen3-1.7B's shape, with random weights: the library multiplies smaller matrices alike at any number of rows.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine import LLM, SamplingParams
from engine.runner import Runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 8000,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
VARIANTS = ["bf16", "int8-row", "fp8-row", "int8-g128", "w8a8-int8-row", "w8a8-fp8-row", "bf16+kv8"]
PROMPTS = torch.randint(8000, (32, 40), generator=torch.Generator().manual_seed(0)).tolist()
NAMED = list(range(5, 8000, 400))


def logprobs(llm: LLM, variant: str, batch: int) -> torch.Tensor:
    """[prompts, tokens, ids]: the first token from a prefill, the others from decode, the same tokens in every run."""
    params = SamplingParams(
        temperature=0, max_tokens=6, ignore_eos=True, detokenize=False, logit_bias={11: 100}, logprob_token_ids=NAMED
    )
    outputs = []
    for first in range(0, len(PROMPTS), batch):
        outputs += llm.generate(PROMPTS[first : first + batch], params, variant=variant, use_tqdm=False)
    return torch.tensor([[p.values[1:] for p in out["logprobs"]] for out in outputs])


def both_batches(folder: Path, variant: str, *, cuda_graphs: bool) -> dict[int, torch.Tensor]:
    options = {"kv_cache_tokens": 1 << 13, "max_num_seqs": 32, "enable_prefix_caching": False}
    llm = LLM(
        folder, [variant], device="cuda", dtype="bfloat16", load_format="dummy", cuda_graphs=cuda_graphs, **options
    )
    return {batch: logprobs(llm, variant, batch) for batch in (1, 32)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_stray_no_further_than_twice_the_plain_path_from_itself(variant: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    fast = both_batches(tmp_path, variant, cuda_graphs=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", False)  # the door then takes the twins
        patch.setattr(Runner, "warm_up", lambda self, variant, num_rows: None)
        plain = both_batches(tmp_path, variant, cuda_graphs=False)
    own = (plain[1] - plain[32]).abs()
    strays = [(fast[batch] - plain[batch]).abs() for batch in (1, 32)]
    print(f"{variant}: own {own.mean():.5f} {own.max():.4f}", *(f"{s.mean():.5f} {s.max():.4f}" for s in strays))
    assert max(float(s.mean()) for s in strays) <= 2 * float(own.mean())
    assert max(float(s.max()) for s in strays) <= 2 * float(own.max())
